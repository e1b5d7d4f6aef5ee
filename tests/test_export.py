"""Exported purifiers give what model.purify gives, on photographs, for any batch."""

import importlib.util
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
from impure_fast.engine.export import export, export_program, export_triton
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
    model = small_model().train()
    export(model, path := tmp_path / "purifier.pt2", 30, 40, decomposed=decomposed)
    assert model.training
    program = torch.export.load(path)
    own = [node for node in program.graph.nodes if "impure_fast" in str(node.target)]
    assert bool(own) == (not decomposed and not can_run("reconstruction_attention", "cpp"))
    agrees(program.module(), model, photographs)


@pytest.fixture(scope="module")
def triton(tmp_path_factory):
    """A model folder for Triton, and its model as onnxruntime, the server's backend, runs it."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    folder = tmp_path_factory.mktemp("models") / "purifier"
    export_triton(small_model(), folder, 30, 40)
    return folder, onnxruntime.InferenceSession(folder / "1" / "model.onnx")


def test_onnxruntime_gives_the_models_pictures(photographs, triton):
    folder, session = triton
    names = [value.name for value in session.get_inputs()]
    assert names == ["images", "seed", "streams"]
    assert [path.name for path in (folder / "1").iterdir()] == ["model.onnx"]

    def run(images, seed, streams):
        inputs = (images, seed.expand(len(images)), streams)
        return session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))[0]

    agrees(run, small_model(), photographs)


def test_requests_that_triton_batches_get_what_each_gets_alone(photographs, triton):
    _, session = triton
    requests = []  # (images [B, 3, H, W], seed [B, 1], streams [B, 1]), as clients send them
    for images, seeds, streams in (
        (photographs[:1], [7], [0]),
        (photographs[1:], [-3, 2**62], [4, 4]),
        (photographs[:1], [7], [1]),
        (photographs[:1], [7], [0]),
    ):
        requests.append((images.numpy(), np.array(seeds)[:, None], np.array(streams)[:, None]))

    def run(images, seed, streams):
        return session.run(None, {"images": images, "seed": seed.reshape(-1), "streams": streams.reshape(-1)})[0]

    batched = np.split(run(*map(np.concatenate, zip(*requests, strict=True))), [1, 3, 4])
    model = small_model()
    for (images, seeds, streams), got in zip(requests, batched, strict=True):
        assert np.abs(got - run(images, seeds, streams)).max() <= 1e-5
        for i, (image, seed, stream) in enumerate(zip(images, seeds, streams, strict=True)):
            wanted = model.purify(torch.from_numpy(image)[None], seed=int(seed[0]), streams=stream.tolist())[0]
            assert np.abs(got[i] - wanted.numpy()).max() <= 1e-5
    assert np.abs(batched[0] - batched[2]).max() > 1e-2  # other streams, other pictures
    assert np.abs(batched[0] - batched[3]).max() <= 1e-5


def test_the_config_is_of_tritons_schema_and_fits_the_model(triton):
    client = importlib.util.find_spec("tritonclient")
    if client is None:
        pytest.skip("tritonclient is not installed")
    from google.protobuf import text_format

    # The schema by its path: the package around it would import gRPC.
    file = Path(client.submodule_search_locations[0], "grpc", "model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    spec.loader.exec_module(schema := importlib.util.module_from_spec(spec))
    folder, session = triton
    config = text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())
    assert config.backend == "onnxruntime" and config.HasField("dynamic_batching") and config.max_batch_size > 1
    types = {"tensor(float)": schema.TYPE_FP32, "tensor(int64)": schema.TYPE_INT64}
    for given, wanted in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [(v.name, v.data_type) for v in given] == [(v.name, types[v.type]) for v in wanted]
        for value, tensor in zip(given, wanted, strict=True):
            batch, *sides = tensor.shape
            assert isinstance(batch, str)  # free
            assert sides == list(value.reshape.shape if value.HasField("reshape") else value.dims)


@pytest.mark.slow
def test_a_compiled_package_gives_the_models_pictures(photographs, tmp_path):
    """In a process of its own, as a server would load it."""
    model = small_model()
    export(model, path := tmp_path / "purifier.pt2", 30, 40, format="aoti")
    torch.save(photographs.contiguous(), tmp_path / "photographs.pt")
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
