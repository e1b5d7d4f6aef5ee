"""Latency and throughput of purification before a classifier, from uint8 images on the host to logits.

    python -m benchmarks.latency --batches 1,8,64 --rates 0.5,0.8 --csv latency.csv --picture latency.png

(`python -m benchmarks report` draws docs/latency.png from results/latency.csv.)

Closed loop: the next batch starts when the last is done.  Open loop: one image arrives every 1/rate seconds, whether
the last is done or not; a call takes all that wait, up to the largest batch; latency counts from arrival.  Every
provider is first compared with the reference under one seed; what differs is not timed.  The classifier's weights are
random: no figure here depends on them.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from impure_fast import Draws, Engine, backend, create_model, load
from impure_fast.classifiers import LITE0_MEAN, LITE0_STD, Normalised
from impure_fast.engine.engine import PRECISIONS
from impure_fast.errors import Error, InputError, MissingExtraError
from impure_fast.evaluation.analysis import psnr
from impure_fast.model import IMPure
from impure_fast.purify import even_batch
from impure_fast.zoo import shipped

from . import authors, results
from .runner import available, board, machine, positive

Purify = Callable[[Tensor, int | None], Tensor]  # (uint8 [N, 3, H, W] on the host, seed) -> float in [0, 1] on device
CSV = results.ROOT / "benchmarks" / "results" / "latency.csv"
AGREES = {"engine fp8": 30.0}  # dB of PSNR against the reference that a provider must reach; the others: 40
LOOPS = {"closed": "images/s", "open": "images/s arriving"}  # of the pictures, their first axes
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

    def engine(precision: str, compile: bool = False) -> Callable[[], Purify]:
        def make() -> Purify:
            own = Engine(model, precision=precision, device=device, compile=compile)
            return lambda images, seed: own.purify(images.to(device).float() / 255, seed=seed, check=False)

        return make

    yield "reference", lambda: of_model(model.purify)
    yield "no purifier", lambda: lambda images, seed: images.to(device).float() / 255
    yield "reference compiled", compiled
    yield (
        "operators",
        lambda: lambda images, seed: model.purify(images.to(device).float() / 255, seed=seed, check=False),
    )
    for precision in PRECISIONS[device]:
        yield f"engine {precision}", engine(precision)
    yield "engine bf16 compiled", engine("bf16", compile=True)
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
    """Statistics of a list of latencies in seconds; per_call: images that each of them stands for.

    Of a percentile no more than the calls can tell: p90 of ten and more, p99 of a hundred and more.
    """
    cuts = statistics.quantiles(taken, n=100, method="inclusive")
    known = [p for p, count in ((50, 2), (90, 10), (99, 100)) if len(taken) >= count]
    percentiles = {f"p{p}_ms": 1e3 * cuts[p - 1] for p in known}
    return {**percentiles, "images_per_second": per_call / statistics.fmean(taken), "count": len(taken)}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Long rows, in COLUMNS, appended to the CSV as they come.  Raises InputError or MissingFileError."""
    if options.authors:
        authors.check(options.authors)
    torch.manual_seed(0)
    make_model = load if options.model.split(".")[0] in {n.split(".")[0] for n in shipped()} else create_model
    model = make_model(options.model).eval().to(options.device)
    known = dict(providers(model, options.device, options.authors))
    wanted = options.providers.split(",") if options.providers else list(known)
    if unknown := [name for name in wanted if name not in known]:
        raise InputError(f"{', '.join(unknown)}: no such provider; there are {', '.join(known)}.")
    try:
        from timm import create_model as create_classifier
    except ImportError as error:
        raise MissingExtraError('The classifier needs the extra "timm": pip install "impure-fast[timm]".') from error
    network = create_classifier("tf_efficientnet_lite0").requires_grad_(False)
    classifier = Normalised(network, LITE0_MEAN, LITE0_STD).eval().to(options.device)
    generator = torch.Generator().manual_seed(0)
    shape = (max(2, *options.batches), 3, options.side, options.side)
    pictures = torch.randint(0, 256, shape, generator=generator).byte()
    base = {
        "date": results.began(),
        "commit": results.commit(),
        "machine": machine(options.device),
        "model": options.model,
        "pictures": f"{options.side}x{options.side}",
    }
    rows: list[dict[str, Any]] = []

    def note(provider: str, loop: str, load: float, figures: dict[str, Any]) -> None:
        texts = {k: f"{v:.5g}" if isinstance(v, float) else str(v) for k, v in figures.items()}
        own = {**base, "provider": provider, "loop": loop, "load": load}
        new = [{**own, "statistic": statistic, "value": value} for statistic, value in texts.items()]
        rows.extend(new)
        if options.csv:
            results.append(options.csv, COLUMNS, new)
        print(f"{provider:26} {loop:7} {load:8g}  {'  '.join(f'{k} {v}' for k, v in texts.items())}", flush=True)

    truth = None
    for name, make in known.items():
        if name not in wanted and name != "reference":
            continue
        if isinstance(make, str):
            note(name, "none", 0, {"why_not": make})
            continue
        try:
            with torch.inference_mode():
                purify = make()
                result = purify(pictures[:2], 0)
                truth = result if truth is None else truth
                agreement = psnr(result.float(), truth) if result is not truth else float("inf")
                note(name, "parity", 0, {"psnr": agreement})
                if agreement < AGREES.get(name, 40.0) and name != "no purifier":
                    note(name, "none", 0, {"why_not": "its pictures differ from the reference's"})
                    continue
                _time(name, purify, classifier, pictures, result, options, note)
        except Exception as refusal:  # one provider's failure is not the run's end
            if name == "reference":
                raise
            note(name, "none", 0, {"why_not": f"{type(refusal).__name__}: {' '.join(str(refusal).split())[:300]}"})
    return rows


def _time(
    name: str,
    purify: Purify,
    classifier: nn.Module,
    pictures: Tensor,
    right: Tensor,
    options: argparse.Namespace,
    note: Callable[[str, str, float, dict[str, Any]], None],
) -> None:
    def answer(images: Tensor) -> Tensor:
        return classifier(purify(images, None)).cpu()

    for batch in options.batches:
        purified = purify(pictures[:batch], 0)  # shapes compiled, memory touched, and by graphs of its own
        classifier(purified)
        if (same := psnr(purified[: len(right)].float(), right[:batch].float())) < AGREES.get(name, 40.0):
            raise RuntimeError(f"its pictures change with the batch: {same:.1f} dB in one of {batch}")
        taken = closed_loop(answer, pictures[:batch], options.seconds)
        note(name, "closed", batch, summary(taken, batch) | board(options.device))
    for batch in range(1, max(options.batches) + 1) if options.rates else ():
        if batch == even_batch(batch):  # the open loop takes any number: their graphs and compilations come before it
            answer(pictures[:batch])
    for rate in options.rates:
        taken = open_loop(answer, pictures[: max(options.batches)], rate, options.seconds)
        figures = summary(taken, 1)
        figures["images_per_second"] = len(taken) / ((len(taken) - 1) / rate + taken[-1])  # below the rate: overrun
        note(name, "open", rate, figures | board(options.device))


def draw(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A line of pictures for each model: the closed loop's latency over throughput, the open one's over arrivals."""
    from matplotlib.figure import Figure

    # (model, pictures, machine) -> loop -> provider -> load -> {statistic: value}, of several the last
    found: dict[tuple[str, ...], dict[str, Any]] = defaultdict(lambda: {loop: {} for loop in LOOPS})
    for row in rows:
        if row["loop"] in LOOPS:
            curves = found[row["model"], row["pictures"], row["machine"]][row["loop"]]
            point = curves.setdefault(row["provider"], {}).setdefault(float(row["load"]), {})
            point[row["statistic"]] = float(row["value"])
    if not found:
        return
    names = list(dict.fromkeys(row["provider"] for row in rows))  # a colour each, in every picture the same
    columns = [loop for loop in LOOPS if any(loops[loop] for loops in found.values())]
    figure = Figure(figsize=(5.5 * len(columns), 4 * len(found)), layout="constrained")
    grid = figure.subplots(len(found), len(columns), squeeze=False)
    for line, (what, loops) in zip(grid, found.items(), strict=True):
        for axis, loop in zip(line, columns, strict=True):
            if not loops[loop]:
                axis.set_visible(False)
                continue
            for provider, points in loops[loop].items():
                x = [point["images_per_second"] if loop == "closed" else at for at, point in sorted(points.items())]
                y = [point["p50_ms"] for _, point in sorted(points.items())]
                axis.plot(x, y, "o-", label=provider, color=f"C{names.index(provider)}")
            axis.set(xscale="log", yscale="log", xlabel=LOOPS[loop], ylabel="p50 latency, ms")
            for side in (axis.xaxis, axis.yaxis):
                side.set_major_formatter("{x:g}")
                side.set_minor_formatter("{x:g}")
            axis.tick_params(which="both", labelsize=6)
            axis.set_title(f"{', '.join(what)}: {loop} loop", fontsize=7)
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="impure_tiny", help="shipped name, or a preset with random weights")
    parser.add_argument("--side", type=int, default=224, help="of the square pictures, in pixels")
    parser.add_argument("--batches", type=_batches, default="1,8,64", help="closed loop; the largest bounds the open's")
    parser.add_argument("--rates", type=_rates, default="", help="images a second of the open loop")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement; at least two calls are made")
    parser.add_argument("--providers", help="names as printed, separated by commas; the reference always runs")
    parser.add_argument("--authors", metavar="PATH", help="a checkout of NoWindButRain/IMPure")
    parser.add_argument("--device", type=available, default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", metavar="FILE", help="append the rows to it")
    parser.add_argument("--picture", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = False
    try:
        rows = measure(options)
    except (Error, OSError) as error:
        parser.exit(2, f"{error}\n")
    if options.picture:
        draw(options.picture, rows)


def _batches(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def _rates(text: str) -> list[float]:
    found = [float(part) for part in text.split(",") if part]
    if not all(rate > 0 for rate in found):
        raise argparse.ArgumentTypeError(f"{text}: rates are above 0")
    return found


if __name__ == "__main__":
    main()
