"""normalise_rows on 32x50x768, written by `python -m benchmarks problems`; needs torch alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, scale: float, zero: int, dtype: torch.dtype
) -> Tensor:
    y = x if dtype == x.dtype else x.float()
    if weight is not None and bias is not None:
        y = F.layer_norm(y, y.shape[-1:], weight.to(y.dtype), bias.to(y.dtype), eps)
    return (y / scale + zero).round().clamp(0, 255).to(dtype) if dtype == torch.uint8 else y.to(dtype)


class Model(nn.Module):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference(x, weight, bias, self.eps, 1.0, 0, x.dtype)


def get_inputs() -> list[Tensor]:
    x = torch.randn((32, 50, 768))
    weight = torch.rand((768,))
    bias = torch.rand((768,))
    return [x, weight, bias]


def get_init_inputs() -> list:
    return [1e-06]
