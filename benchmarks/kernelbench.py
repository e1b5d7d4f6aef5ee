"""Each operator as a problem in KernelBench's form, written from the registry, and a scorer that trusts no solution.

A problem file needs torch alone: class Model, get_inputs(), get_init_inputs().  A solution is a file of the same name
with class ModelNew, built with the same arguments.  It is called on inputs it has never seen, in poisoned memory,
with the truth computed only afterwards, and every way to look fast without working is tried on it.
"""

from __future__ import annotations

import functools
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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from impure_fast.errors import InputError, MissingFileError
from impure_fast.images import write_text
from impure_fast.ops._lib import OPERATORS

from .providers import load
from .registry import LAWS, PROBLEMS, REST, Problem
from .runner import ceilings, error, flat, machine, oracle

FOLDER = Path(__file__).parent / "problems"
FAR = 32.0  # in one channel of queries and keys
IDLE = 1e-3  # seconds of waiting that a busy machine may cause in every single call
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
    precision = _precision()
    try:
        model = load(path, "ModelNew")
        if model is None:
            raise FoulError("It has no class ModelNew.")
        solution = model(*problem.options.values()).to(device)
        inputs = problem.make(torch.float32, device, secrets.randbits(62))
        examine = functools.partial(_examine, problem, solution, precision)
        kept = examine(inputs).result
        examine(_far(problem, problem.refill(inputs, secrets.randbits(62))))
        before = [x.clone() for x in kept]
        own, mine = _race(problem, examine, device, rounds)
        # The same addresses with other numbers: whoever remembers results by address gives the old ones.
        examine(problem.refill(inputs, secrets.randbits(62)))
        if any(not torch.equal(x, y) for x, y in zip(kept, before, strict=True)):
            raise FoulError("A later call changed a result that was handed out before.")
    except Exception as caught:
        return {
            **row,
            "why_not": str(caught) if isinstance(caught, FoulError) else f"{type(caught).__name__}: {caught}",
        }
    size, flops = problem.work(inputs, kept)
    copy, product = ceilings(device, torch.float32)
    row |= {"correct": True, "median_us": round(1e6 * mine, 2), "reference_us": round(1e6 * own, 2)}
    return row | {"speedup": round(own / mine, 3), "of_floor": round(max(size / copy, flops / product) / mine, 4)}


def _precision() -> tuple[Any, ...]:
    """What a solution could change to loosen its own tolerance: the reference's errors are allowed twice."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    reduced = cuda.allow_fp16_reduced_precision_reduction, cuda.allow_bf16_reduced_precision_reduction
    return torch.get_float32_matmul_precision(), cuda.allow_tf32, cudnn.allow_tf32, reduced, torch.get_default_dtype()


def _far(problem: Problem, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Attention's scores beyond what exp can take, each query's by one amount, which a softmax must not see."""
    if problem.op == "reconstruction_attention":
        for x in inputs[:2]:
            x[..., 0] = FAR
    return inputs


class Called(NamedTuple):
    """A call's result, and its seconds by the wall and of this process."""

    result: list[Tensor]
    wall: float
    own: float


def _call(call: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Called:
    """One call in poisoned memory.  On a GPU between synchronisations of the device, which no stream escapes, and with
    a cold cache."""
    on_gpu = inputs[0].is_cuda
    if on_gpu:
        torch.empty(1 << 27, dtype=torch.uint8, device=inputs[0].device).zero_()
    _poison(inputs)
    if on_gpu:
        torch.cuda.synchronize()
    wall, own = _perf_counter(), _process_time()
    result = call(*inputs)
    if on_gpu:
        torch.cuda.synchronize()
    return Called(flat(result), _perf_counter() - wall, _process_time() - own)


def _examine(
    problem: Problem, solution: Callable[..., Any], precision: tuple[Any, ...], inputs: tuple[Tensor, ...]
) -> Called:
    """The solution called on these inputs, or FoulError.  Every call is the same: none can be told from the others."""
    before = [x.clone() for x in inputs]
    with torch.inference_mode():
        called = _call(solution, inputs)
        got = called.result
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
    if _precision() != precision:
        raise FoulError("It changed torch's precision for the whole process.")
    off = error(problem, got, *oracle(problem, inputs))  # only now is the right result in this process's memory
    if off > 1:
        raise FoulError(f"Its result is wrong: {off:.3g} times the error that is allowed.")
    return called


def _poison(inputs: tuple[Tensor, ...]) -> None:
    """Leave NaN in the memory that torch hands out next."""
    sizes = [1 << i for i in range(9, 1 + max(9, math.ceil(math.log2(2 * max(x.numel() for x in inputs)))))]
    _ = [torch.full((size,), float("nan"), device=inputs[0].device) for size in sizes for _ in range(2)]


def _settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
    _sleep(0.05)


def _race(problem: Problem, examine: Callable[..., Called], device: str, rounds: int) -> tuple[float, float]:
    """Median seconds of (reference, solution), in pairs whose order is drawn, each on inputs of its own that are made
    right before its clock starts and hold numbers that no call had before.  Every result is examined.
    """
    taken: tuple[list[Called], list[Called]] = ([], [])
    for _ in range(rounds + 1):
        seed, mine_first = secrets.randbits(62), secrets.randbits(1)
        kept = []  # the reference's result, meanwhile: its memory must not come to hold the solution's
        for mine in (mine_first, 1 - mine_first):
            inputs = problem.make(torch.float32, device, seed)
            if mine:
                taken[1].append(examine(inputs)._replace(result=[]))
            else:
                with torch.inference_mode():
                    kept.append(_call(problem.reference, inputs))
                taken[0].append(kept[0]._replace(result=[]))
    walls, owns = ([statistics.median(getattr(c, of) for c in calls[1:]) for calls in taken] for of in ("wall", "own"))
    if device == "cuda":
        return walls[0], walls[1]
    if min(call.wall - call.own for call in taken[1]) > max(IDLE, owns[1]):  # it waits longer than it works
        raise FoulError("It waits for work that its own process does not do.")
    return owns[0], owns[1]
