"""What is measured: every problem is declared once, with its inputs, its providers and its work.

A provider is a function of the inputs; "reference" is always one, and its fp64 result is the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from impure_fast import Draws, backend, create_model, ops
from impure_fast.ops.reconstruction_attention import replica_rows

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Problem:
    """One operator on one shape.

    make(dtype, device): its inputs; flops: of a forward pass; tolerance: relative to the truth's largest entry, per
    unit of the dtype's eps, beside twice the reference's own error.
    """

    op: str
    shape: str
    make: Callable[[torch.dtype, str], Inputs]
    providers: Mapping[str, Callable[..., Tensor]]
    flops: float
    tolerance: float = 4.0


def _normal(*shape: int) -> Callable[[torch.dtype, str], Tensor]:
    # Never zeros: they are faster than data.
    return lambda dtype, device: torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _attend(name: str, chunks: int = 0) -> Callable[..., Tensor]:
    def run(*inputs: Tensor) -> Tensor:
        return ops.reconstruction_attention(*_split(inputs), chunks=chunks, backend=name)

    return run


def _split(inputs: Inputs) -> Inputs:
    """One packed tensor [B, T, 3, h, d], or queries and packed keys and values -> q, k, v."""
    return inputs[0].unbind(2) if len(inputs) == 1 else (inputs[0], *inputs[1].unbind(2))


def _sdpa(*inputs: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in _split(inputs))).transpose(1, 2)


def _products(*inputs: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in _split(inputs))
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1).matmul(v).transpose(1, 2)


BACKENDS = ("reference", "cpp", "triton", "cuda")


def _plain(batch: int, heads: int, tokens: int, width: int, queries: int | None = None) -> Problem:
    def make(dtype: torch.dtype, device: str) -> Inputs:
        if queries is None:
            return (_normal(batch, tokens, 3, heads, width)(dtype, device),)
        kv = _normal(batch, tokens, 2, heads, width)(dtype, device)
        return _normal(batch, queries, heads, width)(dtype, device), kv

    providers = {**{name: _attend(name) for name in BACKENDS}, "sdpa": _sdpa, "products": _products}
    asked = tokens if queries is None else queries
    shape = f"{batch}x{heads}x{tokens}x{width}" + ("" if queries is None else f" hidden {queries}")
    return Problem("reconstruction_attention", shape, make, providers, 4.0 * batch * heads * asked * tokens * width)


def _shared(images: int, chunks: int, tokens: int, heads: int, width: int) -> Problem:
    def replicas(packed: Tensor) -> Inputs:
        return (packed[:, replica_rows(tokens, chunks, packed.device)].flatten(0, 1),)

    def materialised(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda packed: function(*replicas(packed)).unflatten(0, (-1, chunks))

    providers = {
        **{name: _attend(name, chunks) for name in BACKENDS},
        **{f"{name} on replicas": materialised(_attend(name)) for name in BACKENDS[1:]},
        "sdpa": materialised(_sdpa),
        "products": materialised(_products),
    }
    flops = 4.0 * images * chunks * heads * (tokens + 1) ** 2 * width
    make = _normal(images, 2 * tokens + chunks, 3, heads, width)
    shape = f"{images}x{heads}x{tokens + 1}x{width} shared {chunks}"
    return Problem("reconstruction_attention", shape, lambda *where: (make(*where),), providers, flops)


def _network(preset: str, batch: int, side: int) -> Problem:
    made: dict[tuple[torch.dtype, str], torch.nn.Module] = {}

    def run(name: str) -> Callable[[Tensor], Tensor]:
        def reconstruct(images: Tensor) -> Tensor:
            key = (images.dtype, images.device.type)
            if key not in made:
                torch.manual_seed(0)
                made.clear()
                made[key] = create_model(preset).eval().to(images.device, images.dtype)
            draws = Draws.sample(made[key].config, images.shape, 0, device=images.device)
            with backend(name):
                return made[key].reconstruct(images, draws)[0]

        return reconstruct

    def make(dtype: torch.dtype, device: str) -> Inputs:
        return (torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device, dtype),)

    providers = {"reference": run("reference"), "auto": run("auto")}
    return Problem(f"reconstruct {preset}", f"{batch}x3x{side}x{side}", make, providers, float("nan"), 100.0)


def problems(names: list[str] | None = None) -> Iterator[Problem]:
    """Every problem, or those whose operator begins with one of ``names``."""
    every = [
        _plain(16, 16, 197, 32),
        _plain(64, 12, 50, 64),
        _plain(512, 4, 65, 24),
        _plain(1024, 4, 17, 32),
        _plain(144, 3, 65, 32),  # impure_tiny: 18 tiles, both passes, K = 4
        _plain(72, 2, 257, 32),
        _plain(72, 2, 257, 32, queries=64),
        _shared(18, 4, 256, 2, 32),
        _shared(4, 4, 196, 16, 32),  # the released network's first decoder block
        _network("impure_base_patch16_224", 1, 224),
        _network("impure_base_patch16_224", 4, 224),
        _network("impure_tiny", 9, 64),
    ]
    return (p for p in every if names is None or any(p.op.startswith(name) for name in names))
