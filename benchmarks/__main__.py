"""Measure the operators and the network: ``python -m benchmarks run --help``, ``python -m benchmarks overhead``."""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import torch

from impure_fast.images import write_atomically

from .registry import problems
from .runner import MODES, measure, overhead


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure providers against each other, parity first")
    run.add_argument("--ops", help="operators, or beginnings of their names, separated by commas")
    run.add_argument("--providers", default="reference,auto,cpp,sdpa,products")
    run.add_argument("--dtypes", default="float32,bfloat16")
    run.add_argument("--modes", default=",".join(MODES))
    run.add_argument("--shapes", help="take only the shapes that hold this text")
    run.add_argument("--baseline", default="sdpa", help="ratios are against it, or the reference where it is missing")
    empty = commands.add_parser("overhead", help="measure what a call costs beside its kernel")
    for command in (run, empty):
        command.add_argument("--rounds", type=int, default=31)
        command.add_argument("--json", metavar="FILE")
    options = parser.parse_args()

    torch.set_num_threads(1)
    rows = [overhead(options.rounds)] if options.command == "overhead" else _run(options)
    if options.command == "overhead":
        print(json.dumps(rows[0]))
    if options.json:
        write_atomically(options.json, lambda path: Path(path).write_text(json.dumps(rows, indent=1) + "\n"))


def _run(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for problem in problems(options.ops and options.ops.split(",")):
        if options.shapes and options.shapes not in problem.shape:
            continue
        names = [name for name in problem.providers if name.split()[0] in options.providers.split(",")]
        baseline = options.baseline if options.baseline in names else "reference"
        for dtype in options.dtypes.split(","):
            for mode in options.modes.split(","):
                if problem.op.startswith("reconstruct ") and mode == "backward":
                    continue  # a training step is measured with its loss, elsewhere
                found = measure(problem, getattr(torch, dtype), mode, names, options.rounds, baseline)
                rows += [{**row, "date": date.today().isoformat(), "baseline": baseline} for row in found]
                for row in found:
                    figures = f"{row['median_us']:12.1f} us {row['ratio']:7.2f}x" if "ratio" in row else row["why_not"]
                    print(
                        f"{row['op']} {row['shape']:24} {dtype:9} {mode:9} {row['provider']:18} {figures}", flush=True
                    )
    return rows


if __name__ == "__main__":
    main()
