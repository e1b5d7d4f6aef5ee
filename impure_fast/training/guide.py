"""A frozen network as guide: images in [0, 1] -> the features of some of its modules, and no work beyond the last."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..errors import ConfigError


class _EnoughError(Exception):
    """Leaves the network once every node has given its features."""


class Guide:
    """images in [0, 1] -> {node: features of its first call}, in the order of ``nodes``.

    network: takes [0, 1] images (``classifiers.Normalised``).  It is copied, frozen and put in eval mode, and batch
        norms join the convolutions before them, whose outputs backward then does without.
    nodes: dotted names of its modules.  Hooks, because timm's padding layers cannot be traced into a shorter network.
    side: of the pictures to come; one of zeros finds the order of the modules.
    Raises ConfigError for a node that is no module, or that is never called.
    """

    def __init__(self, network: nn.Module, nodes: Sequence[str], side: int = 224) -> None:
        self.nodes, self._features = tuple(nodes), dict[str, Tensor]()
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        modules = dict(self.network.named_modules())
        if missing := [node for node in nodes if node not in modules]:
            raise ConfigError(f"guide_nodes {missing} are no modules of the guide network.")
        _fold(self.network, nodes, side)
        modules |= dict(self.network.named_modules())  # a batch norm's place may hold its activation now
        for node in nodes:
            modules[node].register_forward_hook(self._keep(node))

    def _keep(self, node: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if node in self._features:
                return
            last = len(self._features) + 1 == len(self.nodes)
            self._features[node] = output if last else output.clone()  # what follows may work in place
            if last:
                raise _EnoughError

        return hook

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        with suppress(_EnoughError):
            self.network(images)
        features, self._features = self._features, {}
        if missing := [node for node in self.nodes if node not in features]:
            raise ConfigError(f"guide_nodes {missing} are never called by the guide network.")
        return {node: features[node] for node in self.nodes}


def _fold(network: nn.Module, nodes: Sequence[str], side: int) -> None:
    """Join batch norms to the convolutions whose outputs they take; convolutions among ``nodes`` stay."""
    names = {module: name for name, module in network.named_modules()}
    made: dict[int, nn.Conv2d] = {}
    alive: list[Tensor] = []  # lest an address comes again
    pairs: list[tuple[nn.Conv2d, nn.modules.batchnorm._BatchNorm]] = []

    def convolved(module: nn.Module, inputs: Any, output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        alive.append(output)
        made[id(output)] = module

    def normed(module: nn.Module, inputs: Any) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        if (before := made.get(id(inputs[0]))) is not None and names[before] not in nodes:
            pairs.append((before, module))

    hooks = [m.register_forward_hook(convolved) for m in names if isinstance(m, nn.Conv2d)]
    hooks += [m.register_forward_pre_hook(normed) for m in names if isinstance(m, nn.BatchNorm2d)]
    device = next((p.device for p in network.parameters()), None)
    with torch.no_grad():
        network(torch.zeros(1, 3, side, side, device=device))
    for hook in hooks:
        hook.remove()
    once = [pair for pair in pairs if sum(pair[0] is c or pair[1] is b for c, b in pairs) == 1]
    for convolution, norm in once:
        network.set_submodule(names[convolution], fuse_conv_bn_eval(convolution, norm))
        # timm's batch norms hold their activation.
        rest = [m for m in (getattr(norm, "drop", None), getattr(norm, "act", None)) if m is not None]
        network.set_submodule(names[norm], nn.Sequential(*rest))
