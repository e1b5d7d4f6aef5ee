"""How it is measured: parity first, then interleaved rounds in one run, medians and ratios of pairs.

On a CPU the clock is the process's own CPU time on one thread, which other work on the machine disturbs least.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from impure_fast import ops
from impure_fast.demo import processor_name
from impure_fast.errors import BackendError
from impure_fast.ops.reconstruction_attention import SPEC

from .registry import Inputs, Problem

SECONDS = 0.02  # of work behind one reading
MODES = ("forward", "backward")  # backward: forward and backward together


def machine() -> str:
    """Processor, torch and threads, as every row carries them."""
    return f"{processor_name()}, torch {torch.__version__}, threads {torch.get_num_threads()}"


def _result(function: Callable[..., Tensor], inputs: Inputs, mode: str) -> list[Tensor]:
    """What a provider computes: its output, or its gradients too."""
    if mode == "forward":
        with torch.inference_mode():
            return [function(*inputs)]
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def parity(problem: Problem, inputs: Inputs, own: list[Tensor], truth: list[Tensor], name: str, mode: str) -> float:
    """Largest error of a provider in units of what is allowed: twice the reference's own, or the dtype's noise."""
    worst = 0.0
    for got, mine, true in zip(_result(problem.providers[name], inputs, mode), own, truth, strict=True):
        scale = float(true.abs().max()) * torch.finfo(got.dtype).eps
        allowed = 2 * float((mine.double() - true).abs().max()) + problem.tolerance * scale
        error = float((got.double() - true).abs().max())
        worst = max(worst, error / allowed if error == error else float("inf"))
    return worst


def measure(
    problem: Problem, dtype: torch.dtype, mode: str, names: list[str], rounds: int, baseline: str
) -> list[dict[str, Any]]:
    """One row a provider.  ratio: median over the rounds of the baseline's time over this provider's."""
    inputs = problem.make(dtype, "cpu")
    truth = _result(problem.providers["reference"], tuple(x.double() for x in inputs), mode)
    own = _result(problem.providers["reference"], inputs, mode)
    base = {"op": problem.op, "shape": problem.shape, "dtype": str(dtype).removeprefix("torch."), "mode": mode}
    rows, calls = [], {}
    for name in names:
        row: dict[str, Any] = {**base, "provider": name}
        rows.append(row)
        try:
            row["parity"] = round(parity(problem, inputs, own, truth, name, mode), 3)
        except BackendError as error:
            row["why_not"] = str(error)
            continue
        if row["parity"] > 1:
            row["why_not"] = "Its result is wrong, so it is not timed."
            continue
        calls[name] = _timed(problem.providers[name], inputs, mode)
    repeats = {name: max(1, round(SECONDS / call(1))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(call(repeats[name]))
    for row in rows:
        if taken := times.get(row["provider"]):
            ordered = sorted(taken)
            row |= {
                "median_us": round(1e6 * statistics.median(ordered), 2),
                "p20_us": round(1e6 * ordered[len(ordered) // 5], 2),
                "p80_us": round(1e6 * ordered[4 * len(ordered) // 5], 2),
                "ratio": round(statistics.median(b / t for b, t in zip(times[baseline], taken, strict=True)), 3),
                "rounds": rounds,
                "machine": machine(),
            }
            if mode == "forward" and problem.flops == problem.flops:
                row["gflops"] = round(problem.flops / statistics.median(ordered) / 1e9, 1)
    return rows


def _timed(function: Callable[..., Tensor], inputs: Inputs, mode: str) -> Callable[[int], float]:
    """repeats -> seconds of CPU time a call."""
    _result(function, inputs, mode)  # first calls load libraries and touch memory

    def run(repeats: int) -> float:
        began = time.process_time()
        for _ in range(repeats):
            _result(function, inputs, mode)
        return (time.process_time() - began) / repeats

    return run


def overhead(rounds: int) -> dict[str, Any]:
    """Microseconds of an operator's call in inference on a tensor so small that its kernel is free.

    public: the function users call (checks, choice of a backend, torch's dispatch); overload: torch's dispatch alone.
    """
    q, k, v = torch.randn(1, 2, 3, 1, 8).unbind(2)
    overload = SPEC.overloads["cpp"]
    calls = {
        "public": lambda: ops.reconstruction_attention(q, k, v, backend=None),
        "overload": lambda: overload(q, k, v, 0.35, 0),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, call in calls.items():
                began = time.process_time()
                for _ in range(2000):
                    call()
                times[name].append((time.process_time() - began) / 2000)
    medians = {f"{name}_us": round(1e6 * statistics.median(taken), 2) for name, taken in times.items()}
    return {"op": SPEC.name, "mode": "dispatch overhead", **medians, "rounds": rounds, "machine": machine()}
