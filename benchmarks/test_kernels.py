"""The registry under pytest-benchmark: ``pytest benchmarks``; parity is checked before anything is timed."""

import pytest
import torch

from impure_fast.errors import BackendError

from . import providers
from .registry import problems
from .runner import error, oracle, result

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    pytest.param(problem, name, dtype, mode, id=f"{problem.op}-{problem.shape}-{name}-{dtype}-{mode}".replace(" ", "_"))
    for small in (True, False)
    for problem in problems(small=small, device=DEVICE)
    for name in providers.providers(problem, "reference,sdpa*,products,auto,cpp,triton,cuda,engine*")
    for dtype in ("float32", "bfloat16")
    for mode in ("forward", "both")
    if dtype in problem.dtypes and (mode == "forward" or problem.gradients)
]


@pytest.mark.parametrize(("problem", "provider", "dtype", "mode"), CASES)
def test_speed(benchmark, problem, provider, dtype, mode):
    torch.set_num_threads(1)
    call, inputs = providers.providers(problem, provider)[provider], problem.make(getattr(torch, dtype), DEVICE)
    try:
        got = result(problem, getattr(call, "check", call), inputs, mode)
    except (BackendError, RuntimeError) as refusal:  # torch's attention refuses by the latter
        pytest.skip(str(refusal))
    assert error(problem, got, *oracle(problem, inputs, mode)) <= 1, "wrong, so it is not timed"

    def timed():
        result(problem, call, inputs, mode)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{problem.op}/{problem.shape}/{dtype}/{mode}"
    benchmark.extra_info |= {"provider": provider, "device": DEVICE, "bytes_floor": problem.work(inputs, got)[0]}
    benchmark.pedantic(timed, warmup_rounds=1, rounds=7, iterations=1)
