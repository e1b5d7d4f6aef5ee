"""``impure-fast train`` and ``finetune``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Device, check_device, check_free, own_modules, progress_bar, say


def train(
    data: Annotated[
        Path, typer.Option(metavar="FILE", help="Packed images (impure-fast data), or a folder of attacked pairs.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="A new folder, or a run to go on with.")
    ],
    config: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="Fields of TrainConfig, or a shipped recipe; the options below go before."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Preset name.")] = None,
    init: Annotated[str | None, typer.Option(metavar="FILE", help="Weights to begin from.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Pictures a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    classifier: Annotated[str | None, typer.Option(help="Attacked; a name of evaluate's, or NAME=FILE.")] = None,
    guide: Annotated[str | None, typer.Option(help="Of the feature loss; unset: the classifier.")] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    memory: Annotated[str | None, typer.Option(help="Kept for backward: all, default, tight or minimal.")] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write DIR/tensorboard too.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Show what a step holds in memory, and train nothing.")] = False,
    device: Device = "cpu",
) -> None:
    """Train a purifier against attacks on a classifier; Ctrl-C saves, the same command goes on.

    What is not given keeps the defaults of impure_fast.training.config.TrainConfig.
    """
    from ..evaluation.targets import load_target
    from ..training import loop
    from ..training.config import TrainConfig

    given: dict[str, Any] = dict(model=model, init=init, steps=steps, batch=batch, lr=lr, seed=seed, memory=memory)
    given |= dict(classifier=classifier, guide=guide, tensorboard=tensorboard or None)
    settings = TrainConfig.from_file(config, **{k: v for k, v in given.items() if v is not None})
    check_device(device)
    own_modules()
    networks: dict[str, Any] = {"classifier": load_target(settings.classifier).model, "device": device}
    if settings.guide:
        networks["guide"] = load_target(settings.guide).model
    if plan:
        from rich.console import Console

        from ..training.plan import plan as planned

        Console(highlight=False).print(*planned(loop.Networks.make(settings, **networks), settings).tables())
        return
    with progress_bar("{task.fields[note]}") as progress:
        tasks: dict[str, Any] = {}

        def show(phase: str, done: int, total: int, figures: dict[str, float]) -> None:
            note = "loss {loss:.4f}, {pictures_per_second:.2f} images/s".format(**figures) if figures else ""
            if phase not in tasks:  # a resumed phase starts where it stands, so that its pace is right
                tasks[phase] = progress.add_task(phase, total=total, completed=done, note=note)
            progress.update(tasks[phase], completed=done, note=note)

        finished = loop.train(settings, data, output, progress=show, **networks)
    if not finished:
        say(f"interrupted and saved in {output}; the same command goes on from there.", "red")
        raise typer.Exit(130)
    typer.echo(f"trained; the weights are {output / 'model.safetensors'}")


def finetune(
    classifier: Annotated[str, typer.Argument(help="A name of evaluate's, or NAME=FILE, as cifar_resnet20=FILE.")],
    data: Annotated[Path, typer.Option(metavar="PATH", help="Labelled pictures: packed npz or class folders.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.safetensors")],
    epochs: Annotated[int, typer.Option(min=1)] = 4,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 0.02,
    batch: Annotated[int, typer.Option(min=1)] = 128,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Device = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.safetensors if it exists.")] = False,
) -> None:
    """Fine-tune a classifier on the pictures that it will be judged on.

    The pictures are held in memory at the classifier's own size.
    """
    check_free(output, ".safetensors", overwrite)
    check_device(device)
    own_modules()
    from safetensors.torch import save_file

    from ..classifiers import Normalised
    from ..evaluation.targets import load_pictures, load_target
    from ..images import write_atomically
    from ..training.classifier import finetune as tune

    target = load_target(classifier)
    pictures = load_pictures(data, target.prepare, sys.maxsize)
    with progress_bar("{task.fields[note]}") as progress:
        task = progress.add_task("fine-tuning", total=None, note="")

        def show(done: int, total: int, loss: float) -> None:
            progress.update(task, completed=done, total=total, note=f"loss {loss:.3f}")

        tune(target, pictures, epochs=epochs, lr=lr, batch=batch, seed=seed, device=device, progress=show)
    state = (target.model.network if isinstance(target.model, Normalised) else target.model).state_dict()
    write_atomically(output, lambda path: save_file({k: v.cpu().contiguous() for k, v in state.items()}, path))
    typer.echo(f"fine-tuned on {len(pictures.labels)} pictures; wrote {output}")
