"""Mix purified and input patches before a guide network (SPEC section 5).

About 1/c of the patches (shuffled places e_r .. e_{r+1}-1 of edges e = round(linspace(0, L-1, c+1)))
show the input, all others the purified image.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import InputError
from . import _dispatch, _lib


class Mixing(Protocol):
    """What ``MixDraws`` decides: a permutation [N, L] int64, the number of chunks, and which shows the input."""

    @property
    def order(self) -> Tensor: ...
    @property
    def chunks(self) -> int: ...
    @property
    def index(self) -> int: ...


def patch_mix(purified: Tensor, images: Tensor, draws: Mixing, patch: int, *, backend: str | None = None) -> Tensor:
    """purified, images: [N, C, H, W] of one float dtype -> mixed [N, C, H, W]; gradients reach both.

    Raises InputError, InputTypeError or BackendError.
    """
    _lib.check_alike("patch_mix", purified=purified, images=images)
    n, _, height, width = images.shape
    tokens = height // patch * (width // patch)
    if purified.shape != images.shape or height % patch or width % patch or draws.order.shape != (n, tokens):
        raise InputError(
            f"purified {list(purified.shape)}, images {list(images.shape)}, order {list(draws.order.shape)} and "
            f"patch={patch} do not fit: wanted two images [N, C, H, W] and an order [N, L]."
        )
    start, stop = shown(tokens, draws.chunks, draws.index)
    return _dispatch.run(SPEC, backend, purified, images, draws.order, start, stop, patch)


def shown(tokens: int, chunks: int, index: int) -> tuple[int, int]:
    """Shuffled places [start, stop) that show the input."""
    start, stop = (round(edge * (tokens - 1) / chunks) for edge in (index, index + 1))
    return start, stop


def mix_mask(draws: Mixing, rows: int, cols: int, patch: int) -> Tensor:
    """1 where the purified pixel is shown, 0 where the input is: float32 [N, 1, rows*p, cols*p]."""
    start, stop = shown(rows * cols, draws.chunks, draws.index)
    return _mask(draws.order, start, stop, rows, cols, patch).float()


def _mask(order: Tensor, start: int, stop: int, rows: int, cols: int, patch: int) -> Tensor:
    n, tokens = order.shape
    place = torch.arange(tokens, device=order.device)
    shuffled = ((place < start) | (place >= stop)).expand(n, tokens)
    raster = torch.empty_like(shuffled).scatter_(1, order, shuffled)
    return raster.view(n, 1, rows, cols).repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def reference(purified: Tensor, images: Tensor, order: Tensor, start: int, stop: int, patch: int) -> Tensor:
    mask = _mask(order, start, stop, images.shape[2] // patch, images.shape[3] // patch, patch).to(images.dtype)
    return images * (1 - mask) + purified * mask


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])
    ctx.options = inputs[3:]


def _backward(run: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *run(grad.contiguous(), *ctx.saved_tensors, *ctx.options), None, None, None, None


SPEC = _lib.declare(
    "patch_mix",
    "(Tensor purified, Tensor images, Tensor order, int start, int stop, int patch) -> Tensor",
    reference=reference,
    fake=lambda purified, *_: purified.new_empty(purified.shape),
    dtypes={"triton": (torch.float32, *_lib.HALVES)},
    kernel="patch_mix",
    gradient=_lib.Gradient(
        "(Tensor grad, Tensor order, int start, int stop, int patch) -> (Tensor, Tensor)",
        fake=lambda grad, *_: (grad.new_empty(grad.shape), grad.new_empty(grad.shape)),
        save=_save,
        backward=_backward,
    ),
)
