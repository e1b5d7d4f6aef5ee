"""Attacks on a classifier that takes images in [0, 1]: library attacks behind one face, seeded and rounded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import MissingExtraError


def pgd(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int,
    step_size: float,
    seed: int,
    batch: int = 20,
) -> Tensor:
    """Untargeted L-inf PGD with a random start (torchattacks), then rounded to 8 bits as an image file would be.

    images: [N, 3, H, W] in [0, 1]; labels: [N] int64; eps, step_size in the images' units.
    The global generator is left as it was.  Raises MissingExtraError without torchattacks.
    """
    try:
        import torchattacks
    except ImportError as error:
        raise MissingExtraError('Attacks need the extra "attack": pip install "impure-fast[attack]".') from error
    attack = torchattacks.PGD(classifier, eps=eps, alpha=step_size, steps=steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pairs = zip(images.split(batch), labels.split(batch), strict=True)
        return torch.cat([(attack(x, y) * 255).round() / 255 for x, y in pairs])
