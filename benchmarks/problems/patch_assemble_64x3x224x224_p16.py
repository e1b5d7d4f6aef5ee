"""patch_assemble on 64x3x224x224 p16, written by `python -m benchmarks problems`; needs torch alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def unpatchify(patches: Tensor, rows: int, cols: int) -> Tensor:
    """patches: [N, rows*cols, p*p*C] in raster order, C = 3 -> [N, C, rows*p, cols*p]."""
    n, _, values = patches.shape
    p = round((values / 3) ** 0.5)
    return patches.view(n, rows, cols, p, p, 3).permute(0, 5, 1, 3, 2, 4).reshape(n, 3, rows * p, cols * p)


def unshuffle(patches: Tensor, order: Tensor) -> Tensor:
    """[N, L, W] in shuffled order -> the same rows in raster order."""
    return torch.empty_like(patches).scatter(1, order[:, :, None].expand_as(patches), patches)


def per_channel(values: list[float] | tuple[float, ...], like: Tensor) -> Tensor:
    """[C, 1, 1], made where ``like`` is: a copy from the host could not be captured in a CUDA graph."""
    return torch.stack([like.new_full((1, 1), value) for value in values])


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


class Model(nn.Module):
    def __init__(self, rows: int, cols: int, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.rows = rows
        self.cols = cols
        self.mean = mean
        self.std = std

    def forward(self, patches: Tensor, order: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference(patches, order, self.rows, self.cols, weight, bias, self.mean, self.std, False, False)


def get_inputs() -> list[Tensor]:
    patches = torch.randn((64, 196, 768))
    order = torch.rand((64, 196)).argsort(dim=1)
    weight = torch.randn((3, 3, 3, 3))
    bias = torch.randn((3,))
    return [patches, order, weight, bias]


def get_init_inputs() -> list:
    return [14, 14, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
