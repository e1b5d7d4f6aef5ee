"""``impure-fast data``, ``convert`` and ``export``: files in, files out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import Error, InputError, MissingExtraError
from .common import Model, check_free, end, progress_bar


def data(
    folder: Annotated[Path, typer.Argument(metavar="INPUT", help="Folder of images; sub-folders are classes.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.npz")],
    cifar10: Annotated[
        Literal["train", "test"] | None, typer.Option(help="INPUT holds torchvision's CIFAR-10: take this part.")
    ] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of pictures that are not yet JPEG.")] = 92,
    max_side: Annotated[int | None, typer.Option(min=1, help="Scale longer sides down to this, in pixels.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.npz if it exists.")] = False,
) -> None:
    """Pack a folder of images into the one file that training and evaluation read.

    RGB JPEG files are kept byte for byte, others are re-encoded. Sub-folders
    named by numbers or by ImageNet synsets have that label, others count in
    sorted order; -1 without sub-folders. The order is shuffled, always alike.
    """
    from ..evaluation.targets import class_labels
    from ..images import encode_jpeg, find_images, jpeg_bytes, write_packed

    check_free(output, ".npz", overwrite)
    sources: list[tuple[str, int, Callable[[], bytes]]] = []  # name, label, picture
    if cifar10:
        images = _cifar10(folder, cifar10)
        for i, (rgb, label) in enumerate(zip(images.data, images.targets, strict=True)):
            sources.append((f"{cifar10}/{i:05d}", label, functools.partial(encode_jpeg, rgb, quality, max_side)))
    else:
        if not folder.is_dir():
            raise InputError(f"{folder} is no folder; give the folder that holds the images or the class folders.")
        label_of = class_labels(
            path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
        )
        for file, relative in find_images([folder], recursive=True):
            label = label_of[relative.parts[0]] if len(relative.parts) > 1 else -1
            sources.append((relative.as_posix(), label, functools.partial(jpeg_bytes, file, quality, max_side)))
    packed: list[tuple[str, int, bytes]] = []
    problems: list[str] = []
    with progress_bar() as progress:
        for name, label, picture in progress.track(sources, description="packing"):
            try:
                packed.append((name, label, picture()))
            except Error as error:
                problems.append(str(error))
    if packed:
        names, labels, jpegs = zip(*packed, strict=True)
        write_packed(output, jpegs, labels, names)
    done = f"packed {len(packed)} images into {output}" if packed else f"nothing was packed, {output} was not written"
    end(problems, f"{done}, failed {len(problems)}")


def _cifar10(root: Path, split: str) -> Any:
    """torchvision's data set; nothing is downloaded."""
    try:
        from torchvision.datasets import CIFAR10
    except ImportError as error:
        raise MissingExtraError("--cifar10 needs torchvision: pip install torchvision.") from error
    try:
        return CIFAR10(root=root, train=split == "train", download=False)
    except RuntimeError as error:
        raise InputError(
            f"{root} does not hold CIFAR-10 as torchvision stores it (cifar-10-batches-py, checksums right). Fetch it "
            f'once: python -c "from torchvision.datasets import CIFAR10; CIFAR10({str(root)!r}, download=True)".'
        ) from error


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN.pth", help="The authors' checkpoint, or a bare state dict.")],
    output: Annotated[Path, typer.Argument(metavar="OUT.safetensors")],
    dtype: Annotated[Literal["fp16", "fp32"], typer.Option(help="Type of the stored weights.")] = "fp32",
    strict: Annotated[bool, typer.Option(help="Refuse missing and unexpected weights.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.safetensors if it exists.")] = False,
) -> None:
    """Convert the authors' weights to a safetensors file with its config inside."""
    check_free(output, ".safetensors", overwrite)
    import torch

    from .. import checkpoints, zoo

    network = zoo.load_official(source, strict=strict)
    wanted = torch.float16 if dtype == "fp16" else torch.float32
    checkpoints.save_safetensors(output, network.state_dict(), network.config, wanted)
    report: Any = network.load_report
    typer.echo(f"wrote {output} ({dtype})")
    typer.echo(f"dropped {len(report.dropped)} (tables and guide networks, never needed)")
    for name, keys in (("missing", report.missing), ("unexpected", report.unexpected)):
        typer.echo(f"{name} {len(keys)}" + (f": {', '.join(keys)}" if keys else ""))


def export(
    output: Annotated[Path | None, typer.Argument(metavar="OUT", help="A .pt2 or .onnx file.")] = None,
    triton: Annotated[
        Path | None, typer.Option(metavar="DIR", help="In place of OUT: a model repository for NVIDIA Triton.")
    ] = None,
    height: Annotated[int, typer.Option(min=1, help="Of the pictures, in pixels.")] = 224,
    width: Annotated[int, typer.Option(min=1)] = 224,
    format: Annotated[
        Literal["program", "aoti", "onnx"] | None,
        typer.Option(help="torch.export program, AOTInductor package or ONNX; unset: by OUT's suffix."),
    ] = None,
    model: Model = "impure_tiny",
    decomposed: Annotated[bool, typer.Option("--decomposed", help="Use torch's own operators alone.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
) -> None:
    """Write the purifier for other runtimes: (images, seed, streams) to purified images, any batch, one size."""
    from .. import zoo
    from ..engine import export as exports

    if triton and not (output or format or decomposed):
        folder = triton / f"{Path(model).name.removesuffix('.safetensors')}_{height}x{width}"
        check_free(folder / "config.pbtxt", ".pbtxt", overwrite)
        exports.export_triton(zoo.load(model), folder, height, width)
        typer.echo(f"wrote {folder} (Triton, pictures of {height} x {width})")
    elif output and not triton:
        form = format or ("onnx" if output.suffix == ".onnx" else "program")
        check_free(output, ".onnx" if form == "onnx" else ".pt2", overwrite)
        exports.export(zoo.load(model), output, height, width, format=form, decomposed=decomposed)
        typer.echo(f"wrote {output} ({form}, pictures of {height} x {width})")
    else:
        raise InputError(
            "Name one: OUT, a .pt2 or .onnx file, or --triton DIR, a model repository (always of ONNX, so without "
            "--format and --decomposed)."
        )
