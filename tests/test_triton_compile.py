"""Compile, without a GPU, every Triton kernel configuration that the host functions launch, and read the machine code.

A child process, free of the interpreter, runs the host functions on meta tensors; a launch compiles for the asked
architecture and stops there.  So tile tables, argument types and known divisibility are those of a real call.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ARCHITECTURES = (80, 90)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# (queries, keys, heads, width, chunks): the networks' shapes and odd ones.
ATTENTION = {
    "encoder": (50, 50, 12, 64, 0),
    "decoder": (197, 197, 16, 32, 0),
    "hidden": (49, 197, 16, 32, 0),
    "hidden16": (16, 65, 4, 16, 0),
    "shared": (396, 396, 16, 32, 4),
    "long": (785, 785, 12, 64, 0),
    "narrow": (257, 257, 8, 16, 0),
    "width24": (65, 65, 4, 24, 0),
    "short": (17, 17, 4, 32, 0),
    "wide": (197, 197, 6, 128, 0),
}
DTYPES = ("float32", "bfloat16", "float16")
# Compiled by every test run; the rest takes minutes.
CORE = re.compile(r"order|noise|uniforms|(encoder|decoder|p=16) (float32|bfloat16)")
# At most, in any configuration: a new spill or a lost vector access shows here first.
REGISTERS = {
    "order_forward": 176,
    "noise_forward": 64,
    "patch_mask_forward": 128,
    "patch_mask_backward": 96,
    "patch_mix_forward": 64,
    "patch_mix_backward": 64,
    "patch_assemble_forward": 128,
    "patch_assemble_backward_image": 168,
    "patch_assemble_backward_patches": 128,
    "attention_forward": 168,
    "attention_backward_q": 208,
    "attention_backward_kv": 255,
}


def cases():
    """(name, host call) for every tile, form, element type and optional argument; on meta tensors."""
    import torch
    from impure_fast.kernels import attention, noise, order, patch_assemble, patch_mask, patch_mix

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def attend(queries, keys, heads, width, chunks, dtype, n=8):
        k, v = empty(n, keys, 3, heads, width, dtype=dtype).unbind(2)[1:]
        q = empty(n, queries, 3, heads, width, dtype=dtype)[:, :, 0]
        out, lse = attention.forward(q, k, v, 0.125, chunks)
        attention.backward(out, q, k, v, out, lse, 0.125, chunks)

    def assemble(grid, patch, dtype, weight, bias, mean, std, clamp, n=8):
        patches, places = (
            empty(8, grid * grid, 3 * patch * patch, dtype=dtype),
            empty(8, grid * grid, dtype=torch.int64),
        )
        image = patch_assemble.forward(patches, places, grid, grid, weight, bias, mean, std, clamp, False)
        patch_assemble.backward(image, patches, places, grid, grid, weight, bias, mean, std, clamp)

    yield "order", lambda: order.forward(empty(8, 196))
    key = empty(dtype=torch.int64)
    yield "noise", lambda: noise.forward(empty(8, dtype=torch.int64), key, 3, 3 * 224 * 224, True)
    yield "uniforms", lambda: noise.forward(empty(8, dtype=torch.int64), key, 1, 196, False)
    factor, streams = empty(8), empty(8, dtype=torch.int64)
    made, given = (factor, factor, None, 1 << 40, streams), (factor, factor, empty(8, 3, 224, 224), None, None)
    for name in DTYPES:
        dtype = getattr(torch, name)
        weight, bias = empty(3, 3, 3, 3, dtype=dtype), empty(3, dtype=dtype)
        for form, shape in ATTENTION.items():
            yield f"{form} {name}", functools.partial(attend, *shape, dtype)
        for patch, grid in ((16, 14), (4, 8), (14, 16)):
            images = empty(8, 3, grid * patch, grid * patch, dtype=dtype)
            places = empty(8, grid * grid, dtype=torch.int64)
            rows = empty(16, grid * grid, 3 * patch * patch, dtype=dtype)
            case, shape = f"p={patch} {name}", tuple(images.shape)
            yield case, functools.partial(patch_mask.forward, images, places, patch, MEAN, STD, *made)
            yield case, functools.partial(patch_mask.backward, rows, places, shape, patch, STD, factor)
            yield case, functools.partial(patch_mix.forward, images, images, places, 0, 9, patch)
            yield case, functools.partial(patch_mix.backward, images, places, 0, 9, patch)
            yield case, functools.partial(assemble, grid, patch, dtype, weight, bias, MEAN, STD, True)
        images, places = empty(8, 3, 224, 224, dtype=dtype), empty(8, 196, dtype=torch.int64)
        last = images.contiguous(memory_format=torch.channels_last)
        rows = empty(8, 196, 768, dtype=dtype)
        clean = functools.partial(patch_mask.forward, images, places, 16, MEAN, STD, None, None, None, None, None)
        yield f"clean {name}", clean
        yield f"clean {name}", functools.partial(patch_mask.backward, rows, places, tuple(images.shape), 16, STD, None)
        yield f"given noise {name}", functools.partial(patch_mask.forward, images, places, 16, MEAN, STD, *given)
        yield f"channels-last {name}", functools.partial(patch_mask.forward, last, places, 16, MEAN, STD, *made)
        yield f"bare {name}", functools.partial(assemble, 14, 16, dtype, None, None, None, None, False)
        yield f"unclamped {name}", functools.partial(assemble, 14, 16, dtype, weight, bias, None, None, False)
        to_uint8 = (rows, places, 14, 14, weight, bias, MEAN, STD, False, True)
        yield f"to uint8 {name}", functools.partial(patch_assemble.forward, *to_uint8)
    # Sizes of 1 reach the compiler as constants.
    images, place, rows = empty(1, 1, 16, 16), empty(1, 1, dtype=torch.int64), empty(2, 1, 256)
    one, stream = empty(1), empty(1, dtype=torch.int64)
    alone = (one, one, None, 1, stream)
    yield "single", functools.partial(patch_mask.forward, images, place, 16, MEAN[:1], STD[:1], *alone)
    yield "single", functools.partial(noise.forward, stream, stream, 3, 1, True)
    yield "single", functools.partial(patch_mask.backward, rows, place, (1, 1, 16, 16), 16, STD[:1], one)
    yield "single", functools.partial(patch_mix.forward, images, images, place, 0, 1, 16)
    yield "single", functools.partial(patch_mix.backward, images, place, 0, 1, 16)
    yield "single", functools.partial(assemble, 1, 16, torch.float32, empty(3, 3, 3, 3), empty(3), MEAN, STD, True, 1)
    yield "single", functools.partial(attend, 1, 1, 1, 16, 0, torch.float32, 1)
    yield "single", functools.partial(order.forward, empty(1, 1))
    images = empty(8, 3, 224, 224, dtype=torch.uint8)
    yield "uint8", functools.partial(patch_mask.forward, images, empty(8, 196, dtype=torch.int64), 16, MEAN, STD, *made)


def compile_cases(architecture, core):
    """{"kernel, case": facts} of every launch; for the child."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    class Nowhere:
        """What a launch asks of a driver before it compiles."""

        def get_current_target(self):
            return GPUTarget("cuda", architecture, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    found, run = {}, jit.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found[f"{self.fn.__module__.split('.')[-1]}{self.fn.__name__}, {case}"] = facts(kernel)
        return kernel

    driver.set_active(Nowhere())
    jit.JITFunction.run = compile_only
    for case, call in cases():
        if core == bool(CORE.fullmatch(case)):
            call()
    return found


def facts(kernel):
    """Registers, stack bytes, and how often each kind of memory or tensor-core instruction stands in the code."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, option, file.name], check=True, capture_output=True, text=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    counts = Counter(re.findall(r"\b((?:LDGSTS|LDG|STG|LDL|STL|HMMA|HGMMA)(?:\.\w+)*)", code))
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"] + numbers["LOCAL"],
        "shared": kernel.metadata.shared,
        "instructions": code.count(";"),
        "counts": counts,
    }


@functools.cache
def compiled(architecture, core):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", f"from {__name__} import main; main({architecture}, {core})"]
    root = Path(__file__).parent.parent
    child = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=1200)
    assert child.returncode == 0, child.stderr[-4000:]
    return json.loads(child.stdout)


def main(architecture, core):
    print(json.dumps(compile_cases(architecture, core)))


@pytest.fixture(params=[True, pytest.param(False, marks=pytest.mark.slow)], ids=["core", "rest"], scope="module")
def core(request):
    return request.param


@pytest.fixture(params=ARCHITECTURES, ids="sm_{}".format, scope="module")
def kernels(request, core):
    return compiled(request.param, core)


def test_every_kernel_is_compiled(kernels):
    assert {name.split(",")[0] for name in kernels} >= REGISTERS.keys() - {"order_forward", "noise_forward"}


def test_nothing_spills(kernels):
    assert {name: k["stack"] for name, k in kernels.items() if k["stack"]} == {}


def test_registers_stay_within_their_budget(kernels):
    over = {name: k["registers"] for name, k in kernels.items() if k["registers"] > REGISTERS[name.split(",")[0]]}
    assert over == {}


def test_pixels_and_rows_move_in_16_bytes(kernels):
    """Where a thread has 16 bytes of neighbours: patches of 16 in contiguous images, and tiles of attention."""
    narrow = {}
    for name, kernel in kernels.items():
        counts = kernel["counts"]
        stores = {kind for kind in counts if kind.startswith("STG")}
        loads = {kind for kind in counts if kind.startswith("LDG")}
        if "attention" in name:  # it also moves a number a row, in 4 bytes
            tiny = re.search("hidden16|short|single", name)
            good = tiny or ("STG.E.128" in stores and "LDG.E.128" in loads and "LDG.E.U16" not in loads)
        elif re.match(r"(patch_mask|patch_mix|patch_assemble_forward).*p=16", name):
            good = stores == {"STG.E.128"}
        else:
            continue
        if not good:
            narrow[name] = counts
    assert narrow == {}


def test_half_attention_runs_on_tensor_cores(kernels):
    half = {name: k["counts"] for name, k in kernels.items() if re.match(r"attention.* b?float16", name)}
    assert half
    assert [name for name, counts in half.items() if not any("MMA" in kind for kind in counts)] == []
