"""Put shuffled patch pixels back into an image: unshuffle, unpatchify, 3x3 convolution, un-normalise, clamp, round.

Values of a patch are ordered (row, column, channel), channel fastest (SPEC 2.9).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from . import _dispatch, _lib
from .patch_mask import per_channel


def patch_assemble(
    patches: Tensor,
    order: Tensor,
    rows: int,
    cols: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    clamp: bool = False,
    to_uint8: bool = False,
    backend: str | None = None,
) -> Tensor:
    """patches: [N, L, p*p*3] in shuffled order; order: [N, L] int64, raster place of each -> [N, 3, rows*p, cols*p].

    weight [3, 3, 3, 3] and bias [3]: a convolution over the assembled image, zero padding; cast to the patches' dtype;
        None leaves it out.
    mean, std: three numbers, un-normalise; None leaves the network's units.
    clamp: cut to [0, 1]; to_uint8: cut, times 255, round half to even; not differentiable.
    Differentiable in patches, weight and bias.  Raises InputError, InputTypeError or BackendError.
    """
    if weight is not None and bias is not None:
        weight, bias = weight.to(patches.dtype), bias.to(patches.dtype)
    _lib.check_alike("patch_assemble", False, patches=patches, order=order, weight=weight, bias=bias)
    if patches.ndim != 3 or patches.shape[1] != rows * cols or order.shape != patches.shape[:2]:
        raise InputError(
            f"patches {list(patches.shape)}, order {list(order.shape)}, grid {rows}x{cols}: wanted [N, L, p*p*3], "
            "[N, L] and a grid of L."
        )
    if 3 * round((patches.shape[2] / 3) ** 0.5) ** 2 != patches.shape[2]:
        raise InputError(f"patches {list(patches.shape)}: wanted rows of p*p*3 values, p the side of a patch.")
    for name, given, wanted in (("weight", weight, (3, 3, 3, 3)), ("bias", bias, (3,))):
        if given is not None and given.shape != wanted:
            raise InputError(f"{name} is {list(given.shape)}; wanted {list(wanted)}.")
    if (weight is None) != (bias is None) or (mean is None) != (std is None):
        raise InputError("weight and bias, and mean and std, belong together: give both or neither.")
    options = (rows, cols, weight, bias, mean and list(mean), std and list(std), clamp, to_uint8)
    return _dispatch.run(SPEC, backend, patches, order, *options)


def unpatchify(patches: Tensor, rows: int, cols: int) -> Tensor:
    """patches: [N, rows*cols, p*p*C] in raster order, C = 3 -> [N, C, rows*p, cols*p]."""
    n, _, values = patches.shape
    p = round((values / 3) ** 0.5)
    return patches.view(n, rows, cols, p, p, 3).permute(0, 5, 1, 3, 2, 4).reshape(n, 3, rows * p, cols * p)


def patchify(images: Tensor, patch: int) -> Tensor:
    """The inverse: [N, C, H, W] -> [N, L, p*p*C] in raster order."""
    n, c, height, width = images.shape
    grid = images.view(n, c, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, patch * patch * c)


def unshuffle(patches: Tensor, order: Tensor) -> Tensor:
    """[N, L, W] in shuffled order -> the same rows in raster order."""
    return torch.empty_like(patches).scatter(1, order[:, :, None].expand_as(patches), patches)


def reference(
    patches: Tensor,
    order: Tensor,
    rows: int,
    cols: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: list[float] | None,
    std: list[float] | None,
    clamp: bool,
    to_uint8: bool,
) -> Tensor:
    image = unpatchify(unshuffle(patches, order), rows, cols)
    if weight is not None:
        image = F.conv2d(image, weight, bias, padding=1)
    if mean is not None and std is not None:
        image = image * per_channel(std, image) + per_channel(mean, image)
    if clamp or to_uint8:
        image = image.clamp(0, 1)
    return (image.float() * 255).round().to(torch.uint8) if to_uint8 else image


def _fake(patches: Tensor, order: Tensor, rows: int, cols: int, *options: Any) -> Tensor:
    p = round((patches.shape[2] / 3) ** 0.5)
    dtype = torch.uint8 if options[-1] else patches.dtype
    return patches.new_empty((patches.shape[0], 3, rows * p, cols * p), dtype=dtype)


def _fake_backward(
    grad: Tensor, patches: Tensor, order: Tensor, rows: int, cols: int, weight: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    none = weight is None
    kernel, bias = patches.new_empty((0,) if none else (3, 3, 3, 3)), patches.new_empty((0,) if none else (3,))
    return patches.new_empty(patches.shape), kernel, bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    patches, order, rows, cols, weight, bias, *options, to_uint8 = inputs
    ctx.save_for_backward(patches, order, weight, bias)
    ctx.options = (rows, cols, *options)
    if to_uint8:
        ctx.mark_non_differentiable(output)


def _backward(run: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    patches, order, weight, bias = ctx.saved_tensors
    rows, cols, *options = ctx.options
    d_patches, d_weight, d_bias = run(grad.contiguous(), patches, order, rows, cols, weight, bias, *options)
    kernel = (None, None) if weight is None else (d_weight, d_bias)
    return d_patches, None, None, None, *kernel, None, None, None, None


SPEC = _lib.declare(
    "patch_assemble",
    "(Tensor patches, Tensor order, int rows, int cols, Tensor? weight, Tensor? bias, float[]? mean, float[]? std,"
    " bool clamp, bool to_uint8) -> Tensor",
    reference=reference,
    fake=_fake,
    dtypes={"triton": (torch.float32, *_lib.HALVES)},
    kernel="patch_assemble",
    gradient=_lib.Gradient(
        "(Tensor grad, Tensor patches, Tensor order, int rows, int cols, Tensor? weight, Tensor? bias, float[]? mean,"
        " float[]? std, bool clamp) -> (Tensor, Tensor, Tensor)",
        fake=_fake_backward,
        save=_save,
        backward=_backward,
    ),
)
