"""Training data: adversarial views of packed photographs, on disk, and the batches drawn from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..attacks import pgd
from ..errors import InputError
from ..images import PackedImages, random_view
from ..purify import to_bytes, to_float


@dataclass
class Pairs:
    """Clean and adversarial views on disk: uint8 arrays [n, side, side, 3], memory-mapped."""

    clean: NDArray[np.uint8]
    adversarial: NDArray[np.uint8]


def adversarial_pairs(
    folder: str | Path,
    images: PackedImages,
    classifier: nn.Module,
    *,
    count: int,
    side: int,
    seed: int,
    eps: tuple[float, float] = (2 / 255, 14 / 255),
    batch: int = 10,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Pairs:
    """Make (or finish, or just open) ``count`` random views and their PGD images against ``classifier``.

    classifier takes [0, 1]; its own decision on the clean view is the label, so no annotation is used.
    Each batch draws its eps uniformly and is a function of seed and batch number, so a killed run goes on.
    Results are rounded to 8 bits.  eps=(0, 0) attacks nothing, and both are the clean views.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    recipe = dict(count=count, side=side, seed=seed, eps=eps, batch=batch, images=len(images))
    state = folder / "pairs.json"
    arrays = []
    for name in ("clean", "adversarial"):
        path = folder / f"{name}.npy"
        if not path.exists():
            np.lib.format.open_memmap(path, "w+", np.uint8, (count, side, side, 3)).flush()
        arrays.append(np.load(path, mmap_mode="r+"))
    done = 0
    if state.exists():
        stored = json.loads(state.read_text())
        if stored["recipe"] != json.loads(json.dumps(recipe)):
            raise InputError(f"{folder} holds pairs of another recipe ({stored['recipe']}); choose another folder.")
        done = stored["done"]
    for start in range(done, count, batch):
        stop = min(start + batch, count)
        rng = np.random.default_rng([seed, start])
        order = np.random.default_rng([seed, 1 << 32, start // len(images)])
        which = order.permutation(len(images))
        views = np.stack([random_view(images[which[i % len(images)]], side, rng) for i in range(start, stop)])
        arrays[0][start:stop] = arrays[1][start:stop] = views
        size = float(rng.uniform(*eps))
        if size:
            x = to_float(views)
            with torch.no_grad():
                labels = classifier(x).argmax(dim=1)
            own_seed = seed * 1_000_003 + start
            attacked = pgd(classifier, x, labels, eps=size, steps=6, step_size=size / 3, seed=own_seed)
            arrays[1][start:stop] = to_bytes(attacked)
        state.write_text(json.dumps({"recipe": recipe, "done": stop}))
        progress(stop, count)
    return Pairs(arrays[0], arrays[1])


def batches(
    pairs: Pairs, *, batch: int, crop: int, seed: int, adversarial: float, noisy: float, start: int = 0
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Endless batches (places of the pairs, inputs, clean pictures), the latter float [batch, 3, crop, crop].

    Step ``start`` on is a function of the seed.

    Of the inputs a share ``adversarial`` carries its perturbation, scaled by 0.4 to 1.1, a share ``noisy``
    sign noise of 2 to 14/255, and the rest nothing.  Crops are random, the same for both.
    """
    step = start
    n, side = pairs.clean.shape[:2]
    while True:
        rng = np.random.default_rng([seed, step])
        epoch, place = divmod(step * batch, n - n % batch)
        which = np.random.default_rng([seed, 1 << 32, epoch]).permutation(n)[place : place + batch]
        inputs, cleans = [], []
        for i in which:
            top, left = rng.integers(side - crop + 1, size=2)
            window = np.s_[top : top + crop, left : left + crop]
            clean = pairs.clean[i][window].astype(np.float32) / 255
            kind = rng.random()
            if kind < adversarial:
                change = (pairs.adversarial[i][window].astype(np.float32) / 255 - clean) * rng.uniform(0.4, 1.1)
            elif kind < adversarial + noisy:
                change = rng.choice([-1, 1], clean.shape) * rng.uniform(2 / 255, 14 / 255)
            else:
                change = 0
            mirror = slice(None, None, -1 if rng.random() < 0.5 else 1)
            cleans.append(clean[:, mirror])
            inputs.append((clean + change).clip(0, 1)[:, mirror])
        x, y = (
            torch.from_numpy(np.stack(a).astype(np.float32)).permute(0, 3, 1, 2).contiguous() for a in (inputs, cleans)
        )
        yield which.tolist(), x, y
        step += 1
