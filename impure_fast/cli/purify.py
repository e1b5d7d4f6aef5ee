"""``impure-fast purify``."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import NUM_STEPS
from ..errors import Error, InputError
from .common import check_device, end, progress_bar, say


class Format(str, Enum):
    """Formats of purified images."""

    png = "png"
    jpg = "jpg"
    webp = "webp"


class Arithmetic(str, Enum):
    """Precisions of the engine."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    int8 = "int8"


def purify(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT", help="Image files, and folders of them.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A file, for one image; or a folder, made if missing.")
    ],
    model: Annotated[str, typer.Option(help="Shipped name, weights file or hub id.")] = "impure_tiny",
    seed: Annotated[
        int | None, typer.Option(min=0, help="Repeat the same draws; unset: fresh for every image.")
    ] = None,
    image_step: Annotated[
        int | None, typer.Option(min=0, max=NUM_STEPS - 1, help="Noise on the image; more hides more.")
    ] = None,
    feature_step: Annotated[
        int | None, typer.Option(min=0, max=NUM_STEPS - 1, help="Noise on the features; more hides more.")
    ] = None,
    format: Annotated[Format | None, typer.Option(help="Of the results; unset: by OUT's suffix, else png.")] = None,
    recursive: Annotated[bool, typer.Option("--recursive", help="Look into sub-folders.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that exist.")] = False,
    precision: Annotated[
        Arithmetic, typer.Option(help="Of the arithmetic; the faster ones round more.")
    ] = Arithmetic.fp32,
    max_batch: Annotated[int | None, typer.Option(min=1, help="Tiles a network call; bounds memory.")] = None,
    device: Annotated[str, typer.Option(help="As torch names it.")] = "cpu",
) -> None:
    """Purify image files.

    Folders keep their structure. A result depends on its image and the seed
    alone, never on the other files. Broken files are named at the end, the
    rest goes on; the exit code is then 1.
    """
    place = _placing(inputs, output, format)
    problems: list[str] = []
    jobs = _plan(_find(inputs, output, recursive, problems), place, problems)
    todo = {target: file for target, file in jobs.items() if overwrite or not os.path.exists(target)}
    done, seconds = 0, 0.0
    if todo:
        from .. import zoo  # imports torch: not for a run that has nothing to do
        from ..engine import Engine

        check_device(device)
        sizes = None if max_batch is None else (max_batch,)
        network = Engine(zoo.load(model), precision=precision.value, batch_sizes=sizes, device=device)
        options = dict(seed=seed, image_step=image_step, feature_step=feature_step)
        began = time.perf_counter()
        with progress_bar() as progress:
            for target, file in progress.track(todo.items(), description="purifying"):
                try:
                    for warning in _purify_file(network, file, target, device, options):
                        say(f"warning: {warning}", "yellow", progress)
                    done += 1
                except Error as error:
                    problems.append(str(error))
        seconds = time.perf_counter() - began
    skipped = len(jobs) - len(todo)
    hint = " (results exist; --overwrite replaces them)" if skipped else ""
    rate = f"; {done / seconds:.2f} images/s" if done else ""
    end(problems, f"purified {done}, skipped {skipped}{hint}, failed {len(problems)}{rate}")


def _placing(inputs: list[Path], output: Path, format: Format | None) -> Callable[[Path], Path]:
    """relative path of an image -> path of its result.  Raises InputError where OUT does not fit the rest."""
    from ..images import SUFFIXES

    suffix = output.suffix.lower()
    if suffix not in SUFFIXES or output.is_dir():
        if output.exists() and not output.is_dir():
            raise InputError(f"{output} exists and is no folder; name a folder or an image ({' '.join(SUFFIXES)}).")
        return lambda relative: output / relative.with_suffix(f".{format.value if format else 'png'}")
    if len(inputs) != 1 or inputs[0].is_dir():
        raise InputError(f"{output} is one image, but INPUT is a folder or more than one; name a folder instead.")
    if format and suffix.replace("jpeg", "jpg") != f".{format.value}":
        raise InputError(f"--format {format.value} contradicts {output}; leave one of them out.")
    return lambda relative: output


def _find(inputs: list[Path], output: Path, recursive: bool, problems: list[str]) -> list[tuple[Path, Path]]:
    """Every (file, relative path) of INPUT; inputs that cannot be used become sentences in ``problems``."""
    from ..images import find_images

    found, out = [], output.resolve()
    for path in inputs:
        try:
            files = find_images([path], recursive)
        except Error as error:
            problems.append(str(error))
            continue
        # Results of an earlier run in a sub-folder of INPUT are no input of this one.
        earlier = path.resolve() in out.parents
        found += [(file, rel) for file, rel in files if not (earlier and out in file.resolve().parents)]
    return found


def _identity(path: Path) -> Any:
    """Equal for two names of one file."""
    try:
        return (stat := path.stat()).st_dev, stat.st_ino
    except OSError:
        return path


def _plan(found: list[tuple[Path, Path]], place: Callable[[Path], Path], problems: list[str]) -> dict[Path, Path]:
    """{result: file} of every image whose result takes no other's place; the others become ``problems``."""
    originals = {_identity(file): file for file, _ in found}
    wanted = {(_identity(file), place(relative)): file for file, relative in found}  # a file named twice counts once
    jobs: dict[Path, Path] = {}
    for (_, target), file in wanted.items():
        if (original := originals.get(_identity(target))) is not None:
            problems.append(f"{file}: its result would overwrite the input {original}; choose another folder.")
        elif target in jobs:
            problems.append(f"{file}: {jobs[target]} already becomes {target}; purify it into another folder.")
        else:
            jobs[target] = file
    return jobs


def _purify_file(network: Any, file: Path, target: Path, device: str, options: dict[str, Any]) -> list[str]:
    """Purify one file; returns warnings."""
    import torch

    from ..images import read_image, write_image

    picture = read_image(file)
    image = torch.from_numpy(picture.rgb).permute(2, 0, 1).to(device)  # [3, H, W]
    purified = network.purify(image, **options)  # alone, so always stream 0
    warning = write_image(target, purified.permute(1, 2, 0).contiguous().cpu().numpy(), picture.alpha)
    return [sentence for sentence in (picture.warning, warning) if sentence]
