"""Results as one long CSV that is only ever appended to; the tables and pictures of docs/explained/kernels.md."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import os
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from impure_fast import __version__
from impure_fast.errors import InputError

from .providers import BASELINES
from .registry import PROBLEMS
from .runner import flat

ROOT = Path(__file__).parent.parent
CSV = ROOT / "benchmarks" / "results" / "kernels.csv"
PAGE = ROOT / "docs" / "explained" / "kernels.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- kernels: made by python -m benchmarks report -->", "<!-- kernels: end -->"
COLUMNS = (
    *("commit", "date", "versions", "device", "dtype", "op", "shape"),
    *("provider", "mode", "statistic", "value"),
)
OURS = ("cpp", "triton", "cuda", "auto", "engine")
_KEYS = ("dtype", "op", "shape", "provider", "mode")
_TEXT = (*_KEYS, "machine", "clock", "baseline", "why_not", "note", "date", "commit")  # of a row; the rest is figures


@functools.cache
def commit() -> str:
    """Of this checkout, with + where it holds changes; outside one GIT_COMMIT of the environment, or "unknown"."""
    call = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--dirty=+"]
    found = ""
    with contextlib.suppress(OSError):  # no git
        found = subprocess.run(call, capture_output=True, text=True).stdout.strip()
    return found or os.environ.get("GIT_COMMIT", "unknown")


@functools.cache
def began() -> str:
    """Date and time by which the lines of one run are known."""
    return datetime.now().isoformat(timespec="seconds")


def lines(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A run's rows as lines of the CSV, one a figure; who was not timed has one line that says why."""
    found = []
    for row in rows:
        device, _, versions = row["machine"].partition(", torch ")
        extra = [f"impure_fast {__version__}", f"torch {versions}", row.get("clock"), row.get("note")]
        base = {
            "commit": row.get("commit") or commit(),
            "date": row.get("date") or began(),
            "versions": ", ".join(filter(None, extra)),
            "device": device,
            **{key: row[key] for key in _KEYS},
        }
        figures = {k: v for k, v in row.items() if k not in _TEXT and isinstance(v, (int, float))}
        if "ratio" in figures:
            figures[f"ratio to {row['baseline']}"] = figures.pop("ratio")
        if "why_not" in row:
            figures = {"why_not": row["why_not"]}
        found += [{**base, "statistic": key, "value": str(value)} for key, value in figures.items()]
    return found


def append(path: str | Path, columns: Sequence[str], entries: Sequence[Mapping[str, Any]]) -> None:
    """Add lines to a CSV, made with its heading where it is missing.

    Raises InputError where the file has other columns.
    """
    path, text = Path(path), io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if path.exists() and path.stat().st_size:
        with path.open(newline="") as file:
            if next(csv.reader(file)) != list(columns):
                raise InputError(f"{path} has other columns than {','.join(columns)}; name another file.")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer.writeheader()
    writer.writerows(entries)
    # One write at the end of the file: what is there already is never touched.
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    with os.fdopen(descriptor, "w") as file:
        file.write(text.getvalue())


def read(path: str | Path = CSV) -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def latest(entries: list[dict[str, str]]) -> dict[tuple[str, ...], dict[str, dict[str, str]]]:
    """{(device, dtype, op, shape, provider, mode): {statistic: its line of the last run}}."""
    found: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for line in entries:
        case = found.setdefault(_case(line), {})
        if any(old["date"] != line["date"] for old in case.values()):
            case.clear()
        case[line["statistic"]] = line
    return found


def _case(line: dict[str, str]) -> tuple[str, ...]:
    return line["device"], *(line[key] for key in _KEYS)


def _ratios(entries: list[dict[str, str]]) -> list[tuple[tuple[str, ...], float, str]]:
    """(key, times as fast as the fastest baseline of the same commit, source) of what is ours."""
    runs: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    strong: dict[tuple[str, ...], list[float]] = defaultdict(list)  # a campaign measures some in other processes
    withdrawn = {case for case, last in latest(entries).items() if "why_not" in last}
    for line in entries:
        wanted = line["statistic"] == "median_us" and "interpreter" not in line["versions"]
        if wanted and _case(line) not in withdrawn:
            case = (*(line[key] for key in ("device", "dtype", "op", "shape", "mode")), line["commit"])
            runs[(*case, line["date"])][line["provider"]] = float(line["value"])
            if any(fnmatch(line["provider"], pattern) for pattern in BASELINES):
                strong[case].append(float(line["value"]))
    found = {}  # of several runs the last one stays
    for (*case, began), medians in runs.items():
        (device, dtype, op, shape, mode, at), baselines = case, strong[tuple(case)]
        ours = [name for name in OURS if name in medians]
        if ours[:1] not in ([], ["auto"]):  # it takes one of those before it
            ours = [name for name in ours if name != "auto"]
        for provider in ours if baselines else ():
            key = (device, dtype, op, shape, provider, mode)
            found[key] = (key, min(baselines) / medians[provider], f"{device}, {began[:10]}, commit {at}")
    return list(found.values())


def table(entries: list[dict[str, str]]) -> str:
    """Markdown: how many times as fast as the fastest baseline each of our providers is, losing rows included."""
    columns: dict[str, None] = {}
    cells: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    found = _ratios(entries)
    for (device, dtype, op, shape, provider, mode), ratio, _ in found:
        columns[f"{dtype} {mode}"] = None
        cells[(device, op, shape, provider)][f"{dtype} {mode}"] = ratio
    head = ["device", "operator", "shape", "provider", *columns]
    text = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * 4 + ['---:'] * len(columns))} |"]
    for key, row in sorted(cells.items()):
        figures = [f"{row[column]:.2f}x" if column in row else "" for column in columns]
        text.append(f"| {' | '.join([*key, *figures])} |")
    sources = "; ".join(sorted({source for *_, source in found}))
    note = (
        "Times as fast as the fastest baseline of the same commit, by medians: the reference, torch's attention in each"
        " of its backends, plain products, torch.compile, the authors' code, as far as the CSV has them. Both: forward"
        f" and backward. {sources}."
    )
    return "\n".join([*text, "", note])


def networks(entries: list[dict[str, str]]) -> str:
    """Markdown: median milliseconds of a network's forward pass by provider, in its last run; a table a device."""
    cells: dict[str, dict[str, dict[tuple[str, ...], str]]] = defaultdict(lambda: defaultdict(dict))
    sources: dict[str, set[str]] = defaultdict(set)
    for (device, dtype, op, shape, provider, mode), statistics in latest(entries).items():
        if op.startswith("reconstruct ") and mode == "forward" and (line := statistics.get("median_us")):
            column = (op.removeprefix("reconstruct "), shape, dtype)
            cells[device][provider][column] = f"{float(line['value']) / 1000:.0f}"
            sources[device].add(f"{line['date'][:10]}, commit {line['commit']}")
    text = []
    for device, rows in cells.items():
        columns = sorted({column for row in rows.values() for column in row})
        head = " | ".join(f"`{name}` {shape}, {dtype}" for name, shape, dtype in columns)
        text += [f"| {device} | {head} |", f"| --- | {' | '.join('---:' for _ in columns)} |"]
        text += [f"| {name} | {' | '.join(row.get(c, '') for c in columns)} |" for name, row in rows.items()]
        text += ["", f"Median milliseconds of a forward pass. {device}, {'; '.join(sorted(sources[device]))}.", ""]
    return "\n".join(text[:-1])


def floors() -> str:
    """Markdown: what no implementation of an operator can do without, and the operations a byte that follow from it."""
    text = ["| operator | shape | MFLOP | MB, float32 | FLOP a byte, float32 | bfloat16 |"]
    text.append("| --- | --- | ---: | ---: | ---: | ---: |")
    for problem in PROBLEMS:
        if not problem.small and not problem.preset:
            needs = []
            for dtype in (torch.float32, torch.bfloat16):
                with FakeTensorMode():  # only shapes count
                    inputs = problem.make(dtype, "cpu")
                    needs.append(problem.work(inputs, flat(problem.reference(*inputs))))
            (moved, flops), _ = needs
            intensities = " | ".join(f"{flops / moved:.1f}" for moved, flops in needs)
            text.append(f"| {problem.op} | {problem.shape} | {flops / 1e6:.1f} | {moved / 1e6:.1f} | {intensities} |")
    return "\n".join(text)


def block(entries: list[dict[str, str]]) -> str:
    """What ``report`` puts into docs/explained/kernels.md."""
    pictures = [f"![{name}](../../benchmarks/results/{name}.png)" for name, draw in PICTURES.items() if draw(entries)]
    parts = ["### The least that must be done", floors(), "### What was measured", table(entries), *pictures]
    return "\n\n".join(parts)


def in_page(page: str, text: str) -> str:
    """The page with ``text`` between the two marks.  Raises InputError where it has not both of them."""
    before, first, rest = page.partition(BEGIN)
    _, last, after = rest.partition(END)
    if not (first and last):
        raise InputError(f"{PAGE.name} lacks the marks {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def report(options: Any) -> None:
    """The tables of README and page, and the pictures that there are figures for."""
    from . import latency

    entries = read()
    for page, text in ((PAGE, block(entries)), (README, networks(entries))):
        page.write_text(in_page(page.read_text(), text))
        print(text)
    for name, draw in PICTURES.items():
        if figure := draw(entries):
            figure.savefig(CSV.with_name(f"{name}.png"), dpi=80, bbox_inches="tight")
            print(f"wrote benchmarks/results/{name}.png")
    latency.draw(ROOT / "docs" / "latency.png", read(latency.CSV))
    print("wrote docs/latency.png")


def _axes(height: float = 4.0) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height))
    return figure, figure.subplots()


def _bars(entries: list[dict[str, str]]) -> Any:
    found = _ratios(entries)
    if not found:
        return None
    figure, axes = _axes(1 + 0.16 * len(found))
    labels = [f"{op} {shape} {dtype} {mode}: {provider}" for (_, dtype, op, shape, provider, mode), *_ in found]
    axes.barh(labels, [ratio for _, ratio, _ in found])
    axes.axvline(1, color="black")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=6)
    axes.set_xlabel("times as fast as the fastest baseline")
    return figure


def _roofline(entries: list[dict[str, str]]) -> Any:
    wanted = ("intensity", "gflops", "copy_gbytes_per_s", "product_gflops")
    points: dict[tuple[str, str], list[tuple[float, ...]]] = defaultdict(list)
    for (device, dtype, *key), statistics in latest(entries).items():
        if "int8" in " ".join(key):  # its operations are not those of the dtype
            continue
        if all(name in statistics for name in wanted) and float(statistics["intensity"]["value"]) > 0:
            points[(device, dtype)].append(tuple(float(statistics[name]["value"]) for name in wanted))
    if not points:
        return None
    figure, axes = _axes()
    for (device, dtype), found in points.items():
        marks = axes.scatter([p[0] for p in found], [p[1] for p in found], s=12, label=f"{device}, {dtype}")
        _, _, copy, product = found[-1]
        grid = [2.0**i for i in range(-4, 14)]
        axes.plot(grid, [min(copy * x, product) for x in grid], color=marks.get_facecolor()[0])
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s")
    axes.legend(fontsize=7)
    return figure


def _memory(entries: list[dict[str, str]]) -> Any:
    found = [(key, float(s["peak_bytes"]["value"])) for key, s in latest(entries).items() if "peak_bytes" in s]
    if not found:
        return None
    figure, axes = _axes(1 + 0.16 * len(found))
    axes.barh([" ".join(key[1:]) for key, _ in found], [value / 2**20 for _, value in found])
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=6)
    axes.set(xscale="log", xlabel="MiB allocated at most beside the inputs")
    return figure


PICTURES = {"speedup": _bars, "roofline": _roofline, "memory": _memory}
