"""patch_mask: every backend against fp64, forward and backward, noise given or made in the kernel."""

import pytest
import torch

from impure_fast import ops
from impure_fast.errors import InputError, InputTypeError
from impure_fast.ops.patch_mask import SPEC
from impure_fast.philox import IMAGE_NOISE, normal

from ..tolerances import assert_near
from .common import backends, backends_and_dtypes, device_of, gradients, need, orders, poisoned, randn

NAME = "patch_mask"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# name: images, rows, columns, patch
CASES = {"tiny": (2, 4, 4, 4), "odd": (3, 3, 5, 6), "one patch": (1, 1, 1, 16), "wide": (2, 1, 7, 8)}
by_case = pytest.mark.parametrize("case", CASES)


def given(case, dtype, device, noised=True):
    n, rows, cols, patch = CASES[case]
    shape = (n, 3, rows * patch, cols * patch)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    images = (images * 255).byte() if dtype == torch.uint8 else images.to(dtype)
    options = {}
    if noised:
        level = torch.linspace(0.1, 0.9, n)
        noise = randn(*shape, dtype=torch.float32 if dtype == torch.uint8 else dtype, seed=1)
        options = {"signal": (1 - level**2).sqrt(), "level": level, "noise": noise}
    order = orders(n, rows * cols)
    return images.to(device), order.to(device), patch, {k: v.to(device) for k, v in options.items()}


def doubled(images):
    return images.double() / 255 if images.dtype == torch.uint8 else images.double()


@by_case
@pytest.mark.parametrize("noised", [True, False], ids=["noised", "clean"])
@backends_and_dtypes(NAME)
def test_parity_with_fp64(case, noised, dtype, backend):
    need(NAME, backend)
    images, order, patch, options = given(case, dtype, device_of(backend), noised)

    def run(on):
        return lambda x: ops.patch_mask(x, order, patch, MEAN, STD, **options, backend=on)

    truth, (true_grad,) = gradients(run("reference"), [images.double()])
    own, (own_grad,) = gradients(run("reference"), [images])
    with poisoned():
        got, (grad,) = gradients(run(backend), [images])
    assert_near(NAME, got, own, truth)
    assert_near(NAME, grad, own_grad, true_grad)


@by_case
@backends(NAME)
def test_bytes_give_float_rows(case, backend):
    need(NAME, backend)
    images, order, patch, options = given(case, torch.uint8, device_of(backend))
    truth = ops.patch_mask(doubled(images), order, patch, MEAN, STD, **options, backend="reference")
    own = ops.patch_mask(images, order, patch, MEAN, STD, **options, backend="reference")
    with poisoned():
        got = ops.patch_mask(images, order, patch, MEAN, STD, **options, backend=backend)
    assert got.dtype == torch.float32
    assert_near(NAME, got, own, truth)


@pytest.mark.parametrize("backend", ["reference", *SPEC.dtypes])
@pytest.mark.parametrize("seed", [0, 5, 2**40 + 3, 2**64 - 1])
def test_noise_made_in_the_kernel_is_that_of_draws(seed, backend):
    need(NAME, backend)
    images, order, patch, options = given("odd", torch.float32, device_of(backend))
    streams = torch.tensor([0, 7, (3 << 32) + 2])
    noise = normal(seed, streams, IMAGE_NOISE, images[0].numel()).view(images.shape).to(images.device)
    levels = {"signal": options["signal"] * 0, "level": options["level"] * 0 + 1}
    made = ops.patch_mask(
        images, order, patch, MEAN, STD, **levels, seed=seed, streams=streams.to(images.device), backend=backend
    )
    wanted = ops.patch_mask(images, order, patch, MEAN, STD, **levels, noise=noise, backend="reference")
    assert float((made - wanted).abs().max()) < 2e-6


@backends(NAME)
def test_strides_do_not_matter(backend):
    need(NAME, backend)
    images, order, patch, options = given("odd", torch.float32, device_of(backend))
    wanted = ops.patch_mask(images, order, patch, MEAN, STD, **options, backend=backend)
    other = {**options, "noise": options["noise"].to(memory_format=torch.channels_last)}
    layouts = {
        "channels last": images.to(memory_format=torch.channels_last),
        "transposed": images.transpose(2, 3).contiguous().transpose(2, 3),
        "a crop": torch.nn.functional.pad(images, (3, 2, 1, 5), value=float("nan"))[..., 1:-5, 3:-2],
    }
    for name, x in layouts.items():
        assert torch.equal(ops.patch_mask(x, order, patch, MEAN, STD, **other, backend=backend), wanted), name


def test_reference_is_embedding_by_convolution():
    images, order, patch, _ = given("odd", torch.float32, "cpu", noised=False)
    weight = randn(7, 3, patch, patch)
    x = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    tokens = torch.nn.functional.conv2d(x, weight, stride=patch).flatten(2).transpose(1, 2)
    rows = ops.patch_mask(images, order, patch, MEAN, STD, backend="reference")
    wanted = tokens.gather(1, order[:, :, None].expand(-1, -1, 7))
    assert torch.allclose(rows @ weight.flatten(1).T, wanted, atol=2e-4)


@pytest.mark.parametrize("backend", ["reference", *SPEC.dtypes])
def test_empty_batch(backend):
    need(NAME, backend)
    device = device_of(backend)
    images, none = torch.zeros(0, 3, 8, 8, device=device), torch.zeros(0, device=device)
    order = torch.zeros(0, 4, dtype=torch.int64, device=device)
    assert ops.patch_mask(images, order, 4, MEAN, STD, backend=backend).shape == (0, 4, 48)
    noised = ops.patch_mask(images, order, 4, MEAN, STD, signal=none, level=none, noise=images, backend=backend)
    streams = torch.zeros(0, dtype=torch.int64, device=device)
    made = ops.patch_mask(
        images, order, 4, MEAN, STD, signal=none, level=none, seed=1, streams=streams, backend=backend
    )
    assert noised.shape == made.shape == (0, 4, 48)


def test_gradcheck():
    images, order, patch, options = given("tiny", torch.float64, "cpu")
    images = images[:1, :, :8, :4].contiguous().requires_grad_()
    options = {"signal": options["signal"][:1], "level": options["level"][:1], "noise": randn(1, 3, 8, 4).double()}
    assert torch.autograd.gradcheck(
        lambda x: ops.patch_mask(x, orders(1, 2), patch, MEAN, STD, **options, backend="reference"), [images]
    )


@backends(NAME)
def test_opcheck(backend):
    need(NAME, backend)
    images, order, patch, options = given("tiny", torch.float32, device_of(backend))
    args = (patch, list(MEAN), list(STD), options["signal"], options["level"], options["noise"], None, None)
    torch.library.opcheck(SPEC.overloads[backend], (images.requires_grad_(), order, *args))


@pytest.mark.parametrize("backend", ["reference", *SPEC.dtypes])
def test_fullgraph_compile_and_export_with_a_dynamic_batch(backend):
    need(NAME, backend)

    class Net(torch.nn.Module):
        def forward(self, images, order, signal, level, noise):
            options = {"signal": signal, "level": level, "noise": noise}
            return ops.patch_mask(images, order, 4, MEAN, STD, **options, backend=backend)

    images, order, _, options = given("tiny", torch.float32, device_of(backend))
    args = (images, order, *options.values())
    wanted = Net()(*args)
    assert torch.allclose(torch.compile(Net(), fullgraph=True, backend="aot_eager")(*args), wanted, atol=1e-6)
    batch = torch.export.Dim("n", min=1, max=64)
    program = torch.export.export(Net(), args, dynamic_shapes=tuple({0: batch} for _ in args))
    double = program.module()(*(torch.cat((x, x)) for x in args))
    assert torch.allclose(double[:2], wanted[:2], atol=1e-6)


IMAGES, ORDER = torch.rand(2, 3, 8, 8), orders(2, 4)
ONES = torch.ones(2)
WRONG = {
    "rank": ((IMAGES[0], ORDER, 4, MEAN, STD), {}, InputError, r"shape \[3, 8, 8\]; wanted \[N, C, H, W\]"),
    "patch": ((IMAGES, ORDER, 3, MEAN, STD), {}, InputError, r"order \[2, 4\] and patch=3 do not fit"),
    "dtype": ((IMAGES.int(), ORDER, 4, MEAN, STD), {}, InputTypeError, "torch.int32; wanted torch.uint8"),
    "mean": ((IMAGES, ORDER, 4, MEAN[:2], STD), {}, InputError, "hold 2 and 3 numbers; images have 3"),
    "half": ((IMAGES, ORDER, 4, MEAN, STD), {"signal": ONES}, InputError, "give both or neither"),
    "noise": ((IMAGES, ORDER, 4, MEAN, STD), {"signal": ONES, "level": ONES}, InputError, "need noise, or seed"),
    "one signal": (
        (IMAGES, ORDER, 4, MEAN, STD),
        {"signal": ONES[:1], "level": ONES, "noise": IMAGES},
        InputError,
        r"signal is \[1\], images \[2, 3, 8, 8\]: wanted \[2\]",
    ),
    "one picture's noise": (
        (IMAGES, ORDER, 4, MEAN, STD),
        {"signal": ONES, "level": ONES, "noise": IMAGES[:1]},
        InputError,
        r"noise is \[1, 3, 8, 8\], images \[2, 3, 8, 8\]: wanted \[2, 3, 8, 8\]",
    ),
    "one stream": (
        (IMAGES, ORDER, 4, MEAN, STD),
        {"signal": ONES, "level": ONES, "seed": 1, "streams": torch.arange(1)},
        InputError,
        r"streams is \[1\]",
    ),
    "level's device": (
        (IMAGES, ORDER, 4, MEAN, STD),
        {"signal": ONES, "level": ONES.to("meta"), "noise": IMAGES},
        InputError,
        "images is on cpu, but level is on meta",
    ),
    "device": ((IMAGES, ORDER.to("meta"), 4, MEAN, STD), {}, InputError, "images is on cpu, but order is on meta"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_errors_name_what_was_given(wrong):
    args, options, kind, message = WRONG[wrong]
    with pytest.raises(kind, match=message):
        ops.patch_mask(*args, **options)
