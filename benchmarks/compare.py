"""Two commits against each other: pairs of readings in one run, medians of ratios, and a noise band.

Each side is a process that imports ``impure_fast`` from a worktree of its commit and the benchmarks from this one.
The new side runs twice: what the two differ by is noise, and a ratio inside that band is no difference.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from impure_fast.errors import Error, InputError
from impure_fast.images import write_text

from .providers import providers
from .registry import Problem, cases, problems
from .results import ROOT
from .runner import SECONDS, error, oracle, result, timed


def run(options: Any) -> int:
    """For every problem: old/new (above 1: new is faster), its band, and the band of new against itself.

    Exit code 1 where new is slower, or a side could not be timed.
    """
    if options.old == ".":
        raise InputError("compare OLD [NEW]: the old side is a commit; '.' stands for this tree as the new one.")
    chosen = list(cases(options))  # before the trees are made, as it may raise
    with _tree(options.old) as old, _tree(options.new) as new:
        rows = [_pairs(*case, options, old, new) for case in chosen]
    if options.json:
        write_text(options.json, json.dumps(rows, indent=1) + "\n")
    return int(any(row.get("verdict") in (None, "new is slower") for row in rows))


def _pairs(problem: Problem, dtype: str, mode: str, options: Any, old: Path, new: Path) -> dict[str, Any]:
    spec = json.dumps([problem.name, dtype, mode, options.provider, options.device])
    row: dict[str, Any] = {"op": problem.op, "shape": problem.shape, "dtype": dtype, "mode": mode}
    label = " ".join(row.values())
    with contextlib.ExitStack() as stack:
        sides = [stack.enter_context(_side(tree, spec)) for tree in (old, new, new)]
        said = [_ask(side) for side in sides]
        if why := [text for text in said if text != "ready"]:
            print(f"{label}: not timed: {'; '.join(dict.fromkeys(why))}", flush=True)
            return {**row, "why_not": why[0]}
        readings = [[0.0, 0.0, 0.0] for _ in range(options.rounds)]
        for i, reading in enumerate(readings):
            for j in range(3):  # each side goes first, second and last in turn
                side = (i + j) % 3
                reading[side] = float(_ask(sides[side], "go"))
    ratios = sorted(2 * a / (b + c) for a, b, c in readings)
    noise = sorted(c / b for _, b, c in readings)
    row |= {"ratio": statistics.median(ratios), "p20": ratios[len(ratios) // 5], "p80": ratios[4 * len(ratios) // 5]}
    row |= {"noise_p20": noise[len(noise) // 5], "noise_p80": noise[4 * len(noise) // 5]}
    row["verdict"] = verdict(row)
    band = f"{row['p20']:.3f} to {row['p80']:.3f}, noise {row['noise_p20']:.3f} to {row['noise_p80']:.3f}"
    print(f"{label}: {row['ratio']:.3f}x ({band}): {row['verdict']}", flush=True)
    return row


def verdict(row: dict[str, Any]) -> str:
    """A difference is one that leaves both bands: of the ratio itself, and of new against new, widened about 1."""
    width = max(abs(row["noise_p20"] - 1), abs(row["noise_p80"] - 1))
    if row["p20"] <= 1 <= row["p80"] or abs(row["ratio"] - 1) <= width:
        return "within noise"
    return "new is faster" if row["ratio"] > 1 else "new is slower"


@contextlib.contextmanager
def _tree(commit: str) -> Iterator[Path]:
    """A folder with ``impure_fast`` of a commit and the benchmarks of this tree."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        source, folder = ROOT, Path(scratch)
        if commit != ".":
            source = folder / "source"
            _git("worktree", "add", "--detach", str(source), commit)
            stack.callback(_git, "worktree", "remove", "--force", str(source))
            (source / "impure_fast" / "kernels").symlink_to(source / "kernels")
            _native(source, commit)
        place = folder / "place"
        place.mkdir()
        (place / "impure_fast").symlink_to(source / "impure_fast")
        (place / "benchmarks").symlink_to(ROOT / "benchmarks")
        yield place


def _native(source: Path, commit: str) -> None:
    """The compiled parts: this tree's own where their source is the same, else built."""
    same = subprocess.run(["git", "-C", str(ROOT), "diff", "--quiet", commit, "--", "csrc", "setup.py"]).returncode == 0
    if same:
        for file in (*ROOT.glob("impure_fast/*.so"), *ROOT.glob("impure_fast/_build.json")):
            shutil.copy(file, source / "impure_fast")
    else:
        build = [sys.executable, "setup.py", "build_ext", "--inplace"]
        if subprocess.run(build, cwd=source, stdout=subprocess.DEVNULL).returncode:
            raise InputError(f"The native parts of {commit} do not build (see above).")


def _git(*arguments: str) -> None:
    found = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if found.returncode:
        raise InputError(f"git {' '.join(arguments[:2])}: {found.stderr.strip()}")


@contextlib.contextmanager
def _side(tree: Path, spec: str) -> Iterator[subprocess.Popen[str]]:
    call = [sys.executable, "-m", "benchmarks", "worker", spec]
    with subprocess.Popen(call, cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def _ask(side: subprocess.Popen[str], order: str = "") -> str:
    """Send an order, if any; a line of answer."""
    assert side.stdin is not None and side.stdout is not None
    if order:
        print(order, file=side.stdin, flush=True)
    return side.stdout.readline().strip() or f"the worker ended with {side.wait()}"


def worker(options: Any) -> None:
    """Says "ready" or why not, then answers every line with the seconds of one reading."""
    name, dtype, mode, provider, device = json.loads(options.spec)
    problem = next(p for small in (True, False) for p in problems(small=small, device=device) if p.name == name)
    inputs = problem.make(getattr(torch, dtype), device)
    try:
        call = providers(problem, provider).get(provider)
        if call is None:
            print(f"{provider} has nothing for it")
            return
        off = error(problem, result(problem, call, inputs, mode), *oracle(problem, inputs, mode))
        if off > 1:
            print(f"wrong result ({off:.2f} times what is allowed)")
            return
        read = timed(problem, call, inputs, mode).read
    except Error as reason:
        print(" ".join(str(reason).split()))
        return
    repeats = max(1, round(SECONDS / read(1)))
    print("ready", flush=True)
    for _ in sys.stdin:
        print(read(repeats), flush=True)
