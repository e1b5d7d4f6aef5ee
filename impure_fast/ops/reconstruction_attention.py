"""Softmax attention of the encoder's chunks and of the decoder's replicas, scores never in memory.

    out[b, t] = sum_s p[b, t, s] v[b, s],  p = softmax_s(scale * q[b, t] . k[b, s]),  per head   (SPEC 2.6)

Forms: plain; hidden (fewer queries than keys: the last decoder block asks with the hidden chunk alone); shared
(the first decoder block: K replicas of an image differ in one chunk and the head, so its 2L + K distinct rows
are computed once and read through a row map).  Backward recomputes p from the log-sum-exp.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from . import _dispatch, _lib


def reconstruction_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    chunks: int = 0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention without mask or dropout.

    q: [B, Tq, h, d]; k, v: [B, T, h, d]; one float dtype and device, any strides.  -> [B, Tq, h, d].
    chunks: K > 0 takes the shared form: q, k, v [N, 2L + K, h, d] hold the rows of the clean patches, of the hidden
        ones, and the K heads -> [N, K, L + 1, h, d], the head first in every replica.
    scale: default d ** -0.5.
    return_lse: also return the natural log of the softmax's denominators, fp32 (fp64 for fp64), [B, h, Tq] or
        [N, K, h, L + 1]; no gradient passes through it.
    backend: demand one; None follows ``impure_fast.backend`` (auto: cuda, cpp, triton, reference).
    Under autocast q, k and v are cast to its dtype.  Deterministic, also backward; no double backward.
    Raises InputError, InputTypeError or BackendError.
    """
    device = q.device.type
    if torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check(q, k, v, chunks)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, lse = _dispatch.run(SPEC, backend, q, k, v, scale, chunks)
    if not return_lse:
        return out
    return out, _log_sum_exp(q, k, scale, chunks) if lse is None else lse


def _check(q: Tensor, k: Tensor, v: Tensor, chunks: int) -> None:
    _lib.check_alike("reconstruction_attention", q=q, k=k, v=v)
    asked, held = q.shape, k.shape
    if len(asked) != 4 or len(held) != 4 or held != v.shape or asked[0] != held[0] or asked[2:] != held[2:]:
        wanted = "wanted q [B, Tq, heads, width] and k, v [B, T, heads, width]"
    elif 0 in held[1:]:
        wanted = "keys, heads and width must not be empty"
    elif chunks and (chunks < 2 or asked != held or held[1] < 3 * chunks or (held[1] - chunks) % (2 * chunks)):
        wanted = f"chunks={chunks} wants 2L + K rows in q, k and v, L a multiple of K >= 2"
    else:
        return
    raise InputError(f"q {list(asked)}, k {list(held)}, v {list(v.shape)}: {wanted}.")


def replica_rows(tokens: int, chunks: int, device: torch.device | str = "cpu") -> Tensor:
    """Rows of the packed tensor that the replicas read: int64 [K, L + 1] (the head, then the patches)."""
    patch = torch.arange(tokens, device=device)
    replica = torch.arange(chunks, device=device)[:, None]
    hidden = patch // (tokens // chunks) == replica
    return torch.cat((2 * tokens + replica, patch + tokens * hidden), dim=1)


def _unpack(packed: Tensor, chunks: int) -> Tensor:
    """[N, 2L + K, h, d] -> every replica's own rows, [N*K, L + 1, h, d]."""
    tokens = (packed.shape[1] - chunks) // 2
    return packed[:, replica_rows(tokens, chunks, packed.device)].flatten(0, 1)


def _log_sum_exp(q: Tensor, k: Tensor, scale: float, chunks: int) -> Tensor:
    if chunks:
        lse = _log_sum_exp(_unpack(q, chunks), _unpack(k, chunks), scale, 0)
        return lse.unflatten(0, (-1, chunks))
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = torch.einsum("bqhd,bkhd->bhqk", q.detach().to(dtype), k.detach().to(dtype))
    return (scale * scores).logsumexp(dim=-1)


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float, chunks: int) -> tuple[Tensor, None]:
    """The oracle; its log-sum-exp is computed apart, and only where it is asked for."""
    if chunks:
        out, _ = reference(_unpack(q, chunks), _unpack(k, chunks), _unpack(v, chunks), scale, 0)
        return out.unflatten(0, (-1, chunks)), None
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, h, T, d]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        # torch's CPU bf16 flash backward is far slower than plain products.
        scores = (q * scale) @ k.transpose(-2, -1)
        return (scores.softmax(dim=-1).to(v.dtype) @ v).transpose(1, 2), None
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2), None


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float, chunks: int) -> tuple[Tensor, Tensor]:
    n, queries, heads, width = q.shape
    shape: tuple[Any, ...] = (n,)
    if chunks:
        shape, queries = (n, chunks), (queries - chunks) // 2 + 1
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*shape, queries, heads, width)), q.new_empty((*shape, heads, queries), dtype=dtype)


def _fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.options = inputs[3:]
    ctx.mark_non_differentiable(output[1])


def _backward(run: Any, ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *run(grad.contiguous(), *ctx.saved_tensors, *ctx.options), None, None


def _limits(backend: str, q: Tensor, *rest: Any) -> list[str]:
    width = q.shape[-1]
    if backend in ("triton", "cuda") and width > 128:
        return [f"It takes head widths up to 128, not {width}."]
    if backend == "cuda" and width % 2:
        return [f"It takes even head widths, not {width}."]
    return []


SPEC = _lib.declare(
    "reconstruction_attention",
    "(Tensor q, Tensor k, Tensor v, float scale, int chunks) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    dtypes={
        "cpp": (torch.float32, torch.bfloat16, torch.float64),
        "cuda": (torch.float32, *_lib.HALVES),
        "triton": (torch.float32, *_lib.HALVES),
    },
    kernel="attention",
    limits=_limits,
    gradient=_lib.Gradient(
        "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, int chunks)"
        " -> (Tensor, Tensor, Tensor)",
        fake=_fake_backward,
        save=_save,
        backward=_backward,
    ),
)
