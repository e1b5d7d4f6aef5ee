"""Which backend runs: wishes and their order, reasons, the one warning of a fall-back."""

import logging
import os
import pickle
import re
import subprocess
import sys
import threading
from importlib import import_module

import pytest
import torch

from impure_fast import backend, can_run, last_backends, ops, set_backend
from impure_fast.errors import BackendError
from impure_fast.ops import _dispatch, _native
from impure_fast.ops._lib import OPERATORS

from .common import device_of

X = torch.rand(1, 4, 2, 8)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(_dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(_dispatch, "_last", {})
    monkeypatch.setattr(_dispatch, "_told", set())
    yield
    set_backend(None)


INSTRUCTION_SETS = ("scalar", "avx2", "avx512", "avx512+bf16", "amx")


def attend(**options):
    """The backend that a call of attention takes."""
    ops.reconstruction_attention(X, X, X, **options)
    return last_backends()["reconstruction_attention"]


@pytest.fixture
def no_library(monkeypatch):
    """As if the compiled part had not been built."""
    monkeypatch.setattr(_native, "why_not", lambda part: f"The compiled {part} part is not built.")
    _dispatch._probe.cache_clear()
    yield
    _dispatch._probe.cache_clear()


def test_every_public_operator_is_declared_and_has_a_reference():
    assert set(ops.__all__) == set(OPERATORS)
    for name, operator in OPERATORS.items():
        assert can_run(name, "reference") == can_run(name, "auto") == []
        assert set(operator.overloads) == set(operator.dtypes) and operator.backends[0] == "reference"


def test_call_beats_context_beats_process_beats_environment(monkeypatch):
    monkeypatch.setenv(_dispatch.VARIABLE, "triton")
    assert _dispatch.wished() == "triton"
    set_backend("cpp")
    assert _dispatch.wished() == "cpp"
    with backend("auto"):
        assert _dispatch.wished() == "auto"
        with backend("reference"):
            assert attend() == "reference"
        assert _dispatch.wished() == "auto"
    set_backend(None)
    assert _dispatch.wished() == "triton"
    assert attend(backend="reference") == "reference"


def test_environment_is_read_at_each_choice(monkeypatch):
    assert _dispatch.wished() == "auto"
    monkeypatch.setenv(_dispatch.VARIABLE, "reference")
    assert attend() == "reference"
    monkeypatch.setenv(_dispatch.VARIABLE, "")
    assert _dispatch.wished() == "auto"


def test_a_context_ends_with_its_block_even_by_an_error_and_stays_in_its_thread():
    seen = []

    def look_elsewhere_and_fail():
        with backend("reference"):
            thread = threading.Thread(target=lambda: seen.append(_dispatch.wished()))
            thread.start()
            thread.join()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        look_elsewhere_and_fail()
    assert (_dispatch.wished(), seen) == ("auto", ["auto"])


def test_unknown_names_are_refused_where_they_are_given(monkeypatch):
    for ask in (lambda: set_backend("fast"), lambda: can_run("order", "fast"), lambda: attend(backend="fast")):
        with pytest.raises(BackendError, match="no backend 'fast'; choose one of auto, reference, cpp, triton, cuda"):
            ask()
    with pytest.raises(BackendError, match="no backend 'fast'"), backend("fast"):
        pass
    monkeypatch.setenv(_dispatch.VARIABLE, "fast")
    with pytest.raises(BackendError, match="IMPURE_FAST_BACKEND: there is no backend 'fast'"):
        attend()
    with pytest.raises(BackendError, match="no operator 'attention'; choose one of noise, normalise_rows"):
        can_run("attention", "cpp")


def test_a_wish_binds_only_operators_that_have_the_backend(no_library):
    with backend("cpp"):
        ops.order(torch.rand(1, 4))
        assert last_backends() == {"order": "reference"}
        with pytest.raises(BackendError, match="reconstruction_attention cannot run on the backend 'cpp'.*not built"):
            attend()


def test_a_demand_is_strict():
    with pytest.raises(BackendError, match=r"order cannot run on the backend 'cpp'.*no cpp implementation.*float32"):
        ops.order(torch.rand(1, 4), backend="cpp")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a backend that a GPU makes possible")
def test_cuda_without_a_device_says_so():
    assert can_run("reconstruction_attention", "cuda") == ["There is no CUDA device."]
    with pytest.raises(BackendError, match="There is no CUDA device.*'auto' takes the best"):
        attend(backend="cuda")


def test_reasons_name_dtype_and_width():
    if reasons := can_run("reconstruction_attention", "cpp"):
        pytest.skip(" ".join(reasons))
    half = X.half()
    assert can_run("reconstruction_attention", "cpp", half, half, half, 1.0, 0) == [
        "It takes float32, bfloat16, float64, not float16."
    ]
    if not can_run("reconstruction_attention", "triton"):
        wide = torch.rand(1, 4, 1, 130, device=device_of("triton"))
        assert can_run("reconstruction_attention", "triton", wide, wide, wide, 1.0, 0) == [
            "It takes head widths up to 128, not 130."
        ]


def test_auto_takes_the_compiled_operator_and_falls_back_by_dtype():
    if reasons := can_run("reconstruction_attention", "cpp"):
        pytest.skip(" ".join(reasons))
    assert attend() == "cpp"
    half = X.half()
    ops.reconstruction_attention(half, half, half)
    assert last_backends() == {"reconstruction_attention": "reference"}


def test_auto_says_once_that_it_falls_back(no_library, caplog):
    with caplog.at_level(logging.WARNING, "impure_fast"):
        assert attend() == attend() == "reference"
    assert [record.getMessage() for record in caplog.records] == [
        "reconstruction_attention runs on reference. cpp: The compiled cpu part is not built."
    ]


def test_operators_with_one_way_to_run_say_nothing(caplog):
    with caplog.at_level(logging.WARNING, "impure_fast"):
        ops.order(torch.rand(1, 4))
    assert caplog.records == []


def test_a_library_that_does_not_load_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(_native, "PACKAGE", tmp_path)
    look = _native.why_not.__wrapped__
    assert "not built: install the package" in look("cpu")
    (tmp_path / "_build.json").write_text('{"not_built": {"cpu": "There is no C++ compiler."}}')
    assert look("cpu") == "The compiled cpu part is not built. There is no C++ compiler."
    (tmp_path / "_cpu.abi3.so").write_bytes(b"not a library")
    assert "_cpu.abi3.so cannot be loaded into torch" in look("cpu")


def test_a_built_cuda_library_loads_even_without_a_device():
    if not (_native.PACKAGE / "_cuda.abi3.so").exists():
        pytest.skip(_native.why_not("cuda"))
    assert _native.why_not("cuda") == ""


def test_compiled_parts_tell_how_they_were_built():
    told = _native.introspect()
    if not told:
        pytest.skip("impure_fast._info is not built")
    assert re.match(r"\d+\.", told["compiler"])
    if not _native.why_not("cpu"):
        assert told["cpu_isa"] in INSTRUCTION_SETS
    said = re.split(r"[\s:,.]+", import_module("impure_fast._info").cpu_isa.__doc__)
    assert set(INSTRUCTION_SETS) <= set(said)
    if (_native.PACKAGE / "_cuda.abi3.so").exists() and not _native.why_not("cuda"):
        kernels = import_module("impure_fast._info").cuda_kernels(str(_native.PACKAGE / "_cuda.abi3.so"))
        assert any("attention_forward" in kernel["name"] for kernel in kernels)
        assert torch.cuda.is_available() or {kernel["registers"] for kernel in kernels} == {-1}


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set_agrees(isa):
    """The choice is made when the library loads, so each is a process of its own."""
    if reasons := can_run("reconstruction_attention", "cpp"):
        pytest.skip(" ".join(reasons))
    code = """
import torch, impure_fast as imp
from impure_fast.ops import _native
torch.set_num_threads(1)
for dtype, limit in ((torch.float32, 3e-6), (torch.bfloat16, 3e-2)):
    for shape, chunks in (((2, 50, 3, 2, 24), 0), ((1, 2 * 48 + 4, 3, 2, 32), 4)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        y = x.detach().double().requires_grad_()
        got = imp.ops.reconstruction_attention(*x.unbind(2), chunks=chunks, backend="cpp")
        true = imp.ops.reconstruction_attention(*y.unbind(2), chunks=chunks, backend="reference")
        for a, b in ((got, true), (torch.autograd.grad(got.sum(), x)[0], torch.autograd.grad(true.sum(), y)[0])):
            assert float((a - b).abs().max()) < limit * float(b.abs().max()), (dtype, shape)
print(_native.introspect().get("cpu_isa"))
"""
    environment = {**os.environ, "IMPURE_FAST_CPU_ISA": isa}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    # A machine without the instruction set takes its best below.
    assert run.stdout.split()[-1] in ("None", *INSTRUCTION_SETS[: INSTRUCTION_SETS.index(isa) + 1])


def test_an_unset_interpreter_is_named_for_triton_on_a_cpu():
    code = "import impure_fast as imp; print(imp.can_run('order', 'triton'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": ""})
    if not torch.cuda.is_available():
        assert "only under TRITON_INTERPRET=1" in run.stdout


def test_results_pickle_without_their_backend():
    out = ops.reconstruction_attention(X, X, X)
    assert torch.equal(pickle.loads(pickle.dumps(out)), out)
