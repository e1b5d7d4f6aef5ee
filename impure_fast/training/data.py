"""Training data: packed photographs, and adversarial views of them.

Packed form (``impure-fast data``): an npz with ``jpeg`` (uint8, all JPEG files one after another),
``offsets`` (int64, n + 1) and ``labels`` (int64, -1 where unknown).  Nothing in it is pickled.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ..errors import InputError, MissingFileError


class PackedImages:
    """Read access to a packed npz: ``len``, ``images[i]`` -> uint8 [H, W, 3], ``labels``."""

    def __init__(self, path: str | Path) -> None:
        if not Path(path).is_file():
            raise MissingFileError(f"{path} does not exist; `impure-fast data` packs a folder of images.")
        try:
            with np.load(path, allow_pickle=False) as file:
                self._jpeg, self._offsets, self.labels = file["jpeg"], file["offsets"], file["labels"].astype(np.int64)
        except (KeyError, ValueError, OSError) as error:
            raise InputError(f"{path} is no packed image file (jpeg, offsets, labels): {error}") from error

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> NDArray[np.uint8]:
        data = self._jpeg[self._offsets[i] : self._offsets[i + 1]].tobytes()
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def to_float(images: NDArray[np.uint8]) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(255)


def random_view(image: NDArray[np.uint8], side: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A random square crop of 70 to 100 % of the short side, scaled to ``side`` (bicubic), mirrored at random."""
    height, width = image.shape[:2]
    crop = int(min(height, width) * rng.uniform(0.7, 1.0))
    top, left = rng.integers(height - crop + 1), rng.integers(width - crop + 1)
    view = Image.fromarray(image[top : top + crop, left : left + crop]).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(view)[:, :: -1 if rng.random() < 0.5 else 1]


Attack = Callable[[nn.Module, float], Callable[[Tensor, Tensor], Tensor]]


def pgd(classifier: nn.Module, eps: float, steps: int = 6) -> Callable[[Tensor, Tensor], Tensor]:
    """torchattacks' PGD with a step of 2 eps / steps."""
    import torchattacks

    return torchattacks.PGD(classifier, eps=eps, alpha=2 * eps / steps, steps=steps)


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
    Results are rounded to 8 bits.
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
        x = to_float(views)
        with torch.no_grad():
            labels = classifier(x).argmax(dim=1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 1_000_003 + start)
            attacked = pgd(classifier, float(rng.uniform(*eps)))(x, labels)
        arrays[0][start:stop] = views
        arrays[1][start:stop] = (attacked * 255).round().byte().permute(0, 2, 3, 1).numpy()
        state.write_text(json.dumps({"recipe": recipe, "done": stop}))
        progress(stop, count)
    return Pairs(arrays[0], arrays[1])


def batches(pairs: Pairs, *, batch: int, crop: int, seed: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (input, clean) batches, float [batch, 3, crop, crop]; step ``start`` on is a function of the seed.

    An image is adversarial (60 %), clean (25 %) or carries sign noise of 2 to 14/255 (15 %); adversarial
    perturbations are scaled by 0.4 to 1.1.  Crops are random, the same for both.
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
            if kind < 0.6:
                change = (pairs.adversarial[i][window].astype(np.float32) / 255 - clean) * rng.uniform(0.4, 1.1)
            elif kind < 0.75:
                change = rng.choice([-1, 1], clean.shape) * rng.uniform(2 / 255, 14 / 255)
            else:
                change = 0
            mirror = slice(None, None, -1 if rng.random() < 0.5 else 1)
            cleans.append(clean[:, mirror])
            inputs.append((clean + change).clip(0, 1)[:, mirror])
        x, y = (
            torch.from_numpy(np.stack(a).astype(np.float32)).permute(0, 3, 1, 2).contiguous() for a in (inputs, cleans)
        )
        yield x, y
        step += 1
