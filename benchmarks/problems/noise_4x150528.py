"""noise on 4x150528, written by `python -m benchmarks problems`; needs torch alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_MASK32 = 4294967295
_ROUNDS = 10


def philox(seed: int | Tensor, streams: Tensor, purpose: int, count: int) -> Tensor:
    """``count`` 32-bit words a stream, as int64 in [0, 2**32).  streams: [N] int64 -> [N, count].

    seed: of all streams, or [N] int64, one a stream.
    """
    blocks = torch.arange((count + 3) // 4, device=streams.device)
    shape = (streams.shape[0], blocks.shape[0])
    # int64 products wrap modulo 2**64, so a shift and a mask give the exact high word.
    c0 = blocks.expand(shape)
    c1 = (streams & _MASK32)[:, None].expand(shape)
    c2 = ((streams >> 32) & _MASK32)[:, None].expand(shape)
    c3 = torch.full(shape, purpose, dtype=torch.int64, device=streams.device)
    if isinstance(seed, Tensor) and seed.ndim:
        seed = seed[:, None]
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(_ROUNDS):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK32) ^ c1 ^ k0, p1 & _MASK32, ((p0 >> 32) & _MASK32) ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return torch.stack((c0, c1, c2, c3), dim=2).flatten(1)[:, :count]  # [N, count]


def uniform(seed: int | Tensor, streams: Tensor, purpose: int, count: int) -> Tensor:
    """float32 multiples of 2**-24 in [0, 1), [N, count]."""
    return (philox(seed, streams, purpose, count) >> 8).float() * 2.0**-24


def normal(seed: int | Tensor, streams: Tensor, purpose: int, count: int) -> Tensor:
    """Standard normals, float32, [N, count]: Box-Muller on the words (0, 1) and (2, 3) of each block."""
    pairs = 2 * ((count + 3) // 4)
    u = uniform(seed, streams, purpose, 2 * pairs).view(streams.shape[0], pairs, 2)
    radius = (-2 * torch.log1p(-u[..., 0])).sqrt()
    angle = (2 * math.pi) * u[..., 1]
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=2).flatten(1)[:, :count]


def reference(streams: Tensor, seed: Tensor, purpose: int, count: int, gaussian: bool) -> Tensor:
    return (normal if gaussian else uniform)(seed, streams, purpose, count)


class Model(nn.Module):
    def __init__(self, purpose: int, count: int, gaussian: bool) -> None:
        super().__init__()
        self.purpose = purpose
        self.count = count
        self.gaussian = gaussian

    def forward(self, streams: Tensor, seed: Tensor) -> Tensor:
        return reference(streams, seed, self.purpose, self.count, self.gaussian)


def get_inputs() -> list[Tensor]:
    streams = torch.randint(-(2**63), 2**63 - 1, (4,))
    seed = torch.randint(-(2**63), 2**63 - 1, ())
    return [streams, seed]


def get_init_inputs() -> list:
    return [3, 150528, True]
