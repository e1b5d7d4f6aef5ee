"""A ``PurifiedClassifier`` as attack libraries want it: images in [0, 1] -> logits, whatever they do to its modes.

For torchattacks, AutoAttack, foolbox and ``impure_fast.attacks``.  Give these libraries no normalisation of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..purify import PurifiedClassifier, expected_logits

GRADIENTS = ("exact", "identity")


class Attackable(nn.Module):
    """The pipeline under attack.

    gradient: "exact" differentiates through the purifier; "identity" (BPDA) takes the purified image forward and the
        identity backward, for defences without a gradient.
    eot: calls a forward, each with fresh draws where the pipeline is random; the logits returned are the logarithm of
        the mean probability, so that any attack becomes one on the expectation.  1 returns the logits themselves.

    Stays in eval mode: torchattacks puts a model that was training into train mode throughout.
    Raises InputError for options that cannot be.
    """

    def __init__(self, pipeline: PurifiedClassifier, *, gradient: str = "exact", eot: int = 1) -> None:
        super().__init__()
        if gradient not in GRADIENTS:
            raise InputError(f"gradient={gradient!r}: wanted one of {GRADIENTS}.")
        if eot < 1:
            raise InputError(f"eot={eot}: wanted at least 1.")
        self.pipeline, self.gradient, self.eot = pipeline, gradient, eot
        self.eval()

    def train(self, mode: bool = True) -> Attackable:
        """Does nothing but keep eval mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """images: [N, 3, H, W] in [0, 1] -> logits [N, classes]."""
        logits = self._logits(images.repeat(self.eot, 1, 1, 1))
        return logits if self.eot == 1 else expected_logits(logits.unflatten(0, (self.eot, -1)))

    def _logits(self, images: Tensor) -> Tensor:
        if self.gradient == "exact":
            return self.pipeline(images)
        logits = []
        for sample in range(self.pipeline.samples):
            with torch.no_grad():
                change = self.pipeline.purify(images, sample) - images
            logits.append(self.pipeline.classify(images + change))
        return torch.stack(logits).mean(dim=0)
