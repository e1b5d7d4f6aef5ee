"""``impure-fast evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .common import check_device, own_modules, progress_bar


def evaluate(
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="Packed npz, shards, or a folder with a folder a class.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Of the report; a run there goes on.")
    ] = Path("evaluation"),
    config: Annotated[
        Path | None, typer.Option(metavar="JSON", help="Fields of Settings; the options below go before them.")
    ] = None,
    suite: Annotated[Literal["ladder", "paper", "standard"] | None, typer.Option(help="Unset: ladder.")] = None,
    classifier: Annotated[
        str | None,
        typer.Option(help="lite0, the authors' three, timm, torchvision, module:factory; NAME=FILE."),
    ] = None,
    purifier: Annotated[list[str] | None, typer.Option(help="Name or file; repeat to compare.")] = None,
    surrogate: Annotated[list[str] | None, typer.Option(help="Classifier whose attacks transfer; may repeat.")] = None,
    eps: Annotated[list[float] | None, typer.Option(help="In 1/255; may repeat. Unset: the suite's own.")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Pictures.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of white-box attacks.")] = None,
    eot: Annotated[int | None, typer.Option(min=1, help="Draws a gradient step averages.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Pictures at once; bounds memory.")] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    device: Annotated[str | None, typer.Option(help="As torch names it.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="64 pictures, PGD-10, EOT-2: a first look.")] = False,
) -> None:
    """Attack classifier and purifier together, with baselines and sanity checks, and report.

    The defaults are the full protocol: PGD-200, EOT-20, 512 pictures. What is not
    given keeps the defaults of impure_fast.evaluation.suites.Settings. Ctrl-C
    stops; the same command goes on.
    """
    from ..evaluation import report, run, suites

    own_modules()
    given: dict[str, Any] = dict(data=data, suite=suite, classifier=classifier)
    given |= dict(purifiers=purifier, surrogates=surrogate, eps=eps, images=images, steps=steps, eot=eot)
    given |= dict(batch=batch, seed=seed, device=device)
    settings = suites.Settings.from_file(config, quick, **{k: v for k, v in given.items() if v not in (None, [])})
    check_device(settings.device)
    with progress_bar() as progress:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, visible=done < total)

        results = run.evaluate(settings, output, progress=show)
    if not results:  # the first of several processes reports
        return
    for sentence in (*report.summary(results), report.table(*report.overview(results))):
        typer.echo(sentence)
    typer.echo(f"wrote {output / 'report.html'}, report.md and results.json")
