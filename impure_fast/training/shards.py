"""Adversarial pairs as WebDataset shards: KEY.adv.png, KEY.clean.jpg and KEY.cls of every picture classified right.

Shard s holds those of the pictures s * size to (s + 1) * size: a function of the recipe and s alone, so a run that was
killed goes on with the shards that are missing, and the folder ends up the same.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..attacks import attack, parse
from ..errors import InputError
from ..images import Labelled, Pixels, decode, encode_png, write_atomically, write_text
from ..purify import to_bytes, to_float


def write_shards(
    folder: str | Path,
    pictures: Sequence[Labelled],
    classifier: nn.Module,
    prepare: Callable[[Pixels], Pixels],
    text: str,
    *,
    recipe: dict[str, Any],
    size: int = 100,
    seed: int = 0,
    batch: int = 32,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Make (or finish) the shards of one attack in ``folder``; returns how many pairs they hold.

    classifier: [N, 3, S, S] in [0, 1] -> logits, in eval mode; prepare: a picture [H, W, 3] -> uint8 [S, S, 3].
    text: the attack as ``attacks.parse`` takes it, with its eps; size: pictures looked at for each shard.
    recipe: what else the result depends on, kept in attack.json with the rest; progress counts pictures.
    Raises InputError for a folder of another recipe, pictures of several sizes or labels that no class has.
    """
    name, parameters = parse(text)
    folder, total = Path(folder), len(pictures)
    _check(folder, recipe | dict(attack=text, pictures=total, size=size, seed=seed, batch=batch))
    for stale in folder.glob(".impure-fast-*.tar"):  # of a run that was killed as it wrote
        stale.unlink()

    def files(start: int) -> dict[str, bytes]:
        part = pictures[start : start + size]
        clean = [prepare(picture.rgb()) for picture in part]
        if len(sizes := {picture.shape[:2] for picture in clean}) > 1:
            raise InputError(f"The pictures have several sizes {sizes}, and this classifier does not say its own.")
        images = to_float(np.stack(clean)).to(device)
        labels = torch.tensor([picture.label for picture in part], device=device)
        with torch.no_grad():
            logits = torch.cat([classifier(x) for x in images.split(batch)])
        if int(labels.max()) >= logits.shape[1]:
            raise InputError(
                f"There is a label {int(labels.max())}, but the classifier knows {logits.shape[1]} classes."
            )
        right = (logits.argmax(dim=1) == labels).nonzero()[:, 0]
        options: dict[str, Any] = dict(parameters, batch=batch, progress=lambda done, _: progress(start + done, total))
        options["seed"] = int(np.random.default_rng([seed, start // size]).integers(2**31))
        attacked = attack(name, classifier, images[right], labels[right], **options) if len(right) else images[:0]
        found = {}
        for i, adversarial in zip(right.tolist(), to_bytes(attacked), strict=True):
            key = f"{start + i:08d}"
            found[f"{key}.adv.png"] = encode_png(adversarial)
            found[f"{key}.clean.jpg"] = _exact(part[i].file(), clean[i])
            found[f"{key}.cls"] = str(part[i].label).encode()
        return found

    kept = 0
    for start in range(0, total, size):
        path = folder / f"{start // size:06d}.tar"
        if not path.exists():
            write_atomically(path, partial(write_tar, files(start)))
        with tarfile.open(path) as archive:
            kept += len(archive.getnames()) // 3
        progress(min(start + size, total), total)
    return kept


def _check(folder: Path, recipe: dict[str, Any]) -> None:
    """Keep the recipe, or hold it to the one that is there."""
    path = folder / "attack.json"
    text = json.dumps(recipe, indent=1) + "\n"
    if path.exists() and path.read_text() != text:
        raise InputError(f"{folder} holds shards of another recipe ({path.name}); choose another folder.")
    write_text(path, text)


def _exact(file: bytes, clean: Pixels) -> bytes:
    """The file itself if it is a JPEG that decodes to exactly ``clean``; else a PNG, as the authors' clean.jpg are:
    readers go by the content, and adv - clean stays the perturbation."""
    if file.startswith(b"\xff\xd8") and np.array_equal(decode(file), clean):
        return file
    return encode_png(clean)


def write_tar(files: dict[str, bytes], path: str | Path) -> None:
    """Equal files, {name: content}, give equal bytes."""
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)  # no time, no owner
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
