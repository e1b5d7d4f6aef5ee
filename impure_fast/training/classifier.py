"""Fine-tune a classifier on packed pictures, so that a study's classifiers can be made again from one command."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import Error, InputError
from ..evaluation.targets import Pictures, Target
from ..purify import to_float


def finetune(
    target: Target,
    pictures: Pictures,
    *,
    epochs: int,
    lr: float = 0.02,
    batch: int = 128,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[int, int, float], None] = lambda done, total, loss: None,
) -> None:
    """Train ``target.model`` in place: SGD (Nesterov 0.9, decay 5e-4), cosine, pictures mirrored and shifted by up to
    an eighth of their side; BatchNorm learns too.  Leaves it in eval mode and frozen.

    A function of the seed.  progress(steps done, of all, loss).
    Raises InputError for labels that the classifier does not know, Error where the loss is not finite.
    """
    model = target.model.to(device).train().requires_grad_(True)
    optimiser = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    n = len(pictures.labels)
    per_epoch = math.ceil(n / batch)
    total = epochs * per_epoch
    for step in range(total):
        epoch, place = divmod(step, per_epoch)
        rng = np.random.default_rng([seed, step])
        which = np.random.default_rng([seed, 1 << 32, epoch]).permutation(n)[place * batch : (place + 1) * batch]
        labels = pictures.labels[which].to(device)
        logits = model(_augment(to_float(pictures.clean[which]), rng).to(device))
        logits = logits[0] if isinstance(logits, tuple) else logits  # torchvision's Inception adds its helpers'
        if int(labels.max()) >= logits.shape[1]:
            raise InputError(f"label {int(labels.max())}: {target.name} knows {logits.shape[1]} classes.")
        loss = F.cross_entropy(logits, labels)
        for group in optimiser.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / total))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if not math.isfinite(value := loss.item()):
            raise Error(f"The loss is {value} at step {step}; try a lower --lr than {lr}.")
        progress(step + 1, total, value)
    model.eval().requires_grad_(False)


def _augment(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Each picture mirrored or not, and shifted into black."""
    n, _, side, _ = images.shape
    most = side // 8
    padded = F.pad(images, [most] * 4)
    down, right = rng.integers(2 * most + 1, size=(2, n))
    shifted = [padded[i, :, d : d + side, r : r + side] for i, (d, r) in enumerate(zip(down, right, strict=True))]
    mirrored = torch.from_numpy(rng.random(n) < 0.5).view(-1, 1, 1, 1)
    stacked = torch.stack(shifted)
    return torch.where(mirrored, stacked.flip(3), stacked)
