"""reconstruction_attention on 72x2x257x32 hidden 64, written by `python -m benchmarks problems`; needs torch alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class Model(nn.Module):
    def __init__(self, scale: float, chunks: int) -> None:
        super().__init__()
        self.scale = scale
        self.chunks = chunks

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference(q, k, v, self.scale, self.chunks)[0]


def get_inputs() -> list[Tensor]:
    q = torch.randn((72, 64, 2, 32))
    k, v = torch.randn((72, 257, 2, 2, 32)).unbind(2)
    return [q, k, v]


def get_init_inputs() -> list:
    return [0.1767766952966369, 0]
