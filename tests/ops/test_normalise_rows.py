"""normalise_rows: layer norm and conversion against fp64 truth, whatever computes them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from impure_fast import ops
from impure_fast.errors import InputError, InputTypeError
from impure_fast.ops.normalise_rows import SPEC

from ..tolerances import assert_near
from .common import backends, backends_and_dtypes, need, poisoned, randn

SHAPES = [(1, 1), (3, 7), (5, 16), (2, 9, 24), (4, 65, 96), (6, 768), (0, 8)]


def case(shape, dtype, offset=0.0):
    """(x, weight, bias) with rows of unlike size and mean."""
    x = randn(*shape, dtype=torch.float64) * (1 + torch.arange(shape[-1])) ** 0.2 + offset
    return x.to(dtype), randn(shape[-1], seed=1), randn(shape[-1], seed=2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 10.0])
@backends_and_dtypes("normalise_rows", ("fp32", "bf16"))
def test_layer_norm_is_near_the_truth(backend, dtype, offset, shape):
    need("normalise_rows", backend)
    x, weight, bias = case(shape, dtype, offset)
    centred = x.double() - x.double().mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    truth = centred / (variance + 1e-6).sqrt() * weight.double() + bias.double()
    reference = ops.normalise_rows(x, weight, bias, 1e-6, backend="reference")
    with poisoned():
        got = ops.normalise_rows(x, weight, bias, 1e-6, backend=backend)
    assert_near("normalise_rows", got, reference, truth)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("normed", [True, False])
@backends_and_dtypes("normalise_rows", ("fp32", "bf16"))
def test_integers_are_the_rounded_rows(backend, dtype, normed, shape):
    need("normalise_rows", backend)
    x, *parameters = case(shape, dtype)
    parameters = parameters if normed else (None, None)
    y = ops.normalise_rows(x, *parameters, 1e-6, dtype=torch.float32, backend="reference")
    got = ops.normalise_rows(x, *parameters, 1e-6, scale=0.02, zero=100, dtype=torch.uint8, backend=backend)
    exact = (y / 0.02 + 100).clamp(0, 255)
    assert got.dtype == torch.uint8 and got.shape == x.shape
    assert not got.numel() or (got - exact).abs().max() <= 0.501
    if x.numel() > 100:
        assert got.min() == 0 and got.max() == 255, "the case must reach both ends"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@backends("normalise_rows")
def test_conversion_alone_is_torchs(backend, dtype):
    need("normalise_rows", backend)
    special = torch.tensor([[0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 3e38, 1 + 2**-8]])
    for x in (special, randn(3, 100)):
        got = ops.normalise_rows(x, dtype=dtype, backend=backend)
        assert torch.equal(got.isnan(), x.isnan()) and torch.equal(got.nan_to_num(), x.to(dtype).nan_to_num())


@backends("normalise_rows")
def test_strided_input_and_opcheck(backend):
    need("normalise_rows", backend)
    x, weight, bias = randn(6, 8).T, randn(6, seed=1), randn(6, seed=2)
    got = ops.normalise_rows(x, weight, bias, 1e-5, backend=backend)
    assert torch.equal(got, ops.normalise_rows(x.contiguous(), weight, bias, 1e-5, backend=backend))
    wide = weight.repeat_interleave(2)[::2], bias.repeat_interleave(2)[::2]
    assert torch.equal(got, ops.normalise_rows(x, *wide, 1e-5, backend=backend))
    with pytest.raises(RuntimeError, match="x must be float32 or bfloat16"):
        SPEC.overloads[backend](x.byte().contiguous(), None, None, 1e-5, 1.0, 0, torch.float32)
    torch.library.opcheck(SPEC.overloads[backend], (x.contiguous(), weight, bias, 1e-5, 0.5, 3, torch.uint8))


def test_clang_sees_no_builtin_that_gcc_alone_has():
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    sources = [*(Path(__file__).parents[2] / "csrc" / "cpu").glob("*.cpp")]
    if not compiler or not sources:
        pytest.skip("needs a C++ compiler and the native sources")
    line = [compiler, "-E", "-std=c++20", "-D__clang__", f"-I{sources[0].parents[1]}"]
    for source in sources:
        text = subprocess.run([*line, source], capture_output=True, text=True).stdout
        assert "namespace impure_fast" in text, source
        assert "__builtin_shuffle(" not in text, source


def test_errors_name_what_was_given():
    x, w = torch.zeros(2, 3), torch.zeros(3)
    for message, call in {
        r"weight is torch.float32 \[2\], x \[2, 3\]: wanted float32 \[3\]": lambda: ops.normalise_rows(x, w[:2], w),
        "weight and bias belong together": lambda: ops.normalise_rows(x, w),
        "scale=0.0, zero=0: wanted a positive scale": lambda: ops.normalise_rows(x, scale=0.0),
        "scale=1.0, zero=256": lambda: ops.normalise_rows(x, zero=256),
    }.items():
        with pytest.raises(InputError, match=message):
            call()
    with pytest.raises(InputTypeError, match="x is torch.int64, dtype torch.int64; wanted floats"):
        ops.normalise_rows(x.long())
