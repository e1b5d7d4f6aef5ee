"""The command line: ``impure-fast purify | demo | info | models | data | convert | export | train | evaluate``.

torch, numpy and Pillow are imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from . import __version__
from .config import NUM_STEPS
from .errors import BackendError, Error, InputError, MissingExtraError

if TYPE_CHECKING:
    import typer
    from rich.progress import Progress
else:
    try:
        import rich  # noqa: F401 (typer's help and every table need it)
        import typer
    except ImportError:
        typer = None  # main() says what to install

MISSING = 'impure-fast needs the extra "cli": pip install "impure-fast[cli]".'

GPU_STATE = "Nothing has run on a GPU yet: CUDA and Triton kernels are compiled and run on the CPU only, in tests."


class Format(str, Enum):
    """Formats of purified images."""

    png = "png"
    jpg = "jpg"
    webp = "webp"


class Split(str, Enum):
    """Parts of CIFAR-10."""

    train = "train"
    test = "test"


class Program(str, Enum):
    """Forms of an exported purifier."""

    program = "program"
    aoti = "aoti"
    onnx = "onnx"


class Arithmetic(str, Enum):
    """Precisions of the engine."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    int8 = "int8"


class Suite(str, Enum):
    """Suites of evaluation."""

    ladder = "ladder"
    paper = "paper"
    standard = "standard"


class Precision(str, Enum):
    """Types of stored weights."""

    fp16 = "fp16"
    fp32 = "fp32"


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
        from . import zoo  # imports torch: not for a run that has nothing to do
        from .engine import Engine

        _check_device(device)
        sizes = None if max_batch is None else (max_batch,)
        network = Engine(zoo.load(model), precision=precision.value, batch_sizes=sizes, device=device)
        options = dict(seed=seed, image_step=image_step, feature_step=feature_step)
        began = time.perf_counter()
        with _progress() as progress:
            for target, file in progress.track(todo.items(), description="purifying"):
                try:
                    for warning in _purify_file(network, file, target, device, options):
                        _say(f"warning: {warning}", "yellow", progress)
                    done += 1
                except Error as error:
                    problems.append(str(error))
        seconds = time.perf_counter() - began
    skipped = len(jobs) - len(todo)
    hint = " (results exist; --overwrite replaces them)" if skipped else ""
    rate = f"; {done / seconds:.2f} images/s" if done else ""
    _end(problems, f"purified {done}, skipped {skipped}{hint}, failed {len(problems)}{rate}")


def _placing(inputs: list[Path], output: Path, format: Format | None) -> Callable[[Path], Path]:
    """relative path of an image -> path of its result.  Raises InputError where OUT does not fit the rest."""
    from .images import SUFFIXES

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
    from .images import find_images

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

    from .images import read_image, write_image

    picture = read_image(file)
    image = torch.from_numpy(picture.rgb).permute(2, 0, 1).to(device)  # [3, H, W]
    purified = network.purify(image, **options)  # alone, so always stream 0
    warning = write_image(target, purified.permute(1, 2, 0).contiguous().cpu().numpy(), picture.alpha)
    return [sentence for sentence in (picture.warning, warning) if sentence]


def demo(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture of the result.")] = Path("demo.png"),
    model: Annotated[str, typer.Option(help="Shipped name, weights file or hub id.")] = "impure_tiny",
    views: Annotated[int, typer.Option(min=1, help="Views of photographs to attack.")] = 40,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Packed ImageNet pictures in place of the photographs.")
    ] = None,
    attack_steps: Annotated[int, typer.Option(min=1, help="Steps of the PGD attack.")] = 20,
    white_box: Annotated[
        int, typer.Option(min=0, help="Attack so many pictures through the purifier as well (slow).")
    ] = 0,
    image_step: Annotated[
        int | None, typer.Option(min=0, max=NUM_STEPS - 1, help="Noise on the image; more hides more.")
    ] = None,
    feature_step: Annotated[
        int | None, typer.Option(min=0, max=NUM_STEPS - 1, help="Noise on the features; more hides more.")
    ] = None,
) -> None:
    """Attack an ImageNet classifier on photographs, purify, and show both."""
    from rich.console import Console

    from . import demo as demo_module

    results = demo_module.run(
        json_path=json_file,
        picture_path=output,
        model=model,
        views=views,
        data=data,
        attack_steps=attack_steps,
        white_box=white_box,
        image_step=image_step,
        feature_step=feature_step,
        progress=_say,
    )
    Console().print(demo_module.table(results))


def info(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """Show versions, devices and what can run on which backend."""
    report = _info()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    from .ops._dispatch import BACKENDS

    table = Table("operator", *BACKENDS[1:])
    reasons: dict[str, list[str]] = {}
    for operator, row in report["operators"].items():
        table.add_row(operator, *("yes" if cell["can_run"] else "no" for cell in row.values()))
        for backend, cell in row.items():
            for reason in cell["reasons"]:
                reasons.setdefault(f"{backend}: {reason}", []).append(operator)
    devices = report["devices"]
    lines = [
        *(f"{name} {number or '(not installed)'}" for name, number in report["versions"].items()),
        f"CPU: {devices['cpu']['name']}, {devices['cpu']['threads']} threads",
        *(f"CUDA: {name}" for name in devices["cuda"] or ["no device"]),
        f"build: {json.dumps(report['build']) if report['build'] else 'no report (_build.json)'}",
    ]
    console = Console(highlight=False, soft_wrap=True)
    console.print("\n".join(lines), markup=False)
    console.print(table)
    console.print("\n".join([*reasons, report["gpu"]]), markup=False)


def _info() -> dict[str, Any]:
    """What ``info`` shows."""
    import torch

    from . import ops
    from .demo import processor_name
    from .ops._dispatch import BACKENDS, can_run
    from .ops._native import build_report, introspect

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    def cell(operator: str, backend: str) -> dict[str, Any]:
        reasons = can_run(operator, backend)
        return {"can_run": not reasons, "reasons": reasons}

    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "versions": {
            "impure_fast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: installed(name) for name in ("triton", "timm", "numpy")},
        },
        "devices": {
            "cpu": {"name": processor_name(), "threads": torch.get_num_threads()},
            "cuda": [torch.cuda.get_device_name(i) for i in cuda],
        },
        "operators": {name: {backend: cell(name, backend) for backend in BACKENDS[1:]} for name in ops.__all__},
        "gpu": GPU_STATE,
        "build": {**(build_report() or {}), **introspect()},
    }


def models() -> None:
    """List the presets, their size and the weights that are shipped."""
    import torch
    from rich.console import Console
    from rich.table import Column, Table

    from . import zoo

    shipped = list(zoo.shipped())
    table = Table(Column("model", no_wrap=True), "parameters", "patch", "context", "weights")
    for name in zoo.list_models():
        with torch.device("meta"):  # counts without allocating
            model = zoo.create_model(name)
        count = sum(p.numel() for p in model.parameters())
        c = model.config
        weights = ", ".join(key for key in shipped if key.split(".")[0] == name) or "none"
        table.add_row(name, f"{count / 1e6:.2f} M", str(c.patch_size), f"{c.tile_size} px", weights)
    Console().print(table)
    typer.echo("A picture larger than the context is purified in overlapping tiles of that size.")


def data(
    folder: Annotated[Path, typer.Argument(metavar="INPUT", help="Folder of images; sub-folders are classes.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.npz")],
    cifar10: Annotated[Split | None, typer.Option(help="INPUT holds torchvision's CIFAR-10: take this part.")] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of pictures that are not yet JPEG.")] = 92,
    max_side: Annotated[int | None, typer.Option(min=1, help="Scale longer sides down to this, in pixels.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.npz if it exists.")] = False,
) -> None:
    """Pack a folder of images into the one file that training and evaluation read.

    RGB JPEG files are kept byte for byte, others are re-encoded. The label is
    the place of the image's sub-folder in their sorted list, or -1 without
    sub-folders. The order is shuffled, always alike.
    """
    from .images import encode_jpeg, find_images, jpeg_bytes, write_packed

    _check_free(output, ".npz", overwrite)
    sources: list[tuple[str, int, Callable[[], bytes]]] = []  # name, label, picture
    if cifar10:
        images = _cifar10(folder, cifar10)
        for i, (rgb, label) in enumerate(zip(images.data, images.targets, strict=True)):
            sources.append((f"{cifar10.value}/{i:05d}", label, functools.partial(encode_jpeg, rgb, quality, max_side)))
    else:
        if not folder.is_dir():
            raise InputError(f"{folder} is no folder; give the folder that holds the images or the class folders.")
        classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        for file, relative in find_images([folder], recursive=True):
            label = classes.index(relative.parts[0]) if len(relative.parts) > 1 else -1
            sources.append((relative.as_posix(), label, functools.partial(jpeg_bytes, file, quality, max_side)))
    packed: list[tuple[str, int, bytes]] = []
    problems: list[str] = []
    with _progress() as progress:
        for name, label, picture in progress.track(sources, description="packing"):
            try:
                packed.append((name, label, picture()))
            except Error as error:
                problems.append(str(error))
    if packed:
        names, labels, jpegs = zip(*packed, strict=True)
        write_packed(output, jpegs, labels, names)
    _end(problems, f"packed {len(packed)} images into {output}, failed {len(problems)}")


def _cifar10(root: Path, split: Split) -> Any:
    """torchvision's data set; nothing is downloaded."""
    try:
        from torchvision.datasets import CIFAR10
    except ImportError as error:
        raise MissingExtraError("--cifar10 needs torchvision: pip install torchvision.") from error
    try:
        return CIFAR10(root=root, train=split is Split.train, download=False)
    except RuntimeError as error:
        raise InputError(
            f"{root} does not hold CIFAR-10 as torchvision stores it (cifar-10-batches-py, checksums right). Fetch it "
            f'once: python -c "from torchvision.datasets import CIFAR10; CIFAR10({str(root)!r}, download=True)".'
        ) from error


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN.pth", help="The authors' checkpoint, or a bare state dict.")],
    output: Annotated[Path, typer.Argument(metavar="OUT.safetensors")],
    dtype: Annotated[Precision, typer.Option(help="Type of the stored weights.")] = Precision.fp32,
    strict: Annotated[bool, typer.Option(help="Refuse missing and unexpected weights.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.safetensors if it exists.")] = False,
) -> None:
    """Convert the authors' weights to a safetensors file with its config inside."""
    _check_free(output, ".safetensors", overwrite)
    import torch

    from . import checkpoints, zoo

    network = zoo.load_official(source, strict=strict)
    wanted = torch.float16 if dtype is Precision.fp16 else torch.float32
    checkpoints.save_safetensors(output, network.state_dict(), network.config, wanted)
    report: Any = network.load_report
    typer.echo(f"wrote {output} ({dtype.value})")
    typer.echo(f"dropped {len(report.dropped)} (tables and guide networks, never needed)")
    for name, keys in (("missing", report.missing), ("unexpected", report.unexpected)):
        typer.echo(f"{name} {len(keys)}" + (f": {', '.join(keys)}" if keys else ""))


def export(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A .pt2 or .onnx file.")],
    height: Annotated[int, typer.Option(min=1, help="Of the pictures, in pixels.")] = 224,
    width: Annotated[int, typer.Option(min=1)] = 224,
    format: Annotated[
        Program | None, typer.Option(help="torch.export program, AOTInductor package or ONNX; unset: by OUT's suffix.")
    ] = None,
    model: Annotated[str, typer.Option(help="Shipped name, weights file or hub id.")] = "impure_tiny",
    decomposed: Annotated[bool, typer.Option("--decomposed", help="Use torch's own operators alone.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
) -> None:
    """Write the purifier for other runtimes: (images, seed, streams) to purified images, any batch, one size."""
    form = format or (Program.onnx if output.suffix == ".onnx" else Program.program)
    _check_free(output, ".onnx" if form is Program.onnx else ".pt2", overwrite)
    from . import zoo
    from .engine import export as exports

    exports.export(zoo.load(model), output, height, width, format=form.value, decomposed=decomposed)
    typer.echo(f"wrote {output} ({form.value}, pictures of {height} x {width})")


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
    from .classifiers import LITE0_MEAN, LITE0_STD, Normalised, efficientnet_lite0
    from .training import loop

    given = dict(model=model, init=init, steps=steps, batch=batch, lr=lr, seed=seed, memory=memory)
    settings = loop.TrainConfig.from_file(config, **{k: v for k, v in given.items() if v is not None})
    _check_device(device)
    classifier = Normalised(efficientnet_lite0(), LITE0_MEAN, LITE0_STD)
    if plan:
        from rich.console import Console

        from .training.plan import plan as planned

        Console(highlight=False).print(*planned(loop.Networks.make(settings, classifier, device), settings).tables())
        return
    with _progress("{task.fields[note]}") as progress:
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
    suite: Annotated[Suite | None, typer.Option(help="Unset: ladder.")] = None,
    classifier: Annotated[
        str | None, typer.Option(help="lite0, the authors' three, timm or torchvision name, module:factory.")
    ] = None,
    classifier_weights: Annotated[str | None, typer.Option(metavar="FILE", help="In place of a download.")] = None,
    purifier: Annotated[list[str] | None, typer.Option(help="Name or file; repeat to compare.")] = None,
    surrogate: Annotated[list[str] | None, typer.Option(help="Classifier whose attacks transfer; may repeat.")] = None,
    eps: Annotated[list[float] | None, typer.Option(help="In 1/255; may repeat. Unset: the suite's own.")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Pictures.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of white-box attacks.")] = None,
    eot: Annotated[int | None, typer.Option(min=1, help="Draws a gradient step averages.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Pictures at once; bounds memory.")] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    device: Annotated[str | None, typer.Option(help="As torch names it.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="PGD-50, EOT-10, 64 pictures, for a first look.")] = False,
) -> None:
    """Attack classifier and purifier together, with baselines and sanity checks, and report.

    The defaults are the full protocol: PGD-200, EOT-20, 512 pictures. What is not
    given keeps the defaults of impure_fast.evaluation.suites.Settings. Ctrl-C
    stops; the same command goes on.
    """
    from .evaluation import report, run, suites

    sys.path.insert(0, os.getcwd())  # an own classifier may lie here, as with python -m
    given: dict[str, Any] = dict(
        data=data, suite=suite and suite.value, classifier=classifier, classifier_weights=classifier_weights
    )
    given |= dict(purifiers=purifier, surrogates=surrogate, eps=eps, images=images, steps=steps, eot=eot)
    given |= dict(batch=batch, seed=seed, device=device)
    settings = suites.Settings.from_file(config, quick, **{k: v for k, v in given.items() if v not in (None, [])})
    _check_device(settings.device)
    with _progress() as progress:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, visible=done < total)

        results = run.evaluate(settings, output, progress=show)
    for sentence in report.summary(results):
        typer.echo(sentence)
    typer.echo(f"wrote {output / 'report.html'}, report.md and results.json")


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise BackendError(f"--device {device} cannot be used here: {reason} --device cpu always works.") from error


def _check_free(output: Path, suffix: str, overwrite: bool) -> None:
    if output.suffix != suffix:
        raise InputError(f"{output} must end in {suffix}.")
    if output.exists() and not overwrite:
        raise InputError(f"{output} exists; --overwrite replaces it.")


def _progress(*notes: str) -> Progress:
    """A bar on stderr with the time left, ``notes`` behind it; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, *map(TextColumn, notes), console=console, disable=not console.is_terminal, transient=True)


def _say(message: str, style: str | None = None, progress: Progress | None = None) -> None:
    """One line on stderr, above the bar of ``progress``."""
    from rich.console import Console

    console = progress.console if progress else Console(stderr=True)
    console.print(message, style=style, markup=False, highlight=False, soft_wrap=True)


def _end(problems: Sequence[str], summary: str) -> None:
    """Name what failed, then sum up; exit code 1 if anything did."""
    for problem in problems:
        _say(f"error: {problem}", "red")
    typer.echo(summary)
    if problems:
        raise typer.Exit(1)


@contextlib.contextmanager
def _plain_ending() -> Iterator[None]:
    """One line and an exit code in place of a traceback, for all that a user can mend."""
    try:
        yield
    except KeyboardInterrupt:
        _say("interrupted; nothing is half-written, and the same command can be run again.", "red")
        raise typer.Exit(130) from None
    except BrokenPipeError:  # `| head`: typer ends it
        raise
    except (Error, OSError) as error:  # OSError: a full disk, a missing permission
        _say(f"error: {error}", "red")
        raise typer.Exit(1) from None


def make_app() -> typer.Typer:
    """The typer application."""
    app = typer.Typer(
        name="impure-fast",
        help="Adversarial purification by information masking (IMPure).",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for command in (purify, demo, info, models, data, convert, export, train, evaluate):
        app.command()(_plain_ending()(command))
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``impure-fast``.  Ends by SystemExit with the exit code."""
    if typer is None:
        raise SystemExit(MISSING)
    make_app()(arguments, prog_name="impure-fast")


if __name__ == "__main__":
    main()
