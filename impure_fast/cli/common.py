"""What the commands share: bars, messages, checks of what was given, and a plain ending for every error."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..config import NUM_STEPS
from ..errors import BackendError, Error, InputError

if TYPE_CHECKING:
    from rich.progress import Progress

Model = Annotated[str, typer.Option(help="Shipped name, weights file or hub id.")]
Precision = Annotated[
    Literal["fp32", "bf16", "fp16", "int8", "fp8"], typer.Option(help="Of the engine; the faster ones round more.")
]
Device = Annotated[str, typer.Option(help="As torch names it.")]
ImageStep = Annotated[int | None, typer.Option(min=0, max=NUM_STEPS - 1, help="Noise on the image; more hides more.")]
FeatureStep = Annotated[
    int | None, typer.Option(min=0, max=NUM_STEPS - 1, help="Noise on the features; more hides more.")
]


@contextlib.contextmanager
def plain_ending() -> Iterator[None]:
    """One line and an exit code in place of a traceback, for all that a user can mend."""
    try:
        yield
    except KeyboardInterrupt:
        say("interrupted; nothing is half-written, and the same command can be run again.", "red")
        raise typer.Exit(130) from None
    except BrokenPipeError:  # `| head`: typer ends it
        raise
    except (Error, OSError) as error:  # OSError: a full disk, a missing permission
        say(f"error: {error}", "red")
        raise typer.Exit(1) from None


def own_modules() -> None:
    """Let module:factory name a module of the current folder, as with python -m."""
    sys.path.append(os.getcwd())  # last, so that a file here shadows no library


def check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise BackendError(f"--device {device} cannot be used here: {reason} --device cpu always works.") from error


def check_free(output: Path, suffix: str, overwrite: bool) -> None:
    if output.suffix != suffix:
        raise InputError(f"{output} must end in {suffix}.")
    if output.exists() and not overwrite:
        raise InputError(f"{output} exists; --overwrite replaces it.")


def progress_bar(*notes: str) -> Progress:
    """A bar on stderr with the time left, ``notes`` behind it; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, *map(TextColumn, notes), console=console, disable=not console.is_terminal, transient=True)


def say(message: str, style: str | None = None, progress: Progress | None = None) -> None:
    """One line on stderr, above the bar of ``progress``."""
    from rich.console import Console

    console = progress.console if progress else Console(stderr=True)
    console.print(message, style=style, markup=False, highlight=False, soft_wrap=True)


def end(problems: Sequence[str], summary: str) -> None:
    """Name what failed, then sum up; exit code 1 if anything did."""
    for problem in problems:
        say(f"error: {problem}", "red")
    typer.echo(summary)
    if problems:
        raise typer.Exit(1)
