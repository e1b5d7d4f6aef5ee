"""What the operators' tests share: backends with their reasons, draws of tensors, poisoned memory."""

import contextlib

import pytest
import torch

from impure_fast import can_run
from impure_fast.ops._lib import OPERATORS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def device_of(backend):
    """Where a backend's tensors lie in this process."""
    cuda = backend == "cuda" or (backend == "triton" and torch.cuda.is_available())
    return "cuda" if cuda else "cpu"


def need(operator, backend):
    """Skip, with the reason, what this machine cannot run."""
    if reasons := can_run(operator, backend):
        pytest.skip(f"{backend}: {' '.join(reasons)}")


def backends(operator):
    """Parametrise over the backends of an operator but the reference."""
    return pytest.mark.parametrize("backend", list(OPERATORS[operator].dtypes))


def backends_and_dtypes(operator, dtypes=tuple(DTYPES)):
    """Parametrise over the backends but the reference, each with the float dtypes that it has."""
    return pytest.mark.parametrize(
        ("backend", "dtype"),
        [
            pytest.param(backend, DTYPES[dtype], id=f"{backend}-{dtype}")
            for backend, has in OPERATORS[operator].dtypes.items()
            for dtype in dtypes
            if DTYPES[dtype] in has
        ],
    )


def randn(*shape, dtype=torch.float32, device="cpu", seed=0):
    """Standard normals from a local seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def orders(n, tokens, device="cpu", seed=0):
    """n random permutations, int64 [n, tokens]."""
    return torch.rand(n, tokens, generator=torch.Generator().manual_seed(seed)).argsort(dim=1).to(device)


def gradients(function, inputs, seed=9):
    """(result, gradients of a random weighting of it) for the floating inputs, which are detached first."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = function(*leaves)
    weights = randn(*result.shape, dtype=result.dtype, device=result.device, seed=seed)
    return result.detach(), torch.autograd.grad(result, leaves, weights)


@contextlib.contextmanager
def poisoned():
    """Every uninitialised tensor made within holds NaN (integers: their largest value)."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch fills empty tensors in this mode alone
    try:
        assert torch.empty(8).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(was)
