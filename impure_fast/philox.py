"""Philox4x32-10 (Salmon et al., SC 2011): counter-based random numbers.

Key = seed, counter = (element block, stream low, stream high, purpose); four 32-bit words a counter, element e takes
word e % 4 of block e // 4.  So a number depends on seed, stream, purpose and place alone.
"""

from __future__ import annotations

import math
import operator
import secrets

import torch
from torch import Tensor

from .errors import InputTypeError

_MASK32 = 0xFFFFFFFF
_ROUNDS = 10

# Last counter word: what a number is used for.
POSITION, ORDER, IMAGE_STEP, IMAGE_NOISE, FEATURE_STEP, FEATURE_NOISE, MIX_ORDER, MIX_CHUNKS, ATTACK = range(9)


Seed = int | Tensor  # a tensor, int64, where a captured or exported graph takes the seed as an input


def seed_or_fresh(seed: Seed | None, shape: tuple[int, ...] = ()) -> Seed:
    """The seed itself; for None one of 63 bits from the operating system's entropy.

    shape: that a tensor may have in place of (): [N] for one seed an image.
    """
    if seed is None:
        return secrets.randbits(63)
    if isinstance(seed, Tensor) and seed.dtype == torch.int64 and (seed.ndim == 0 or seed.shape == shape):
        return seed
    try:
        return operator.index(seed)
    except TypeError as error:
        raise InputTypeError(f"seed is {seed!r}; wanted an integer or None.") from error


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


def integers(seed: int | Tensor, streams: Tensor, purpose: int, count: int, low: int, high: int) -> Tensor:
    """Integers in [low, high), [N, count] int64 (multiply-shift; bias below (high - low) / 2**32)."""
    return low + ((philox(seed, streams, purpose, count) * (high - low)) >> 32)


def normal(seed: int | Tensor, streams: Tensor, purpose: int, count: int) -> Tensor:
    """Standard normals, float32, [N, count]: Box-Muller on the words (0, 1) and (2, 3) of each block."""
    pairs = 2 * ((count + 3) // 4)
    u = uniform(seed, streams, purpose, 2 * pairs).view(streams.shape[0], pairs, 2)
    radius = (-2 * torch.log1p(-u[..., 0])).sqrt()
    angle = (2 * math.pi) * u[..., 1]
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=2).flatten(1)[:, :count]
