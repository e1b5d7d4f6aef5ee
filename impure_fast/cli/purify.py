"""``impure-fast purify``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import Error, InputError
from .common import Device, FeatureStep, ImageStep, Model, Precision, check_device, end, progress_bar, say

if TYPE_CHECKING:
    from ..serving.bulk import Result
    from ..serving.stores import Place


def purify(
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT", help="Image files, and folders of them; s3://... too.")
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="A file, for one image; or a folder, made if missing.")],
    model: Model = "impure_tiny",
    seed: Annotated[
        int | None, typer.Option(min=0, help="Repeat the same draws; unset: fresh for every image.")
    ] = None,
    image_step: ImageStep = None,
    feature_step: FeatureStep = None,
    format: Annotated[
        Literal["png", "jpg", "webp"] | None, typer.Option(help="Of the results; unset: by OUT's suffix, else png.")
    ] = None,
    recursive: Annotated[bool, typer.Option("--recursive", help="Look into sub-folders.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that exist.")] = False,
    precision: Precision = "fp32",
    max_batch: Annotated[int | None, typer.Option(min=1, help="Tiles a network call; bounds memory.")] = None,
    device: Device = "cpu",
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Work on a Ray cluster; auto: one that runs here, else a new one."),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="With --ray; unset: one a CPU, or a GPU.")] = None,
) -> None:
    """Purify image files.

    Folders keep their structure. A result depends on its image and the seed
    alone, never on the other files. Broken files are named at the end, the
    rest goes on; the exit code is then 1.
    """
    from ..serving.stores import existing, place

    sources, out = [place(text) for text in inputs], place(output)
    placing = _placing(sources, out, format)
    problems: list[str] = []
    jobs = _plan(_find(sources, out, recursive, problems), placing, problems)
    there = set() if overwrite else existing(jobs)
    todo = {target: file for target, file in jobs.items() if target not in there}
    done, seconds = 0, 0.0
    if todo:
        from .. import zoo  # imports torch: not for a run that has nothing to do
        from ..engine import Engine
        from ..serving.bulk import purify_files

        sizes = None if max_batch is None else sorted({min(2**i, max_batch) for i in range(max_batch.bit_length() + 1)})
        options = dict(seed=seed, image_step=image_step, feature_step=feature_step)
        if ray is None:
            check_device(device)
        network = Engine(zoo.load(model), precision=precision, batch_sizes=sizes, device=device)
        if ray is not None:
            from ..serving.cluster import connect

            connect(ray, workers)
        results = _here(network, todo, options) if ray is None else purify_files(network, todo, options, workers)
        began = time.perf_counter()
        with progress_bar() as progress:
            for _, warnings, problem in progress.track(results, total=len(todo), description="purifying"):
                for warning in warnings:
                    say(f"warning: {warning}", "yellow", progress)
                if problem is None:
                    done += 1
                else:
                    problems.append(problem)
        seconds = time.perf_counter() - began
    skipped = len(jobs) - len(todo)
    hint = " (results exist; --overwrite replaces them)" if skipped else ""
    rate = f"; {done / seconds:.2f} images/s" if done else ""
    end(problems, f"purified {done}, skipped {skipped}{hint}, failed {len(problems)}{rate}")


def _here(network: Any, jobs: Mapping[Place, Place], options: dict[str, Any]) -> Iterator[Result]:
    """``serving.bulk.purify_files`` in this process."""
    from ..serving.bulk import purify_file

    for target, file in jobs.items():
        try:
            yield target, purify_file(network, file, target, options), None
        except Error as error:
            yield target, [], str(error)


def _placing(inputs: list[Place], output: Place, format: str | None) -> Callable[[Path], Place]:
    """relative path of an image -> place of its result.  Raises InputError where OUT does not fit the rest."""
    from ..images import SUFFIXES

    ending = f".{format or 'png'}"
    if isinstance(output, str):
        if PurePath(output).suffix.lower() in SUFFIXES:
            raise InputError(f"{output} is one image; in an object store, name a folder.")
        return lambda relative: f"{output.rstrip('/')}/{relative.with_suffix(ending).as_posix()}"
    suffix = output.suffix.lower()
    if suffix not in SUFFIXES or output.is_dir():
        if output.exists() and not output.is_dir():
            raise InputError(f"{output} exists and is no folder; name a folder or an image ({' '.join(SUFFIXES)}).")
        return lambda relative: output / relative.with_suffix(ending)
    if len(inputs) != 1 or (isinstance(inputs[0], Path) and inputs[0].is_dir()):
        raise InputError(f"{output} is one image, but INPUT is a folder or more than one; name a folder instead.")
    if format and suffix.replace("jpeg", "jpg") != f".{format}":
        raise InputError(f"--format {format} contradicts {output}; leave one of them out.")
    return lambda relative: output


def _find(inputs: list[Place], output: Place, recursive: bool, problems: list[str]) -> list[tuple[Place, Path]]:
    """Every (file, relative path) of INPUT; what cannot be used becomes sentences in ``problems``."""
    from ..images import find_images
    from ..serving.stores import find_in_store

    found: list[tuple[Place, Path]] = []
    for path in inputs:
        try:
            files = (
                find_images([path], recursive, problems) if isinstance(path, Path) else find_in_store(path, recursive)
            )
        except Error as error:
            problems.append(str(error))
            continue
        # Results of an earlier run in a sub-folder of INPUT are no input of this one.
        earlier = _inside(output, path)
        found += [(file, relative) for file, relative in files if not (earlier and _inside(file, output))]
    return found


def _inside(place: Place, folder: Place) -> bool:
    if isinstance(place, Path) and isinstance(folder, Path):
        return folder.resolve() in place.resolve().parents
    return str(place).startswith(f"{str(folder).rstrip('/')}/")


def _identity(path: Place) -> Any:
    """Equal for two names of one file."""
    if isinstance(path, str):
        return path
    try:
        return (stat := path.stat()).st_dev, stat.st_ino
    except OSError:
        return path


def _plan(found: list[tuple[Place, Path]], place: Callable[[Path], Place], problems: list[str]) -> dict[Place, Place]:
    """{result: file} of every image whose result takes no other's place; the others become ``problems``."""
    originals = {_identity(file): file for file, _ in found}
    wanted = {(_identity(file), place(relative)): file for file, relative in found}  # a file named twice counts once
    jobs: dict[Place, Place] = {}
    for (_, target), file in wanted.items():
        if (original := originals.get(_identity(target))) is not None:
            problems.append(f"{file}: its result would overwrite the input {original}; choose another folder.")
        elif target in jobs:
            problems.append(f"{file}: {jobs[target]} already becomes {target}; purify it into another folder.")
        else:
            jobs[target] = file
    return jobs
