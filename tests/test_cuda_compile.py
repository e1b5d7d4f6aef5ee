"""All CUDA sources compile for sm_80 and sm_90a, and no kernel spills more registers than cuda_spills.json allows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path.name for path in ROOT.glob("csrc/cuda/*.cu"))
ARCHITECTURES = ("80", "90a")
ALLOWED = json.loads(Path(__file__).with_name("cuda_spills.json").read_text())  # {architecture: {kernel: bytes}}
FLAGS = ("-std=c++20", "-O3", f"-I{ROOT}/csrc")
STABLE = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # as setup.py

pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")


@pytest.fixture(scope="module")
def cubins(tmp_path_factory: pytest.TempPathFactory):
    """(source, architecture) -> (cubin, what ptxas reports)."""
    folder = tmp_path_factory.mktemp("cubins")

    @cache
    def compiled(source: str, arch: str) -> tuple[Path, str]:
        cubin = folder / f"{Path(source).stem}_{arch}.cubin"
        command = ["nvcc", *FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v", "-cubin"]
        process = subprocess.run(
            [*command, ROOT / "csrc/cuda" / source, "-o", cubin], capture_output=True, text=True, check=False
        )
        assert process.returncode == 0, process.stderr
        return cubin, process.stderr

    return compiled


def readable(name: str) -> str:
    """_ZN11impure_fast...17attention_forwardINS_8Bfloat16ELi32EEE... -> attention_forward<Bfloat16, 32>."""
    found = re.search(r"\d+([a-z_]+)I(?:NS_)?(?:\d+(\w+?)E)(?:Li(\d+)E)?E", name)
    return f"{found[1]}<{', '.join(filter(None, found.groups()[1:]))}>" if found else name


def kernels(report: str) -> dict[str, tuple[int, int]]:
    """{kernel: (registers, bytes of spill stores and loads)}."""
    pattern = (
        r"Function properties for (\S+)\s+\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    )
    found = re.findall(pattern + r"\s+ptxas info\s+: Used (\d+) registers", report)
    return {readable(name): (int(registers), int(stores) + int(loads)) for name, stores, loads, registers in found}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_no_kernel_spills_beyond_the_list(cubins, source: str, arch: str) -> None:
    found = kernels(cubins(source, arch)[1])
    assert bool(found) == ("__global__" in (ROOT / "csrc/cuda" / source).read_text())
    folder = ROOT / "build/ptxas"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{name}: {registers} registers, {spill} bytes spilt" for name, (registers, spill) in found.items()]
    (folder / f"{Path(source).stem}_{arch}.txt").write_text("\n".join([*sorted(lines), ""]))
    beyond = {name: spill for name, (_, spill) in found.items() if spill > ALLOWED.get(arch, {}).get(name, 0)}
    assert not beyond


# Where the bytes are: kernel, the tensor-core instructions of its unrolled loops, counted by hand.
COUNTED = {
    "attention_forward<Bfloat16, 32>": 3 * 2 * 2 + 3 * 4,  # 48 keys: scores over 2 depths, then 4 x 8 columns
    "attention_forward<Bfloat16, 64>": 4 * 2 * 4 + 4 * 8,  # 64 keys
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", COUNTED)
def test_instructions_are_the_counted_ones(cubins, kernel: str, arch: str) -> None:
    triton = find_spec("triton")
    dump = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    if not dump or not dump.exists():
        pytest.skip("there is no cuobjdump; triton brings one")
    listing = subprocess.run(
        [dump, "-sass", cubins("attention_forward.cu", arch)[0]], capture_output=True, text=True, check=True
    ).stdout
    bodies = dict(body.split("\n", 1) for body in listing.split("Function : ")[1:])
    body = next(body for name, body in bodies.items() if readable(name) == kernel)
    used = Counter(re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", body))
    names = " ".join(used)
    assert sum(count for name, count in used.items() if name.startswith("HMMA.16816")) == COUNTED[kernel]
    assert re.search(r"LDGSTS\S*\.128", names) and "STG.E.128" in names
    assert not re.search(r"\b(LDL|STL)\b", names)


def test_the_binding_compiles_against_this_torch(tmp_path: Path) -> None:
    extension = pytest.importorskip("torch.utils.cpp_extension")
    runtime = [path.parent for path in (Path(shutil.which("nvcc") or "").resolve().parents[1]).rglob("cuda_runtime.h")]
    include = [f"-I{path}" for path in (*extension.include_paths(), *runtime[:1])]
    command = ["g++", *FLAGS, STABLE, "-DUSE_CUDA", "-fPIC", "-Wall", "-Werror", "-Wno-attributes", *include, "-c"]
    source = ROOT / "csrc/bindings/ops_cuda.cpp"
    process = subprocess.run([*command, source, "-o", tmp_path / "ops_cuda.o"], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
