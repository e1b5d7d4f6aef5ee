"""The permutation of an image's patches from uniforms: stable ranks by counting, no sort kernel (SPEC 2.5)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError, InputTypeError
from . import _dispatch, _lib


def order(uniforms: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """uniforms: [N, L] float32 -> (order, restore), both int64 [N, L].

    order is the stable ascending argsort (raster place of each shuffled token), restore its inverse.  Not
    differentiable.  Raises InputError, InputTypeError or BackendError.
    """
    if uniforms.ndim != 2:
        raise InputError(f"uniforms has shape {list(uniforms.shape)}; wanted [N, L].")
    if uniforms.dtype != torch.float32:
        raise InputTypeError(f"uniforms has dtype {uniforms.dtype}; wanted torch.float32.")
    return _dispatch.run(SPEC, backend, uniforms.detach())


def reference(uniforms: Tensor) -> tuple[Tensor, Tensor]:
    places = uniforms.argsort(dim=1, stable=True)
    return places, places.argsort(dim=1)


def _fake(uniforms: Tensor) -> tuple[Tensor, Tensor]:
    return uniforms.new_empty(uniforms.shape, dtype=torch.int64), uniforms.new_empty(uniforms.shape, dtype=torch.int64)


SPEC = _lib.declare(
    "order",
    "(Tensor uniforms) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    dtypes={"triton": (torch.float32,)},
    kernel="order",
)
