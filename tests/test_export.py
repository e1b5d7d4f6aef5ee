"""Exported purifiers give what model.purify gives, on photographs, for any batch."""

import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from impure_fast import can_run, load
from impure_fast.engine.export import export, export_program
from impure_fast.errors import InputError
from impure_fast.purify import to_float

from .conftest import small_model


@pytest.fixture(scope="module")
def photographs():
    """Three photographs of 30 x 40 pixels, [3, 3, 30, 40]: tiles, overlap and padding for a small network."""
    skimage = pytest.importorskip("skimage", reason="its photographs come with the extra demo")
    folder = Path(str(files(skimage))) / "data"
    names = ("chelsea.png", "coffee.png", "rocket.jpg")
    return to_float(np.stack([np.asarray(Image.open(folder / n).convert("RGB").resize((40, 30))) for n in names]))


def agrees(function, model, photographs):
    """Whether an exported function follows model.purify, for batches of one and of three."""
    for images, streams in ((photographs[:1], [6]), (photographs, [0, 5, 2])):
        got = torch.as_tensor(function(images, torch.tensor(9), torch.tensor(streams)))
        assert (got - model.purify(images, seed=9, streams=streams)).abs().max() <= 1e-5


@pytest.mark.parametrize("decomposed", [False, True], ids=["operators", "decomposed"])
def test_a_program_gives_the_models_pictures(photographs, decomposed, tmp_path):
    model = small_model()
    export(model, path := tmp_path / "purifier.pt2", 30, 40, decomposed=decomposed)
    program = torch.export.load(path)
    own = [node for node in program.graph.nodes if "impure_fast" in str(node.target)]
    assert bool(own) == (not decomposed and not can_run("reconstruction_attention", "cpp"))
    agrees(program.module(), model, photographs)


def test_onnxruntime_gives_the_models_pictures(photographs, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    model = small_model()
    export(model, path := tmp_path / "purifier.onnx", 30, 40, format="onnx")
    session = onnxruntime.InferenceSession(path)
    names = [value.name for value in session.get_inputs()]
    assert names == ["images", "seed", "streams"] and {p.name for p in tmp_path.iterdir()} == {path.name}

    def run(*inputs):
        return session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))[0]

    agrees(run, model, photographs)


@pytest.mark.slow
def test_a_compiled_package_gives_the_models_pictures(photographs, tmp_path):
    """In a process of its own, as a server would load it."""
    model = small_model()
    export(model, path := tmp_path / "purifier.pt2", 30, 40, format="aoti")
    torch.save(photographs, tmp_path / "photographs.pt")
    code = (
        "import sys, torch, impure_fast as imp; from impure_fast.ops import _native; _native.why_not('cpu');"
        "f = torch._inductor.aoti_load_package(sys.argv[1]); x = torch.load(sys.argv[2]);"
        "torch.save(f(x, torch.tensor(9), torch.tensor([0, 5, 2])), sys.argv[3])"
    )
    arguments = [path, tmp_path / "photographs.pt", tmp_path / "got.pt"]
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True)
    got = torch.load(tmp_path / "got.pt")
    assert (got - model.purify(photographs, seed=9, streams=[0, 5, 2])).abs().max() <= 1e-5


@pytest.mark.slow
def test_the_shipped_model_exports_at_full_size(photographs):
    model = load("impure_tiny")
    images = torch.nn.functional.interpolate(photographs, (224, 224), mode="bicubic").clamp(0, 1)
    program = export_program(model, 224, 224, decomposed=True)
    agrees(program.module(), model, images)


def test_impossible_sizes_and_formats_are_refused(tmp_path):
    model = small_model()
    with pytest.raises(InputError, match=re.escape("height=0, width=4: must be at least 1 pixel.")):
        export_program(model, 0, 4)
    with pytest.raises(InputError, match=r"format='onnx', file .*a.pt2: wanted one of program \(.pt2\), aoti"):
        export(model, tmp_path / "a.pt2", 8, 8, format="onnx")
