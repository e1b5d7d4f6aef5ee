"""Softmax attention of the encoder's chunks and the decoder's replicas.

out[b, t] = sum_s softmax_s(q[b, t] . k[b, s] / sqrt(d)) v[b, s], per head; no mask, no dropout (SPEC 2.6).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def reconstruction_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v: [B, heads, T, d], any float dtype and strides -> [B, heads, T, d]."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        # torch's CPU bf16 flash backward is far slower than plain products.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return scores.softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)
