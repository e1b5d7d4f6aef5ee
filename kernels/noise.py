"""Random numbers from counters, straight to memory: one thread makes whole counters, neighbours in one store."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import philox

_COUNTERS = 256  # of four numbers, at most, in a program


@triton.jit
def _forward(
    streams_ptr,
    seed_ptr,
    out_ptr,
    seed_stride,
    count,
    PURPOSE: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    blocks = tl.cdiv(count, 4 * COUNTERS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * COUNTERS
    counter = first + tl.arange(0, COUNTERS)[None, :]
    seed, stream = tl.load(seed_ptr + row * seed_stride), tl.load(streams_ptr + row)
    if GAUSSIAN:
        values = philox.normals(seed, stream, counter, PURPOSE)
    else:
        values = philox.uniforms(seed, stream, counter, PURPOSE)
    element = 4 * first + tl.arange(0, 4 * COUNTERS)[None, :]
    tl.store(out_ptr + row * count + element, values, element < count)


def forward(streams: Tensor, seed: Tensor, purpose: int, count: int, gaussian: bool) -> Tensor:
    """streams: [N] int64, seed: int64 [] or [N] -> fp32 [N, count]; see ``impure_fast.ops.noise``."""
    out = streams.new_empty((len(streams), count), dtype=torch.float32)
    if out.numel():
        counters = min(_COUNTERS, triton.next_power_of_2(triton.cdiv(count, 4)))
        grid = (len(streams) * triton.cdiv(count, 4 * counters),)
        with torch.cuda.device_of(streams):
            _forward[grid](
                streams,
                seed,
                out,
                seed.ndim,
                count,
                PURPOSE=purpose,
                GAUSSIAN=gaussian,
                COUNTERS=counters,
                num_warps=max(1, counters // 64),
                enable_fp_fusion=False,
            )
    return out
