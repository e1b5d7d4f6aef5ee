"""The engine: the model's law in every precision, batch by batch, thread by thread, and never stale."""

import contextlib
import copy
import pickle
import re
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from impure_fast import Draws, Engine, Error, PurifiedClassifier, load
from impure_fast.engine import products
from impure_fast.engine.engine import _fold, _in_order, synthetic_pictures
from impure_fast.engine.graphs import Graphs
from impure_fast.errors import ConfigError, InputError
from impure_fast.ops._dispatch import backend, wished
from impure_fast.purify import even_batch, to_float

from .conftest import global_generator_untouched, random_images, small_model

ROOT = Path(__file__).parents[1]
PSNR = {"fp32": 110, "bf16": 45, "int8": 30}  # dB against the model, values in [0, 1]; a random network is the worst
PRECISIONS = list(PSNR)
MODES = {
    "released": {},
    "mask, mask": dict(image_mask="mask", feature_mask="mask"),
    "mask, noise": dict(image_mask="mask"),
    "noise, mask": dict(feature_mask="mask"),
    "fixed order": dict(random_order=False),
    "no convolution": dict(pixel_conv=False),
    "decoder of one block": dict(decoder_depth=1),
    "no side outputs": dict(out_indices=()),
    "side outputs in another order": dict(out_indices=(1, 0)),
    "three chunks": dict(num_chunks=3),
}


def psnr(a, b):
    return float(-10 * (a.double() - b.double()).square().mean().clamp(min=1e-30).log10())


@pytest.mark.parametrize("mode", MODES)
def test_folded_weights_are_the_same_network(mode):
    model = small_model(**MODES[mode])
    images = random_images(2, 3, 24, 24)
    want = model.purify(images, seed=3, clamp=False)
    assert (Engine(model, precision="fp32").purify(images, seed=3, clamp=False) - want).abs().max() <= 2e-6


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(3, 3, 24, 24), (2, 3, 40, 31), (3, 17, 23)], ids=str)
def test_engine_follows_the_model_at_any_size(precision, shape):
    model = small_model()
    images = random_images(*shape)
    got = Engine(model, precision=precision).purify(images, seed=1, image_step=300)
    want = model.purify(images, seed=1, image_step=300)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert psnr(got, want) >= PSNR[precision]


def test_without_onednn_torchs_products_answer(monkeypatch):
    model, images = small_model(), random_images(1, 3, 24, 24)
    monkeypatch.setattr("impure_fast.engine.engine.onednn_missing", lambda: "left out")
    engine = Engine(model, precision="fp32")
    assert psnr(engine.purify(images, seed=0), model.purify(images, seed=0)) >= PSNR["fp32"]
    with pytest.raises(ConfigError, match=r'precision="int8" needs oneDNN \(left out\); choose "fp32" or "bf16"'):
        Engine(model, precision="int8").purify(images)


@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_engine_follows_the_model(precision, compiler, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler, fullgraph=True))
    model = small_model(depth=1, decoder_depth=2, out_indices=(0,))
    engine = Engine(model, precision=precision, compile=True)
    for count in (2, 3):  # the second is compiled for any number
        images = random_images(count, 3, 24, 24)
        want = model.purify(images, seed=5, clamp=False)
        assert psnr(engine.purify(images, seed=5, clamp=False), want) > PSNR[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_picture_does_not_depend_on_its_neighbours(precision):
    engine = Engine(small_model(), precision=precision)
    images, streams = random_images(5, 3, 24, 24), [4, 9, 2, 7, 5]
    together = engine.purify(images, seed=8, streams=streams)
    alone = torch.stack([engine.purify(x, seed=8, streams=[s]) for x, s in zip(images, streams, strict=True)])
    split = Engine(engine.model, precision=precision, batch_sizes=(1, 2)).purify(images, seed=8, streams=streams)
    limit = {"fp32": 110, "bf16": 50, "int8": 50}[precision]
    assert psnr(together, alone) >= limit and psnr(together, split) >= limit


def test_uint8_and_given_draws_are_taken():
    model = small_model()
    engine = Engine(model, precision="fp32")
    bytes_ = random_images(2, 3, 24, 24, dtype=torch.uint8)
    difference = engine.purify(bytes_, seed=2).int() - model.purify(bytes_, seed=2).int()
    assert engine.purify(bytes_).dtype == torch.uint8 and difference.abs().max() <= 1
    draws = Draws.sample(model.config, (2, 3, 24, 24), 5)
    images = random_images(2, 3, 24, 24)
    assert psnr(engine.purify(images, draws=draws), model.purify(images, draws=draws)) >= PSNR["fp32"]
    assert engine.purify(images[:0]).shape == (0, 3, 24, 24)


def test_eight_bits_of_the_shipped_weights_differ_no_more_than_between_batch_sizes():
    """Beyond 1e-5 nothing is promised of floats: in 8 bits a value on the edge may fall on either side."""
    model = load("impure_tiny")
    bytes_ = random_images(3, 3, 96, 96, dtype=torch.uint8)
    want = model.purify(bytes_, seed=5)
    for other in (model.purify(bytes_, seed=5, max_batch=1), Engine(model, precision="fp32").purify(bytes_, seed=5)):
        apart = (other.int() - want.int()).abs()
        assert apart.max() <= 1 and apart.float().mean() < 2e-4


def test_no_seed_is_fresh_and_the_global_generator_is_left_alone():
    engine = Engine(small_model(), precision="int8")
    images = random_images(1, 3, 24, 24)
    with global_generator_untouched():
        assert not torch.equal(engine.purify(images), engine.purify(images))
        assert torch.equal(engine.purify(images, seed=1), engine.purify(images, seed=1))


def test_a_changed_model_is_folded_anew():
    model, images = small_model(), random_images(1, 3, 24, 24)
    engine = Engine(model, precision="fp32")
    before = engine.purify(images, seed=0)
    with torch.no_grad():
        model.decoder_pred.bias.add_(0.5)
    after = engine.purify(images, seed=0)
    assert psnr(after, model.purify(images, seed=0)) >= PSNR["fp32"] > psnr(after, before)
    model.load_state_dict(small_model(seed=1).state_dict())
    assert psnr(engine.purify(images, seed=0), model.purify(images, seed=0)) >= PSNR["fp32"]
    model.decoder_pred.bias.data.add_(0.5)  # leaves no trace
    engine.refresh()
    assert psnr(engine.purify(images, seed=0), model.purify(images, seed=0)) >= PSNR["fp32"]


def test_weights_whose_changes_cannot_be_seen_are_refused():
    with torch.inference_mode():
        unseen = small_model()
        assert not any(p.is_inference() for p in load("impure_tiny").parameters())
    with pytest.raises(ConfigError, match=r"made under torch.inference_mode, where no change of it can be seen"):
        Engine(unseen).purify(random_images(1, 3, 24, 24))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_callers_autocast_changes_nothing(precision):
    engine, images = Engine(small_model(), precision=precision), random_images(1, 3, 24, 24)
    want = engine.purify(images, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(engine.purify(images, seed=0), want)


def test_bf16_does_not_darken_bright_pictures():
    model, images = load("impure_tiny"), 0.6 + 0.3 * random_images(4, 3, 64, 64)
    want = model.purify(images, seed=0)
    assert (Engine(model, precision="bf16").purify(images, seed=0) - want).mean().abs() < 0.1 / 255


def test_a_gradient_is_refused_and_the_model_left_as_it_is():
    model = small_model()
    engine = Engine(model)
    images = random_images(1, 3, 24, 24).requires_grad_()
    with pytest.raises(Error, match=r"An Engine gives no gradients; model.purify does"):
        engine.purify(images)
    with torch.no_grad():
        assert not engine.purify(images).requires_grad
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_an_engine_stands_in_front_of_a_classifier():
    model, images = small_model(), random_images(2, 3, 24, 24)
    classifier = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 5), torch.nn.Flatten(), torch.nn.LazyLinear(5))
    options = dict(mean=(0.5,) * 3, std=(0.5,) * 3, mode="deterministic")
    want = PurifiedClassifier(classifier, model, **options)(images)
    got = PurifiedClassifier(classifier, Engine(model, precision="fp32"), **options)(images)
    assert (got - want).abs().max() <= 1e-4
    got.sum().backward()  # to the classifier's weights
    assert classifier[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize("again", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))], ids=["deepcopy", "pickle"])
def test_copies_answer_alike(again):
    engine = Engine(small_model(), precision="int8", batch_sizes=(2,))
    images = random_images(3, 3, 24, 24)
    want = engine.purify(images, seed=0)
    other = again(engine)
    assert other.stats()["count"] == 0
    assert torch.equal(other.purify(images, seed=0), want)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_threads_and_devices_give_the_results_of_one(precision):
    model, images = small_model(), random_images(6, 3, 24, 24)
    engine = Engine(model, precision=precision)
    want = [engine.purify(images, seed=seed) for seed in range(4)]
    got = {}

    def work(own, seeds):
        for seed in seeds:
            got[seed] = own.purify(images, seed=seed)

    jobs = [(engine, (0,)), (engine, (1,)), (Engine(model, precision=precision), (2, 3))]
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[seed], want[seed]) for seed in range(4))
    several = Engine(model, precision=precision, device=["cpu", "cpu"])
    assert psnr(several.purify(images, seed=0), want[0]) >= 50


def test_a_stream_keeps_order_and_numbers_its_pictures():
    model = small_model()
    engine = Engine(model, precision="fp32")
    shapes = [(24, 24), (24, 24), (24, 24), (17, 23), (24, 24)]
    pictures = [random_images(3, *shape, seed=i) for i, shape in enumerate(shapes)]
    taken = []
    results = engine.stream((taken.append(i) or x for i, x in enumerate(pictures)), seed=4, batch=2)
    first = next(results)
    assert taken == [0, 1], "a batch that is full may not wait for the picture after it"
    for i, (got, picture) in enumerate(zip([first, *results], pictures, strict=True)):
        assert psnr(got, model.purify(picture, seed=4, streams=[i])) >= PSNR["fp32"]
    assert list(engine.stream([])) == []
    with pytest.raises(InputError, match=r"batch=0: must be at least 1 picture"):
        next(engine.stream(pictures, batch=0))


def test_stats_count_calls_and_warmup_forgets_its_own():
    engine = Engine(small_model())
    assert engine.stats()["count"] == engine.stats()["p99_ms"] == engine.stats()["images_per_second"] == 0
    engine.warmup()
    assert engine.stats()["images"] == 0
    engine.purify(random_images(3, 3, 24, 24))
    engine.purify(random_images(3, 24, 24))
    stats = engine.stats()
    assert (stats["count"], stats["images"]) == (2, 4)
    assert 0 < stats["p50_ms"] <= stats["p90_ms"] <= stats["p99_ms"] and stats["images_per_second"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(precision="fp8"), "precision='fp8': on cpu choose one of fp32, bf16, int8."),
        (dict(device="gpu"), "device='gpu' is none that torch knows; cpu always works."),
        (dict(device="meta"), "device='meta': wanted one or more devices of one kind, cpu or cuda."),
        (dict(device=["cpu", "cuda"]), "device=['cpu', 'cuda']: wanted one or more devices of one kind, cpu or cuda."),
        (dict(precision="int8", compile=True), "compile=True: int8 runs on oneDNN alone"),
        (dict(batch_sizes=(0, 4)), "batch_sizes=(0, 4): wanted tile counts of at least 1, or None."),
        (dict(batch_sizes=8), "batch_sizes=8: wanted tile counts of at least 1, or None."),
        (dict(calibration=torch.zeros(0, 3, 24, 24)), "calibration holds no pictures"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Engine(small_model(), **options)
    with pytest.raises(ConfigError, match="model is a Linear; Engine wants an IMPure"):
        Engine(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 260])
def test_products_agree_with_the_plain_ones(dtype, rows):
    generator = torch.Generator().manual_seed(0)
    x, w, b, r = (torch.randn(shape, generator=generator) for shape in ((rows, 48), (32, 48), (32,), (rows, 32)))
    fast, plain = products.OneDnn(w.to(dtype), b.to(dtype)), products.Plain(w.double(), b.double())
    observed = products.Observed(w, b)
    observed(x)
    whole = products.OneDnnInt8(observed, dtype)
    for options in ({}, {"gelu": True}, {"residual": r}):
        want = plain(x.double(), **{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()})
        given = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        scale = float(want.abs().max())
        assert (fast(x.to(dtype), **given).double() - want).abs().max() <= 4 * torch.finfo(dtype).eps * scale
        strided = {k: v.t().contiguous().t() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        assert torch.equal(fast(x.to(dtype), **strided), fast(x.to(dtype), **given))
        got = whole(x.to(dtype).t().contiguous().t(), **strided)
        assert got.dtype == dtype and (got.double() - want).abs().max() <= 0.03 * scale


def test_int8_saturates_beyond_what_calibration_saw():
    observed = products.Observed(torch.eye(4), torch.zeros(4))
    observed(torch.tensor([[-1.0, 0.0, 0.5, 1.0]]))
    got = products.OneDnnInt8(observed, torch.float32)(torch.tensor([[-9.0, 0.0, 0.5, 9.0]]))
    assert torch.allclose(got, torch.tensor([[-1.0, 0.0, 0.5, 1.0]]), atol=2 / 255)


def test_given_pictures_set_the_scales_of_int8():
    model, images = small_model(), random_images(2, 3, 24, 24)
    near = Engine(model, precision="int8", calibration=images).purify(images, seed=0)
    grey = Engine(model, precision="int8", calibration=torch.full((1, 3, 24, 24), 0.5)).purify(images, seed=0)
    want = model.purify(images, seed=0)
    assert psnr(near, want) > psnr(grey, want)
    assert synthetic_pictures(3, 24).aminmax() == (0, 1)


def test_fp8_products_and_their_network_agree_with_the_plain_ones():
    generator = torch.Generator().manual_seed(0)
    x, w, b, r = (torch.randn(shape, generator=generator) for shape in ((2, 5, 48), (32, 48), (32,), (2, 5, 32)))
    observed = products.Observed(w, b)
    observed(x)
    fast = products.Fp8(observed)
    for options in ({}, {"gelu": True}, {"residual": r}):
        want = observed(x, **{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in options.items()})
        got = fast(x, **{k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in options.items()})
        assert got.dtype == torch.bfloat16 and (got - want).square().mean() <= 0.05**2 * want.square().mean()
    observed = products.Observed(torch.eye(16), torch.zeros(16))
    observed(torch.tensor([-1.0, 0.5] * 8))
    far = torch.tensor([[-9.0, 0.5] * 8])
    assert torch.equal(products.Fp8(observed)(far).float(), far.clamp(min=-1))  # beyond what calibration saw

    model = small_model(embed_dim=32, num_heads=2, decoder_embed_dim=16, decoder_num_heads=2)
    images = random_images(2, 3, 24, 24)
    network = _fold(model, torch.device("cpu"), "fp8", None)
    assert any(isinstance(block.fc1, products.Fp8) for block in network.blocks)
    draws = Draws.sample(model.config, images.shape, 0)
    with torch.inference_mode():
        assert psnr(network(images, draws), model(images, draws)) > 25


class Replayed:
    """In place of ``graphs.Cuda``: a replay that reads the given tensors again, and what a capture would refuse."""

    class Host(TorchDispatchMode):
        """A captured function may neither make tensors of Python's numbers nor read any."""

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            statistics = name == "lift_fresh" and args[0].shape == (3,)  # which a GPU's kernels take as numbers
            assert statistics or name not in ("lift_fresh", "_local_scalar_dense", "nonzero"), f"{name} needs the host"
            return function(*args, **(kwargs or {}))

    def __init__(self):
        self.recorded = 0

    def aside(self):
        return contextlib.nullcontext()

    def record(self, function):
        self.recorded += 1
        with self.Host(), backend("auto"):
            result = function()
        return lambda: result.copy_(function()), result


def test_graphs_are_kept_by_size_strength_and_backend_the_latest_used_first(monkeypatch):
    monkeypatch.setattr("impure_fast.engine.graphs.LIMIT", 2)
    engine = Engine(small_model(), precision="fp32")
    ((network, _),) = engine._ready()
    with torch.inference_mode():
        graphs = Graphs(network, None, Replayed())
    engine._networks = [(network, graphs)]
    for count in (5, 6, 1, 5):  # 5 is padded to 6, which one alone of them does not push out
        engine.purify(random_images(count, 3, 24, 24), seed=0)
    assert [key[0] for key in graphs.captured] == [1, 6] and graphs.cuda.recorded == 2
    with backend("reference"):
        engine.purify(random_images(6, 3, 24, 24), seed=0)
    assert [key[0] for key in graphs.captured] == [6, 6] and graphs.cuda.recorded == 3


def test_batches_of_graphs_leave_little_room():
    assert [even_batch(n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 38, 234)] == [1, 2, 3, 4, 4, 6, 6, 8, 32, 192]


@pytest.mark.parametrize("mode", MODES)
def test_graphs_are_captured_once_and_draw_afresh(mode):
    model = small_model(**MODES[mode])
    engine = Engine(model, precision="fp32", batch_sizes=(1, 4))
    ((network, _),) = engine._ready()
    with torch.inference_mode():
        graphs = Graphs(network, engine.batch_sizes, Replayed())
    engine._networks = [(network, graphs)]
    plain = Engine(model, precision="fp32")
    images = random_images(7, 3, 24, 24)
    for seed in (0, 2**64 - 1):  # 4 + 3 tiles: two network calls, the second padded
        want = plain.purify(images, seed=seed, streams=range(10, 17))
        assert (engine.purify(images, seed=seed, streams=range(10, 17)) - want).abs().max() <= 2e-6
    assert torch.equal(engine.purify(images[0], seed=5), engine.purify(images[:1], seed=5)[0])
    assert graphs.cuda.recorded == 2 and engine.stats()["graph_hits"] == 6
    engine.purify(images, seed=0, image_step=300)
    assert graphs.cuda.recorded == 3  # another strength, another graph
    engine.purify(images, draws=Draws.sample(model.config, images.shape, 0))
    assert engine.stats()["graph_hits"] == 8  # given draws go without


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
def test_graphs_and_precisions_of_a_gpu_follow_the_model(precision):
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    model, images = small_model(), random_images(7, 3, 24, 24)
    engine = Engine(model, precision=precision, device="cuda", batch_sizes=(1, 4))
    engine.warmup()
    for seed in (0, 2**64 - 1):
        got, want = engine.purify(images, seed=seed), model.purify(images, seed=seed)
        assert psnr(got, want) > {"fp32": 90, "fp8": 25}.get(precision, 45)
    assert engine.stats()["graph_hits"] == 7  # three of them in warm-up
    streamed = list(engine.stream(iter(images), seed=1, batch=2))
    assert psnr(torch.stack(streamed), engine.purify(images, seed=1)) > (90 if precision == "fp32" else 45)


def test_what_cannot_be_captured_runs_without_a_graph_and_says_so(caplog):
    class Refused(Replayed):
        def record(self, function):
            raise RuntimeError("operation not permitted when stream is capturing")

    engine = Engine(small_model(), precision="fp32")
    ((network, _),) = engine._ready()
    engine._networks = [(network, Graphs(network, None, Refused()))]
    images = random_images(2, 3, 24, 24)
    got = [engine.purify(images, seed=0) for _ in range(2)]
    assert torch.equal(got[0], Engine(small_model(), precision="fp32").purify(images, seed=0))
    assert engine.stats()["graph_hits"] == 0
    assert caplog.text.count("No CUDA graph for 2 tiles of 24x24: operation not permitted") == 1


def test_calls_at_once_keep_their_order_and_their_backend():
    def call(i):
        time.sleep(0.02 * (i % 2 == 0))
        return torch.tensor([i]), wished()

    with backend("reference"):
        found = list(_in_order((partial(call, i) for i in range(5)), 2))
    assert [(int(i), name) for i, name in found] == [(i, "reference") for i in range(5)]


@pytest.mark.slow
def test_memory_of_a_long_stream_stays_flat():
    code = """
import resource
from tests.conftest import random_images, small_model
from impure_fast import Engine
engine = Engine(small_model(), precision="bf16")
image = random_images(3, 24, 24)
for i, _ in enumerate(engine.stream((image.clone() for _ in range(10_000)), batch=4)):
    if i in (1_000, 9_999):
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    early, late = map(int, ran.stdout.split())
    assert late - early <= 8 * 1024, "the peak of 10,000 pictures lies 8 MiB at most above that of 1,000"


def test_precision_costs_little_on_photographs():
    """The shipped weights; what it does to decisions is measured by `python -m benchmarks.precision`."""
    skimage = pytest.importorskip("skimage", reason="its photographs come with the extra demo")
    photograph = np.asarray(Image.open(Path(skimage.__file__).parent / "data" / "chelsea.png").convert("RGB"))
    images, model = to_float(photograph[None, 60:156, 100:196]), load("impure_tiny")
    want = model.purify(images, seed=0)
    for precision, least in (("bf16", 50), ("int8", 45)):
        assert psnr(Engine(model, precision=precision).purify(images, seed=0), want) >= least
