"""The benchmark suite: what is wrong is not timed, the page agrees with the figures, the scorer is not fooled."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import compare, kernelbench, results, runner
from benchmarks.__main__ import main
from benchmarks.authors import Authors
from benchmarks.providers import load, providers
from benchmarks.registry import PROBLEMS, network_flops, problems
from benchmarks.runner import _fp8, _tf32, ceiling_rows, error, measure, oracle, products, result, variants
from impure_fast.errors import InputError, MissingFileError
from impure_fast.ops._lib import OPERATORS

SMALL = [problem for problem in PROBLEMS if problem.small]
ORDER = next(problem for problem in SMALL if problem.op == "order")
ATTENTION = next(problem for problem in SMALL if problem.op == "reconstruction_attention")
KEYS = {"op", "shape", "dtype", "mode", "provider", "median_us", "p20_us", "p80_us", "parity", "machine"}
ROOT = Path(__file__).parents[2]


def script(folder, name, text):
    path = folder / f"{name}.py"
    path.write_text(f"import torch\n{text}")
    return str(path)


def test_every_operator_and_a_network_are_declared_small_and_real():
    for small in (True, False):
        declared = {problem.op.split()[0] for problem in PROBLEMS if problem.small == small}
        assert declared == {*OPERATORS, "reconstruct"}


def test_floors_are_what_cannot_be_done_without():
    """Worked out by hand: the operations of the released network without what is shared or thrown away, its first
    decoder block's pairs of rows, and half of the pictures that are mixed."""
    assert network_flops("impure_base_patch16_224", (1, 3, 224, 224)) == pytest.approx(110.23e9, rel=1e-4)
    by_name = {problem.name: problem for problem in PROBLEMS}
    assert by_name["reconstruction_attention_4x16x197x32_shared_4"].flops == 4 * 4 * 16 * 32 * 107_216
    mix = by_name["patch_mix_2x3x16x16_p4"]
    inputs = mix.make(torch.float32, "cpu")
    size, _ = mix.work(inputs, result(mix, mix.reference, inputs, "forward"))
    assert size == 2 * 4 * 2 * 3 * 16 * 16 + 8 * 2 * 16  # a picture in, a picture out, the order


@pytest.mark.parametrize("problem", SMALL, ids=lambda p: p.name)
def test_rows_have_the_promised_keys_and_the_reference_is_right(problem):
    rows = measure(problem, torch.float32, "forward", providers(problem, "reference,auto"), 2)
    assert [row["provider"] for row in rows] == ["reference", "auto"]
    for row in rows:
        assert row.keys() >= KEYS and row["parity"] <= 1 and row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["of_floor"] > 0


@pytest.mark.parametrize("mode", ["backward", "both"])
def test_gradients_are_measured(mode):
    for problem in SMALL:
        if problem.gradients:
            (row,) = measure(problem, torch.float32, mode, providers(problem, "reference"), 2)
            assert row["parity"] <= 1 and row["median_us"] > 0 and "of_floor" not in row


def test_every_attention_baseline_is_right_or_says_why_it_cannot():
    found = providers(ATTENTION, "sdpa*,products,cpp")
    rows = measure(ATTENTION, torch.float32, "forward", found, 1)
    for row in rows:
        assert ("median_us" in row) != ("why_not" in row)
        assert row["parity"] is None or row["parity"] <= 1
    assert {row["provider"] for row in rows if "median_us" in row} >= {"sdpa", "sdpa-flash", "sdpa-math", "products"}


def test_a_user_provider_is_one_file_with_one_function(tmp_path):
    text = "def order(uniforms):\n    p = uniforms.argsort(dim=1, stable=True)\n    return p, p.argsort(dim=1)\n"
    path = script(tmp_path, "mine", text)
    (row,) = measure(ORDER, torch.float32, "forward", providers(ORDER, path), 2)
    assert row["provider"] == "mine" and row["parity"] == 0 and row["median_us"] > 0
    assert providers(ATTENTION, path) == {}  # it has no such function


def test_a_wrong_provider_is_not_timed(tmp_path):
    wrong = script(tmp_path, "wrong", "def order(uniforms):\n    p = uniforms.argsort(dim=1)\n    return p, p\n")
    broken = script(tmp_path, "broken", "def order(uniforms):\n    raise ValueError('no')\n")
    half = script(tmp_path, "half", "def order(uniforms):\n    return uniforms.argsort(dim=1).int()\n")
    rows = measure(ORDER, torch.float32, "forward", providers(ORDER, f"{wrong},{broken},{half}"), 2)
    assert all("median_us" not in row for row in rows)
    assert ["wrong" in row["why_not"] for row in rows] == [True, False, True]
    assert rows[1]["why_not"] == "ValueError: no"


def test_a_wrong_gradient_is_not_timed(tmp_path):
    text = "def reconstruction_attention(q, k, v, scale, chunks):\n    x = [t.transpose(1, 2) for t in (q, k, v)]\n"
    text += "    out = torch.nn.functional.scaled_dot_product_attention(*x).transpose(1, 2)\n"
    path = script(tmp_path, "doubled", text + "    return out + out - out.detach()\n")
    found = providers(ATTENTION, path)
    assert "median_us" in measure(ATTENTION, torch.float32, "forward", found, 1)[0]
    assert "wrong" in measure(ATTENTION, torch.float32, "both", found, 1)[0]["why_not"]


def test_a_gradient_of_the_neighbouring_row_is_not_timed(tmp_path):
    """What comes from above must differ from row to row, or such a kernel passes."""
    text = "class Shifted(torch.autograd.Function):\n"
    text += "    forward = staticmethod(lambda ctx, x: x)\n"
    text += "    backward = staticmethod(lambda ctx, grad: grad.roll(1, 1))\n"
    text += "def reconstruction_attention(q, k, v, scale, chunks):\n    x = [t.transpose(1, 2) for t in (q, k, v)]\n"
    text += "    out = torch.nn.functional.scaled_dot_product_attention(*x).transpose(1, 2)\n"
    path = script(tmp_path, "shifted", text + "    return Shifted.apply(out)\n")
    found = providers(ATTENTION, path)
    for dtype in (torch.float32, torch.bfloat16):
        assert "median_us" in measure(ATTENTION, dtype, "forward", found, 1)[0]
        assert "wrong" in measure(ATTENTION, dtype, "both", found, 1)[0]["why_not"]


def test_the_gate_holds_a_network_to_its_own_precision():
    """In bf16 neither another picture nor a coarser result passes; fp32 wants fp32."""
    net = next(problem for problem in SMALL if problem.preset)
    for dtype, coarse in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float8_e5m2)):
        inputs = net.make(dtype, "cpu")
        (own,), (true,) = oracle(net, inputs)
        assert error(net, [own], [own], [true]) <= 0.5
        for wrong in (own * 0, own.flip(3), own.to(coarse).to(dtype)):
            assert error(net, [wrong], [own], [true]) > 1


def test_a_few_large_errors_and_many_small_ones_are_both_wrong():
    truth = torch.cat((torch.full((1,), 100.0), torch.ones(9999)))
    few, many = truth.clone(), truth.clone()
    few[0] += 1e-3
    many[1:] += 1e-5  # little beside the largest entry
    for got in (few, many):
        assert error(ATTENTION, [got], [truth], [truth.double()]) > 1
    assert error(ATTENTION, [truth * (1 + 2e-7)], [truth], [truth.double()]) < 1


def test_a_nan_is_wrong_even_where_the_reference_has_one():
    one, nan = torch.ones(2), torch.full((2,), float("nan"))
    assert error(ATTENTION, [nan], [one / 0], [one.double()]) == float("inf")  # the reference overflows
    assert error(ATTENTION, [one * 9], [one / 0], [one.double()]) == float("inf")
    assert error(ATTENTION, [one], [one], [one.double()]) == 0
    assert (
        error(ATTENTION, [nan], [one], [one.double()]) == error(ATTENTION, [one], [nan], [one.double()]) == float("inf")
    )
    assert error(ATTENTION, [one.double()], [one], [one.double()]) == float("inf")  # another dtype


def test_what_is_too_fast_is_measured_again(monkeypatch):
    monkeypatch.setattr("benchmarks.runner.SUSPICIOUS", 0.0)
    rows = measure(ATTENTION, torch.float32, "forward", providers(ATTENTION, "sdpa,cpp"), 2)
    assert all(row["measured_again_us"] > 0 and row["median_us"] > 0 for row in rows)
    assert rows[0]["ratio"] == 1  # pairs of the second time too


def test_what_works_in_one_place_alone_is_found_out_by_other_inputs(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.runner.SUSPICIOUS", 0.0)
    text = "kept = []\ndef order(uniforms):\n    if not kept:\n        kept.append(uniforms.data_ptr())\n"
    text += "    p = uniforms.argsort(dim=1, stable=uniforms.data_ptr() == kept[0])\n"
    text += "    return p, p.argsort(dim=1) if uniforms.data_ptr() == kept[0] else p\n"
    path = script(tmp_path, "memory", text)
    rows = measure(ORDER, torch.float32, "forward", providers(ORDER, f"reference,{path}"), 2)
    assert "median_us" in rows[0] and "median_us" not in rows[1]
    assert rows[1]["why_not"] == "RuntimeError: Its result is wrong on other inputs."


def test_what_was_timed_is_asked_again_with_other_numbers(tmp_path):
    text = "kept = {}\ndef order(uniforms):\n    if uniforms.data_ptr() not in kept:\n"
    text += (
        "        p = uniforms.argsort(dim=1, stable=True)\n        kept[uniforms.data_ptr()] = p, p.argsort(dim=1)\n"
    )
    path = script(tmp_path, "address", text + "    return kept[uniforms.data_ptr()]\n")
    rows = measure(ORDER, torch.float32, "forward", providers(ORDER, f"{path},reference"), 2)
    assert rows[0]["why_not"] == "What was timed does not follow its inputs." and "median_us" not in rows[0]
    assert rows[1]["median_us"] > 0


def test_who_modifies_its_inputs_is_not_timed_and_spoils_nothing(tmp_path):
    text = "def order(uniforms):\n    p = uniforms.argsort(dim=1, stable=True)\n    uniforms.mul_(-1)\n"
    path = script(tmp_path, "inplace", text + "    return p, p.argsort(dim=1)\n")
    rows = measure(ORDER, torch.float32, "forward", providers(ORDER, f"{path},reference"), 2)
    assert rows[0]["why_not"] == "It modified its inputs, so it is not timed."
    assert rows[1]["parity"] == 0 and rows[1]["median_us"] > 0


def test_the_strongest_compiled_baseline_has_its_weights_as_constants(monkeypatch):
    from torch._inductor import freezing

    folded = []
    real = freezing.replace_params_with_constants
    monkeypatch.setattr(freezing, "replace_params_with_constants", lambda *a, **o: (folded.append(a), real(*a, **o))[1])
    net = next(problem for problem in SMALL if problem.preset)
    inputs = net.make(torch.float32, "cpu")
    with torch.inference_mode():
        providers(net, "compile-max-autotune")["compile-max-autotune"](*inputs)
    (module, params, *_) = folded[0]
    assert len(params) > 50


def test_the_pytest_front_times_what_is_right_by_group(tmp_path):
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks"]
    line += ["--benchmark-json", str(tmp_path / "b.json"), "--benchmark-columns", "median"]
    line += ["-k", f"reconstruction_attention-{ATTENTION.shape.replace(' ', '_')}-"]
    alone = {key: value for key, value in os.environ.items() if "XDIST" not in key}
    ended = subprocess.run(line, cwd=ROOT, env=alone, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    timed = json.loads((tmp_path / "b.json").read_text())["benchmarks"]
    by_group = {bench["group"] for bench in timed}
    start = f"reconstruction_attention/{ATTENTION.shape}/"
    assert by_group == {f"{start}{dtype}/{mode}" for dtype in ("float32", "bfloat16") for mode in ("forward", "both")}
    assert {"reference", "sdpa", "auto"} <= {bench["extra_info"]["provider"] for bench in timed}


def test_the_pytest_front_times_nothing_that_is_wrong(monkeypatch):
    from benchmarks import test_kernels

    monkeypatch.setattr(
        test_kernels.providers, "providers", lambda *_: {"bad": lambda *x: ATTENTION.reference(*x) * 1.1}
    )
    with pytest.raises(AssertionError, match="wrong, so it is not timed"):
        test_kernels.test_speed(None, ATTENTION, "bad", "float32", "forward")


def test_a_later_run_that_fails_withdraws_what_an_earlier_one_measured():
    line = dict.fromkeys(results.COLUMNS, "x") | {"mode": "forward", "commit": "a"}
    earlier = [
        line | {"date": "1", "provider": name, "statistic": "median_us", "value": value}
        for name, value in (("reference", "4"), ("cpp", "1"))
    ]
    assert [ratio for _, ratio, _ in results._ratios(earlier)] == [4.0]
    later = [*earlier, line | {"date": "2", "provider": "cpp", "statistic": "why_not", "value": "wrong"}]
    assert results._ratios(later) == []
    assert [set(last) for last in results.latest(later).values()] == [{"median_us"}, {"why_not"}]


def test_the_machines_ceilings_are_measured():
    copy, product, cached, launch, *network = ceiling_rows(["float32"], "cpu", 1, small=True)
    assert copy["gbytes_per_s"] > 0 and product["gflops"] > 0 and cached["gbytes_per_s"] > 0 and launch["median_us"] > 0
    weight = torch.zeros(1, 1)
    assert [row["provider"] for row in network] == [*products(weight), *variants(weight)]
    assert all(row["gflops"] > 0 and row["median_us"] > 0 for row in network)


def test_what_is_timed_as_a_product_is_one():
    x, weight = torch.randn(48, 64, dtype=torch.bfloat16), torch.randn(32, 64, dtype=torch.bfloat16)
    truth = x.double() @ weight.double().T
    ways = products(weight) | variants(weight) | {"fp8": _fp8(weight), "tf32": partial(_tf32, weight)}
    for name, multiply in ways.items():
        wanted = torch.nn.functional.gelu(truth, approximate="tanh") if name == "gelu" else truth
        off = (multiply(x).double() - wanted).norm() / wanted.norm()
        assert off < (0.1 if name == "fp8" else 0.01), name
    assert torch.get_float32_matmul_precision() == "highest"


def test_unknown_providers_and_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"'fastest' is no provider; known are reference, auto"):
        providers(ORDER, "fastest")
    with pytest.raises(MissingFileError, match=r"nowhere\.py"):
        providers(ORDER, "nowhere.py")
    with pytest.raises(MissingFileError, match="no checkout"):
        Authors("nowhere", "impure_base_patch16_224")
    with pytest.raises(InputError, match="there is a provider 'sdpa' already"):
        providers(ORDER, script(tmp_path, "sdpa", ""))
    with pytest.raises(InputError, match=r"broken\.py does not run: SyntaxError"):
        providers(ORDER, script(tmp_path, "broken", "def ("))
    with pytest.raises(InputError, match=r"No problem fits ops 'ordr' .*; there are order 64x196; patch_mask"):
        problems("ordr")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("run --dtypes float31", "float31: choose of float32, bfloat16"),
        ("run --modes forwards", "forwards: choose of forward, backward, both"),
        ("run --rounds 0", "0: wanted a whole number of at least 1"),
        ("run --device tpu", "tpu: choose cpu, or cuda"),
        ("run --ops ordr", "No problem fits ops 'ordr'"),
        ("run --small --ops order --providers fastest", "'fastest' is no provider"),
        ("run --small --ops order --providers mine.py", "There is no provider file mine.py"),
        ("run --small --ops order --providers engine", "'engine' has nothing for these problems"),
        ("run --authors nowhere", "nowhere is no checkout of the authors' repository"),
        ("run --csv CONTRIBUTING.md", "CONTRIBUTING.md has other columns"),
        ("compare nothing-of-that-name --ops order", "nothing-of-that-name"),
        ("compare . --ops order", "the old side is a commit"),
        ("score nowhere", "There is no nowhere"),
        ("score .ci", "holds no solution"),
    ],
)
def test_a_wrong_command_says_what_to_do(arguments, said, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments.split()])
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert code == 2 and said in err and "Traceback" not in err + out


def test_rows_are_kept_as_they_come(tmp_path, monkeypatch):
    """A run that is ended early leaves what it had."""
    real = runner.measure

    def ended(problem, *rest):
        if problem.op != "order":
            raise KeyboardInterrupt
        return real(problem, *rest)

    monkeypatch.setattr("benchmarks.__main__.measure", ended)
    files = ["--json", str(tmp_path / "rows.json"), "--csv", str(tmp_path / "rows.csv")]
    arguments = ["run", "--small", "--ops", "order,patch_mix", "--providers", "reference", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments, *files])
    with pytest.raises(KeyboardInterrupt):
        main()
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["op"] == "order" and {line["op"] for line in results.read(tmp_path / "rows.csv")} == {"order"}


def test_results_are_appended_and_never_overwritten(tmp_path):
    path = tmp_path / "kernels.csv"
    rows = measure(ORDER, torch.float32, "forward", providers(ORDER, "reference"), 2)
    results.append(path, results.COLUMNS, results.lines(rows))
    before = path.read_text()
    results.append(path, results.COLUMNS, results.lines(rows))
    assert path.read_text().startswith(before)
    assert len(results.read(path)) == 2 * len(results.lines(rows)) and before.count("commit,date") == 1
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="other columns"):
        results.append(path, results.COLUMNS, results.lines(rows))
    assert path.read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize(("path", "tables"), [(results.PAGE, results.block), (results.README, results.networks)])
def test_pages_and_results_agree(path, tables):
    page, entries = path.read_text(), results.read()
    assert results.in_page(page, tables(entries)) == page, "run python -m benchmarks report"
    for entry in entries:
        if entry["statistic"] == "median_us" and entry["provider"] in ("cpp", "engine"):
            entry["value"] = "1"
    assert results.in_page(page, tables(entries)) != page
    with pytest.raises(InputError, match="lacks the marks"):
        results.in_page(page.replace(results.END, ""), "")


def test_pictures_are_drawn_where_there_are_figures():
    row = {"commit": "c", "date": "d", "versions": "v", "device": "gpu", "dtype": "float16", "op": "o", "shape": "s"}
    figures = {"intensity": 2, "gflops": 3, "copy_gbytes_per_s": 4, "product_gflops": 9, "peak_bytes": 4096}
    figures |= {"median_us": 7}
    entries = [
        {**row, "provider": provider, "mode": "forward", "statistic": k, "value": str(v)}
        for provider in ("cuda", "sdpa")
        for k, v in figures.items()
    ]
    for name, draw in results.PICTURES.items():
        assert draw(entries) is not None and draw([]) is None
        assert f"{name}.png" in results.block(entries) and f"{name}.png" not in results.block([])


def test_problem_files_are_what_the_registry_writes():
    files = {path.name: path.read_text() for path in kernelbench.FOLDER.glob("*.py")}
    assert files == {f"{p.name}.py": kernelbench.source(p) for p in kernelbench.chosen()}, (
        "python -m benchmarks problems"
    )
    assert {p.op for p in kernelbench.chosen()} == set(OPERATORS)


def test_problem_files_need_torch_alone_and_compute_what_the_reference_does(tmp_path):
    small = [problem for problem in SMALL if not problem.preset]
    for problem in small:
        path = tmp_path / f"{problem.name}.py"
        path.write_text(kernelbench.source(problem))
        inputs = problem.make(torch.float32, "cpu")
        model = load(str(path), "Model")(*load(str(path), "get_init_inputs")())
        for got, own in zip(result(problem, model, inputs, "forward"), oracle(problem, inputs)[0], strict=True):
            assert torch.equal(got, own)
    code = (
        "import importlib, pathlib, sys\nfor p in pathlib.Path().glob('*.py'):\n    m = importlib.import_module(p.stem)"
    )
    code += "\n    m.Model(*m.get_init_inputs())(*m.get_inputs())\n    print(p.stem)"
    code += "\nassert not [m for m in sys.modules if m.startswith('impure')]"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (sorted(run.stdout.split()), run.returncode) == (sorted(p.name for p in small), 0), run.stderr


HONEST = "        p = u.argsort(dim=1, stable=True)\n        return p, p.argsort(dim=1)\n"
TRICKS = {
    "cache": (
        "    kept = None\n    def forward(self, u):\n        if self.kept is None:\n"
        "            p = u.argsort(dim=1, stable=True)\n            self.kept = p, p.argsort(dim=1)\n"
        "        return self.kept\n",
        "result is wrong",
    ),
    "address": (
        "    kept = {}\n    def forward(self, u):\n        if u.data_ptr() not in self.kept:\n"
        "            p = u.argsort(dim=1, stable=True)\n            self.kept[u.data_ptr()] = p, p.argsort(dim=1)\n"
        "        return tuple(x.clone() for x in self.kept[u.data_ptr()])\n",
        "result is wrong",
    ),
    "laziness": (
        "    calls = 0\n    def forward(self, u):\n        self.calls += 1\n        p = u.argsort(dim=1, stable=True)\n"
        "        q = p if 2 < self.calls < 5 else p.argsort(dim=1)\n        return p, q\n",
        "result is wrong",
    ),
    "race": (
        "    calls = 0\n    def forward(self, u):\n        self.calls += 1\n"
        + HONEST.replace(
            "        return",
            """
        if self.calls > 2:
            u.zero_()
        return""",
        ),
        "modified its inputs",
    ),
    "subclass": (
        "    calls = 0\n    def forward(self, u):\n        self.calls += 1\n"
        "        p = u.argsort(dim=1, stable=True)\n        q = p.argsort(dim=1)\n"
        "        return p, torch.nn.Parameter(q, False) if self.calls > 2 else q\n",
        "plain tensors",
    ),
    "process": (
        "    def forward(self, u):\n        import subprocess, sys\n"
        "        subprocess.run(['sleep', '0.05'])\n" + HONEST,
        "its own process does not do",
    ),
    "tf32": (
        "    def forward(self, u):\n        torch.backends.cudnn.allow_tf32 = not torch.backends.cudnn.allow_tf32\n"
        + HONEST,
        "precision",
    ),
    "thread": (
        "    def forward(self, u):\n        import threading, time\n        u = u.clone()\n"
        "        out = torch.zeros(u.shape, dtype=torch.int64), torch.zeros(u.shape, dtype=torch.int64)\n"
        "        def work():\n            time.sleep(0.01)\n            p = u.argsort(dim=1, stable=True)\n"
        "            with torch.inference_mode():\n"
        "                out[0].copy_(p), out[1].copy_(p.argsort(dim=1))\n"
        "        threading.Thread(target=work).start()\n        return out\n",
        "not ready",
    ),
    "memory": (
        "    def forward(self, u):\n        return tuple(torch.empty(u.shape, dtype=torch.int64) for _ in range(2))\n",
        "result is wrong",
    ),
    "inputs": ("    def forward(self, u):\n        u.add_(0.5)\n" + HONEST, "modified its inputs"),
    "buffer": (
        "    out = None\n    def forward(self, u):\n        p = u.argsort(dim=1, stable=True)\n"
        "        if self.out is None:\n            self.out = p.clone(), p.clone()\n"
        "        self.out[0].copy_(p), self.out[1].copy_(p.argsort(dim=1))\n        return self.out\n",
        "later call changed",
    ),
    "precision": (
        "    def forward(self, u):\n        torch.set_float32_matmul_precision('medium')\n" + HONEST,
        "precision",
    ),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_the_scorer_refuses_the_known_tricks(tmp_path, trick):
    body, reason = TRICKS[trick]
    path = script(tmp_path, ORDER.name, f"class ModelNew(torch.nn.Module):\n{body}")
    was = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        row = kernelbench.judge(ORDER, path, "cpu", 2)
    finally:
        torch.set_float32_matmul_precision(was[0])
        torch.backends.cudnn.allow_tf32 = was[1]
    assert not row["correct"] and reason in row["why_not"], row


def test_the_scorer_refuses_a_softmax_without_its_maximum(tmp_path):
    body = "class ModelNew(torch.nn.Module):\n    def __init__(self, scale, chunks):\n        super().__init__()\n"
    body += "        self.scale = scale\n    def forward(self, q, k, v):\n"
    body += "        q, k, v = (x.transpose(1, 2) for x in (q, k, v))\n"
    body += "        e = (self.scale * q @ k.transpose(2, 3)).exp()\n"
    body += "        return (e / e.sum(-1, keepdim=True) @ v).transpose(1, 2)\n"
    path = script(tmp_path, ATTENTION.name, body)
    row = kernelbench.judge(ATTENTION, path, "cpu", 2)
    assert not row["correct"] and "result is wrong" in row["why_not"]
    stable = body.replace(
        "(self.scale * q @ k.transpose(2, 3)).exp()", "(self.scale * q @ k.transpose(2, 3)).softmax(-1)"
    )
    row = kernelbench.judge(ATTENTION, script(tmp_path, ATTENTION.name, stable), "cpu", 2)
    assert row["correct"], row


def test_the_scorers_clock_sees_no_numbers_twice(tmp_path):
    """A solution may remember results by the numbers themselves: that is no error, but it must not pay."""
    body = "    kept = {}\n    def forward(self, u):\n        key = hash(u.numpy().tobytes())\n"
    body += "        if key not in self.kept:\n            import time\n            end = time.process_time() + 0.02\n"
    body += "            while time.process_time() < end:\n                pass\n"
    body += "            p = u.argsort(dim=1, stable=True)\n            self.kept[key] = p, p.argsort(dim=1)\n"
    body += "        return tuple(x.clone() for x in self.kept[key])\n"
    path = script(tmp_path, ORDER.name, f"class ModelNew(torch.nn.Module):\n{body}")
    row = kernelbench.judge(ORDER, path, "cpu", 5)
    assert row["correct"] and row["median_us"] >= 20_000, row


def test_the_scorer_scores_an_honest_solution_and_reports_a_crash(tmp_path):
    script(tmp_path, ORDER.name, f"class ModelNew(torch.nn.Module):\n    def forward(self, u):\n{HONEST}")
    script(tmp_path, ATTENTION.name, "import os\nos._exit(3)\n")
    out = tmp_path / "scores.json"
    kernelbench.score(SimpleNamespace(folder=str(tmp_path), device="cpu", rounds=2, json=str(out)))
    crashed, honest = sorted(json.loads(out.read_text()), key=lambda row: row["correct"])
    assert honest["correct"] and honest["speedup"] > 0 and honest["of_floor"] > 0
    assert "ended with 3" in crashed["why_not"]


@pytest.mark.parametrize(
    ("ratio", "p20", "p80", "said"),
    [
        (1.02, 1.01, 1.03, "within noise"),  # new against itself differs as much
        (1.05, 0.99, 1.20, "within noise"),  # its own band holds 1
        (1.05, 1.04, 1.06, "new is faster"),
        (0.90, 0.89, 0.91, "new is slower"),
    ],
)
def test_a_ratio_inside_the_noise_is_no_difference(ratio, p20, p80, said):
    row = {"ratio": ratio, "p20": p20, "p80": p80, "noise_p20": 0.97, "noise_p80": 1.01}
    assert compare.verdict(row) == said


@pytest.mark.slow
def test_a_slower_commit_is_found(tmp_path):
    """A planted regression: the new tree's operator does its work five times."""
    for name in ("old", "new"):
        shutil.copytree(ROOT / "impure_fast", tmp_path / name / "impure_fast", symlinks=True)
        (tmp_path / name / "impure_fast" / "kernels").unlink(missing_ok=True)
        (tmp_path / name / "impure_fast" / "kernels").symlink_to(ROOT / "kernels")
        (tmp_path / name / "benchmarks").symlink_to(ROOT / "benchmarks")
    file = tmp_path / "new" / "impure_fast" / "ops" / "order.py"
    work = "    places = uniforms.argsort(dim=1, stable=True)\n"
    assert work in file.read_text()
    file.write_text(file.read_text().replace(work, 5 * work))
    options = SimpleNamespace(provider="reference", device="cpu", rounds=7)
    row = compare._pairs(ORDER, "float32", "forward", options, tmp_path / "old", tmp_path / "new")
    assert row["ratio"] < 0.7 and row["verdict"] == "new is slower", row


def test_a_side_says_why_it_cannot_be_timed(capsys):
    for provider, said in {"cpp": "cpp has nothing for it", "fastest": "'fastest' is no provider"}.items():
        compare.worker(SimpleNamespace(spec=json.dumps([ORDER.name, "float32", "forward", provider, "cpu"])))
        assert capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize(
    ("verdicts", "code"), [(["within noise", "new is faster"], 0), (["new is slower"], 1), ([None], 1)]
)
def test_compare_ends_with_1_where_new_is_slower(verdicts, code, monkeypatch):
    monkeypatch.setattr(compare, "_tree", lambda commit: contextlib.nullcontext(ROOT))
    said = iter(verdicts)
    monkeypatch.setattr(compare, "_pairs", lambda *case: {"verdict": next(said)})
    chosen = dict(ops="order", shapes="", small=False, device="cpu", dtypes=["float32"], modes=["forward"], json=None)
    monkeypatch.setattr(compare, "cases", lambda options: [()] * len(verdicts))
    assert compare.run(SimpleNamespace(old="HEAD", new=".", **chosen)) == code


def test_a_compared_side_answers_readings(tmp_path):
    spec = json.dumps([ORDER.name, "float32", "forward", "auto", "cpu"])
    with compare._side(ROOT, spec) as side:
        assert compare._ask(side) == "ready"
        assert float(compare._ask(side, "go")) > 0


def test_the_campaign_runs_its_cheap_parts_without_a_gpu(tmp_path):
    call = ["bash", str(ROOT / "benchmarks" / "gpu_campaign.sh"), "--out", str(tmp_path), "--device", "cpu"]
    call += ["--parts", "versions,sanitizer,ncu,nonsense", "--python", sys.executable, "--minutes", "60"]
    run = subprocess.run(call, capture_output=True, text=True, timeout=600)
    status = dict(line.split("\t")[:2] for line in (tmp_path / "status.tsv").read_text().splitlines())
    assert run.returncode == 1, run.stderr
    assert status == {"versions": "done", "sanitizer": "skipped", "ncu": "skipped", "nonsense": "failed"}
    assert "torch" in (tmp_path / "versions.txt").read_text()


FAILS = """#!/usr/bin/env bash
# In Python's place: training crashes, ceilings hangs and will not be ended, the rest works.
case "$*" in
    *training_memory*) kill -SEGV $$ ;;
    *ceilings*) echo $$ > "$(dirname "$0")/pid"; trap "" TERM; while :; do sleep 1; done ;;
esac
"""


def test_the_campaign_outlives_parts_that_crash_or_hang(tmp_path):
    python = tmp_path / "python"
    python.write_text(FAILS)
    python.chmod(0o755)
    call = ["bash", str(ROOT / "benchmarks" / "gpu_campaign.sh"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    call += ["--minutes", "0.4", "--parts", "training,ceilings,versions", "--python", str(python)]
    began = time.monotonic()
    run = subprocess.run(call, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1 and time.monotonic() - began < 30
    lines = [line.split("\t") for line in (tmp_path / "out" / "status.tsv").read_text().splitlines()]
    assert [line[:2] for line in lines] == [["training", "failed"], ["ceilings", "timeout"], ["versions", "done"]]
    assert "exit 139" in lines[0][3] and "more than" in lines[1][3]
    left = subprocess.run(
        ["ps", "-o", "stat=", "-p", (tmp_path / "pid").read_text().strip()], capture_output=True, text=True
    )
    assert left.stdout.strip()[:1] in ("", "Z")  # nor does it go on in the background


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--minutes soon", "--minutes soon is no number"),
        ("--device tpu", "--device tpu is neither cpu nor cuda"),
        ("--python nowhere", "there is no nowhere"),
        ("--out", "--out wants a value"),
        ("--fast", "unknown argument --fast"),
    ],
)
def test_a_wrong_campaign_says_what_to_do(arguments, said):
    call = ["bash", str(ROOT / "benchmarks" / "gpu_campaign.sh"), *arguments.split()]
    run = subprocess.run(call, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and said in run.stderr


@pytest.mark.slow
def test_the_campaign_can_be_rehearsed_on_a_cpu(tmp_path):
    """Every part's commands are right, cut down to small shapes."""
    call = ["bash", str(ROOT / "benchmarks" / "gpu_campaign.sh"), "--out", str(tmp_path), "--device", "cpu"]
    call += ["--parts", "versions,build,ceilings,operators,network,latency,training,compile"]
    run = subprocess.run([*call, "--minutes", "60", "--python", sys.executable], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert {file.name for file in tmp_path.iterdir()} >= {"kernels.csv", "latency.csv", "training.json", "compile.json"}
    compiled = {r["provider"]: r for r in json.loads((tmp_path / "products.json").read_text()) if r["op"] == "product"}
    assert compiled["compile-max-autotune"]["gflops"] > 0
    ran = {line["op"].split()[0] for line in results.read(tmp_path / "kernels.csv")}
    assert ran == {"ceiling", "product", "reconstruct", *OPERATORS} - {"normalise_rows"}
    rows = results.read(tmp_path / "kernels.csv")
    timed = {line["provider"] for line in rows if line["statistic"] == "median_us"}
    assert timed >= {"reference", "auto", "engine", "compile", "compile-max-autotune", "sdpa-math", "products"}


def test_the_campaign_lists_what_it_would_run(tmp_path):
    call = ["bash", str(ROOT / "benchmarks" / "gpu_campaign.sh"), "--out", str(tmp_path), "--dry-run"]
    run = subprocess.run(call, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and not list(tmp_path.iterdir())
    parts = ("build", "parity", "sanitizer", "ceilings", "operators", "network", "training", "latency")
    assert all(f"\n{part}\t" in f"\n{run.stdout}" for part in parts), run.stdout
