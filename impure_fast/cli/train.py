"""``impure-fast train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import check_device, progress_bar


def train(
    data: Annotated[
        Path, typer.Option(metavar="FILE", help="Packed images (impure-fast data), or a folder of attacked pairs.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="A new folder, or a run to go on with.")
    ],
    config: Annotated[
        Path | None, typer.Option(metavar="JSON", help="Fields of TrainConfig; the options below go before them.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Preset name.")] = None,
    init: Annotated[str | None, typer.Option(metavar="FILE", help="Weights to begin from.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Pictures a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    memory: Annotated[str | None, typer.Option(help="Kept for backward: all, default, tight or minimal.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show what a step holds in memory, and train nothing.")] = False,
    device: Annotated[str, typer.Option(help="As torch names it.")] = "cpu",
) -> None:
    """Train a purifier against attacks on EfficientNet-Lite0; Ctrl-C saves, the same command goes on.

    What is not given keeps the defaults of impure_fast.training.loop.TrainConfig.
    """
    from ..classifiers import LITE0_MEAN, LITE0_STD, Normalised, efficientnet_lite0
    from ..training import loop

    given = dict(model=model, init=init, steps=steps, batch=batch, lr=lr, seed=seed, memory=memory)
    settings = loop.TrainConfig.from_file(config, **{k: v for k, v in given.items() if v is not None})
    check_device(device)
    classifier = Normalised(efficientnet_lite0(), LITE0_MEAN, LITE0_STD)
    if plan:
        from rich.console import Console

        from ..training.plan import plan as planned

        Console(highlight=False).print(*planned(loop.Networks.make(settings, classifier, device), settings).tables())
        return
    with progress_bar("{task.fields[note]}") as progress:
        tasks: dict[str, Any] = {}

        def show(phase: str, done: int, total: int, figures: dict[str, float]) -> None:
            note = "loss {loss:.4f}, {pictures_per_second:.2f} images/s".format(**figures) if figures else ""
            if phase not in tasks:  # a resumed phase starts where it stands, so that its pace is right
                tasks[phase] = progress.add_task(phase, total=total, completed=done, note=note)
            progress.update(tasks[phase], completed=done, note=note)

        finished = loop.train(settings, data, output, classifier, progress=show, device=device)
    if finished:
        typer.echo(f"trained; the weights are {output / 'model.safetensors'}")
    else:
        typer.echo(f"interrupted and saved in {output}; the same command goes on from there.")
