"""patch_mix on 64x3x224x224 p16, written by `python -m benchmarks problems`; needs torch alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _mask(order: Tensor, start: int, stop: int, rows: int, cols: int, patch: int) -> Tensor:
    n, tokens = order.shape
    place = torch.arange(tokens, device=order.device)
    shuffled = ((place < start) | (place >= stop)).expand(n, tokens)
    raster = torch.empty_like(shuffled).scatter_(1, order, shuffled)
    return raster.view(n, 1, rows, cols).repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def reference(purified: Tensor, images: Tensor, order: Tensor, start: int, stop: int, patch: int) -> Tensor:
    mask = _mask(order, start, stop, images.shape[2] // patch, images.shape[3] // patch, patch).to(images.dtype)
    return images * (1 - mask) + purified * mask


class Model(nn.Module):
    def __init__(self, start: int, stop: int, patch: int) -> None:
        super().__init__()
        self.start = start
        self.stop = stop
        self.patch = patch

    def forward(self, purified: Tensor, images: Tensor, order: Tensor) -> Tensor:
        return reference(purified, images, order, self.start, self.stop, self.patch)


def get_inputs() -> list[Tensor]:
    purified = torch.rand((64, 3, 224, 224))
    images = torch.rand((64, 3, 224, 224))
    order = torch.rand((64, 196)).argsort(dim=1)
    return [purified, images, order]


def get_init_inputs() -> list:
    return [49, 98, 16]
