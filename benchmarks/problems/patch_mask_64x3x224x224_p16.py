"""patch_mask on 64x3x224x224 p16, written by `python -m benchmarks problems`; needs torch alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_MASK32 = 4294967295
_ROUNDS = 10
IMAGE_NOISE = 3


def per_channel(values: list[float] | tuple[float, ...], like: Tensor) -> Tensor:
    """[C, 1, 1], made where ``like`` is: a copy from the host could not be captured in a CUDA graph."""
    return torch.stack([like.new_full((1, 1), value) for value in values])


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x: [N, L, W], index: [N, L] -> x[n, index[n, l]]."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def to_rows(images: Tensor, patch: int) -> Tensor:
    """[N, C, H, W] -> [N, L, C*p*p] in raster order, values (channel, row, column)."""
    n, c, height, width = images.shape
    grid = images.reshape(n, c, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(n, (height // patch) * (width // patch), c * patch * patch)


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


class Model(nn.Module):
    def __init__(self, patch: int, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.patch = patch
        self.mean = mean
        self.std = std

    def forward(self, images: Tensor, order: Tensor, signal: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        return reference(images, order, self.patch, self.mean, self.std, signal, level, noise, None, None)


def get_inputs() -> list[Tensor]:
    images = torch.rand((64, 3, 224, 224))
    order = torch.rand((64, 196)).argsort(dim=1)
    signal = torch.rand((64,))
    level = torch.rand((64,))
    noise = torch.randn((64, 3, 224, 224))
    return [images, order, signal, level, noise]


def get_init_inputs() -> list:
    return [16, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
