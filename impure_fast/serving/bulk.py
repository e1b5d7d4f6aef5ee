"""Purify many files on a Ray cluster (Ray Data).

Rows are names: each actor reads, purifies and writes one picture after another, as the local command does, so that
none waits in memory anywhere.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..engine import Engine
from ..errors import BackendError, Error, ImageTooLargeError
from ..images import decode_image, encode_image, read_image, write_image
from .cluster import first_line
from .stores import Place, place, read, write

BLOCK = 16  # pictures handed to an actor at once
RETRIES = 3  # of a block whose actor died

Result = tuple[Place, list[str], str | None]  # target, warnings, what went wrong


def purify_file(engine: Engine, file: Place, target: Place, options: Mapping[str, Any]) -> list[str]:
    """Purify one picture alone, so always stream 0; returns warnings.  options: of ``Engine.purify``.

    Raises Error; ImageTooLargeError where memory does not suffice.
    """
    try:
        picture = read_image(file) if isinstance(file, Path) else decode_image(read(file), file)
        image = torch.from_numpy(picture.rgb).permute(2, 0, 1)  # [3, H, W]
        rgb = engine.purify(image, **options).permute(1, 2, 0).contiguous().numpy()
        if isinstance(target, Path):
            warning = write_image(target, rgb, picture.alpha, picture.profile)
        else:
            data, warning = encode_image(target, rgb, picture.alpha, picture.profile)
            write(target, data)
    except (MemoryError, RuntimeError) as error:
        # torch's error for a GPU is a class, its allocator's for a CPU a bare RuntimeError.
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and "allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        reason = first_line(error) or type(error).__name__
        raise ImageTooLargeError(
            f"{file} does not fit in memory: {reason.rstrip('.')}; take a smaller picture, or --device cpu."
        ) from error
    return [sentence for sentence in (picture.warning, warning) if sentence]


class Worker:
    """An actor: an engine that takes one row after another."""

    def __init__(self, engine: Engine, options: Mapping[str, Any]) -> None:
        self._engine, self._options = engine, options

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        said, problem = [], ""
        try:
            said = purify_file(self._engine, place(row["file"]), place(row["target"]), self._options)
        except Error as error:
            problem = str(error)
        except Exception as error:  # of one picture: its neighbours go on
            problem = f"{row['file']}: {first_line(error) or type(error).__name__}"
        return {"target": row["target"], "warnings": "\n".join(said), "problem": problem}


def purify_files(
    engine: Engine, jobs: Mapping[Place, Place], options: Mapping[str, Any], workers: int | None = None
) -> Iterator[Result]:
    """Purify {target: file} on the cluster that Ray is connected to; yields what became of each.

    Every machine must see the files under these names.  A block of pictures whose actor died is done again.
    Raises BackendError where Ray gives up.
    workers: actors, one CPU each and, for an engine on CUDA, one GPU; None takes what the cluster has.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = -1  # their pictures are named below
    gpus = int(engine.devices[0].type == "cuda")
    workers = workers or max(1, int(ray.cluster_resources().get("GPU" if gpus else "CPU", 1)))
    pairs = {_name(target): (target, file) for target, file in jobs.items()}
    worker: Any = Worker  # ray.data's annotation knows functions alone
    rows = [{"file": _name(file), "target": name} for name, (_, file) in pairs.items()]
    blocks = math.ceil(len(rows) / BLOCK)
    with warnings.catch_warnings():  # Ray deprecates the last two, which have no other name yet
        warnings.simplefilter("ignore")
        dataset = ray.data.from_items(rows, override_num_blocks=blocks).map(
            worker,
            fn_constructor_args=(engine, dict(options)),
            compute=ActorPoolStrategy(size=min(workers, blocks)),
            num_cpus=1,
            num_gpus=gpus,
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
    try:
        for row in dataset.iter_rows():
            target, _ = pairs.pop(row["target"])
            yield target, row["warnings"].splitlines(), row["problem"] or None
    except ray.exceptions.RayError as error:
        raise BackendError(f"The work on Ray ended: {first_line(error)}") from error
    for target, file in pairs.values():
        yield target, [], f"{file}: the worker that had it, or a neighbour in its block, failed again and again."


def _name(place: Place) -> str:
    return str(place.absolute()) if isinstance(place, Path) else place
