"""The CUDA source of reconstruction_attention, run on the CPU: parity, row maps, planted faults.

One program holds all kernels and the host device layer, under AddressSanitizer and UBSan; tensors are
allocations of their exact size, results and shared memory start as NaN.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from impure_fast.ops import reconstruction_attention

from ..tolerances import allowed

ROOT = Path(__file__).parents[2]
RESULTS = ("out", "lse", "dq", "dk", "dv")
FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}

# (queries, keys, heads, width, chunks); the shared form has 2 (keys - 1) + chunks rows.
SHAPES = {
    **{f"width {width}": (20, 17, 2, width, 0) for width in (6, 10, 16, 24, 48, 64, 80, 96, 128)},
    "hidden queries": (12, 50, 2, 32, 0),
    "one query": (1, 3, 1, 16, 0),
    "shared": (17, 17, 2, 16, 4),
    "shared, odd width": (13, 13, 1, 10, 2),
}
TOKENS = {
    **{f"{t} tokens of width {d}": (t, t, 1, d, 0) for t, d in ((50, 64), (65, 24), (197, 32), (257, 16), (289, 16))},
    **{f"{t} keys of width {d}": (33, t, 1, d, 0) for t, d in ((255, 32), (256, 16), (257, 64), (289, 64), (785, 64))},
    "785 tokens of width 16": (785, 785, 1, 16, 0),
    "shared, 65 tokens": (65, 65, 2, 32, 4),
}


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if platform.machine() != "x86_64" or sys.platform != "linux":
        pytest.skip("the fibres of the host device layer are written for x86-64 Linux")
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("there is no g++")
    program = tmp_path_factory.mktemp("device_on_cpu") / "driver"
    # Unoptimised: compiling all kernels then takes 7 s in place of 24, running them milliseconds.
    flags = ["-std=c++20", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wno-unknown-pragmas"]
    include = [f"-I{ROOT}/tests/device_on_cpu", f"-I{ROOT}/csrc"]
    sources = [*sorted(ROOT.glob("csrc/cuda/attention_*.cu")), ROOT / "tests/device_on_cpu/driver.cpp"]
    subprocess.run([compiler, *flags, *include, "-x", "c++", *sources, "-o", program], check=True)
    return program


class RefusedError(Exception):
    """What the driver wrote to stderr."""


def run(driver: Path, direction: str, name: str, tensors: tuple[Tensor, ...], scale: float, chunks: int, **how: Any):
    """The kernel's results.  how: shift in bytes; else environment variables of the host device layer."""
    q, k, v = tensors if direction == "forward" else tensors[1:4]
    n, rows, heads, width = k.shape
    queries, keys = ((rows - chunks) // 2 + 1,) * 2 if chunks else (q.shape[1], rows)
    numbers = [list(FORMATS).index(name), n * max(chunks, 1), heads, queries, keys, width, chunks, scale]
    numbers += [how.pop("shift", 0), *(stride for x in (q, k, v) for stride in x.stride()[:3])]
    data = b""
    for x in tensors:  # the memory from a view's first to its last element
        size = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        span = x.as_strided((size if x.numel() else 0,), (1,)).contiguous()
        data += struct.pack("q", span.nbytes) + span.view(torch.uint8).numpy().tobytes()
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", **{key: str(value) for key, value in how.items()}}
    process = subprocess.run(
        [driver, direction, *map(str, numbers)], input=data, capture_output=True, env=environment, timeout=120
    )
    if process.returncode:
        raise RefusedError(process.stderr.decode())
    lead, dtype = (n, chunks) if chunks else (n,), FORMATS[name]
    shapes = [(x.shape, dtype) for x in (q, k, v)]
    if direction == "forward":
        shapes = [((*lead, queries, heads, width), dtype), ((*lead, heads, queries), torch.float32)]
    results, raw = [], bytearray(process.stdout)
    for shape, kind in shapes:
        size = math.prod(shape) * kind.itemsize
        results.append(torch.frombuffer(raw[:size], dtype=kind).view(shape) if size else torch.empty(shape))
        raw = raw[size:]
    return results


class Problem:
    """Inputs, and the reference's results in fp64 (the truth) and in the tested dtype."""

    def __init__(
        self, name: str, shape: tuple[int, ...], batch: int = 1, packed: bool = True, scale: float | None = None
    ):
        queries, keys, heads, width, self.chunks = shape
        self.name, self.scale = name, width**-0.5 if scale is None else scale
        generator = torch.Generator().manual_seed(0)
        rows = 2 * (keys - 1) + self.chunks if self.chunks else keys
        qkv = torch.randn(batch, rows, 3, heads, width, generator=generator).to(FORMATS[name])
        q, k, v = qkv.unbind(2) if packed else (x.contiguous() for x in qkv.unbind(2))
        if queries < keys:
            q = q[:, 1 : 1 + queries]
        elif queries > keys:
            q = torch.randn(batch, queries, heads, width, generator=generator).to(FORMATS[name])
        self.inputs = (q, k, v)
        self.truth = self.reference(torch.float64)
        self.own = self.reference(FORMATS[name])

    def reference(self, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in self.inputs]
        out, lse = reconstruction_attention(
            *inputs, scale=self.scale, chunks=self.chunks, return_lse=True, backend="reference"
        )
        generator = torch.Generator().manual_seed(1)
        self.grad = torch.randn(out.shape, generator=generator).to(FORMATS[self.name])
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, inputs, self.grad.to(dtype))]

    def wrong(self, **results: Tensor) -> dict[str, str]:
        """Which of out, lse, dq, dk, dv are further from the truth than tolerances.py allows, and by how much."""
        wrong = {}
        for name, result in results.items():
            i = RESULTS.index(name)
            truth, own = self.truth[i], self.own[i]
            limit = allowed("reconstruction_attention", result.dtype, own, truth)
            if self.name == "tf32":
                limit = 4 * 2**-10 * truth.abs().max().item()  # as for the other formats, with its own epsilon
            error = (result.double() - truth).abs().max().item()
            if not error <= limit:
                wrong[name] = f"error {error:.2g}, allowed {limit:.2g}"
        return wrong

    def forward(self, driver: Path, **how: Any) -> dict[str, Tensor]:
        results = run(driver, "forward", self.name, self.inputs, self.scale, self.chunks, **how)
        return dict(zip(RESULTS[:2], results, strict=True))

    def backward(self, driver: Path, **how: Any) -> dict[str, Tensor]:
        tensors = (self.grad, *self.inputs, self.truth[0].to(FORMATS[self.name]), self.truth[1].float())
        results = run(driver, "backward", self.name, tensors, self.scale, self.chunks, **how)
        return dict(zip(RESULTS[2:], results, strict=True))

    def check(self, driver: Path, **how: Any) -> None:
        assert not self.wrong(**self.forward(driver, **how), **self.backward(driver, **how))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_parity(driver: Path, name: str, shape: str) -> None:
    Problem(name, SHAPES[shape], batch=2 if "shared" in shape else 1).check(driver)


@pytest.mark.parametrize("shape", TOKENS)
def test_parity_at_the_networks_sizes(driver: Path, shape: str) -> None:
    Problem("bf16", TOKENS[shape]).check(driver)


@pytest.mark.parametrize("arch", [80, 86, 90])
@pytest.mark.parametrize(("name", "width"), [("bf16", 96), ("bf16", 128), ("fp32", 64), ("tf32", 128)])
def test_parity_in_stages(driver: Path, name: str, width: int, arch: int) -> None:
    Problem(name, (40 if name == "fp32" else 70, 300 if name == "bf16" else 150, 1, width, 0)).check(driver, ARCH=arch)


@pytest.mark.parametrize("how", [{"shift": 4}, {"REVERSE": 1}], ids=["unaligned memory", "last warp first"])
@pytest.mark.parametrize("shape", [(50, 50, 1, 64, 0), (17, 17, 2, 16, 4), (80, 300, 1, 32, 0)], ids=str)
def test_parity_does_not_hang_on(driver: Path, shape: tuple[int, ...], how: dict[str, Any]) -> None:
    Problem("bf16", shape).check(driver, **how)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_any_scale(driver: Path, scale: float) -> None:
    Problem("fp16", (33, 33, 1, 16, 0), scale=scale).check(driver)


@pytest.mark.parametrize("chunks", [0, 4])
def test_empty_batch(driver: Path, chunks: int) -> None:
    problem = Problem("bf16", (17, 17, 2, 16, chunks))
    problem.inputs = tuple(x[:0] for x in problem.inputs)
    assert all(x.numel() == 0 for x in problem.forward(driver).values())


# Fault, direction, shape: every barrier of two stages, and one of each other kind.
STAGED, WHOLE = (40, 310, 1, 64, 0), (16, 16, 1, 64, 0)
FAULTS = [
    *((f"barrier:{i}", "forward", STAGED) for i in range(3)),
    *((f"barrier:{i}", "backward", (80, 40, 1, 64, 0)) for i in range(5)),
    ("warp_barrier:1", "forward", WHOLE),
    *((f"wait:{i}", "forward", STAGED) for i in range(2)),
    *((f"wait:{i}", "backward", (80, 40, 1, 64, 0)) for i in range(2)),
    *((f"lane:{i}", "forward", WHOLE) for i in range(2)),
    ("index:0", "forward", WHOLE),
    ("index:0", "backward", WHOLE),
]


@pytest.mark.parametrize(("fault", "direction", "shape"), FAULTS, ids=str)
def test_a_planted_fault_is_caught(driver: Path, fault: str, direction: str, shape: tuple[int, ...]) -> None:
    problem = Problem("bf16", shape)
    try:
        results = getattr(problem, direction)(driver, FAULT=fault)
    except RefusedError:
        return
    assert problem.wrong(**results)


def test_an_index_past_the_end_is_caught_by_the_sanitizer(driver: Path) -> None:
    with pytest.raises(RefusedError, match="heap-buffer-overflow"):
        Problem("bf16", WHOLE, packed=False).forward(driver, FAULT="index:3")


@pytest.mark.parametrize(("nth", "message"), [(0, "device_on_cpu"), (16, "lanes of a warp meet at shuffle")])
def test_a_lane_that_stays_away_is_caught(driver: Path, nth: int, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        Problem("bf16", WHOLE).forward(driver, FAULT=f"absent:{nth}")
