"""order on 64x196, written by `python -m benchmarks problems`; needs torch alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def reference(uniforms: Tensor) -> tuple[Tensor, Tensor]:
    places = uniforms.argsort(dim=1, stable=True)
    return places, places.argsort(dim=1)


class Model(nn.Module):
    def forward(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        return reference(uniforms)


def get_inputs() -> list[Tensor]:
    uniforms = torch.rand((64, 196)).mul(256).floor().div(256)
    return [uniforms]


def get_init_inputs() -> list:
    return []
