"""What a training step holds in memory, part by part: counted on fake tensors, so before the first step and at no cost.

Activations are what autograd keeps between forward and backward, each storage once, where it is first kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from ..memory import POLICIES, kept_by
from ..model import IMPure
from .config import OPTIMIZERS, TrainConfig
from .loop import Networks, draw, step_losses

if TYPE_CHECKING:
    from rich.table import Table

REST = "rest of the network"


@contextlib.contextmanager
def count_kept(parts: Mapping[str, nn.Module], owned: Iterable[Tensor]) -> Iterator[dict[str, int]]:
    """{part: bytes kept for backward} of what runs within; what no part's forward keeps is ``REST``.

    owned: tensors that are there anyhow, weights and inputs; they do not count.
    """
    seen = {x.untyped_storage()._cdata: x for x in owned}  # holds the tensors, lest an address comes again
    bytes_of, inside = dict.fromkeys([*parts, REST], 0), [REST]

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = x
            bytes_of[inside[-1]] += storage.nbytes()
        return x

    def leave(*_: Any) -> None:
        inside.pop()

    hooks = []
    for name, module in parts.items():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
        hooks.append(module.register_forward_hook(leave, always_call=True))  # a guide leaves by an exception
    try:
        with saved_tensors_hooks(pack, lambda x: x):
            yield bytes_of
    finally:
        for hook in hooks:
            hook.remove()


def blocks_of(model: IMPure) -> dict[str, nn.Module]:
    """{"encoder block 0": module, ...}."""
    groups = {"encoder": model.blocks, "decoder": model.decoder_blocks}
    return {f"{name} block {b}": block for name, blocks in groups.items() for b, block in enumerate(blocks)}


def _moment(parameter: Tensor, optimizer: str) -> int:
    """Bytes of one of AdamW's two moments.  torchao keeps small ones whole; others are codes of a byte, one scale for
    256 of them and a table of 256 values.
    """
    count = parameter.numel()
    if optimizer == "adamw8bit" and count >= 4096 and count % 256 == 0:
        return count + 4 * count // 256 + 4 * 256
    return size_of([parameter])


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes."""
    return sum(x.numel() * x.element_size() for x in tensors)


@dataclass(frozen=True)
class Plan:
    """Bytes a process holds.

    fixed: {"weights", "gradients", "optimizer", "running average", "guide weights"}.
    activations: {policy: {part: bytes}}; memory: the policy of the run; optimizers: {name: bytes}.
    """

    fixed: dict[str, int]
    activations: dict[str, dict[str, int]]
    memory: str
    optimizers: dict[str, int]

    def again(self, policy: str) -> int:
        """At most so much is computed again at once: the largest block's results that ``policy`` does not keep."""
        whole, kept = self.activations["all"], self.activations[policy]
        return max(whole[part] - kept[part] for part in whole)

    def total(self, policy: str) -> int:
        """All of it, while backward stands in the largest block."""
        return sum(self.fixed.values()) + sum(self.activations[policy].values()) + self.again(policy)

    def tables(self) -> tuple[Table, Table]:
        """What the run holds, and what another policy would save; in MiB."""
        from rich.table import Column, Table

        def mib(count: int) -> str:
            return f"{count / 2**20:,.1f}"

        held = Table("held through a step", "MiB")
        for name, count in (self.fixed | self.activations[self.memory]).items():
            held.add_row(name, mib(count))
        switches = Table(Column("memory", no_wrap=True), "kept for backward", "again at once", "in all", "saves")
        for policy, parts in self.activations.items():
            name = f"{policy} (this run)" if policy == self.memory else policy
            figures = (sum(parts.values()), self.again(policy), self.total(policy))
            switches.add_row(name, *map(mib, figures), mib(self.total(self.memory) - self.total(policy)))
        batch = sum(self.activations[self.memory].values()) // 2
        eight = self.fixed["optimizer"] - self.optimizers["adamw8bit"]
        switches.caption = (
            f"half the batch saves about {mib(batch)}, ema=0 {mib(self.fixed['running average'])}, "
            f"optimizer=adamw8bit {mib(eight)}"
        )
        return held, switches


def plan(networks: Networks, config: TrainConfig, processes: int = 1) -> Plan:
    """The ledger of one process's step; ``networks`` lie on the device of the run and are not changed.

    Of several ``crops`` the one with most pixels counts.  The attack of ``attack_steps`` goes before the step and is
    not counted.
    """
    for crop, batch in sorted(config.crops, key=lambda pair: pair[0] ** 2 * pair[1])[-1:]:
        config = replace(config, crop=crop, batch=batch, crops=())
    model = networks.model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = {name: 2 * sum(_moment(p, name) for p in trained) for name in OPTIMIZERS}
    fixed = {
        "weights": size_of((*model.parameters(), *model.buffers())),
        "gradients": size_of(trained),
        "optimizer": optimizers[config.optimizer],
        "running average": size_of(model.parameters()) if config.ema else 0,
        **{f"{name} weights": size_of((*m.parameters(), *m.buffers())) for name, m in networks.judges().items()},
    }
    batch = config.batch // (processes * config.accumulate) * (2 if config.attack_steps else 1)
    before = model.kept
    try:
        activations = {}
        for policy in dict.fromkeys((*POLICIES, config.memory)):
            model.kept = kept_by(policy)
            activations[policy] = _activations(networks, config, batch)
    finally:
        model.kept = before
    return Plan(fixed, activations, config.memory, optimizers)


def _activations(networks: Networks, config: TrainConfig, batch: int) -> dict[str, int]:
    model, judges = networks.model, networks.judges()
    device = next(model.parameters()).device
    draws, mixing = draw(config, model.config, range(batch), 0, device)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake: Callable[[Tensor], Tensor] = mode.from_tensor
        images, clean = torch.empty(2, batch, 3, config.crop, config.crop, device=device)
        owned = [t for m in (model, *judges.values()) for t in (*m.parameters(), *m.buffers())]
        with count_kept(blocks_of(model) | judges, [*map(fake, owned), *owned, images, clean]) as kept:
            step_losses(networks, config, images, clean, draws, mixing)
    return kept
