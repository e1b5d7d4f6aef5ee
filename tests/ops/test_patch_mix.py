"""patch_mix: every backend equals the reference bit for bit, forward and backward."""

import pytest
import torch

from impure_fast import ops
from impure_fast.draws import MixDraws
from impure_fast.errors import InputError, InputTypeError
from impure_fast.ops.patch_mix import SPEC, mix_mask

from .common import backends, backends_and_dtypes, device_of, gradients, need, orders, poisoned, randn

NAME = "patch_mix"
# name: images, channels, rows, columns, patch, chunks, index
CASES = {
    "tiny": (2, 3, 4, 4, 4, 2, 1),
    "odd": (3, 3, 3, 5, 6, 4, 0),
    "last": (1, 1, 2, 3, 8, 3, 2),
    "nothing shown": (1, 3, 1, 1, 4, 2, 0),
}
by_case = pytest.mark.parametrize("case", CASES)


def given(case, dtype, device):
    n, channels, rows, cols, patch, chunks, index = CASES[case]
    shape = (n, channels, rows * patch, cols * patch)
    images = [randn(*shape, dtype=dtype, device=device, seed=s) for s in (0, 1)]
    return images, MixDraws(orders(n, rows * cols, device), chunks, index), patch


@by_case
@backends_and_dtypes(NAME)
def test_bitwise_parity(case, dtype, backend):
    need(NAME, backend)
    images, draws, patch = given(case, dtype, device_of(backend))
    own, own_grads = gradients(lambda *x: ops.patch_mix(*x, draws, patch, backend="reference"), images)
    with poisoned():
        got, grads = gradients(lambda *x: ops.patch_mix(*x, draws, patch, backend=backend), images)
    assert torch.equal(got, own)
    assert all(torch.equal(a, b) for a, b in zip(grads, own_grads, strict=True))


@pytest.mark.parametrize("backend", ["reference", *SPEC.dtypes])
def test_shows_exactly_the_chunk_of_the_input(backend):
    need(NAME, backend)
    (purified, images), draws, patch = given("odd", torch.float32, device_of(backend))
    mixed = ops.patch_mix(purified, images, draws, patch, backend=backend)
    mask = mix_mask(draws, 3, 5, patch).bool().expand_as(images)
    assert torch.equal(mixed[mask], purified[mask]) and torch.equal(mixed[~mask], images[~mask])
    edges = torch.linspace(0, 14, 5).round().long()
    shown = draws.order[:, edges[0] : edges[1]].sort(dim=1).values
    assert torch.equal((~mask[:, 0, ::patch, ::patch]).flatten(1).nonzero()[:, 1].view(3, -1), shown)


@backends(NAME)
def test_strides_do_not_matter_and_nothing_is_shared(backend):
    need(NAME, backend)
    (purified, images), draws, patch = given("odd", torch.float32, device_of(backend))
    wanted = ops.patch_mix(purified, images, draws, patch, backend=backend)
    last = images.to(memory_format=torch.channels_last)
    crop = torch.nn.functional.pad(purified, (1, 2, 3, 4), value=float("nan"))[..., 3:-4, 1:-2]
    assert torch.equal(ops.patch_mix(crop, last, draws, patch, backend=backend), wanted)
    assert wanted.data_ptr() not in (purified.data_ptr(), images.data_ptr())


@backends(NAME)
def test_empty_batch(backend):
    need(NAME, backend)
    images = torch.zeros(0, 3, 8, 8, device=device_of(backend))
    draws = MixDraws(orders(0, 4, images.device), 2, 0)
    assert ops.patch_mix(images, images, draws, 4, backend=backend).shape == (0, 3, 8, 8)


def test_gradcheck():
    images, draws, patch = given("last", torch.float64, "cpu")
    images = [x.requires_grad_() for x in images]
    assert torch.autograd.gradcheck(lambda *x: ops.patch_mix(*x, draws, patch, backend="reference"), images)


@backends(NAME)
def test_opcheck(backend):
    need(NAME, backend)
    images, draws, patch = given("tiny", torch.float32, device_of(backend))
    torch.library.opcheck(SPEC.overloads[backend], (*(x.requires_grad_() for x in images), draws.order, 0, 5, patch))


@pytest.mark.parametrize("backend", ["reference", *SPEC.dtypes])
def test_fullgraph_compile(backend):
    need(NAME, backend)
    images, draws, patch = given("tiny", torch.float32, device_of(backend))

    def mix(purified, images):
        return ops.patch_mix(purified, images, draws, patch, backend=backend)

    assert torch.equal(torch.compile(mix, fullgraph=True, backend="aot_eager")(*images), mix(*images))


def test_errors_name_what_was_given():
    images, draws, patch = given("tiny", torch.float32, "cpu")
    with pytest.raises(InputError, match=r"purified \[2, 3, 16, 12\], images \[2, 3, 16, 16\]"):
        ops.patch_mix(images[0][..., :12], images[1], draws, patch)
    with pytest.raises(InputError, match=r"order \[2, 16\] and patch=8 do not fit"):
        ops.patch_mix(*images, draws, 8)
    with pytest.raises(InputTypeError, match="purified is torch.float32, but images is torch.float16"):
        ops.patch_mix(images[0], images[1].half(), draws, patch)
