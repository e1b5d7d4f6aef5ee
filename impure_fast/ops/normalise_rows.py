"""Layer norm along rows, straight to the type that the next product takes: floats, or 8-bit integers.

    y = (x - mean) / sqrt(variance + eps) * weight + bias,   integers: clip(round(y / scale) + zero, 0, 255)

Moves each element once in and once out; for inference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, InputTypeError
from . import _dispatch, _lib

OUT = (torch.float32, torch.bfloat16, torch.uint8)


def normalise_rows(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
    *,
    scale: float = 1.0,
    zero: int = 0,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """x: [..., W] float -> the same shape in ``dtype`` (float32, bfloat16 or uint8; default x's).

    weight, bias: float32 [W]; without them y = x, which leaves the conversion.
    scale, zero: of uint8 results; halves round to even or up, as the backend has it.
    Not differentiable.  Raises InputError, InputTypeError or BackendError.
    """
    dtype = x.dtype if dtype is None else dtype
    if not x.is_floating_point() or dtype not in (*OUT, x.dtype):
        raise InputTypeError(f"x is {x.dtype}, dtype {dtype}; wanted floats to float32, bfloat16, uint8 or x's own.")
    if (weight is None) != (bias is None):
        raise InputError("weight and bias belong together: give both or neither.")
    for name, given in (("weight", weight), ("bias", bias)):
        if given is not None and (given.shape != x.shape[-1:] or given.dtype != torch.float32):
            raise InputError(
                f"{name} is {given.dtype} {list(given.shape)}, x {list(x.shape)}: wanted float32 [{x.shape[-1]}]."
            )
    if scale <= 0 or not 0 <= zero <= 255:
        raise InputError(f"scale={scale}, zero={zero}: wanted a positive scale and a zero in 0..255.")
    _lib.check_alike("normalise_rows", False, x=x, weight=weight, bias=bias)
    weight, bias = (None if given is None else given.contiguous() for given in (weight, bias))
    return _dispatch.run(SPEC, backend, x.detach().contiguous(), weight, bias, eps, scale, zero, dtype)


def reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, scale: float, zero: int, dtype: torch.dtype
) -> Tensor:
    y = x if dtype == x.dtype else x.float()
    if weight is not None and bias is not None:
        y = F.layer_norm(y, y.shape[-1:], weight.to(y.dtype), bias.to(y.dtype), eps)
    return (y / scale + zero).round().clamp(0, 255).to(dtype) if dtype == torch.uint8 else y.to(dtype)


def _fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, scale: float, zero: int, dtype: torch.dtype
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


SPEC = _lib.declare(
    "normalise_rows",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, float scale, int zero, ScalarType dtype) -> Tensor",
    reference=reference,
    fake=_fake,
    dtypes={"cpp": (torch.float32, torch.bfloat16)},
    kernel="",
)
