"""Registration with torch: one overload a backend, so that a graph, an export and a test can name the one that ran.

Schemas, fake kernels and autograd are Python; compiled libraries and Triton files only add implementations.
The reference is no torch operator but plain PyTorch, with PyTorch's own autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, InputTypeError

LIBRARY = torch.library.Library("impure_fast", "DEF")
HALVES = (torch.bfloat16, torch.float16)

Function = Callable[..., Any]


@dataclass(frozen=True)
class Gradient:
    """Backward of an operator, itself an operator with the same backends.

    arguments: its schema without a name; save(ctx, inputs, output) and backward(run, ctx, *grads) as in
    torch.library.register_autograd, with ``run`` the backward operator of the backend that ran forward.
    """

    arguments: str
    fake: Function
    save: Function
    backward: Function


@dataclass(frozen=True)
class Operator:
    """One operator: its reference, and an overload for each other backend.

    dtypes: {backend: dtypes of the first argument}; limits(backend, *args): further reasons why a backend cannot
    take these arguments, as sentences.
    """

    name: str
    reference: Function
    dtypes: Mapping[str, tuple[torch.dtype, ...]]
    limits: Callable[..., list[str]]
    overloads: dict[str, Function]

    @property
    def backends(self) -> tuple[str, ...]:
        return ("reference", *self.dtypes)


OPERATORS: dict[str, Operator] = {}


def declare(
    name: str,
    arguments: str,
    *,
    reference: Function,
    fake: Function,
    dtypes: Mapping[str, tuple[torch.dtype, ...]],
    kernel: str,
    gradient: Gradient | None = None,
    limits: Callable[..., list[str]] = lambda backend, *args: [],
) -> Operator:
    """Register ``name`` with torch, one overload for each backend of ``dtypes``.

    arguments: schema without the name, "(Tensor x) -> Tensor".
    kernel: file in ``impure_fast.kernels`` whose ``forward`` and ``backward`` are the Triton implementations.
    """
    overloads = {}
    for backend in dtypes:
        _define(f"{name}.{backend}", arguments, fake, kernel, "forward")
        overloads[backend] = getattr(getattr(torch.ops.impure_fast, name), backend)
        if gradient is not None:
            back = f"{name}_backward"
            _define(f"{back}.{backend}", gradient.arguments, gradient.fake, kernel, "backward")
            run = getattr(getattr(torch.ops.impure_fast, back), backend)
            torch.library.register_autograd(
                f"impure_fast::{name}.{backend}",
                _bind(gradient.backward, run),
                setup_context=gradient.save,
                lib=LIBRARY,
            )
    OPERATORS[name] = Operator(name, reference, dtypes, limits, overloads)
    return OPERATORS[name]


def _define(overload: str, arguments: str, fake: Function, kernel: str, function: str) -> None:
    LIBRARY.define(overload + arguments)
    torch.library.register_fake(f"impure_fast::{overload}", fake, lib=LIBRARY)
    if overload.endswith(".triton"):

        def launch(*args: Any) -> Any:
            return getattr(import_module(f"impure_fast.kernels.{kernel}"), function)(*args)

        for key in ("CUDA", "CPU"):  # on the CPU, Triton's interpreter
            LIBRARY.impl(overload, launch, key)


def _bind(backward: Function, run: Function) -> Function:
    return lambda ctx, *grads: backward(run, ctx, *grads)


def check_alike(operator: str, dtype: bool = True, **tensors: Tensor | None) -> None:
    """Raise unless all tensors lie on one device (and have one dtype), naming the two that differ."""
    first, x = next(iter(tensors.items()))
    assert x is not None
    for name, other in tensors.items():
        if other is None:
            continue
        if other.device != x.device:
            raise InputError(f"{operator}: {first} is on {x.device}, but {name} is on {other.device}.")
        if dtype and other.dtype != x.dtype:
            raise InputTypeError(f"{operator}: {first} is {x.dtype}, but {name} is {other.dtype}.")
