"""``impure-fast attack``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .common import Device, check_device, own_modules, progress_bar


def attack(
    data: Annotated[str, typer.Option(metavar="PATH", help="Packed npz, shards, or a folder with a folder a class.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Gets a folder for each attack.")],
    attacks: Annotated[
        list[str] | None, typer.Option("--attack", help="NAME,KEY=VALUE,...; may repeat. Unset: the authors' nine.")
    ] = None,
    eps: Annotated[float, typer.Option(min=0, max=255, help="In 1/255; where an attack does not say its own.")] = 16,
    classifier: Annotated[str, typer.Option(help="A name of evaluate's, or NAME=FILE.")] = "lite0",
    images: Annotated[int | None, typer.Option(min=1, help="The first so many pictures. Unset: all.")] = None,
    shard: Annotated[int, typer.Option(min=1, help="Pictures looked at for a shard.")] = 100,
    batch: Annotated[int, typer.Option(min=1, help="Pictures attacked at once.")] = 32,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Device = "cpu",
) -> None:
    """Attack a classifier and keep the pairs as WebDataset shards, for training and evaluation.

    A shard holds KEY.adv.png, KEY.clean.jpg (which decodes to exactly the
    picture that was attacked) and KEY.cls of each picture that the classifier
    gets right. Attacks and parameters are those of impure_fast.attacks, eps and
    step_size in 1/255: pgd,steps=10,step_size=2,eps=8. Ctrl-C stops; the same
    command goes on.
    """
    import torch

    from ..attacks import AUTHORS, parse
    from ..evaluation.targets import digest, labelled, load_target
    from ..training.shards import write_shards

    own_modules()
    check_device(device)
    target = load_target(classifier)
    pictures = labelled(data, images or sys.maxsize)
    labels = digest(torch.tensor([picture.label for picture in pictures]))
    recipe = dict(classifier=target.name, weights=digest(target.model), data=Path(data).name, labels=labels)
    with progress_bar() as progress:
        for text in attacks or AUTHORS:
            text = text if "eps" in parse(text)[1] else f"{text},eps={eps:g}"
            task = progress.add_task(text, total=len(pictures))
            kept = write_shards(
                output / text,
                pictures,
                target.model.to(device),
                target.prepare,
                text,
                recipe=recipe,
                size=shard,
                seed=seed,
                batch=batch,
                device=device,
                progress=lambda done, total, task=task: progress.update(task, completed=done),  # type: ignore[misc]
            )
            typer.echo(f"{output / text}: {kept} pairs of {len(pictures)} pictures")
