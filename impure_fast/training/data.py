"""Training data: clean and adversarial views on disk, made or taken from elsewhere, and the batches drawn from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..attacks import pgd
from ..errors import InputError
from ..evaluation.targets import digest
from ..images import PackedImages, decode, find_images, random_view, read_shard, shards_of, write_text
from ..purify import to_bytes, to_float

NAMES = ("clean", "adversarial")


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
    device: str = "cpu",
) -> Pairs:
    """Make (or finish, or just open) ``count`` random views and their PGD images against ``classifier``.

    classifier, on ``device``, takes [0, 1]; its own decision on the clean view is the label, so no annotation is used.
    Each batch draws its eps uniformly and is a function of seed and batch number, so a killed run goes on.
    Results are rounded to 8 bits.  eps=(0, 0) attacks nothing, and both are the clean views, stored once.
    """
    recipe = dict(count=count, side=side, seed=seed, eps=eps, batch=batch, images=len(images), data=images.digest())
    recipe |= {"classifier": digest(classifier)} if any(eps) else {}
    store, done = _open(Path(folder), recipe, NAMES if any(eps) else NAMES[:1])
    for start in range(done, count, batch):
        stop = min(start + batch, count)
        rng = np.random.default_rng([seed, start])
        order = np.random.default_rng([seed, 1 << 32, start // len(images)])
        which = order.permutation(len(images))
        views = np.stack([random_view(images[which[i % len(images)]], side, rng) for i in range(start, stop)])
        store.clean[start:stop] = views
        if any(eps):
            size = float(rng.uniform(*eps))
            x = to_float(views).to(device)
            with torch.no_grad():
                labels = classifier(x).argmax(dim=1)
            own_seed = seed * 1_000_003 + start
            attacked = pgd(classifier, x, labels, eps=size, steps=6, step_size=size / 3, seed=own_seed, batch=batch)
            store.adversarial[start:stop] = to_bytes(attacked)
        _note(Path(folder), recipe, stop, store)
        progress(stop, count)
    return store


def stored_pairs(
    folder: str | Path,
    source: str | Path,
    *,
    count: int,
    side: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Pairs:
    """Take (or finish, or just open) the first ``count`` pairs of ``source``, attacked elsewhere.

    source: a folder of WebDataset shards (*.tar with KEY.adv.png and KEY.clean.jpg; others are passed over), or with
        the sub-folders adv and clean, whose files have the same names but for the suffix.
    The same random window of ``side`` pixels is cut from both.  Raises InputError naming the pair that does not fit.
    """
    recipe = dict(count=count, side=side, seed=seed, source=str(source))
    store, done = _open(Path(folder), recipe, NAMES)
    for i, (key, clean, adversarial) in enumerate(_files(Path(source)) if done < count else ()):
        if i < done:
            continue
        rgb = _decode(key, clean), _decode(key, adversarial)
        height, width = rgb[0].shape[:2]
        if rgb[0].shape != rgb[1].shape or min(height, width) < side:
            raise InputError(f"{key}: clean {rgb[0].shape[:2]}, adv {rgb[1].shape[:2]}; wanted one size from {side}.")
        rng = np.random.default_rng([seed, i])
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        store.clean[i], store.adversarial[i] = (x[top : top + side, left : left + side] for x in rgb)
        done = i + 1
        if done % 64 == 0 or done == count:
            _note(Path(folder), recipe, done, store)
        progress(done, count)
        if done == count:
            break
    if done < count:
        raise InputError(f"{source} holds {done} pairs; pairs={count} asks for more.")
    return store


def _files(source: Path) -> Iterator[tuple[str, bytes, bytes]]:
    """(key, clean, adversarial) of every pair of ``source``."""
    for shard in shards_of(source):
        for key, parts in read_shard(shard):
            if {"clean", "adv"} <= parts.keys():
                yield f"{shard}/{key}", parts["clean"], parts["adv"]
    if (source / "clean").is_dir():
        attacked = {relative.with_suffix(""): path for path, relative in find_images([source / "adv"], recursive=True)}
        for path, relative in find_images([source / "clean"], recursive=True):
            if (other := attacked.get(relative.with_suffix(""))) is not None:
                yield str(path), path.read_bytes(), other.read_bytes()


def _decode(key: str, data: bytes) -> NDArray[np.uint8]:
    try:
        return decode(data)
    except OSError as error:
        raise InputError(f"{key} holds a picture that cannot be read: {error}.") from error


def _open(folder: Path, recipe: dict[str, Any], names: Sequence[str]) -> tuple[Pairs, int]:
    """The arrays in ``folder``, made if missing, and how many pairs they hold already; one array may be both."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = (recipe["count"], recipe["side"], recipe["side"], 3)
    for name in names:
        if not (path := folder / f"{name}.npy").exists():
            np.lib.format.open_memmap(path, "w+", np.uint8, shape).flush()
    done = 0
    if (state := folder / "pairs.json").exists():
        stored = json.loads(state.read_text())
        if stored["recipe"] != json.loads(json.dumps(recipe)):
            raise InputError(f"{folder} holds pairs of another recipe ({stored['recipe']}); choose another folder.")
        done = stored["done"]
    arrays = [np.load(folder / f"{name}.npy", mmap_mode="r+") for name in names]
    return Pairs(arrays[0], arrays[-1]), done


def _note(folder: Path, recipe: dict[str, Any], done: int, store: Pairs) -> None:
    """Keep how many pairs are stored, once they are."""
    for array in (store.clean, store.adversarial):
        if isinstance(array, np.memmap):
            array.flush()
    write_text(folder / "pairs.json", json.dumps({"recipe": recipe, "done": done}))


class Batches(Dataset[tuple[list[int], Tensor, Tensor]]):
    """Step -> the places of all its pairs, and this process's share of its inputs and clean pictures.

    config: the run's ``TrainConfig``.  A function of (seed, step).  Inputs and clean pictures are float
    [batch / world, 3, crop, crop] in [0, 1].  Of the inputs a share ``adversarial`` carries its perturbation, scaled
    by ``strength``, a share ``noisy`` sign noise of 2 to 14/255, and the rest nothing.  Crops are random, the same for
    both.
    """

    def __init__(self, pairs: Pairs, config: Any, rank: int = 0, world: int = 1) -> None:
        self.pairs, self.config, self.rank, self.world = pairs, config, rank, world

    def __getitem__(self, step: int) -> tuple[list[int], Tensor, Tensor]:
        config, pairs = self.config.at(step), self.pairs
        n, side = pairs.clean.shape[:2]
        rng = np.random.default_rng([config.seed, step])
        epoch, place = divmod(step * config.batch, n - n % config.batch)
        which = np.random.default_rng([config.seed, 1 << 32, epoch]).permutation(n)[place : place + config.batch]
        inputs, cleans = [], []
        for place, i in enumerate(which):
            top, left = rng.integers(side - config.crop + 1, size=2)
            window = np.s_[top : top + config.crop, left : left + config.crop]
            kind, change = rng.random(), np.zeros(())
            if kind < config.adversarial:
                factor = rng.uniform(*config.strength)
            elif kind < config.adversarial + config.noisy:
                change = rng.choice([-1, 1], (config.crop, config.crop, 3)) * rng.uniform(2 / 255, 14 / 255)
            mirror = slice(None, None, -1 if rng.random() < 0.5 else 1)
            if place * self.world // config.batch != self.rank:
                continue  # its draws alone were wanted
            clean = pairs.clean[i][window].astype(np.float32) / 255
            if kind < config.adversarial:
                change = (pairs.adversarial[i][window].astype(np.float32) / 255 - clean) * factor
            cleans.append(clean[:, mirror])
            inputs.append((clean + change).clip(0, 1)[:, mirror])
        x, y = (
            torch.from_numpy(np.stack(a).astype(np.float32)).permute(0, 3, 1, 2).contiguous() for a in (inputs, cleans)
        )
        return which.tolist(), x, y
