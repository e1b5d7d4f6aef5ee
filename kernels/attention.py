"""Attention of whole short sequences: scores never leave registers, backward recomputes them from the log-sum-exp.

Forward: one program holds a block of queries of one (sequence, head), its output sums and a [queries, keys] tile of
scores, and walks the key blocks, rescaling by the running maximum; where all keys fit one block it walks once.
Backward, no atomics: a kernel over query blocks walks the keys for dq, one over key blocks walks the queries for
dk and dv.  Keys and values are read once a query block, from L2 but for the first; the rest moves once.
Shared form: every replica reads the packed rows through ``_row``; its gradients are its own, summed after.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2E = tl.constexpr(1.4426950408889634)
# The interpreter multiplies raw bits of bf16: give tl.dot fp32 there.
_INTERPRETED = triton.knobs.runtime.interpret
# (bytes an element, head width up to): queries, keys, warps; the largest without spills on sm_80 and sm_90.
_TILES = {
    (2, 16): (64, 64, 4),
    (2, 32): (64, 64, 4),
    (2, 64): (64, 32, 4),
    (2, 128): (64, 32, 8),
    (4, 16): (32, 32, 4),
    (4, 32): (32, 32, 8),
    (4, 64): (32, 32, 8),
    (4, 128): (16, 16, 8),
}


@triton.jit
def _program(heads, tokens, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's tokens, head, sequence, and the image and replica of that sequence."""
    blocks = tl.cdiv(tokens, BLOCK)
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    sequence = (rest // heads).to(tl.int64)
    if CHUNKS:
        image, replica = sequence // CHUNKS, (sequence % CHUNKS).to(tl.int32)
    else:
        image, replica = sequence, 0
    return block * BLOCK + tl.arange(0, BLOCK), (rest % heads).to(tl.int64), sequence, image, replica


@triton.jit
def _row(token, tokens, replica, CHUNKS: tl.constexpr):
    """Row of the packed tensor that holds a token: clean patches, noised patches, heads."""
    if CHUNKS == 0:
        return token
    patches = tokens - 1
    first = 1 + replica * (patches // CHUNKS)
    hidden = (token >= first) & (token < first + patches // CHUNKS)
    return tl.where(token == 0, 2 * patches + replica, token - 1 + tl.where(hidden, patches, 0))


@triton.jit
def _load(ptr, row, stride, valid, WIDTH: tl.constexpr, PADDED: tl.constexpr, UPCAST: tl.constexpr):
    """[rows, PADDED], zeros where not valid."""
    column = tl.arange(0, PADDED)
    address = ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    x = tl.load(address, valid[:, None] & (column < WIDTH)[None, :], 0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def _store(ptr, x, token, stride, valid, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    column = tl.arange(0, PADDED)
    address = ptr + token.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(address, x.to(ptr.dtype.element_ty), valid[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _dot(a, b, c=None):
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def _forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    q_stride,
    k_stride,
    v_stride,
    scale,
    heads,
    queries,
    keys,
    CHUNKS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    token, head, sequence, image, replica = _program(heads, queries, CHUNKS, QUERIES)
    q_ptr += (image * q_stride[0] + head * q_stride[2]) * UNIT
    k_ptr += (image * k_stride[0] + head * k_stride[2]) * UNIT
    v_ptr += (image * v_stride[0] + head * v_stride[2]) * UNIT
    q = _load(q_ptr, _row(token, queries, replica, CHUNKS), q_stride[1] * UNIT, token < queries, WIDTH, PADDED, UPCAST)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    out = tl.zeros((QUERIES, PADDED), tl.float32)
    for start in range(0, keys, KEYS):
        key = start + tl.arange(0, KEYS)
        row = _row(key, keys, replica, CHUNKS)
        k = _load(k_ptr, row, k_stride[1] * UNIT, key < keys, WIDTH, PADDED, UPCAST)
        v = _load(v_ptr, row, v_stride[1] * UNIT, key < keys, WIDTH, PADDED, UPCAST)
        score = tl.where((key < keys)[None, :], _dot(q, tl.trans(k)) * (scale * _LOG2E), float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        p = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = tl.fma(total, shrink, tl.sum(p, 1))
        out = _dot(p.to(v.dtype), v, out * shrink[:, None])
        top = higher
    valid = token < queries
    out_ptr += (sequence * queries * heads + head) * WIDTH
    _store(out_ptr, out / total[:, None], token, heads * WIDTH, valid, WIDTH, PADDED)
    tl.store(lse_ptr + (sequence * heads + head) * queries + token, (top + tl.log2(total)) / _LOG2E, valid)


@triton.jit
def _backward_q(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    q_stride,
    k_stride,
    v_stride,
    scale,
    heads,
    queries,
    keys,
    CHUNKS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dq, and for the other kernel delta[t] = grad[t] . out[t]."""
    token, head, sequence, image, replica = _program(heads, queries, CHUNKS, QUERIES)
    valid = token < queries
    q_ptr += (image * q_stride[0] + head * q_stride[2]) * UNIT
    k_ptr += (image * k_stride[0] + head * k_stride[2]) * UNIT
    v_ptr += (image * v_stride[0] + head * v_stride[2]) * UNIT
    plane = (sequence * queries * heads + head) * WIDTH
    line = (sequence * heads + head) * queries + token
    q = _load(q_ptr, _row(token, queries, replica, CHUNKS), q_stride[1] * UNIT, valid, WIDTH, PADDED, UPCAST)
    grad = _load(grad_ptr + plane, token, heads * WIDTH, valid, WIDTH, PADDED, UPCAST)
    out = _load(out_ptr + plane, token, heads * WIDTH, valid, WIDTH, PADDED, UPCAST)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + line, delta, valid)
    lse = tl.load(lse_ptr + line, valid, float("inf")) * _LOG2E
    dq = tl.zeros((QUERIES, PADDED), tl.float32)
    for start in range(0, keys, KEYS):
        key = start + tl.arange(0, KEYS)
        row = _row(key, keys, replica, CHUNKS)
        k = _load(k_ptr, row, k_stride[1] * UNIT, key < keys, WIDTH, PADDED, UPCAST)
        v = _load(v_ptr, row, v_stride[1] * UNIT, key < keys, WIDTH, PADDED, UPCAST)
        # Rows of zeros score 0, which may be far above a row's log-sum-exp.
        score = tl.where((key < keys)[None, :], _dot(q, tl.trans(k)) * (scale * _LOG2E), float("-inf"))
        p = tl.exp2(score - lse[:, None])
        ds = p * (_dot(grad, tl.trans(v)) - delta[:, None])
        dq = _dot(ds.to(k.dtype), k, dq)
    _store(dq_ptr + plane, dq * scale, token, heads * WIDTH, valid, WIDTH, PADDED)


@triton.jit
def _backward_kv(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    q_stride,
    k_stride,
    v_stride,
    scale,
    heads,
    queries,
    keys,
    CHUNKS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    key, head, sequence, image, replica = _program(heads, keys, CHUNKS, KEYS)
    valid = key < keys
    q_ptr += (image * q_stride[0] + head * q_stride[2]) * UNIT
    k_ptr += (image * k_stride[0] + head * k_stride[2]) * UNIT
    v_ptr += (image * v_stride[0] + head * v_stride[2]) * UNIT
    grad_ptr += (sequence * queries * heads + head) * WIDTH
    key_row = _row(key, keys, replica, CHUNKS)
    k = _load(k_ptr, key_row, k_stride[1] * UNIT, valid, WIDTH, PADDED, UPCAST)
    v = _load(v_ptr, key_row, v_stride[1] * UNIT, valid, WIDTH, PADDED, UPCAST)
    dk = tl.zeros((KEYS, PADDED), tl.float32)
    dv = tl.zeros((KEYS, PADDED), tl.float32)
    for start in range(0, queries, QUERIES):
        token = start + tl.arange(0, QUERIES)
        seen = token < queries
        row = _row(token, queries, replica, CHUNKS)
        q = _load(q_ptr, row, q_stride[1] * UNIT, seen, WIDTH, PADDED, UPCAST)
        grad = _load(grad_ptr, token, heads * WIDTH, seen, WIDTH, PADDED, UPCAST)
        line = (sequence * heads + head) * queries + token
        lse = tl.load(lse_ptr + line, seen, float("inf")) * _LOG2E
        delta = tl.load(delta_ptr + line, seen, 0.0)
        p = tl.exp2(_dot(k, tl.trans(q)) * (scale * _LOG2E) - lse[None, :])  # [KEYS, QUERIES]
        dv = _dot(p.to(grad.dtype), grad, dv)
        ds = p * (_dot(v, tl.trans(grad)) - delta[None, :])
        dk = _dot(ds.to(q.dtype), q, dk)
    plane = (sequence * keys * heads + head) * WIDTH
    _store(dk_ptr + plane, dk * scale, key, heads * WIDTH, valid, WIDTH, PADDED)
    _store(dv_ptr + plane, dv, key, heads * WIDTH, valid, WIDTH, PADDED)


def _tiles(queries: int, keys: int, q: Tensor) -> dict[str, Any]:
    """Tile sizes and launch options by element size and head width; short sequences take smaller tiles."""
    padded = max(16, triton.next_power_of_2(q.shape[-1]))
    most_queries, most_keys, warps = _TILES[q.element_size(), padded]
    return {
        "WIDTH": q.shape[-1],
        "PADDED": padded,
        "QUERIES": max(16, min(most_queries, triton.next_power_of_2(queries))),
        "KEYS": max(16, min(most_keys, triton.next_power_of_2(keys))),
        "UPCAST": _INTERPRETED,
        "num_warps": warps,
        "num_stages": 2,
        "enable_fp_fusion": False,
    }


def _rows(*tensors: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """The tensors, last axis contiguous, and their strides in units of a common divisor, known to the compiler."""
    tensors = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)
    unit = math.gcd(16, *(s for x in tensors for s in x.stride()[:3]))
    strides = {
        f"{name}_stride": tuple(s // unit for s in x.stride()[:3]) for name, x in zip("qkv", tensors, strict=True)
    }
    return list(tensors), {"UNIT": unit, **strides}


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, chunks: int) -> tuple[Tensor, Tensor]:
    """See ``impure_fast.ops.reconstruction_attention`` for the forms; -> (out, lse)."""
    n, queries, heads, width = q.shape
    keys = k.shape[1]
    batch: tuple[int, ...] = (n,)
    if chunks:
        batch, queries = (n, chunks), (queries - chunks) // 2 + 1
        keys = queries
    out = q.new_empty((*batch, queries, heads, width))
    lse = q.new_empty((*batch, heads, queries), dtype=torch.float32)
    if out.numel():
        tiles = _tiles(queries, keys, q)
        grid = (math.prod(batch) * heads * triton.cdiv(queries, tiles["QUERIES"]),)
        (q, k, v), rows = _rows(q, k, v)
        with torch.cuda.device_of(q):
            _forward[grid](
                q, k, v, out, lse, scale=scale, heads=heads, queries=queries, keys=keys, CHUNKS=chunks, **rows, **tiles
            )
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, chunks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (dq, dk, dv), contiguous, in the shapes of q, k and v."""
    heads, queries = lse.shape[-2:]
    keys = queries if chunks else k.shape[1]
    sequences = math.prod(lse.shape[:-2])
    grad, out, lse = grad.contiguous(), out.contiguous(), lse.contiguous()
    delta = torch.empty_like(lse)
    if chunks:  # each replica's own, to be summed in fp32
        own = q.new_empty((3, sequences, queries, heads, q.shape[-1]), dtype=torch.float32)
        dq, dk, dv = own.unbind()
    else:
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    tiles = _tiles(queries, keys, q)
    (q, k, v), rows = _rows(q, k, v)
    sizes = {"scale": scale, "heads": heads, "queries": queries, "keys": keys, "CHUNKS": chunks, **rows, **tiles}
    with torch.cuda.device_of(q):
        if dq.numel():
            grid = (sequences * heads * triton.cdiv(queries, tiles["QUERIES"]),)
            _backward_q[grid](grad, q, k, v, out, lse, delta, dq, **sizes)
        if dk.numel():
            grid = (sequences * heads * triton.cdiv(keys, tiles["KEYS"]),)
            _backward_kv[grid](grad, q, k, v, lse, delta, dk, dv, **sizes)
    if chunks:
        dq, dk, dv = _packed(own, chunks, q.dtype).unbind()
    return dq, dk, dv


def _packed(own: Tensor, chunks: int, dtype: torch.dtype) -> Tensor:
    """Sum the replicas' own rows [3, N*K, L + 1, h, d] into the packed rows that they read, [3, N, 2L + K, h, d]."""
    own = own.unflatten(1, (-1, chunks))
    patches = own[:, :, :, 1:].unflatten(3, (chunks, -1))  # [3, N, replica, chunk, S, h, d]
    hides = torch.eye(chunks, dtype=torch.bool, device=own.device)[:, :, None, None, None]
    clean = patches.masked_fill(hides, 0).sum(2)
    hidden = patches.diagonal(dim1=2, dim2=3).movedim(-1, 2)
    return torch.cat((clean.flatten(2, 3), hidden.flatten(2, 3), own[:, :, :, 0]), 2).to(dtype)
