"""patch_assemble: every backend against fp64, with and without each of its steps, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from impure_fast import ops
from impure_fast.errors import InputError
from impure_fast.ops.patch_assemble import SPEC, patchify, unpatchify, unshuffle

from ..tolerances import assert_near
from .common import backends, backends_and_dtypes, device_of, gradients, need, orders, poisoned, randn

NAME = "patch_assemble"
UNITS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# name: images, rows, columns, patch
CASES = {"tiny": (2, 4, 4, 4), "odd": (2, 2, 3, 6), "one patch": (1, 1, 1, 16), "two pixels": (1, 1, 2, 1)}
STEPS = {
    "all": (True, {**UNITS, "clamp": True}),
    "network units": (True, {}),
    "no convolution": (False, UNITS),
    "neither": (False, {}),
}
by_case = pytest.mark.parametrize("case", CASES)


def given(case, dtype, device):
    n, rows, cols, patch = CASES[case]
    patches = randn(n, rows * cols, 3 * patch * patch, dtype=dtype, device=device)
    weight = 0.3 * randn(3, 3, 3, 3, dtype=dtype, device=device, seed=1)
    return patches, weight, randn(3, dtype=dtype, device=device, seed=2), orders(n, rows * cols, device), rows, cols


@by_case
@pytest.mark.parametrize("steps", STEPS)
@backends_and_dtypes(NAME)
def test_parity_with_fp64(case, steps, dtype, backend):
    need(NAME, backend)
    convolve, options = STEPS[steps]
    *tensors, order, rows, cols = given(case, dtype, device_of(backend))
    tensors = tensors if convolve else tensors[:1]

    def run(on):
        return lambda patches, *conv: ops.patch_assemble(patches, order, rows, cols, *conv, **options, backend=on)

    truth, true_grads = gradients(run("reference"), [x.double() for x in tensors])
    own, own_grads = gradients(run("reference"), tensors)
    with poisoned():
        got, grads = gradients(run(backend), tensors)
    assert_near(NAME, got, own, truth)
    if options.get("clamp") and dtype != torch.float32:
        return  # a value that rounds across 0 or 1 rightly gets another gradient
    for grad, own_grad, true_grad in zip(grads, own_grads, true_grads, strict=True):
        assert_near(NAME, grad, own_grad, true_grad)


@by_case
@backends_and_dtypes(NAME)
def test_bytes_are_rounded_half_to_even(case, dtype, backend):
    need(NAME, backend)
    patches, weight, bias, order, rows, cols = given(case, dtype, device_of(backend))
    options = {**UNITS, "to_uint8": True}
    own = ops.patch_assemble(patches, order, rows, cols, weight, bias, **options, backend="reference")
    got = ops.patch_assemble(patches, order, rows, cols, weight, bias, **options, backend=backend)
    assert got.dtype == torch.uint8
    assert int((got.int() - own.int()).abs().max()) <= (1 if dtype != torch.bfloat16 else 2)
    halves = torch.arange(48, device=patches.device).view(1, 1, 48) / 255 + 0.5 / 255
    flat = ops.patch_assemble(halves, order[:1, :1] * 0, 1, 1, to_uint8=True, backend=backend)
    assert torch.equal(flat, (unpatchify(halves, 1, 1) * 255).round().byte())


@pytest.mark.parametrize("backend", ["reference", *SPEC.dtypes])
def test_every_pixel_comes_from_its_own_patch(backend):
    need(NAME, backend)
    image = torch.arange(3 * 12 * 20.0, device=device_of(backend)).view(1, 3, 12, 20)
    order = orders(1, 15, image.device)
    shuffled = patchify(image, 4).gather(1, order[:, :, None].expand(-1, -1, 48))
    assert torch.equal(ops.patch_assemble(shuffled, order, 3, 5, backend=backend), image)
    assert torch.equal(unpatchify(unshuffle(shuffled, order), 3, 5), image)


def test_convolution_crosses_patches_and_pads_with_zeros():
    patches, weight, bias, order, rows, cols = given("odd", torch.float32, "cpu")
    image = ops.patch_assemble(patches, order, rows, cols, backend="reference")
    got = ops.patch_assemble(patches, order, rows, cols, weight, bias, backend="reference")
    assert torch.allclose(got, F.conv2d(image, weight, bias, padding=1), atol=1e-6)


@backends(NAME)
def test_strides_do_not_matter(backend):
    need(NAME, backend)
    patches, weight, bias, order, rows, cols = given("odd", torch.float32, device_of(backend))
    wanted = ops.patch_assemble(patches, order, rows, cols, weight, bias, backend=backend)
    strided = patches.transpose(1, 2).contiguous().transpose(1, 2)
    kernel = weight.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(ops.patch_assemble(strided, order, rows, cols, kernel, bias, backend=backend), wanted)


@backends(NAME)
def test_empty_batch(backend):
    need(NAME, backend)
    patches = torch.zeros(0, 4, 48, device=device_of(backend))
    order = orders(0, 4, patches.device)
    assert ops.patch_assemble(patches, order, 2, 2, backend=backend).shape == (0, 3, 8, 8)


def test_gradcheck():
    patches, weight, bias, order, rows, cols = given("tiny", torch.float64, "cpu")
    inputs = [x.requires_grad_() for x in (patches[:1, :2].contiguous(), weight, bias)]
    assert torch.autograd.gradcheck(
        lambda patches, *conv: ops.patch_assemble(patches, orders(1, 2), 1, 2, *conv, **UNITS, backend="reference"),
        inputs,
    )


@pytest.mark.parametrize("steps", STEPS)
@backends(NAME)
def test_opcheck(steps, backend):
    need(NAME, backend)
    convolve, options = STEPS[steps]
    patches, weight, bias, order, rows, cols = given("tiny", torch.float32, device_of(backend))
    conv = (weight.requires_grad_(), bias.requires_grad_()) if convolve else (None, None)
    units = [list(options[name]) if name in options else None for name in ("mean", "std")]
    args = (patches.requires_grad_(), order, rows, cols, *conv, *units, options.get("clamp", False), False)
    torch.library.opcheck(SPEC.overloads[backend], args)


@pytest.mark.parametrize("backend", ["reference", *SPEC.dtypes])
def test_fullgraph_compile_and_export_with_a_dynamic_batch(backend):
    need(NAME, backend)

    class Net(torch.nn.Module):
        def forward(self, patches, order, weight, bias):
            return ops.patch_assemble(patches, order, 4, 4, weight, bias, **UNITS, clamp=True, backend=backend)

    patches, weight, bias, order, _, _ = given("tiny", torch.float32, device_of(backend))
    args = (patches, order, weight, bias)
    wanted = Net()(*args)
    assert torch.allclose(torch.compile(Net(), fullgraph=True, backend="aot_eager")(*args), wanted, atol=1e-6)
    batch = torch.export.Dim("n", min=1, max=64)
    program = torch.export.export(Net(), args, dynamic_shapes=({0: batch}, {0: batch}, {}, {}))
    double = program.module()(torch.cat((patches, patches)), torch.cat((order, order)), weight, bias)
    assert torch.allclose(double, torch.cat((wanted, wanted)), atol=1e-6)


def test_errors_name_what_was_given():
    patches, weight, bias, order, rows, cols = given("tiny", torch.float32, "cpu")
    with pytest.raises(InputError, match=r"patches \[2, 16, 48\], order \[2, 16\], grid 4x5"):
        ops.patch_assemble(patches, order, 4, 5)
    with pytest.raises(InputError, match="weight and bias, and mean and std, belong together"):
        ops.patch_assemble(patches, order, 4, 4, weight)
    with pytest.raises(InputError, match="belong together"):
        ops.patch_assemble(patches, order, 4, 4, weight, bias, mean=UNITS["mean"])
    with pytest.raises(InputError, match=r"patches \[2, 16, 40\]: wanted rows of p\*p\*3 values"):
        ops.patch_assemble(patches[:, :, :40], order, 4, 4)
    with pytest.raises(InputError, match=r"weight is \[1, 3, 3, 3\]; wanted \[3, 3, 3, 3\]"):
        ops.patch_assemble(patches, order, 4, 4, weight[:1], bias)
    with pytest.raises(InputError, match=r"bias is \[2\]; wanted \[3\]"):
        ops.patch_assemble(patches, order, 4, 4, weight, bias[1:])
    with pytest.raises(InputError, match="patches is on cpu, but order is on meta"):
        ops.patch_assemble(patches, order.to("meta"), 4, 4)
