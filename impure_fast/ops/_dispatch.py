"""Which backend runs an operator: the wish (call, context, process, environment), or the best that can.

Nothing else in the package asks what hardware there is.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from contextvars import ContextVar
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError
from . import _native
from ._lib import OPERATORS, Operator
from ._native import constant_when_traced

BACKENDS = ("auto", "reference", "cpp", "triton", "cuda")
VARIABLE = "IMPURE_FAST_BACKEND"
# What "auto" tries, best first; interpreted Triton is for tests and never chosen.
PREFERENCE = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}

_log = logging.getLogger("impure_fast")
_context: ContextVar[str | None] = ContextVar("impure_fast_backend", default=None)
_process: list[str | None] = [None]
_last: dict[str, str] = {}
_told: set[tuple[str, tuple[str, ...]]] = set()


def _known(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise BackendError(f"{source}: there is no backend {name!r}; choose one of {', '.join(BACKENDS)}.")
    return name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the block, run every operator that has it on this backend: auto, reference, cpp, triton or cuda."""
    token = _context.set(_known(name, f"backend({name!r})"))
    try:
        yield
    finally:
        _context.reset(token)


def set_backend(name: str | None) -> None:
    """The same for the whole process; None goes back to IMPURE_FAST_BACKEND, or "auto"."""
    _process[0] = None if name is None else _known(name, f"set_backend({name!r})")


@constant_when_traced
def wished() -> str:
    """The backend asked for, in the order: context, process, environment, "auto"."""
    name = _context.get() or _process[0]
    return name or _known(os.environ.get(VARIABLE) or "auto", VARIABLE)


def last_backends() -> dict[str, str]:
    """{operator: backend that ran it last} in this process."""
    return dict(_last)


def can_run(operator: str, backend: str, *args: Any) -> list[str]:
    """Why ``backend`` cannot run ``operator``, one sentence a reason; empty if it can.

    args: the operator's arguments; without them only this machine and this installation are asked.
    """
    if operator not in OPERATORS:
        raise BackendError(f"There is no operator {operator!r}; choose one of {', '.join(sorted(OPERATORS))}.")
    return _reasons(OPERATORS[operator], _known(backend, "can_run"), *args)


def _reasons(op: Operator, backend: str, *args: Any) -> list[str]:
    if backend in ("auto", "reference"):
        return []
    if backend not in op.dtypes:
        return [f"There is no {backend} implementation of it."]
    if reason := _machine(backend):
        return [reason]
    if not args:
        return []
    x, device = args[0], "cpu" if backend == "cpp" or (backend == "triton" and _interpreted()) else "cuda"
    reasons = []
    if x.device.type != device:
        reasons.append(f"It takes tensors on {device}; these are on {x.device}.")
    if x.dtype not in op.dtypes[backend]:
        reasons.append(f"It takes {', '.join(map(_short, op.dtypes[backend]))}, not {_short(x.dtype)}.")
    return reasons + op.limits(backend, *args)


@constant_when_traced  # apart from the cache, about which torch.compile would warn
def _machine(backend: str) -> str:
    """Why nothing at all runs on ``backend`` here, or ""."""
    return _probe(backend)


@functools.cache
def _probe(backend: str) -> str:
    if backend == "cpp":
        return _native.why_not("cpu")
    if backend == "triton":
        try:
            import_module("triton")
        except ImportError as error:
            return f"Triton cannot be imported ({error}); it comes with torch on Linux."
        if not torch.cuda.is_available() and not _interpreted():
            return "There is no CUDA device; on a CPU Triton runs only under TRITON_INTERPRET=1."
        return ""
    if not torch.cuda.is_available():
        return "There is no CUDA device."
    return _native.why_not("cuda")


@constant_when_traced
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _choose(op: Operator, strict: str | None, *args: Any) -> str:
    wish = wished() if strict is None else _known(strict, f"{op.name}(backend={strict!r})")
    if wish == "auto" or (strict is None and wish not in op.backends):
        missed: list[str] = []
        for candidate in PREFERENCE.get(args[0].device.type, ()):
            if candidate in op.dtypes:
                reasons = _reasons(op, candidate, *args)
                if not reasons:
                    _say_once(op.name, candidate, tuple(missed))
                    return candidate
                missed.append(f"{candidate}: {' '.join(reasons)}")
        _say_once(op.name, "reference", tuple(missed))
        return "reference"
    if reasons := _reasons(op, wish, *args):
        shapes = ", ".join(f"{_short(a.dtype)}{list(a.shape)} on {a.device}" for a in args if isinstance(a, Tensor))
        raise BackendError(
            f"{op.name} cannot run on the backend {wish!r}: {' '.join(reasons)} Given: {shapes}. "
            "The backend 'auto' takes the best that can."
        )
    return wish


@constant_when_traced
def _say_once(operator: str, chosen: str, missed: tuple[str, ...]) -> None:
    if missed and (operator, missed) not in _told:
        _told.add((operator, missed))
        _log.warning("%s runs on %s. %s", operator, chosen, " ".join(missed))


def run(op: Operator, strict: str | None, *args: Any) -> Any:
    """Run ``op`` on the chosen backend.  strict: a backend demanded by the caller, or None for the wish."""
    chosen = _choose(op, strict, *args)
    _last[op.name] = chosen
    return op.reference(*args) if chosen == "reference" else op.overloads[chosen](*args)
