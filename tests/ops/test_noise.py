"""noise: the same normals from every backend, whatever the batch."""

import pytest
import torch

from impure_fast import ops
from impure_fast.errors import InputError
from impure_fast.ops.noise import SPEC
from impure_fast.philox import normal, uniform

from .common import backends, device_of, need, poisoned

SEEDS = [0, 5, 2**63 - 1, 2**64 - 1, -3]


@pytest.mark.parametrize("count", [0, 1, 6, 255, 256, 257, 1000])
@pytest.mark.parametrize("seed", SEEDS)
@backends("noise")
def test_normals_are_philoxs(backend, seed, count):
    need("noise", backend)
    streams = torch.tensor([0, 7, 2**32 - 1, 3 << 32 | 9])
    want = normal(seed, streams, 5, count)
    with poisoned():
        got = ops.noise(streams.to(device_of(backend)), seed, 5, count, backend=backend)
    assert got.dtype == torch.float32 and got.shape == (4, count)
    assert not count or (got.cpu() - want).abs().max() <= 1e-6
    got = ops.noise(streams.to(device_of(backend)), seed, 1, count, gaussian=False, backend=backend)
    assert torch.equal(got.cpu(), uniform(seed, streams, 1, count))


@pytest.mark.parametrize("backend", ["reference", *SPEC.dtypes])
def test_a_million_numbers_lie_within_2e_6_of_the_exact_ones(backend):
    """The largest radii, the smallest, every part of the circle; truth: the same formula in fp64."""
    need("noise", backend)
    interpreted = backend == "triton" and device_of(backend) == "cpu"  # which takes 20 s for the million
    streams, count = torch.arange(4), 25_000 if interpreted else 250_000
    u = uniform(1, streams, 3, count).double().view(4, -1, 2)
    radius, angle = (-2 * torch.log1p(-u[..., 0])).sqrt(), 2 * torch.pi * u[..., 1]
    truth = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=2).flatten(1)
    got = ops.noise(streams.to(device_of(backend)), 1, 3, count, backend=backend)
    assert truth.abs().max() > (4 if interpreted else 4.5) and (got.cpu().double() - truth).abs().max() <= 2e-6


@backends("noise")
def test_a_stream_is_the_same_in_any_batch(backend):
    need("noise", backend)
    streams = torch.tensor([4, 9, 2, 4], device=device_of(backend))
    together = ops.noise(streams, 3, 1, 77, backend=backend)
    assert torch.equal(together[1:2], ops.noise(streams[1:2], 3, 1, 77, backend=backend))
    assert torch.equal(together[0], together[3]) and not torch.equal(together[0], together[1])
    assert torch.equal(ops.noise(streams.repeat_interleave(2)[::2], 3, 1, 77, backend=backend), together)
    assert ops.noise(streams[:0], 3, 1, 77, backend=backend).shape == (0, 77)


@pytest.mark.parametrize("backend", ["reference", *SPEC.dtypes])
def test_a_seed_as_tensor_gives_the_same_numbers(backend):
    need("noise", backend)
    seeds = torch.tensor([9, 2**62, -3], device=device_of(backend))
    streams = torch.tensor([4, 9, 2], device=device_of(backend))
    together = ops.noise(streams, seeds, 1, 9, backend=backend)
    for i, seed in enumerate((9, 2**62, -3)):
        for form in (seed, seeds[i], seeds[i].cpu()):
            assert torch.equal(ops.noise(streams, form, 1, 9, backend=backend)[i], together[i])


@backends("noise")
def test_opcheck(backend):
    need("noise", backend)
    streams = torch.arange(2, device=device_of(backend))
    torch.library.opcheck(SPEC.overloads[backend], (streams, streams[0] - 5, 2, 11, True))


def test_errors_name_what_was_given():
    with pytest.raises(InputError, match=r"streams is torch.int32 \[2\]; wanted int64 \[N\]"):
        ops.noise(torch.arange(2, dtype=torch.int32), 0, 1, 4)
    for seed in (torch.arange(2), torch.zeros(3)):
        with pytest.raises(InputError, match=r"streams \[3\]: wanted int64, \[\] or \[N\]"):
            ops.noise(torch.arange(3), seed, 1, 4)
