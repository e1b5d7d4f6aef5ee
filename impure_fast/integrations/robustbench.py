"""The pipeline by RobustBench's contract: a deterministic function of images in [0, 1] with gradients and no loops.

    model = robustbench_model(classifier, imp.load("impure_tiny"), mean=mean, std=std)
    robustbench.eval.benchmark(model, dataset="imagenet", threat_model="Linf", eps=4 / 255)

RobustBench itself is installed from its repository; its release on the package index pins an old timm and has no
``benchmark``.  It ranks deterministic defences only: report the pipeline with fresh draws beside it
(``impure-fast evaluate --suite ladder``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..purify import PurifiedClassifier


def robustbench_model(
    classifier: nn.Module, purifier: nn.Module, *, mean: Sequence[float], std: Sequence[float], **options: Any
) -> PurifiedClassifier:
    """[N, 3, H, W] in [0, 1] -> logits: one fixed seed, the same draws for every image, eval mode, frozen.

    options: further ones of ``PurifiedClassifier`` but ``mode``.  The parameters of both networks stop asking for
    gradients; the image keeps its own.
    """
    pipeline = PurifiedClassifier(classifier, purifier, mean=mean, std=std, mode="deterministic", **options)
    return pipeline.eval().requires_grad_(False)
