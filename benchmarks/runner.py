"""How it is measured: parity first, then interleaved rounds in one run, medians and ratios of pairs.

On a CPU the clock is the process's own CPU time on one thread, which other work on the machine disturbs least.  On a
GPU it is CUDA events around a replayed graph (around the call where it cannot be captured), the L2 cache flushed
before every reading.  Rows carry what was reached of two ceilings measured in the same run: copied bytes, and
operations of a matrix product.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from typing import Any, NamedTuple

import torch
from torch import Tensor

from impure_fast import ops
from impure_fast.demo import processor_name
from impure_fast.engine.products import OneDnn, onednn_missing
from impure_fast.ops.reconstruction_attention import SPEC

from .providers import BASELINES, Provider, compilers
from .registry import Problem

SECONDS = 0.02  # of work behind one reading on a CPU
MODES = ("forward", "backward", "both")  # backward: alone, of a graph kept from forward
SUSPICIOUS = 2.0  # times the best baseline: measured again
Reading = Callable[[int], float]  # calls -> seconds a call


class Clock(NamedTuple):
    """read: takes a reading; name: of what it is; call: what is timed, with its result."""

    read: Reading
    name: str
    call: Callable[[], Any]


def machine(device: str) -> str:
    """Device, torch and threads, as every row carries them."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor_name()
    return f"{name}, torch {torch.__version__}, threads {torch.get_num_threads()}"


def available(device: str) -> str:
    """A device as an argument of the command line."""
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise argparse.ArgumentTypeError(f"{device}: choose cpu, or cuda where there is a CUDA device")
    return device


def positive(text: str) -> int:
    """A number of at least 1 as an argument of the command line."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text}: wanted a whole number of at least 1")
    return int(text)


def flat(out: Any) -> list[Tensor]:
    """A provider's result as tensors."""
    return list(out) if isinstance(out, (tuple, list)) else [out]


def result(problem: Problem, call: Provider, inputs: tuple[Tensor, ...], mode: str) -> list[Tensor]:
    """What a provider computes: its outputs, or its output and gradients."""
    if mode == "forward":
        with torch.inference_mode():
            return flat(call(*inputs))
    leaves = problem.leaves(inputs)
    out = call(*leaves)
    wanted = [x for x in leaves if x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, _upstream(out.shape, out.dtype, out.device))]


@functools.lru_cache(maxsize=2)
def _upstream(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The gradient that comes from above: random, and the same number in every dtype."""
    generator = torch.Generator().manual_seed(2)
    return (torch.randint(-16, 17, shape, generator=generator) / 16).to(device, dtype)


def error(problem: Problem, got: list[Tensor], own: list[Tensor], truth: list[Tensor]) -> float:
    """Error in units of what is allowed (1): twice the reference's own error and the dtype's noise.

    The worse of the largest error and the root mean square's.  Integers must be equal; another shape, dtype or count,
    a NaN, or a reference that is infinitely wrong itself is infinitely wrong.
    """
    if [(x.shape, x.dtype) for x in got] != [(x.shape, x.dtype) for x in own]:
        return math.inf
    worst = 0.0
    for x, mine, true in zip(got, own, truth, strict=True):
        if not x.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(x, true) else math.inf)
            continue
        noise = problem.tolerance * torch.finfo(x.dtype).eps
        for size in (lambda t: float(t.abs().max()), lambda t: float(t.square().mean().sqrt())):
            off, allowed = size(x.double() - true), 2 * size(mine.double() - true) + noise * size(true)
            ratio = off / allowed if allowed else math.inf if off else 0.0
            worst = max(worst, ratio if math.isfinite(allowed) and ratio == ratio else math.inf)
    return worst


def oracle(problem: Problem, inputs: tuple[Tensor, ...], mode: str = "forward") -> tuple[list[Tensor], list[Tensor]]:
    """(the reference's result, the truth in fp64) for these inputs."""
    wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    return result(problem, problem.reference, inputs, mode), result(problem, problem.reference, wide, mode)


@functools.cache
def ceilings(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes a second of a large copy, operations a second of a square product) on this machine, the best of 5.

    The product is torch's own or, where that is faster, oneDNN's on packed weights.
    """
    side, size = (8192, 1 << 30) if device == "cuda" else (1024, 1 << 28)
    source = torch.rand(size // 8, device=device, dtype=torch.float64)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device).to(dtype)
    with torch.inference_mode():
        calls = [lambda: target.copy_(source), *(functools.partial(f, a) for f in products(a).values())]
        copy, *fastest = (min(read(1) for _ in range(5)) for read in (_clock(call, device).read for call in calls))
    return 2 * size / copy, 2 * side**3 / min(fastest)


def products(weight: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """{provider: x -> x weight^T}: torch's own, and on a CPU oneDNN's on packed weights."""
    found: dict[str, Callable[[Tensor], Tensor]] = {"torch": lambda x: torch.nn.functional.linear(x, weight)}
    if weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16) and not onednn_missing():
        found["packed"] = OneDnn(weight, weight.new_zeros(len(weight)))
    return found


def variants(weight: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """{provider: x -> x weight^T} with something fused, and on a GPU in a narrower arithmetic: no ceiling of the dtype.

    in place: added to a residual; gelu: through its epilogue; tf32 of float32; fp8 of bfloat16, the input converted
    beforehand, with the tensor cores' own sums and with those in float32.  Inner sizes in fp8 are multiples of 16.
    """
    bias, across = weight.new_zeros(len(weight)), weight.t()
    residual = functools.cache(lambda rows: weight.new_zeros(rows, len(weight)))
    found: dict[str, Callable[[Tensor], Tensor]] = {
        "in place": lambda x: residual(len(x)).addmm_(x, across),
        "gelu": lambda x: torch._addmm_activation(bias, x, across, use_gelu=True),
    }
    if weight.device.type == "cuda" and weight.dtype == torch.float32:
        found["tf32"] = functools.partial(_tf32, weight)
    if weight.device.type == "cuda" and weight.dtype == torch.bfloat16 and torch.cuda.get_device_capability() >= (8, 9):
        found["fp8"] = functools.partial(_fp8(weight), use_fast_accum=True)
        found["fp8, float32 sums"] = functools.partial(_fp8(weight), use_fast_accum=False)
    return found


def _tf32(weight: Tensor, x: Tensor) -> Tensor:
    was = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return torch.nn.functional.linear(x, weight)
    finally:
        torch.set_float32_matmul_precision(was)


def _fp8(weight: Tensor) -> Callable[..., Tensor]:
    across, one = weight.to(torch.float8_e4m3fn).t(), torch.ones((), device=weight.device)
    narrow = functools.cache(lambda x: x.to(torch.float8_e4m3fn))
    return lambda x, **options: torch._scaled_mm(narrow(x), across, one, one, out_dtype=weight.dtype, **options)


def _clock(call: Callable[[], Any], device: str, capture: bool = True) -> Clock:
    """A warmed call's clock."""
    for _ in range(2):
        call()
    if device == "cpu":

        def cpu(repeats: int) -> float:
            began = time.process_time()
            for _ in range(repeats):
                call()
            return (time.process_time() - began) / repeats

        return Clock(cpu, "process CPU time", call)
    call, name = _captured(call) if capture else (call, "CUDA events")
    flush = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device=device)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def events(_: int) -> float:
        flush.zero_()
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3

    return Clock(events, name, call)


def _captured(call: Callable[[], Any]) -> tuple[Callable[[], Any], str]:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):
            out = call()
    except Exception:
        torch.cuda.set_stream(stream)  # a capture that fails leaves its own
        torch.cuda.synchronize()
        return call, "CUDA events"

    def replay() -> Any:
        graph.replay()
        return out

    return replay, "CUDA events, graph"


def timed(problem: Problem, call: Provider, inputs: tuple[Tensor, ...], mode: str) -> Clock:
    """A provider's clock, warmed."""
    device = inputs[0].device.type
    if mode != "backward":
        return _clock(lambda: result(problem, call, inputs, mode), device)
    leaves = problem.leaves(inputs)
    out = call(*leaves)
    wanted, weight = [x for x in leaves if x.requires_grad], _upstream(out.shape, out.dtype, out.device)

    def backward() -> Any:
        return torch.autograd.grad(out, wanted, weight, retain_graph=True)

    return _clock(backward, device, capture=False)  # it runs in forward's stream, which is not the captured one


def measure(
    problem: Problem, dtype: torch.dtype, mode: str, found: dict[str, Provider], rounds: int, device: str = "cpu"
) -> list[dict[str, Any]]:
    """One row a provider; who cannot run or is wrong has ``why_not`` and no time.

    ratio: median over the rounds of the baseline's time over this provider's.  The baseline is torch's attention
    ("sdpa") or else the reference.
    """
    top = ceilings(device, dtype)  # first: a capture that fails may spoil torch's generator on the GPU
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # compiled code of other problems counts against its limit
    inputs = problem.make(dtype, device)
    given = [x.clone() for x in inputs]
    own, truth = oracle(problem, inputs, mode)
    base = {"op": problem.op, "shape": problem.shape, "dtype": str(dtype).removeprefix("torch."), "mode": mode}
    rows: list[dict[str, Any]] = []
    clocks: dict[str, Clock] = {}
    for name, call in found.items():
        rows.append(row := {**base, "provider": name, "parity": None, "machine": machine(device)})
        with _refused(row):
            off = error(problem, result(problem, getattr(call, "check", call), inputs, mode), own, truth)
            if any(not torch.equal(x, y) for x, y in zip(inputs, given, strict=True)):
                problem.refill(inputs, seed=0)
                row["why_not"] = "It modified its inputs, so it is not timed."
                continue
            row["parity"] = round(off, 3) if off < math.inf else None
            if off > 1:
                row["why_not"] = "Its result is wrong, so it is not timed."
                continue
            if name != "engine":  # whose graphs have memory of their own, which this would leave out
                row["peak_bytes"] = _peak(problem, call, inputs, mode)
            clocks[name] = timed(problem, call, inputs, mode)
            row["clock"] = clocks[name].name
    del truth, given
    baseline = next((name for name in ("sdpa", "reference") if name in clocks), None)
    times = _rounds({name: clock.read for name, clock in clocks.items()}, rounds, device)
    after = board(device)
    strong = [statistics.median(t) for name, t in times.items() if any(fnmatch(name, pattern) for pattern in BASELINES)]
    work = problem.work(inputs, own) if mode == "forward" else (0.0, 0.0)  # the floor is declared for it alone
    floor = max(work[0] / top[0], work[1] / top[1]) if device == "cuda" else 0.0  # a CPU's caches are warm
    if mode != "backward":  # whose graph holds the numbers that it was made with
        _ask_again(problem, inputs, mode, [row for row in rows if not hasattr(found[row["provider"]], "check")], clocks)
    for row in rows:
        if "why_not" in row:
            continue
        taken = times[name := row["provider"]]
        paired = times[baseline] if baseline else None
        median = statistics.median(taken)
        if (strong and min(strong) / median > SUSPICIOUS) or median < floor:
            row["measured_again_us"] = round(1e6 * median, 2)
            with _refused(row):
                again = _again(problem, dtype, mode, {n: found[n] for n in (baseline, name) if n}, rounds, device)
                taken, paired = again[name], again[baseline] if baseline else None
            if "why_not" in row:
                continue
        row |= _figures(taken, paired, work, top)
        row |= {"baseline": baseline, "rounds": rounds, **after}
        if device == "cpu" and name.startswith("triton"):
            row["note"] = "Triton's interpreter: no measure of a kernel"
        if hasattr(found[name], "note"):
            row["note"] = found[name].note
    return rows


def _ask_again(
    problem: Problem, inputs: tuple[Tensor, ...], mode: str, rows: list[dict[str, Any]], clocks: dict[str, Clock]
) -> None:
    """Other numbers at the same addresses, for exactly what was timed: a graph that does nothing, or a result that was
    kept, gives the old ones."""
    own, truth = oracle(problem, problem.refill(inputs, seed=2), mode)
    for row in rows:
        if "why_not" not in row:
            with _refused(row):
                if error(problem, clocks[row["provider"]].call(), own, truth) > 1:
                    row["why_not"] = "What was timed does not follow its inputs."


@contextlib.contextmanager
def _refused(row: dict[str, Any]) -> Iterator[None]:
    """A backend that cannot, a compiler that is missing, memory that is out: a row, not the run's end."""
    try:
        yield
    except Exception as refusal:
        text = " ".join(str(refusal).split(" Given:")[0].split())
        row["why_not"] = f"{type(refusal).__name__}: {text[:300]}"


def _rounds(clocks: dict[str, Reading], rounds: int, device: str) -> dict[str, list[float]]:
    repeats = {name: max(1, round(SECONDS / read(1))) if device == "cpu" else 1 for name, read in clocks.items()}
    times: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(rounds):
        for name, read in clocks.items():
            times[name].append(read(repeats[name]))
    return times


def _again(
    problem: Problem, dtype: torch.dtype, mode: str, found: dict[str, Provider], rounds: int, device: str
) -> dict[str, list[float]]:
    """More than twice the best baseline is first taken for a mistake: other inputs, parity and clocks anew.

    found: the baseline of the ratio, if any, and the suspect last.
    """
    inputs, suspect = problem.make(dtype, device, seed=1), [*found.values()][-1]
    got = result(problem, getattr(suspect, "check", suspect), inputs, mode)
    if error(problem, got, *oracle(problem, inputs, mode)) > 1:
        raise RuntimeError("Its result is wrong on other inputs.")
    return _rounds({name: timed(problem, call, inputs, mode).read for name, call in found.items()}, rounds, device)


def _figures(
    taken: list[float], baseline: list[float] | None, work: tuple[float, float], top: tuple[float, float]
) -> dict[str, Any]:
    ordered, median = sorted(taken), statistics.median(taken)
    row: dict[str, Any] = {
        "median_us": round(1e6 * median, 2),
        "p20_us": round(1e6 * ordered[len(ordered) // 5], 2),
        "p80_us": round(1e6 * ordered[4 * len(ordered) // 5], 2),
    }
    if baseline:
        row["ratio"] = round(statistics.median(b / t for b, t in zip(baseline, taken, strict=True)), 3)
    if work[0]:
        floor = max(work[0] / top[0], work[1] / top[1])
        row |= {"gbytes_per_s": round(work[0] / median / 1e9, 2), "gflops": round(work[1] / median / 1e9, 2)}
        row |= {"intensity": round(work[1] / work[0], 3), "of_floor": float(f"{floor / median:.4g}")}
        row |= {"copy_gbytes_per_s": round(top[0] / 1e9, 1), "product_gflops": round(top[1] / 1e9, 1)}
    return row


def _peak(problem: Problem, call: Provider, inputs: tuple[Tensor, ...], mode: str) -> int | None:
    """Bytes that a call allocates at most beside its inputs; known on a GPU alone."""
    if inputs[0].device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result(problem, call, inputs, mode)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def board(device: str) -> dict[str, float]:
    """Clock and power of the GPU right after the readings."""
    if device != "cuda":
        return {}
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "--id=0"]
    try:
        clock, power = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.split(",")
        return {"clock_mhz": float(clock), "power_w": float(power)}
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}


# Rows and widths of the released network's products: 1, 8 and 64 images, encoder (both passes) and decoder.
PRODUCTS = [
    (rows * images, k, n)
    for images in (1, 8, 64)
    for rows, width in ((400, 768), (788, 512))
    for k, n in ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
]
MLP = [(400 * 64, 768, 3072), (400 * 64, 3072, 768)]


def ceiling_rows(
    dtypes: list[str], device: str, rounds: int, small: bool, compiled: bool = False
) -> Iterator[dict[str, Any]]:
    """The machine's ceilings, what a launch costs, and what is reached on the network's own products.

    copy in cache: 10 MB, ten times; launch: one of 156 additions of a number, as many as a pass of the engine has.
    compiled: the two products of the encoder's MLP alone, at 64 images, with torch.compile's beside.
    """
    for name in dtypes:
        dtype = getattr(torch, name)
        base = {"dtype": name, "mode": "forward", "provider": "torch", "machine": machine(device)}
        copy, product = ceilings(device, dtype)
        after = board(device)
        yield {**base, "op": "ceiling", "shape": "copy", "gbytes_per_s": round(copy / 1e9, 1)} | after
        yield {**base, "op": "ceiling", "shape": "product", "gflops": round(product / 1e9, 1)} | after
        yield from ({**base, "op": "ceiling"} | row | board(device) for row in _small_ceilings(dtype, device))
        square = (8192, 8192, 8192) if device == "cuda" else (1024, 1024, 1024)
        for m, k, n in PRODUCTS[:1] if small else MLP if compiled else (square, *PRODUCTS):
            x, weight = (torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (n, k)))
            found = products(weight) | variants(weight)
            if compiled:
                linear = torch.nn.Linear(k, n, bias=False, device="meta")
                linear.weight = torch.nn.Parameter(weight, requires_grad=False)
                found |= compilers(linear)
            for provider, multiply in found.items():
                row = {**base, "provider": provider, "op": "product", "shape": f"{m}x{k}x{n}"}
                with _refused(row), torch.inference_mode():  # a library may lack one, or the machine a compiler
                    clock = _clock(functools.partial(multiply, x), device)
                    taken = [clock.read(1) for _ in range(rounds)]
                if "why_not" in row:
                    yield row
                    continue
                row |= {"clock": clock.name} | board(device) | _figures(taken, None, (0.0, 0.0), (copy, product))
                row["gflops"] = round(2e-9 * m * k * n / statistics.median(taken), 1)
                yield row


def _small_ceilings(dtype: torch.dtype, device: str) -> Iterator[dict[str, Any]]:
    source = torch.rand((10 << 20) // dtype.itemsize, device=device).to(dtype)
    target, number = torch.empty_like(source), torch.zeros(1, device=device, dtype=dtype)

    def best(call: Callable[[Tensor], Any], on: Tensor, times: int, capture: bool) -> float:
        clock = _clock(lambda: [call(on) for _ in range(times)], device, capture)
        return min(clock.read(1) for _ in range(5)) / times

    with torch.inference_mode():
        copied = best(target.copy_, source, 10, True)
        yield {"shape": "copy in cache", "gbytes_per_s": round(2e-9 * source.nbytes / copied, 1)}
        for way, capture in {"eager": False, "graph": True}.items() if device == "cuda" else [("eager", False)]:
            yield {"shape": f"launch, {way}", "median_us": round(1e6 * best(number.add_, number, 156, capture), 3)}


def overhead(rounds: int) -> list[dict[str, Any]]:
    """CPU time of an operator's call in inference on a tensor so small that its kernel is free.

    public: the function users call (checks, choice of a backend, torch's dispatch); overload: torch's dispatch alone.
    """
    q, k, v = torch.randn(1, 2, 3, 1, 8).unbind(2)
    calls = {
        "public": lambda: ops.reconstruction_attention(q, k, v, backend=None),
        "overload": lambda: SPEC.overloads["cpp"](q, k, v, 0.35, 0),
    }
    with torch.inference_mode():
        times = _rounds({name: _clock(call, "cpu").read for name, call in calls.items()}, rounds, "cpu")
    base = {"op": SPEC.name, "shape": "1x1x2x8", "dtype": "float32", "mode": "dispatch overhead"}
    return [
        {**base, "provider": name, "median_us": round(1e6 * statistics.median(t), 2), "machine": machine("cpu")}
        for name, t in times.items()
    ]
