"""Each operator as a problem in KernelBench's form, written from the registry, and a scorer that trusts no solution.

A problem file needs torch alone: class Model, get_inputs(), get_init_inputs().  A solution is a file of the same name
with class ModelNew, built with the same arguments.  It is called on inputs it has never seen, in poisoned memory,
with the truth computed only afterwards, and every way to look fast without working is tried on it.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from impure_fast.errors import InputError, MissingFileError
from impure_fast.images import write_text
from impure_fast.ops._lib import OPERATORS

from .providers import load
from .registry import LAWS, PROBLEMS, REST, Problem
from .runner import ceilings, error, flat, machine, oracle

FOLDER = Path(__file__).parent / "problems"
_perf_counter, _process_time, _sleep = time.perf_counter, time.process_time, time.sleep  # before a solution is loaded


def chosen() -> list[Problem]:
    """The first real shape of every operator, and of each of attention's forms."""
    found: dict[tuple[str, ...], Problem] = {}
    for p in PROBLEMS:
        if not (p.small or p.preset):
            found.setdefault((p.op, *p.tensors, str(p.options.get("chunks", 0) > 0)), p)
    return list(found.values())


def write(_: Any = None) -> None:
    """Write the problem files."""
    FOLDER.mkdir(exist_ok=True)
    for problem in chosen():
        text = source(problem)
        write_text(FOLDER / f"{problem.name}.py", text)
        print(f"wrote {problem.name}.py")


def source(problem: Problem) -> str:
    """A problem's file: the reference's own source, what it calls, and the inputs' law."""
    parts: dict[str, str] = {}
    _closure(OPERATORS[problem.op].reference, parts)
    constants = [text for text in parts.values() if "\n" not in text and not text.startswith("import ")]
    functions = [text for text in parts.values() if "\n" in text]
    imports = {text for text in parts.values() if text.startswith("import ") and "torch" not in text}
    imports |= {"from typing import Any"} & ({"from typing import Any"} if "Any" in "".join(functions) else set())
    functional = ["import torch.nn.functional as F"] if "F" in parts else []
    passed = {**{name: f"self.{name}" for name in problem.options}, **{name: name for name in problem.names}}
    passed |= {name: repr(value) for name, value in REST.get(problem.op, {}).items()}
    passed["dtype"] = f"{problem.names[0]}.dtype"
    order = [passed[name] for name in inspect.signature(OPERATORS[problem.op].reference).parameters]
    fields = [f"self.{name} = {name}" for name in problem.options] or ["pass"]
    head = f'"""{problem.op} on {problem.shape}, written by `python -m benchmarks problems`; needs torch alone."""'
    lines = [head, "", "from __future__ import annotations", ""]
    lines += [*sorted(imports), *([""] if imports else []), "import torch", *functional, "from torch import Tensor, nn"]
    lines += ["", *constants] if constants else []
    for text in functions:
        lines += ["", "", text.rstrip()]
    last = "[0]" if problem.op == "reconstruction_attention" else ""
    result = "tuple[Tensor, Tensor]" if problem.op == "order" else "Tensor"
    arguments = ", ".join(f"{name}: Tensor" for name in problem.names)
    lines += ["", "", "class Model(nn.Module):"]
    if problem.options:
        options = ", ".join(f"{name}: {_type(value)}" for name, value in problem.options.items())
        lines += [f"    def __init__(self, {options}) -> None:", "        super().__init__()"]
        lines += [*(f"        {text}" for text in fields), ""]
    lines += [f"    def forward(self, {arguments}) -> {result}:"]
    lines += [f"        return reference({', '.join(order)}){last}", "", "", "def get_inputs() -> list[Tensor]:"]
    lines += [f"    {line}" for line in _inputs(problem)]
    lines += [f"    return [{', '.join(problem.names)}]", "", ""]
    lines += ["def get_init_inputs() -> list:", f"    return {list(problem.options.values())!r}"]
    return "\n".join(lines) + "\n"


def _type(value: Any) -> str:
    return "list[float]" if isinstance(value, list) else type(value).__name__


def _inputs(problem: Problem) -> Iterator[str]:
    for names, (shape, law) in problem.tensors.items():
        text = LAWS[law].format(shape=shape).replace(", generator=generator", "").replace(".to(dtype)", "")
        yield f"{', '.join(names.split())} = {text}{'.unbind(2)' if ' ' in names else ''}"


def _closure(function: types.FunctionType, parts: dict[str, str]) -> None:
    """Source of what a function of the package calls, callees first, into ``parts``."""
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if name in parts or value is function:
            continue
        if isinstance(value, types.FunctionType) and value.__module__.startswith("impure_fast"):
            _closure(value, parts)
        elif isinstance(value, types.ModuleType):
            parts[name] = f"import {value.__name__}"
        elif isinstance(value, int):
            parts[name] = f"{name} = {value}"
    parts[function.__name__] = inspect.getsource(function)


def score(options: Any) -> None:
    """Every solution of a folder in a process of its own, or the one given."""
    target = Path(options.folder)
    if not target.exists():
        raise MissingFileError(f"There is no {target}; wanted a folder of solutions, or one.")
    files = [target] if target.is_file() else sorted(target.glob("*.py"))
    known = {problem.name: problem for problem in PROBLEMS if not problem.preset}
    if not files:
        raise InputError(f"{target} holds no solution (a file of a problem's name, with a class ModelNew).")
    if unknown := [file.name for file in files if file.stem not in known]:
        raise InputError(f"No problem has the name of {', '.join(unknown)}; problems are {', '.join(known)}.")
    if target.is_file():
        rows = [judge(known[target.stem], str(target), options.device, options.rounds)]
    else:
        rows = [_apart(file, options) for file in files]
    for row in rows:
        figures = f"{row['speedup']:6.2f}x, {100 * row['of_floor']:.1f} % of the floor" if row["correct"] else ""
        print(f"{row['problem']:50} {figures or row['why_not']}")
    if options.json:
        write_text(options.json, json.dumps(rows, indent=1) + "\n")


def _apart(file: Path, options: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "row.json"
        call = [sys.executable, "-m", "benchmarks", "score", str(file), "--device", options.device]
        call += ["--rounds", str(options.rounds), "--json", str(answer)]
        try:
            run = subprocess.run(call, capture_output=True, text=True, timeout=600)
        except subprocess.TimeoutExpired:
            return {"problem": file.stem, "correct": False, "why_not": "It took more than 600 s."}
        if not answer.exists():
            last = (run.stderr.strip().splitlines() or ["no message"])[-1]
            return {
                "problem": file.stem,
                "correct": False,
                "why_not": f"Its process ended with {run.returncode}: {last}",
            }
        return json.loads(answer.read_text())[0]


class FoulError(Exception):
    """What a solution did wrong, as a sentence."""


def judge(problem: Problem, path: str, device: str, rounds: int) -> dict[str, Any]:
    """Correctness on fresh inputs, then speed-up over the reference and share of the floor's speed."""
    row: dict[str, Any] = {"problem": problem.name, "correct": False, "machine": machine(device)}
    precision = torch.get_float32_matmul_precision()
    try:
        model = load(path, "ModelNew")
        if model is None:
            raise FoulError("It has no class ModelNew.")
        solution = model(*problem.options.values()).to(device)
        inputs = problem.make(torch.float32, device, secrets.randbits(62))
        kept = _examine(problem, solution, inputs)
        _examine(problem, solution, _refill(problem, inputs))
        before = [x.clone() for x in kept]
        own, mine = _race(problem, solution, device, rounds)
        # The same addresses with other numbers: whoever remembers results by address gives the old ones.
        _examine(problem, solution, _refill(problem, inputs))
        if any(not torch.equal(x, y) for x, y in zip(kept, before, strict=True)):
            raise FoulError("A later call changed a result that was handed out before.")
        if torch.get_float32_matmul_precision() != precision:
            raise FoulError("It changed torch's precision for the whole process.")
    except Exception as caught:
        return {
            **row,
            "why_not": str(caught) if isinstance(caught, FoulError) else f"{type(caught).__name__}: {caught}",
        }
    size, flops = problem.work(inputs, kept)
    copy, product = ceilings(device, torch.float32)
    row |= {"correct": True, "median_us": round(1e6 * mine, 2), "reference_us": round(1e6 * own, 2)}
    return row | {"speedup": round(own / mine, 3), "of_floor": round(max(size / copy, flops / product) / mine, 4)}


def _refill(problem: Problem, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    fresh = problem.make(torch.float32, str(inputs[0].device), secrets.randbits(62))
    for x, y in zip(inputs, fresh, strict=True):
        x.copy_(y)
    return inputs


def _examine(problem: Problem, solution: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The solution's result on these inputs, or FoulError."""
    before = [x.clone() for x in inputs]
    with torch.inference_mode(), _poisoned(inputs):
        got = flat(solution(*inputs))
        if any(type(x) is not Tensor for x in got):
            raise FoulError("Its result is not made of plain tensors.")
        at_once = [x.clone() for x in got]  # in this stream, at this moment
    _settle(inputs[0].device.type)
    if any(not torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(got, at_once, strict=True)):
        raise FoulError("Its result was not ready when it returned: work on another stream or thread.")
    if any(not torch.equal(x, y) for x, y in zip(inputs, before, strict=True)):
        raise FoulError("It modified its inputs.")
    addresses = {x.untyped_storage().data_ptr() for x in inputs}
    if any(x.untyped_storage().data_ptr() in addresses for x in got):
        raise FoulError("Its result lies in its inputs' memory.")
    off = error(problem, got, *oracle(problem, inputs))  # only now is the right result in this process's memory
    if off > 1:
        raise FoulError(f"Its result is wrong: {off:.3g} times the error that is allowed.")
    return got


@contextlib.contextmanager
def _poisoned(inputs: tuple[Tensor, ...]) -> Iterator[None]:
    """Free memory holds NaN, and what torch hands out uninitialised too."""
    sizes = [1 << i for i in range(9, 1 + max(9, math.ceil(math.log2(2 * max(x.numel() for x in inputs)))))]
    blocks = [torch.full((size,), float("nan"), device=inputs[0].device) for size in sizes for _ in range(2)]
    del blocks
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was)


def _settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
    _sleep(0.05)


def _race(problem: Problem, solution: Callable[..., Any], device: str, rounds: int) -> tuple[float, float]:
    """Median seconds of (reference, solution), in pairs; every call has numbers that no call had before.

    Every result is checked.  On a GPU by the wall clock between synchronisations of the whole device, so that no
    stream escapes it.
    """
    inputs, flush = problem.make(torch.float32, device), None
    if device == "cuda":
        flush = torch.empty(1 << 27, dtype=torch.uint8, device=device)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        _refill(problem, inputs)
        results = []  # the reference's is kept meanwhile: its memory must not come to hold the solution's
        for call, taken in zip((problem.reference, solution), times, strict=True):
            with torch.inference_mode():
                if flush is not None:
                    flush.zero_()
                    torch.cuda.synchronize()
                clock = _process_time if flush is None else _perf_counter
                began = clock()
                results.append(call(*inputs))
                if flush is not None:
                    torch.cuda.synchronize()
                taken.append(clock() - began)
        if error(problem, flat(results[1]), *oracle(problem, inputs)) > 1:
            raise FoulError("Its result is wrong on the inputs it was timed on.")
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])
