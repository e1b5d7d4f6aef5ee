"""Random numbers from counters: each fixed by seed, stream, purpose and place, on every backend (``philox``).

Writes each number once; reads nothing but the streams and the seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ..philox import Seed, normal, uniform
from . import _dispatch, _lib


def noise(
    streams: Tensor, seed: Seed, purpose: int, count: int, *, gaussian: bool = True, backend: str | None = None
) -> Tensor:
    """streams: [N] int64; purpose: the last counter word -> float32 [N, count], on the streams' device.

    seed: of all streams, or int64 [N], one a stream.  As a tensor it is an input of captured and exported graphs.
    gaussian: standard normals, within 2e-6 of the exact values; else uniforms in [0, 1), exact.
    Raises InputError or BackendError.
    """
    if streams.ndim != 1 or streams.dtype != torch.int64:
        raise InputError(f"streams is {streams.dtype} {list(streams.shape)}; wanted int64 [N].")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or (seed.ndim and seed.shape != streams.shape):
            raise InputError(
                f"seed is {seed.dtype} {list(seed.shape)}, streams {list(streams.shape)}: wanted int64, [] or [N]."
            )
        key = seed.to(streams.device)
    else:  # the 64 bits as a signed integer, made where the streams are
        key = streams.new_full((), (seed + 2**63) % 2**64 - 2**63)
    return _dispatch.run(SPEC, backend, streams.contiguous(), key.contiguous(), purpose, count, gaussian)


def reference(streams: Tensor, seed: Tensor, purpose: int, count: int, gaussian: bool) -> Tensor:
    return (normal if gaussian else uniform)(seed, streams, purpose, count)


def _fake(streams: Tensor, seed: Tensor, purpose: int, count: int, gaussian: bool) -> Tensor:
    return streams.new_empty((streams.shape[0], count), dtype=torch.float32)


SPEC = _lib.declare(
    "noise",
    "(Tensor streams, Tensor seed, int purpose, int count, bool gaussian) -> Tensor",
    reference=reference,
    fake=_fake,
    dtypes={"cpp": (torch.int64,), "triton": (torch.int64,)},
    kernel="noise",
)
