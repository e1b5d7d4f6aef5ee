"""Images to the network's shuffled patch rows, clean and noised, in one pass over the pixels (SPEC 2.4 to 2.7).

    x = (image - mean) / std;  noised = signal * x + level * noise;  rows[n, j] = patch order[n, j] of either

Rows feed the patch embedding as one matrix product; values lie as its weight does: (channel, row, column).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, InputTypeError
from ..philox import IMAGE_NOISE, normal
from . import _dispatch, _lib


def patch_mask(
    images: Tensor,
    order: Tensor,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    signal: Tensor | None = None,
    level: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | None = None,
    streams: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Normalise, noise, cut into patches and shuffle.

    images: [N, C, H, W], uint8 or float in [0, 1], any strides; order: [N, L] int64, raster place of each shuffled
    token; mean, std: C numbers.  -> rows [N, L, C*p*p], float32 for uint8, else images' dtype.
    signal, level: [N] float32, the schedule's a and b at each image's step; given, the noised rows follow the clean
        ones, [2N, L, C*p*p].  Their noise is ``noise`` [N, C, H, W], or is made in the kernel: ``seed`` and
        ``streams`` [N] int64, equal to ``Draws.image_noise``.
    Differentiable in float images.  Raises InputError, InputTypeError or BackendError.
    """
    n, c, height, width = _image_shape(images)
    if height % patch or width % patch or tuple(order.shape) != (n, height // patch * (width // patch)):
        raise InputError(f"order {list(order.shape)} and patch={patch} do not fit images {list(images.shape)}.")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise InputTypeError(f"images has dtype {images.dtype}; wanted torch.uint8 or a float type.")
    if len(mean) != c or len(std) != c:
        raise InputError(f"mean and std hold {len(mean)} and {len(std)} numbers; images have {c} channels.")
    if (signal is None) != (level is None):
        raise InputError("signal and level belong together: give both or neither.")
    if signal is not None and (noise is None) == (seed is None or streams is None):
        raise InputError("Noised rows need noise, or seed and streams to make it from; not both.")
    options: dict[str, Tensor | None] = dict(signal=signal, level=level, noise=noise, streams=streams)
    for name, given in options.items():
        wanted = images.shape if name == "noise" else images.shape[:1]
        if given is not None and given.shape != wanted:
            raise InputError(f"{name} is {list(given.shape)}, images {list(images.shape)}: wanted {list(wanted)}.")
    _lib.check_alike("patch_mask", False, images=images, order=order, **options)
    if seed is not None and seed >= 1 << 63:
        seed -= 1 << 64  # the schema's integers are signed
    numbers = (patch, list(mean), list(std))
    return _dispatch.run(SPEC, backend, images, order, *numbers, signal, level, noise, seed, streams)


def _image_shape(images: Tensor) -> tuple[int, int, int, int]:
    if images.ndim != 4:
        raise InputError(f"images has shape {list(images.shape)}; wanted [N, C, H, W].")
    n, c, height, width = images.shape
    return n, c, height, width


def to_rows(images: Tensor, patch: int) -> Tensor:
    """[N, C, H, W] -> [N, L, C*p*p] in raster order, values (channel, row, column)."""
    n, c, height, width = images.shape
    grid = images.reshape(n, c, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(n, (height // patch) * (width // patch), c * patch * patch)


def per_channel(values: list[float] | tuple[float, ...], like: Tensor) -> Tensor:
    """[C, 1, 1], made where ``like`` is: a copy from the host could not be captured in a CUDA graph."""
    return torch.stack([like.new_full((1, 1), value) for value in values])


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x: [N, L, W], index: [N, L] -> x[n, index[n, l]]."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def reference(
    images: Tensor,
    order: Tensor,
    patch: int,
    mean: list[float],
    std: list[float],
    signal: Tensor | None,
    level: Tensor | None,
    noise: Tensor | None,
    seed: int | None,
    streams: Tensor | None,
) -> Tensor:
    x = images.float() / 255 if images.dtype == torch.uint8 else images
    x = (x - per_channel(mean, x)) / per_channel(std, x)
    rows = gather_tokens(to_rows(x, patch), order)
    if signal is None or level is None:
        return rows
    if noise is None:
        assert seed is not None and streams is not None
        noise = normal(seed, streams, IMAGE_NOISE, math.prod(x.shape[1:])).view(x.shape)
    a, b = (t.to(x.dtype).view(-1, 1, 1, 1) for t in (signal, level))
    noised = a * x + b * noise.to(x.dtype)
    return torch.cat((rows, gather_tokens(to_rows(noised, patch), order)))


def _fake(images: Tensor, order: Tensor, patch: int, mean: Any, std: Any, signal: Tensor | None, *_: Any) -> Tensor:
    n, c = images.shape[:2]
    dtype = torch.float32 if images.dtype == torch.uint8 else images.dtype
    return images.new_empty((n if signal is None else 2 * n, order.shape[1], c * patch * patch), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, order, patch, _, std, signal, *_ = inputs
    ctx.save_for_backward(order, signal)
    ctx.options = (tuple(images.shape), patch, std, images.is_floating_point(), len(inputs))


def _backward(run: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    order, signal = ctx.saved_tensors
    shape, patch, std, floating, count = ctx.options
    return run(grad.contiguous(), order, shape, patch, std, signal) if floating else None, *[None] * (count - 1)


SPEC = _lib.declare(
    "patch_mask",
    "(Tensor images, Tensor order, int patch, float[] mean, float[] std, Tensor? signal, Tensor? level,"
    " Tensor? noise, int? seed, Tensor? streams) -> Tensor",
    reference=reference,
    fake=_fake,
    dtypes={"triton": (torch.float32, *_lib.HALVES, torch.uint8)},
    kernel="patch_mask",
    gradient=_lib.Gradient(
        "(Tensor grad, Tensor order, SymInt[] shape, int patch, float[] std, Tensor? signal) -> Tensor",
        fake=lambda grad, order, shape, *_: grad.new_empty(shape),
        save=_save,
        backward=_backward,
    ),
)
