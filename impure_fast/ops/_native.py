"""The compiled parts, loaded on first use; what a build report or the loader says where they cannot be."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch

PACKAGE = Path(__file__).parent.parent
F = TypeVar("F", bound=Callable[..., Any])


def constant_when_traced(function: F) -> F:
    """torch.compiler.assume_constant_result, whose import costs a second: a compiled graph keeps what was so when
    it was traced."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


def build_report() -> dict[str, Any] | None:
    """What setup.py wrote: mode, built, not_built {part: reason}; None in a tree that was never built."""
    path = PACKAGE / "_build.json"
    return json.loads(path.read_text()) if path.exists() else None


@functools.cache
@constant_when_traced
def why_not(part: str) -> str:
    """Load the library of a part, "cpu" or "cuda"; why it cannot be, in a sentence, or ""."""
    library = PACKAGE / f"_{part}.abi3.so"
    if not library.exists():
        report = build_report()
        if report is None:
            return f"The compiled {part} part is not built: install the package, or run setup.py build_ext --inplace."
        return f"The compiled {part} part is not built. {report['not_built'].get(part, '')}".rstrip()
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name} cannot be loaded into torch {torch.__version__}: {error}."
    return ""


def introspect() -> dict[str, Any]:
    """What the compiled parts say of themselves: {"compiler", "cpu_isa", "cuda_kernels"}; empty without _info."""
    try:
        info = import_module("impure_fast._info")
    except ImportError:
        return {}
    found: dict[str, Any] = {"compiler": info.compiler()}
    if not why_not("cpu"):
        found["cpu_isa"] = info.cpu_isa(str(PACKAGE / "_cpu.abi3.so"))
    if torch.cuda.is_available() and not why_not("cuda"):
        found["cuda_kernels"] = info.cuda_kernels(str(PACKAGE / "_cuda.abi3.so"))
    return found
