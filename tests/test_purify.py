"""model.purify and PurifiedClassifier: any size, any dtype, and the same result in any batch."""

import copy
import dataclasses
import json
import pickle
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from impure_fast import Draws, Engine, Error, PurifiedClassifier
from impure_fast.config import PRESETS
from impure_fast.errors import ConfigError, InputError, InputTypeError
from impure_fast.purify import Tiling, over_tiles, purify_images

from .conftest import SMALL, global_generator_untouched, random_images, small_config, small_model

TENSORS = ("positions", "order", "image_step", "feature_step", "image_noise", "feature_noise")


class Stand:
    """A stand-in for the network: applies ``function`` to each tile, and keeps what it was given."""

    def __init__(self, function=lambda tiles: tiles):
        self.function, self.tiles, self.draws = function, [], []

    def __call__(self, images, draws):
        self.tiles.append(images.detach())
        self.draws.append(draws)
        return self.function(images)

    def purify(self, images, config=SMALL, **options):
        given = dict(seed=0, streams=None, draws=None, clamp=True, max_batch=None, check=True)
        return purify_images(self, config, torch.float32, images, **{**given, **options})


def all_draws(stand):
    """What a stand-in was given over all its calls: {name: tensor}."""
    return {name: torch.cat([getattr(draws, name) for draws in stand.draws]) for name in TENSORS}


def close(a, b, tolerance=1e-5):
    return a.shape == b.shape and a.dtype == b.dtype and float((a.double() - b.double()).abs().max()) <= tolerance


# ---------------------------------------------------------------------------------------- size and tiles


@pytest.mark.parametrize("config", [PRESETS["impure_tiny"], SMALL], ids=["tiny", "small"])
@pytest.mark.parametrize(
    ("height", "width"), [(64, 64), (17, 23), (1, 1), (5, 200), (200, 3), (300, 190), (1080, 1920)], ids=str
)
def test_identity_in_the_networks_place_gives_the_picture_back(config, height, width):
    config = dataclasses.replace(config, image_mask="mask", feature_mask="mask")  # no noise to draw
    images = random_images(1, 3, height, width)
    stand = Stand()
    assert close(stand.purify(images, config), images, 1e-6)
    sides = {tuple(tiles.shape[2:]) for tiles in stand.tiles}
    assert len(sides) == 1 and max(next(iter(sides))) <= config.tile_size


@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_fixed_order_tiles_hold_equal_classes_at_any_size(chunks):
    config = small_config(num_chunks=chunks, random_order=False)
    for height, width in ((1, 1), (17, 23), (24, 5), (60, 25)):
        images = random_images(1, 3, height, width)
        assert close(Stand().purify(images, config), images, 1e-6)


def test_picture_no_larger_than_a_tile_goes_through_whole_with_the_least_padding():
    stand = Stand()
    stand.purify(random_images(2, 3, 17, 9))  # 5x3 patches; K=4 wants 5x4
    assert [tuple(tiles.shape) for tiles in stand.tiles] == [(2, 3, 20, 16)]


def test_padding_reflects_and_replicates_where_the_picture_is_too_small():
    stand = Stand()
    images = random_images(1, 3, 17, 2)
    stand.purify(images)
    (tile,) = stand.tiles
    assert torch.equal(tile[:, :, :17, :2], images)
    assert tile.shape == (1, 3, 24, 8)  # 5x1 patches become 6x2: K=4
    assert torch.equal(tile[:, :, 17:, :2], images[:, :, [15, 14, 13, 12, 11, 10, 9]])
    assert torch.equal(tile[:, :, :17, 2:], images[:, :, :, 1:].expand(-1, -1, -1, 6))


@pytest.mark.parametrize(("band_tiles", "calls"), [(100, [12]), (6, [6, 6]), (1, [6, 6])])
def test_tiles_overlap_by_the_stride_and_cover_the_picture(band_tiles, calls):
    seen = []

    def keep(tiles, image, place):
        seen.append(len(tiles))
        for tile, n, t in zip(tiles, image.tolist(), place.tolist(), strict=True):
            top, left = 16 * (t // 3), 16 * (t % 3)
            assert torch.equal(tile, images[n, :, top : top + 24, left : left + 24])
        return tiles

    images = random_images(2, 3, 40, 56)  # strides of 16: 2x3 tiles of 24
    result = over_tiles(images, Tiling.of(SMALL, 40, 56), keep, band_tiles)
    assert seen == calls
    torch.testing.assert_close(result, images, atol=1e-6, rtol=0)


def test_bands_change_nothing(monkeypatch):
    model = small_model()
    images = random_images(2, 3, 50, 60).requires_grad_()
    whole = model.purify(images, seed=0)
    (gradient,) = torch.autograd.grad(whole.sum(), images)
    monkeypatch.setattr("impure_fast.purify.BAND_TILES", 1)
    banded = model.purify(images, seed=0)
    torch.testing.assert_close(banded, whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(banded.sum(), images)[0], gradient, atol=1e-4, rtol=1e-4)


def test_seams_vanish_where_tiles_disagree():
    shades = iter(torch.linspace(0, 1, 6).tolist())  # every tile another constant
    stand = Stand(lambda tiles: torch.stack([torch.full_like(tile, next(shades)) for tile in tiles]))
    result = stand.purify(torch.zeros(1, 3, 40, 56), max_batch=1)
    assert float(result.min()) == 0 and float(result.max()) == 1
    steps = torch.cat((result.diff(dim=2).abs().flatten(), result.diff(dim=3).abs().flatten()))
    assert 0 < float(steps.max()) <= 0.6 / 8 + 1e-6  # largest difference of neighbours over the overlap of 8 pixels


def test_each_tile_has_its_own_stream():
    stand = Stand()
    stand.purify(random_images(2, 3, 40, 24), streams=[7, 9])  # two tiles an image
    wanted = Draws.sample(SMALL, (4, 3, 24, 24), 0, streams=[7, 7 + 2**32, 9, 9 + 2**32])
    given = all_draws(stand)
    assert [name for name in TENSORS if not torch.equal(given[name], getattr(wanted, name))] == []


# ---------------------------------------------------------------------------------------- batches, seeds, streams


@pytest.mark.parametrize("side", [(24, 24), (20, 40)], ids=["one tile", "tiles"])
def test_image_gets_the_same_draws_alone_in_a_batch_and_in_small_calls(side):
    images = random_images(64, 3, *side)
    runs = {"batch": {}, "calls of three": {"max_batch": 3}}
    stands = {name: Stand() for name in (*runs, "alone")}
    for name, options in runs.items():
        stands[name].purify(images, streams=range(100, 164), seed=3, **options)
    stands["alone"].purify(images[17:18], streams=[117], seed=3)
    batch, calls, alone = (all_draws(stands[name]) for name in (*runs, "alone"))
    per_image = len(batch["order"]) // 64
    assert max(len(tiles) for tiles in stands["calls of three"].tiles) == 3
    for name in TENSORS:
        assert torch.equal(batch[name], calls[name]), name
        assert torch.equal(batch[name][17 * per_image : 18 * per_image], alone[name]), name


@pytest.mark.parametrize("side", [(24, 24), (20, 40)], ids=["one tile", "tiles"])
def test_image_gets_the_same_result_alone_in_a_batch_and_in_small_calls(side):
    model = small_model()
    images = random_images(64, 3, *side)
    streams = list(range(100, 164))
    batch = model.purify(images, seed=3, streams=streams)
    assert close(model.purify(images, seed=3, streams=streams, max_batch=3), batch)
    for n in (0, 17, 63):
        assert close(model.purify(images[n : n + 1], seed=3, streams=[streams[n]]), batch[n : n + 1])
        assert close(model.purify(images[n], seed=3, streams=[streams[n]]), batch[n])
    assert not close(model.purify(images[17:18], seed=3, streams=[0]), batch[17:18], 1e-3)


def test_seed_repeats_and_none_does_not():
    model = small_model()
    images = random_images(2, 3, 24, 24)
    assert torch.equal(model.purify(images, seed=5), model.purify(images, seed=5))
    assert not close(model.purify(images, seed=5), model.purify(images, seed=6), 1e-3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = model.purify(images)
        torch.manual_seed(0)
        assert not close(first, model.purify(images), 1e-3)


def test_global_generator_is_left_alone():
    with global_generator_untouched():
        small_model().purify(random_images(2, 3, 30, 24))


def test_streams_are_counted_from_zero_and_belong_to_images_not_places():
    model = small_model()
    images = random_images(1, 3, 24, 24).expand(3, -1, -1, -1)
    default = model.purify(images, seed=1)
    assert close(default, model.purify(images, seed=1, streams=[0, 1, 2]), 0)
    assert close(default[[2, 0, 1]], model.purify(images, seed=1, streams=torch.tensor([2, 0, 1])))
    same = model.purify(images, seed=1, streams=[8, 8, 9])
    assert close(same[0], same[1]) and not close(same[0], same[2], 1e-3)


def test_given_draws_take_the_place_of_seed_and_streams():
    model = small_model()
    images = random_images(2, 3, 21, 24)
    draws = Draws.sample(SMALL, (2, 3, 24, 24), 4, streams=[1, 2])
    wanted = model.purify(images, seed=4, streams=[1, 2])
    assert close(model.purify(images, draws=draws), wanted, 0)
    assert close(model.purify(images, draws=draws, seed=99, max_batch=1), wanted)
    with pytest.raises(InputError, match=r"\(2, 3, 24, 24\).*\(3, 3, 24, 24\)"):
        model.purify(random_images(3, 3, 24, 24), draws=draws)
    for purify in (model.purify, Engine(model).purify):
        with pytest.raises(InputError, match="image_step=7, feature_step=None: the draws given hold their own steps"):
            purify(images, draws=draws, image_step=7)


def test_blended_pictures_are_divided_where_they_lie(monkeypatch):
    made, zeros_like = [], torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda x: made.append(zeros_like(x)) or made[-1])
    images = random_images(1, 3, 40, 40)
    blended = over_tiles(images, Tiling.of(SMALL, 40, 40), lambda tiles, image, place: tiles, None)
    assert close(blended, images) and blended.untyped_storage().data_ptr() == made[0].untyped_storage().data_ptr()


def test_max_batch_by_default_bounds_the_tiles_of_a_call(monkeypatch):
    stand = Stand()
    monkeypatch.setattr("impure_fast.purify.TILE_MEMORY", 2**20)
    stand.purify(random_images(40, 3, 24, 24))
    assert len(stand.tiles) > 1 and sum(len(tiles) for tiles in stand.tiles) == 40


# ---------------------------------------------------------------------------------------- dtypes and layouts


def test_bytes_are_divided_by_255_exactly_and_every_byte_comes_back():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    stand = Stand()
    result = stand.purify(images)
    assert torch.equal(result, images) and result.dtype == torch.uint8
    assert torch.equal(stand.tiles[0], images.float() / 255)


def test_bytes_are_rounded_half_to_even():
    halves = [k + 0.5 for k in range(255) if float(torch.tensor((k + 0.5) / 255) * 255) == k + 0.5]
    assert {int(h) % 2 for h in halves} == {0, 1}  # fp32 keeps some exact halves of both kinds
    for half in halves[:20]:
        result = Stand(lambda tiles, v=half: torch.full_like(tiles, v / 255)).purify(torch.zeros(1, 3, 8, 8).byte())
        assert result.unique().tolist() == [round(half)]  # Python rounds half to even


def test_bytes_and_floats_agree():
    model = small_model()
    images = random_images(2, 3, 30, 24, dtype=torch.uint8)
    floats = model.purify(images.float() / 255, seed=0)
    assert torch.equal(model.purify(images, seed=0), (floats * 255).round().byte())


def test_values_beyond_the_range_are_cut_unless_asked_not_to():
    images = random_images(1, 3, 8, 8)
    stand = Stand(lambda tiles: 3 * tiles - 1)
    assert close(stand.purify(images), (3 * images - 1).clamp(0, 1), 0)
    assert close(stand.purify(images, clamp=False), 3 * images - 1, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 20, 24), (3, 20, 24), (2, 3, 20, 40)], ids=str)
def test_dtype_and_shape_come_back(dtype, shape):
    model = small_model()
    images = random_images(*shape, dtype=dtype)
    result = model.purify(images, seed=0)
    assert (result.dtype, result.shape) == (images.dtype, images.shape)
    if dtype.is_floating_point:
        assert close(result, model.purify(images.float(), seed=0).to(dtype), 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_network_of_another_dtype_purifies_too(dtype):
    images = random_images(2, 3, 30, 40)
    result = small_model().to(dtype).purify(images, seed=0)
    tolerance = 1e-5 if dtype == torch.float64 else 0.1
    assert close(result, small_model().purify(images, seed=0), tolerance)


def read_only(images):
    array = images.numpy().copy()
    array.setflags(write=False)
    return torch.from_numpy(array)


LAYOUTS = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
    "read-only": read_only,
}


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_the_images_does_not_matter_and_they_are_not_changed(layout):
    model = small_model()
    images = LAYOUTS[layout](random_images(2, 3, 20, 24))
    before = images.clone().contiguous()
    wanted = model.purify(before, seed=0)
    assert close(model.purify(images, seed=0), wanted, 1e-6)
    assert torch.equal(images, before)


@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (1, 1)])
def test_pictures_narrower_than_a_patch_go_through(shape):
    images = random_images(2, 3, *shape)
    assert small_model().purify(images, seed=0).shape == images.shape


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_empty_batch_comes_back_empty(dtype):
    images = torch.zeros(0, 3, 20, 24, dtype=dtype)
    result = small_model().purify(images)
    assert (result.shape, result.dtype) == (images.shape, dtype)


def test_training_mode_changes_nothing():
    model = small_model()
    images = random_images(2, 3, 30, 24)
    wanted = model.eval().purify(images, seed=0)
    assert torch.equal(model.train().purify(images, seed=0), wanted)
    assert model.training  # and the mode is left as it was


# ---------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("shape", [(2, 3, 24, 24), (3, 20, 24), (1, 3, 40, 30)], ids=str)
def test_gradient_reaches_every_pixel_of_the_image(shape):
    model = small_model()
    images = random_images(*shape).requires_grad_()
    result = model.purify(images, seed=0, clamp=False)
    (gradient,) = torch.autograd.grad(result.square().sum(), images)
    assert gradient.shape == images.shape and int((gradient == 0).sum()) == 0


def test_gradient_agrees_with_central_differences_through_tiles():
    model = small_model().double()
    images = random_images(1, 3, 30, 24, dtype=torch.float64).requires_grad_()

    def loss(x):
        return model.purify(x, seed=0, clamp=False, check=False).square().sum()

    (gradient,) = torch.autograd.grad(loss(images), images)
    direction = random_images(1, 3, 30, 24, seed=3, dtype=torch.float64) - 0.5
    with torch.no_grad():
        slope = float(loss(images + 1e-4 * direction) - loss(images - 1e-4 * direction)) / 2e-4
    assert abs(slope - float((gradient * direction).sum())) < 1e-6 * abs(slope)


def test_no_graph_is_kept_unless_the_image_needs_one():
    model = small_model()
    assert all(p.requires_grad for p in model.parameters())
    images = random_images(1, 3, 24, 24)
    assert not model.purify(images).requires_grad
    with torch.no_grad():
        assert not model.purify(images.clone().requires_grad_()).requires_grad
    assert model.purify(images.clone().requires_grad_()).requires_grad
    with torch.inference_mode():
        assert model.purify(images).shape == images.shape


# ---------------------------------------------------------------------------------------- strength


@pytest.mark.parametrize("name", ["image_step", "feature_step"])
def test_step_of_one_call_takes_the_place_of_the_config(name):
    model = small_model()
    images = random_images(2, 3, 30, 24)
    wanted = model.purify(images, seed=0)
    assert torch.equal(model.purify(images, seed=0, **{name: getattr(SMALL, name)}), wanted)
    changed = model.purify(images, seed=0, **{name: 0})
    assert not close(changed, wanted, 1e-3)
    other = small_model(**{name: 0})
    assert torch.equal(other.purify(images, seed=0), changed)
    assert torch.equal(model.purify(images, seed=0), wanted)  # the model keeps its own


@pytest.mark.parametrize("value", [1000, -1, 1.5, "400"], ids=repr)
@pytest.mark.parametrize("name", ["image_step", "feature_step"])
def test_impossible_step_is_refused_by_name_and_value(name, value):
    with pytest.raises(ConfigError, match=re.escape(f"{name}={value!r}: must be")):
        small_model().purify(random_images(1, 3, 24, 24), **{name: value})


# ---------------------------------------------------------------------------------------- bad input

GOOD = random_images(2, 3, 24, 24)


def with_one_pixel(value):
    images = GOOD.clone()
    images[1, 2, 3, 4] = value
    return images


BAD = {  # images, options, error, words of its message
    "no tensor": ([[0.5]], {}, InputTypeError, ["list", "torch.Tensor"]),
    "numpy array": (GOOD.numpy(), {}, InputTypeError, ["ndarray", "torch.from_numpy"]),
    "two axes": (GOOD[0, 0], {}, InputError, ["(24, 24)", "[3, H, W]"]),
    "five axes": (GOOD[None], {}, InputError, ["(1, 2, 3, 24, 24)", "[N, 3, H, W]"]),
    "grey": (GOOD[:, :1], {}, InputError, ["(2, 1, 24, 24)"]),
    "alpha": (random_images(4, 24, 24), {}, InputError, ["(4, 24, 24)"]),
    "channels behind": (random_images(24, 24, 3), {}, InputError, ["(24, 24, 3)"]),
    "no height": (GOOD[:, :, :0], {}, InputError, ["(2, 3, 0, 24)", "height and width"]),
    "no width": (GOOD[0, :, :, :0], {}, InputError, ["(3, 24, 0)"]),
    "int64": (GOOD.long(), {}, InputTypeError, ["torch.int64", "torch.uint8"]),
    "int8": (GOOD.to(torch.int8), {}, InputTypeError, ["torch.int8"]),
    "bool": (GOOD > 0.5, {}, InputTypeError, ["torch.bool"]),
    "complex": (GOOD.to(torch.complex64), {}, InputTypeError, ["torch.complex64"]),
    "0 to 255 as float": (GOOD * 255, {}, InputError, ["[0, 1]", "255 as float", "check=False"]),
    "normalised": ((GOOD - 0.5) / 0.25, {}, InputError, ["from -1.9", "Normalised twice"]),
    "slightly above": (GOOD.clone().fill_(1.002), {}, InputError, ["1.002"]),
    "slightly below": (GOOD.clone().fill_(-0.002), {}, InputError, ["-0.002"]),
    "NaN": (with_one_pixel(float("nan")), {}, InputError, ["nan"]),
    "infinite": (with_one_pixel(float("inf")), {}, InputError, ["inf"]),
    "unclamped bytes": (GOOD.byte(), {"clamp": False}, InputError, ["clamp=False", "uint8"]),
    "no tile a call": (GOOD, {"max_batch": 0}, InputError, ["max_batch=0"]),
    "too few streams": (GOOD, {"streams": [1]}, InputError, ["streams has shape (1,)", "2 images"]),
    "streams of two axes": (GOOD, {"streams": [[1, 2]]}, InputError, ["streams has shape (1, 2)", "2 images"]),
    "broken streams": (GOOD, {"streams": [0.5, 1.0]}, InputTypeError, ["streams holds torch.float32", "integers"]),
    "seed of letters": (GOOD, {"seed": "a"}, InputTypeError, ["seed is 'a'; wanted an integer or None"]),
    "negative stream": (GOOD, {"streams": [0, -1]}, InputError, ["[0, 2**32)", "-1"]),
    "stream too large": (GOOD, {"streams": [0, 2**32]}, InputError, ["[0, 2**32)", "4294967296"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_a_sentence(case):
    images, options, error, words = BAD[case]
    with pytest.raises(error) as caught:
        small_model().purify(images, **options)
    assert isinstance(caught.value, Error)
    assert [word for word in words if word not in str(caught.value)] == []


def test_values_a_rounding_error_outside_are_taken():
    small_model().purify(torch.full((1, 3, 24, 24), 1.0009))
    small_model().purify(torch.full((1, 3, 24, 24), -0.0009))


def test_range_check_can_be_switched_off():
    assert small_model().purify(random_images(1, 3, 24, 24) * 2, check=False).shape == (1, 3, 24, 24)


# ---------------------------------------------------------------------------------------- PurifiedClassifier

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def small_classifier():
    """Any network from normalised images to five logits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layers = nn.Conv2d(3, 8, 3, 2, 1), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)
        return nn.Sequential(*layers).eval()


def purified_classifier(**options):
    given = {"mean": MEAN, "std": STD, **options}
    return PurifiedClassifier(small_classifier(), small_model(), **given).eval()


def by_hand(images, streams, seed=0, size=None):
    """The same pipeline from its public parts."""
    purified = small_model().purify(images, seed=seed, streams=streams)
    if size is not None:
        purified = F.interpolate(purified, size, mode="bilinear", antialias=True)
    normed = (purified - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return small_classifier()(normed)


@pytest.mark.parametrize("clamp", [True, "straight-through"])
@pytest.mark.parametrize(("size", "sides"), [(None, None), (32, (32, 32)), ((16, 40), (16, 40))], ids=str)
def test_logits_are_those_of_the_pipeline_made_by_hand(clamp, size, sides):
    images = random_images(3, 3, 30, 24)
    with torch.no_grad():
        random_mode = purified_classifier(seed=7, clamp=clamp, size=size)(images)
        assert close(random_mode, by_hand(images, [0, 1, 2], 7, sides), 1e-6)
        fixed = purified_classifier(mode="deterministic", clamp=clamp, size=size)(images)
        assert close(fixed, by_hand(images, [0, 0, 0], 0, sides), 1e-6)


def test_without_clamp_the_classifier_sees_values_beyond_the_range():
    images = random_images(2, 3, 24, 24)
    loose = purified_classifier(mode="deterministic", clamp=False).purify(images)
    cut = purified_classifier(mode="deterministic", clamp=True).purify(images)
    assert float(loose.min()) < 0
    assert close(loose.clamp(0, 1), cut, 0)


def test_deterministic_logits_depend_on_the_image_alone():
    model = purified_classifier(mode="deterministic")
    images = random_images(9, 3, 24, 24)
    with torch.no_grad():
        batch = model(images)
        assert torch.equal(model(images), batch)
        assert close(model(images.flip(0)).flip(0), batch)
        for n in (0, 8):
            assert close(model(images[n : n + 1]), batch[n : n + 1])
        twin = model(images[[2, 5, 2]])
        assert close(twin[0], twin[2])


def test_deterministic_seed_is_zero_unless_given():
    images = random_images(2, 3, 24, 24)
    with torch.no_grad():
        default, zero, other = (purified_classifier(mode="deterministic", seed=seed)(images) for seed in (None, 0, 1))
    assert torch.equal(default, zero) and not close(default, other, 1e-4)


def test_random_mode_goes_on_at_every_call_and_repeats_with_its_seed():
    images = random_images(2, 3, 24, 24)
    with torch.no_grad():
        first = purified_classifier(seed=5)
        one, two = first(images), first(images)
        assert not close(one, two, 1e-4)
        again = purified_classifier(seed=5)
        assert torch.equal(again(images), one) and torch.equal(again(images), two)
        assert close(two, by_hand(images, [2, 3], 5), 1e-6)  # the n-th image since construction has stream n
        single = purified_classifier(seed=5)
        assert close(torch.cat([single(images[:1]), single(images[1:])]), one)


def test_random_mode_without_a_seed_is_fresh_at_every_call():
    images = random_images(2, 3, 24, 24)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        results = []
        for _ in range(2):
            torch.manual_seed(0)
            results.append(purified_classifier()(images))
    assert not close(*results, 1e-4)


def test_samples_average_the_logits():
    images = random_images(2, 3, 24, 24)
    with torch.no_grad():
        three = purified_classifier(seed=5, samples=3)(images)
        single = purified_classifier(seed=5)
        assert close(three, torch.stack([single(images) for _ in range(3)]).mean(0), 1e-6)
        fixed = purified_classifier(mode="deterministic", samples=3)
        wanted = torch.stack([by_hand(images, [sample] * 2) for sample in range(3)]).mean(0)
        assert close(fixed(images), wanted, 1e-6)
        assert torch.equal(fixed(images), fixed(images))


@pytest.mark.parametrize("name", ["image_step", "feature_step"])
def test_classifier_hands_the_step_on(name):
    images = random_images(2, 3, 24, 24)
    wanted = small_model(**{name: 0}).purify(images, seed=0, streams=[0, 0])
    assert close(purified_classifier(mode="deterministic", **{name: 0}).purify(images), wanted, 0)


class Shift(nn.Module):
    """A purifier's stand-in that pushes every value past the range."""

    def purify(self, images, *, clamp, **options):
        shifted = images + 2
        return shifted.clamp(0, 1) if clamp else shifted


def test_straight_through_clamp_passes_the_gradient_that_a_clamp_kills():
    images = random_images(1, 3, 8, 8).requires_grad_()
    gradients = {}
    for clamp in (True, False, "straight-through"):
        model = PurifiedClassifier(small_classifier(), Shift(), mean=MEAN, std=STD, clamp=clamp)
        purified = model.purify(images)
        weight = random_images(1, 3, 8, 8, seed=1)
        (gradients[clamp],) = torch.autograd.grad((purified * weight).sum(), images)
        assert torch.equal(purified.detach(), torch.ones(1, 3, 8, 8) if clamp else images.detach() + 2)
    assert float(gradients[True].abs().max()) == 0
    assert torch.equal(gradients["straight-through"], random_images(1, 3, 8, 8, seed=1))
    assert torch.equal(gradients["straight-through"], gradients[False])


def test_gradient_of_the_loss_reaches_the_image():
    images = random_images(2, 3, 30, 24).requires_grad_()
    loss = F.cross_entropy(purified_classifier(mode="deterministic")(images), torch.tensor([0, 1]))
    (gradient,) = torch.autograd.grad(loss, images)
    assert int((gradient == 0).sum()) == 0


def test_it_owns_the_parameters_of_both_networks_and_moves_with_them():
    model = purified_classifier()
    wanted = {f"classifier.{k}" for k, _ in small_classifier().named_parameters()}
    wanted |= {f"purifier.{k}" for k, _ in small_model().named_parameters()}
    assert {name for name, _ in model.named_parameters()} == wanted
    assert set(model.state_dict()) == wanted
    double = model.double()
    assert double.mean.dtype == torch.float64
    assert double(random_images(1, 3, 24, 24, dtype=torch.float64)).dtype == torch.float64


def test_training_mode_does_not_change_the_law():
    images = random_images(2, 3, 24, 24)
    model = purified_classifier(mode="deterministic")
    with torch.no_grad():
        wanted = model(images)
        assert torch.equal(model.train()(images), wanted)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_of_it_go_on_as_it_would(way):
    images = random_images(2, 3, 24, 24)
    model = purified_classifier(seed=5)
    with torch.no_grad():
        model(images)
        other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
        assert torch.equal(other(images), model(images))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_images_of_any_float_type_are_classified(dtype):
    images = random_images(2, 3, 24, 24).to(dtype)
    model = purified_classifier(mode="deterministic")
    with torch.no_grad():
        logits = model(images)
        assert logits.shape == (2, 5) and close(logits.float(), model(images.float()), 0.05)


def test_empty_batch_has_empty_logits():
    assert purified_classifier()(torch.zeros(0, 3, 24, 24)).shape == (0, 5)


BAD_OPTIONS = {
    "mode": ({"mode": "sometimes"}, ["mode='sometimes'", '"deterministic"']),
    "clamp": ({"clamp": "soft"}, ["clamp='soft'", "straight-through"]),
    "samples": ({"samples": 0}, ["samples=0", "at least 1"]),
    "mean": ({"mean": (0.5,)}, ["mean=(0.5,)", "three channels"]),
    "std": ({"std": (0.5, 0.5)}, ["std=(0.5, 0.5)", "three channels"]),
    "std of zero": ({"std": (0.5, 0.0, 0.5)}, ["std=(0.5, 0.0, 0.5)"]),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_impossible_classifier_options_are_refused(case):
    options, words = BAD_OPTIONS[case]
    with pytest.raises(InputError) as caught:
        purified_classifier(**options)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    "images", [random_images(3, 24, 24), random_images(1, 3, 24, 24, dtype=torch.uint8)], ids=["CHW", "bytes"]
)
def test_classifier_wants_a_batch_of_floats(images):
    with pytest.raises(InputError, match=r"wanted float \[N, 3, H, W\] in \[0, 1\]"):
        purified_classifier()(images)


def test_classifier_refuses_normalised_images():
    with pytest.raises(InputError, match="Normalised twice"):
        purified_classifier()(random_images(1, 3, 24, 24) * 4 - 2)


# ---------------------------------------------------------------------------------------- memory

MEASURE = """
import json, resource, time, torch
import impure_fast as imp
torch.set_num_threads(1)
model = imp.create_model("impure_tiny").eval()
picture = torch.randint(0, 256, (3, 2160, 3840), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
result = model.purify(picture, seed=0)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
assert result.shape == picture.shape and result.dtype == torch.uint8
print(json.dumps({"before": before / 2**20, "peak": peak / 2**20, "seconds": time.perf_counter() - start}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux only")
def test_a_4k_picture_stays_under_two_gib():
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    assert measured["peak"] < 2, measured
