"""The registry under pytest-benchmark: ``pytest benchmarks``; parity is checked before anything is timed."""

import pytest
import torch

from impure_fast.errors import BackendError

from . import providers
from .registry import problems
from .runner import error, oracle, result

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    pytest.param(problem, name, id=f"{problem.op}-{problem.shape}-{name}".replace(" ", "_"))
    for small in (True, False)
    for problem in problems(small=small, device=DEVICE)
    for name in providers.providers(problem, "reference,sdpa*,products,auto,cpp,triton,cuda,engine*")
]


@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("problem", "provider"), CASES)
def test_speed(benchmark, problem, provider, dtype, mode):
    if mode == "both" and not problem.gradients:
        pytest.skip("It has no gradient.")
    torch.set_num_threads(1)
    if dtype not in problem.dtypes:
        pytest.skip("It has no such dtype.")
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
