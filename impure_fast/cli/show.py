"""``impure-fast demo``, ``app``, ``info`` and ``models``."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from .common import FeatureStep, ImageStep, Model, say

GPU_STATE = "Nothing has run on a GPU yet: CUDA and Triton kernels, CUDA graphs and fp8 are tested on the CPU alone."


def demo(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture of the result.")] = Path("demo.png"),
    model: Model = "impure_tiny",
    views: Annotated[int, typer.Option(min=1, help="Views of photographs to attack.")] = 40,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Packed ImageNet pictures in place of the photographs.")
    ] = None,
    attack_steps: Annotated[int, typer.Option(min=1, help="Steps of the PGD attack.")] = 20,
    white_box: Annotated[
        int, typer.Option(min=0, help="Attack so many pictures through the purifier as well (slow).")
    ] = 0,
    image_step: ImageStep = None,
    feature_step: FeatureStep = None,
) -> None:
    """Attack an ImageNet classifier on photographs, purify, and show both."""
    from rich.console import Console

    from .. import demo as demo_module

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
        progress=say,
    )
    Console().print(demo_module.table(results))


def app(
    model: Model = "impure_tiny",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets everybody in.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Unset: a free one from 7860 on.")] = None,
) -> None:
    """Serve a page on which to attack a classifier on a photograph and purify it."""
    from .. import app as app_module
    from .. import zoo

    page, address = app_module.launch(zoo.load(model), host, port)
    say(f"the page is at {address}; Ctrl-C ends it")
    page.block_thread()


def info(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """Show versions, devices and what can run on which backend."""
    report = _info()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    from ..ops._dispatch import BACKENDS

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

    from .. import ops
    from ..demo import processor_name
    from ..ops._dispatch import BACKENDS, can_run
    from ..ops._native import build_report, introspect

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

    from .. import zoo

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
