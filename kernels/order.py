"""Stable ranks by counting: rank_i = #{u_j < u_i} + #{j < i, u_j = u_i}.

One program ranks a block of one image's uniforms against all of them, block by block; a [64, 64] tile of comparisons
lies in registers.  Moves 4 bytes in (L / 64 times, from L2 but for the first) and 16 out an element; no backward.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64


@triton.jit
def _load(uniforms_ptr, image, place, tokens, stride):
    address = uniforms_ptr + image * stride[0] + place.to(tl.int64) * stride[1]
    u = tl.load(address, place < tokens, float("inf"))
    return tl.where(u == u, u, float("inf"))  # with NaN, too, the ranks are a permutation


@triton.jit
def _forward(uniforms_ptr, order_ptr, restore_ptr, stride, tokens, BLOCK: tl.constexpr):
    blocks = tl.cdiv(tokens, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    u_i = _load(uniforms_ptr, image, i, tokens, stride)[:, None]
    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, tokens, BLOCK):
        # Places past the end hold inf and lie behind every i: never counted.
        j = start + tl.arange(0, BLOCK)
        u_j = _load(uniforms_ptr, image, j, tokens, stride)[None, :]
        before = (u_j < u_i) | ((u_j == u_i) & (j[None, :] < i[:, None]))
        rank += tl.sum(before.to(tl.int32), 1)
    valid = i < tokens
    tl.store(restore_ptr + image * tokens + i, rank.to(tl.int64), valid)
    tl.store(order_ptr + image * tokens + rank, i.to(tl.int64), valid)


def forward(uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """uniforms: [N, L] fp32, any strides -> (order, restore), both int64 [N, L]."""
    n, tokens = uniforms.shape
    order = uniforms.new_empty((n, tokens), dtype=torch.int64)
    restore = torch.empty_like(order)
    if order.numel():
        grid = (n * triton.cdiv(tokens, BLOCK),)
        with torch.cuda.device_of(uniforms):
            _forward[grid](
                uniforms, order, restore, uniforms.stride(), tokens, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False
            )
    return order, restore
