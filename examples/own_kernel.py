"""A kernel of your own as a benchmark provider: a function with the operator's name and arguments.

python -m benchmarks run --ops order --providers reference,examples/own_kernel.py

The suite checks it against the reference in float64 before it is timed; a wrong result gets a row that says so.
"""

import torch
from torch import Tensor


def order(uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Rank by counting in place of a sort: [N, L] -> (permutation [N, L], its inverse); ties go by place."""
    place = torch.arange(uniforms.shape[1], device=uniforms.device)
    mine, other = uniforms[:, :, None], uniforms[:, None, :]
    before = (other < mine) | ((other == mine) & (place[None, :] < place[:, None]))
    ranks = before.sum(dim=2)
    return torch.empty_like(ranks).scatter(1, ranks, place.expand_as(ranks)), ranks
