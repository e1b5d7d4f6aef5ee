"""Standard normals from counters: ``philox.normal``, each number fixed by seed, stream, purpose and place.

Writes each number once; reads nothing but the streams.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ..philox import Seed, normal
from . import _dispatch, _lib


def noise(streams: Tensor, seed: Seed, purpose: int, count: int, *, backend: str | None = None) -> Tensor:
    """streams: [N] int64; purpose: the last counter word -> float32 [N, count], on the streams' device.

    Every backend is within 2e-6 of the exact values.  A seed that is a tensor (an exported graph's input) takes the
    reference.
    Raises InputError or BackendError.
    """
    if streams.ndim != 1 or streams.dtype != torch.int64:
        raise InputError(f"streams is {streams.dtype} {list(streams.shape)}; wanted int64 [N].")
    if isinstance(seed, Tensor):
        return normal(seed, streams, purpose, count)
    # The schema holds the 64 bits of the key as a signed integer.
    signed = (seed + 2**63) % 2**64 - 2**63
    return _dispatch.run(SPEC, backend, streams.contiguous(), signed, purpose, count)


def reference(streams: Tensor, seed: int, purpose: int, count: int) -> Tensor:
    return normal(seed, streams, purpose, count)


def _fake(streams: Tensor, seed: int, purpose: int, count: int) -> Tensor:
    return streams.new_empty((streams.shape[0], count), dtype=torch.float32)


SPEC = _lib.declare(
    "noise",
    "(Tensor streams, int seed, int purpose, int count) -> Tensor",
    reference=reference,
    fake=_fake,
    dtypes={"cpp": (torch.int64,)},
    kernel="",
)
