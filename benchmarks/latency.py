"""Latency and throughput of purification before a classifier, from uint8 images on the host to logits.

    python -m benchmarks.latency --batches 1,8,64 --rates 0.5,0.8 --csv latency.csv --picture latency.png

Closed loop: the next batch starts when the last is done.  Open loop: one image arrives every 1/rate seconds, whether
the last is done or not; a call takes all that wait, up to the largest batch; latency counts from arrival.  Every
provider is first compared with the reference under one seed; what differs is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from impure_fast import Draws, Engine, backend, create_model, load
from impure_fast.classifiers import LITE0_MEAN, LITE0_STD, Normalised, efficientnet_lite0
from impure_fast.engine.engine import PRECISIONS
from impure_fast.evaluation.analysis import psnr
from impure_fast.model import IMPure
from impure_fast.zoo import shipped

from . import authors, results
from .runner import machine

Purify = Callable[[Tensor, int | None], Tensor]  # (uint8 [N, 3, H, W] on the host, seed) -> float in [0, 1] on device
AGREES = 40.0  # dB of PSNR against the reference that a provider must reach
COLUMNS = ("date", "commit", "machine", "model", "pictures", "provider", "loop", "load", "statistic", "value")


def providers(model: IMPure, device: str, folder: str | None) -> Iterator[tuple[str, Callable[[], Purify] | str]]:
    """(name, what makes it, or why it cannot be)."""

    def of_model(network: Any) -> Purify:
        def purify(images: Tensor, seed: int | None) -> Tensor:
            with backend("reference"):
                return network(images.to(device).float() / 255, seed=seed, check=False)

        return purify

    def compiled() -> Purify:
        fast = IMPure(model.config).eval().to(device)
        fast.load_state_dict(model.state_dict())
        fast.forward = torch.compile(fast.forward)  # type: ignore[method-assign]
        return of_model(fast.purify)

    def engine(precision: str) -> Callable[[], Purify]:
        def make() -> Purify:
            own = Engine(model, precision=precision, device=device)
            return lambda images, seed: own.purify(images.to(device).float() / 255, seed=seed, check=False)

        return make

    yield "reference", lambda: of_model(model.purify)
    yield "no purifier", lambda: lambda images, seed: images.to(device).float() / 255
    yield "reference compiled", compiled
    yield "operators", lambda: lambda images, seed: model.purify(images.to(device).float() / 255, seed=seed)
    for precision in PRECISIONS[device]:
        yield f"engine {precision}", engine(precision)
    if folder is None:
        yield "authors", "needs --authors, a checkout of their repository"
    elif model.config.patch_size != 16:
        yield "authors", "their code has no network of this shape"
    else:
        for name, dtype in (("authors", None), ("authors bf16 autocast", torch.bfloat16)):
            yield name, lambda dtype=dtype: _authors(authors.load(folder, model).to(device), model, device, dtype)


def _authors(theirs: Any, model: IMPure, device: str, dtype: torch.dtype | None) -> Purify:
    """Their network as they call it (``dtype``: under autocast); under a seed with our draws, for the comparison."""

    def purify(images: Tensor, seed: int | None) -> Tensor:
        x = images.to(device).float() / 255
        given: Any = contextlib.nullcontext()
        if seed is not None:
            given = authors.drawn(Draws.sample(model.config, x.shape, seed, device=device))
        with given, torch.autocast(device, dtype, enabled=dtype is not None):
            return theirs.unnormalize(theirs(x)[1]).float().clamp(0, 1)

    return purify


def closed_loop(answer: Callable[[Tensor], Tensor], images: Tensor, seconds: float) -> list[float]:
    """Seconds of each call."""
    taken: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(taken) < 2:
        start = time.perf_counter()
        answer(images)
        taken.append(time.perf_counter() - start)
    return taken


def open_loop(answer: Callable[[Tensor], Tensor], images: Tensor, rate: float, seconds: float) -> list[float]:
    """Seconds from arrival to answer of each image; images: as many as one call may take."""
    count, done = max(3, int(rate * seconds)), 0
    taken: list[float] = []
    began = time.perf_counter()
    while done < count:
        now = time.perf_counter() - began
        waiting = min(int(now * rate) + 1, count) - done
        if waiting <= 0:
            time.sleep(max(0.0, done / rate - now))
            continue
        part = images[:waiting]
        answer(part)
        ended = time.perf_counter() - began
        taken += [ended - (done + i) / rate for i in range(len(part))]
        done += len(part)
    return taken


def summary(taken: list[float], per_call: int) -> dict[str, float]:
    """Statistics of a list of latencies in seconds; per_call: images that each of them stands for."""
    cuts = statistics.quantiles(taken, n=100, method="inclusive")
    mean = statistics.fmean(taken)
    return {
        "p50_ms": 1e3 * cuts[49],
        "p90_ms": 1e3 * cuts[89],
        "p99_ms": 1e3 * cuts[98],
        "images_per_second": per_call / mean,
        "count": len(taken),
    }


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Long rows, in COLUMNS."""
    torch.manual_seed(0)
    model = (load if options.model.split(".")[0] in {n.split(".")[0] for n in shipped()} else create_model)(
        options.model
    )
    model = model.eval().to(options.device)
    classifier = Normalised(efficientnet_lite0(), LITE0_MEAN, LITE0_STD).eval().to(options.device)
    batches = [int(b) for b in options.batches.split(",")]
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (max(batches), 3, options.side, options.side), generator=generator).byte()
    base = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": results.commit(),
        "machine": machine(options.device),
        "model": options.model,
        "pictures": f"{options.side}x{options.side}",
    }
    rows: list[dict[str, Any]] = []

    def note(provider: str, loop: str, load: float, figures: dict[str, Any]) -> None:
        for statistic, value in figures.items():
            value = f"{value:.5g}" if isinstance(value, float) else value
            rows.append(
                {**base, "provider": provider, "loop": loop, "load": load, "statistic": statistic, "value": value}
            )
        print(
            f"{provider:26} {loop:7} {load:8g}  "
            + "  ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()),
            flush=True,
        )

    truth = None
    wanted = options.providers and options.providers.split(",")
    for name, make in providers(model, options.device, options.authors):
        if wanted and name not in wanted and name != "reference":
            continue
        if isinstance(make, str):
            note(name, "none", 0, {"why_not": make})
            continue
        with torch.inference_mode():
            purify = make()
            result = purify(pictures[:1], 0)
            truth = result if truth is None else truth
            agreement = psnr(result.float(), truth) if result is not truth else float("inf")
            note(name, "parity", 0, {"psnr": agreement})
            if agreement < AGREES and name != "no purifier":
                note(name, "none", 0, {"why_not": "its pictures differ from the reference's"})
                continue
            _time(name, purify, classifier, pictures, batches, options, note)
    return rows


def _time(
    name: str,
    purify: Purify,
    classifier: nn.Module,
    pictures: Tensor,
    batches: list[int],
    options: argparse.Namespace,
    note: Callable[[str, str, float, dict[str, Any]], None],
) -> None:
    def answer(images: Tensor) -> Tensor:
        return classifier(purify(images, None)).cpu()

    for batch in batches:
        answer(pictures[:batch])  # shapes compiled, memory touched
        note(name, "closed", batch, summary(closed_loop(answer, pictures[:batch], options.seconds), batch))
    for rate in (float(r) for r in options.rates.split(",") if r):
        taken = open_loop(answer, pictures, rate, options.seconds)
        figures = summary(taken, 1)
        del figures["images_per_second"]  # the rate itself, as long as it is kept up with
        note(name, "open", rate, figures)


def append(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a CSV; it is made with its heading where it is missing."""
    fresh = not Path(path).exists()
    with Path(path).open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def draw(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Latency over throughput in the closed loop, latency over arrival rate in the open one."""
    from matplotlib.figure import Figure

    labels = {"closed": "images/s", "open": "images/s arriving"}
    loops = [loop for loop in labels if any(row["loop"] == loop for row in rows)]
    figure = Figure(figsize=(5.5 * len(loops), 4), layout="constrained")
    for axis, loop in zip(figure.subplots(1, len(loops), squeeze=False)[0], loops, strict=True):
        for provider in dict.fromkeys(row["provider"] for row in rows if row["loop"] == loop):
            own = [row for row in rows if (row["provider"], row["loop"]) == (provider, loop)]
            value = {(row["load"], row["statistic"]): float(row["value"]) for row in own}
            loads = sorted({row["load"] for row in own})
            x = [value[load, "images_per_second"] if loop == "closed" else load for load in loads]
            axis.plot(x, [value[load, "p50_ms"] for load in loads], "o-", label=provider)
        axis.set(xscale="log", yscale="log", xlabel=labels[loop], ylabel="p50 latency, ms", title=f"{loop} loop")
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(f"{rows[0]['model']}, {rows[0]['pictures']}, {rows[0]['machine']}", fontsize=9)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="impure_tiny", help="shipped name, or a preset with random weights")
    parser.add_argument("--side", type=int, default=224, help="of the square pictures, in pixels")
    parser.add_argument("--batches", default="1,8,64", help="of the closed loop; the largest bounds the open one's")
    parser.add_argument("--rates", default="", help="images a second of the open loop")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement; at least two calls are made")
    parser.add_argument("--providers", help="names as printed, separated by commas; the reference always runs")
    parser.add_argument("--authors", metavar="PATH", help="a checkout of NoWindButRain/IMPure")
    parser.add_argument("--device", default="cpu", choices=PRECISIONS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", metavar="FILE", help="append the rows to it")
    parser.add_argument("--picture", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(options)
    if options.csv:
        append(options.csv, rows)
    if options.picture:
        draw(options.picture, rows)


if __name__ == "__main__":
    main()
