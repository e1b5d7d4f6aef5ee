"""order: stable ranks, whatever computes them."""

import pytest
import torch

from impure_fast import ops
from impure_fast.errors import InputError, InputTypeError
from impure_fast.ops.order import SPEC

from .common import backends, device_of, need


@pytest.mark.parametrize(("n", "tokens"), [(1, 1), (2, 3), (3, 16), (2, 196), (1, 257)])
@pytest.mark.parametrize("backend", ["reference", *SPEC.dtypes])
def test_order_is_the_stable_argsort_and_restore_its_inverse(n, tokens, backend):
    need("order", backend)
    u = torch.rand(n, tokens, generator=torch.Generator().manual_seed(0)).to(device_of(backend))
    order, restore = ops.order(u, backend=backend)
    assert order.dtype == restore.dtype == torch.int64
    assert torch.equal(order, u.argsort(dim=1, stable=True))
    assert torch.equal(order.gather(1, restore), torch.arange(tokens, device=u.device).expand(n, -1))


@pytest.mark.parametrize("backend", ["reference", *SPEC.dtypes])
def test_ties_keep_their_raster_order(backend):
    need("order", backend)
    u = torch.tensor([[0.5, 0.25, 0.5, 0.25, 0.0, 0.5]], device=device_of(backend))
    order, restore = ops.order(u, backend=backend)
    assert order.tolist() == [[4, 1, 3, 0, 2, 5]] and restore.tolist() == [[3, 1, 4, 2, 0, 5]]


@backends("order")
def test_strided_input_and_empty_batch(backend):
    need("order", backend)
    u = torch.rand(20, 3, generator=torch.Generator().manual_seed(1), device="cpu").to(device_of(backend)).T
    assert torch.equal(ops.order(u, backend=backend)[0], u.argsort(dim=1, stable=True))
    assert [x.shape for x in ops.order(u[:0], backend=backend)] == [(0, 20)] * 2


@backends("order")
def test_opcheck(backend):
    need("order", backend)
    torch.library.opcheck(SPEC.overloads[backend], (torch.rand(2, 9, device=device_of(backend)),))


def test_errors_name_what_was_given():
    with pytest.raises(InputError, match=r"shape \[3\]; wanted \[N, L\]"):
        ops.order(torch.rand(3))
    with pytest.raises(InputTypeError, match=r"torch.float64; wanted torch.float32"):
        ops.order(torch.rand(1, 3, dtype=torch.float64))
