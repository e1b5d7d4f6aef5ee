"""Measure, compare, report and score kernels: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from impure_fast.errors import Error, InputError
from impure_fast.images import write_text

from . import authors, compare, kernelbench, providers, results
from .registry import DTYPES, Problem, cases
from .runner import MODES, available, ceiling_rows, measure, overhead, positive


def main() -> int:
    options = _parser().parse_args()
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # a reference in TF32 would excuse errors of every other
    try:
        return int(options.function(options) or 0)
    except (Error, OSError) as error:
        print(error, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)

    def command(function: Any, name: str, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(function=function)
        return made

    def choose(made: argparse.ArgumentParser) -> None:
        made.add_argument("--ops", default="", help="operators, or beginnings of their names, with commas")
        made.add_argument("--shapes", default="", help="only shapes that hold this text")
        made.add_argument("--small", action="store_true", help="the small shapes, for tests and memory checkers")
        made.add_argument("--dtypes", type=_some(DTYPES), default="float32,bfloat16", help=", ".join(DTYPES))
        made.add_argument("--modes", type=_some(MODES), default="forward,both", help=", ".join(MODES))
        measure_on(made)

    def measure_on(made: argparse.ArgumentParser) -> None:
        made.add_argument("--device", type=available, default="cuda" if torch.cuda.is_available() else "cpu")
        count(made)

    def count(made: argparse.ArgumentParser) -> None:
        made.add_argument("--rounds", type=positive, default=31)
        made.add_argument("--json", metavar="FILE")

    run = command(_run, "run", "measure providers against each other, parity first")
    choose(run)
    run.add_argument("--providers", default=providers.DEFAULT, help="names, patterns (sdpa*) and files (mine.py)")
    run.add_argument("--authors", metavar="PATH", help="checkout of the authors' repository: provider 'authors'")
    run.add_argument("--csv", metavar="FILE", help=f"append here, for instance {results.CSV.relative_to(results.ROOT)}")
    empty = command(_overhead, "overhead", "measure what a call costs beside its kernel")
    top = command(_ceilings, "ceilings", "copy bandwidth, product rates, and the network's own products")
    top.add_argument("--small", action="store_true", help="one of the network's products alone")
    top.add_argument("--compile", action="store_true", help="two products alone, torch.compile's beside")
    top.add_argument("--dtypes", type=_some(DTYPES), default="float32,bfloat16", help=", ".join(DTYPES))
    measure_on(top)
    count(empty)
    for made in (empty, top):
        made.add_argument("--csv", metavar="FILE")
    against = command(compare.run, "compare", "two commits against each other, pairs in one run")
    against.add_argument("old", help="a commit")
    against.add_argument("new", nargs="?", default=".", help="a commit, or '.' for this tree")
    choose(against)
    against.add_argument("--provider", default="auto")
    worker = command(compare.worker, "worker", "one side of compare; it starts its own")
    worker.add_argument("spec")
    command(kernelbench.write, "problems", "write benchmarks/problems from the registry")
    score = command(kernelbench.score, "score", "correctness and speed of a folder of solutions (class ModelNew)")
    score.add_argument("folder")
    measure_on(score)
    command(results.report, "report", "tables and pictures from the results, in README and docs")
    return parser


def _some(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """argparse's type of names with commas between."""

    def parse(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose of {', '.join(known)}")
        return text.split(",")

    return parse


def _run(options: argparse.Namespace) -> int:
    """Exit code 1 where a whole problem could not be measured; the others' rows are kept as they come."""
    rows: list[dict[str, Any]] = []
    failed = 0
    if options.authors:
        authors.check(options.authors)
    _keep(options, rows, [])
    for problem, dtype, mode in cases(options):
        found = providers.providers(problem, options.providers, options.authors)
        try:
            taken = measure(problem, getattr(torch, dtype), mode, found, options.rounds, options.device)
        except Exception as failure:
            failed = 1
            print(f"{problem.op} {problem.shape} {dtype} {mode}: {type(failure).__name__}: {failure}", file=sys.stderr)
            continue
        _print(problem, taken)
        _keep(options, rows, taken)
    if not rows and not failed:
        raise InputError(f"Nothing was measured: {options.providers!r} has nothing for these problems and modes.")
    return failed


def _overhead(options: argparse.Namespace) -> None:
    rows = overhead(options.rounds)
    print(json.dumps(rows))
    _keep(options, [], rows)


def _ceilings(options: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    for row in ceiling_rows(options.dtypes, options.device, options.rounds, options.small, options.compile):
        units = {"gflops": "GFLOP/s", "gbytes_per_s": "GB/s", "median_us": "us"}
        speed = next((f"{row[key]:.1f} {unit}" for key, unit in units.items() if key in row), row.get("why_not"))
        print(f"{row['op']} {row['shape']:16} {row['dtype']:9} {row['provider']:17} {speed}", flush=True)
        _keep(options, rows, [row])


def _keep(options: argparse.Namespace, rows: list[dict[str, Any]], new: list[dict[str, Any]]) -> None:
    """Add to the rows, and at once to the files: a run that is ended early leaves what it had."""
    rows += new
    if options.json:
        write_text(options.json, json.dumps(rows, indent=1) + "\n")
    if options.csv:
        results.append(options.csv, results.COLUMNS, results.lines(new))


def _print(problem: Problem, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if "median_us" in row:
            figures = f"{row['median_us']:12.1f} us" + (f" {row['ratio']:7.2f}x" if "ratio" in row else "")
            if "of_floor" in row:
                figures += f"  {100 * row['of_floor']:5.1f} % of the floor's speed"
            if "measured_again_us" in row:
                figures += f"  measured again (first {row['measured_again_us']:.1f} us)"
        else:
            figures = row["why_not"]
        print(f"{row['op']} {problem.shape:24} {row['dtype']:9} {row['mode']:9} {row['provider']:20} {figures}")
    if rows:
        print(f"  on {rows[0]['machine']}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
