"""What the network keeps for its backward pass and what it computes again: a policy is a set of kept names.

A block is a chain of steps, each named by its result.  Between two kept results the steps are one checkpoint, of
which only the input is stored; its last step is not run again, for a linear layer saves its input alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .errors import ConfigError
from .ops._dispatch import backend, wished

# Results of a block's steps: 1, 3, 1, 1, 1, 4 and 4 of its widths a token.  A block's input is always kept.
RESULTS = ("norm1", "qkv", "attention", "middle", "norm2", "fc1", "gelu")
# "sides": what is outside the blocks, the encoder's side outputs and the linear layers round the decoder.
ALL = frozenset(RESULTS) | {"sides"}
POLICIES: dict[str, frozenset[str]] = {
    "all": ALL,
    "default": ALL - {"norm1", "norm2", "gelu"},
    "tight": frozenset({"middle"}),
    "minimal": frozenset(),
}

State = tuple[Tensor, ...]
Step = Callable[..., State]


def kept_by(policy: str | Set[str]) -> frozenset[str]:
    """The names that a policy keeps, by its own name or given as a set.  Raises ConfigError."""
    if isinstance(policy, str):
        if policy in POLICIES:
            return POLICIES[policy]
    elif policy <= ALL:
        return frozenset(policy)
    raise ConfigError(f"memory={policy!r}: wanted one of {', '.join(POLICIES)}, or a set of {', '.join(sorted(ALL))}.")


def run_steps(steps: Sequence[Step], kept: Set[str], *state: Tensor) -> State:
    """A block's ``steps`` in turn, each taking the state of the one before; all but the last give ``RESULTS``."""
    piece: list[Step] = []
    for name, step in zip((*RESULTS, "output"), steps, strict=True):
        piece.append(step)
        if name in kept or name == "output":
            state = again(_joined(piece), *state, kept=len(piece) == 1)
            piece = []
    return state


def _joined(steps: Sequence[Step]) -> Step:
    def run(*state: Tensor) -> State:
        for step in steps:
            state = step(*state)
        return state

    return run


def again(function: Callable[..., Any], *inputs: Tensor, kept: bool = False) -> Any:
    """``function(*inputs)``; unless ``kept``, backward computes it again from its inputs.  It must draw nothing."""
    if kept or not torch.is_grad_enabled():
        return function(*inputs)
    wish = wished()  # a context's wish has ended when backward runs, and does not reach autograd's threads

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), backend(wish)

    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
