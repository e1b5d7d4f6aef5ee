"""Draws: the counter-based generator, the laws of every number, and that images do not share them."""

import dataclasses
import math
import random

import pytest
import torch

from impure_fast import Draws, backend
from impure_fast.draws import MixDraws, fixed_order
from impure_fast.errors import InputError, InputTypeError
from impure_fast.philox import FEATURE_NOISE, IMAGE_NOISE, ORDER, integers, normal, philox, uniform

from .conftest import global_generator_untouched, small_config

TENSORS = ("positions", "order", "image_step", "feature_step", "image_noise", "feature_noise")
SHAPE = (3, 3, 24, 16)  # 6x4 patches: 24 tokens, 6 a chunk


def stream_ids(*values):
    return torch.tensor(values, dtype=torch.int64)


def equal_draws(a, b):
    return [name for name in TENSORS if not torch.equal(getattr(a, name), getattr(b, name))] == []


# ---------------------------------------------------------------------------------------- Philox


def reference_philox(counter, key):
    """Philox4x32-10 of Salmon et al. (SC 2011) in plain integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


# Published known answers of Random123 (kat_vectors, philox 4x32 10): counter, key, output.
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN, ids=["zeros", "ones", "pi"])
def test_reference_philox_gives_the_published_answers(counter, key, answer):
    assert reference_philox(counter, key) == answer


def test_first_published_answer_comes_out_of_the_package():
    assert philox(0, stream_ids(0), 0, 4)[0].tolist() == KNOWN[0][2]


def test_words_are_philox_of_block_stream_and_purpose():
    rng = random.Random(0)
    seeds = [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**64 - 1, *(rng.getrandbits(64) for _ in range(6))]
    streams = [0, 1, 2**32 - 1, 2**32, 2**63 - 1, *(rng.getrandbits(63) for _ in range(4))]
    for seed in seeds:
        purpose, count = rng.getrandbits(32), rng.randint(1, 23)
        words = philox(seed, stream_ids(*streams), purpose, count)
        for stream, row in zip(streams, words.tolist(), strict=True):
            counters = [[b, stream & 0xFFFFFFFF, stream >> 32, purpose] for b in range((count + 3) // 4)]
            wanted = [w for c in counters for w in reference_philox(c, [seed & 0xFFFFFFFF, seed >> 32])]
            assert row == wanted[:count], (seed, stream, purpose)


def test_a_longer_draw_starts_with_the_shorter_one():
    for draw in (philox, uniform, normal):
        assert torch.equal(draw(5, stream_ids(7), 1, 41)[:, :10], draw(5, stream_ids(7), 1, 10))


# ---------------------------------------------------------------------------------------- laws of single numbers

MANY = 200_000


def test_uniforms_are_multiples_of_two_to_the_minus_24_in_the_half_open_interval():
    u = uniform(3, stream_ids(1), ORDER, MANY)
    assert u.dtype == torch.float32
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert torch.equal(u.double() * 2**24, (u.double() * 2**24).round())
    assert abs(float(u.double().mean()) - 0.5) < 4 * (1 / 12 / MANY) ** 0.5
    assert abs(float(u.double().var()) - 1 / 12) < 4 * (1 / 180 / MANY) ** 0.5


def test_largest_word_stays_below_one(monkeypatch):
    largest = torch.full((1, 4), 0xFFFFFFFF, dtype=torch.int64)
    monkeypatch.setattr("impure_fast.philox.philox", lambda *args: largest)
    assert float(uniform(0, stream_ids(0), 0, 4).max()) == 1 - 2.0**-24
    assert bool(normal(0, stream_ids(0), 0, 4).isfinite().all())


def test_normals_have_the_normal_law():
    z = normal(11, stream_ids(2), IMAGE_NOISE, MANY)[0].double()
    assert abs(float(z.mean())) < 4 / MANY**0.5
    assert abs(float(z.var()) - 1) < 4 * (2 / MANY) ** 0.5
    assert abs(float((z**3).mean())) < 4 * (15 / MANY) ** 0.5
    assert abs(float((z**4).mean()) - 3) < 4 * (96 / MANY) ** 0.5
    ordered = z.sort().values
    distance = (torch.special.ndtr(ordered) - torch.arange(1, MANY + 1) / MANY).abs().max()
    assert float(distance) < 1.95 / MANY**0.5  # Kolmogorov-Smirnov, one in a thousand


def test_normals_made_of_one_pair_are_independent():
    cosine, sine = normal(12, stream_ids(2), IMAGE_NOISE, MANY)[0].double().view(-1, 2).unbind(1)
    for a, b in ((cosine, sine), (cosine.abs(), sine.abs()), (cosine[1:], sine[:-1])):
        assert abs(float(torch.corrcoef(torch.stack((a, b)))[0, 1])) < 4 * (2 / MANY) ** 0.5


def test_integers_fill_their_half_open_range_evenly():
    values = integers(13, stream_ids(0), 5, 70_000, -3, 4)[0]
    counts = (values + 3).bincount(minlength=7)
    assert len(counts) == 7 and values.dtype == torch.int64
    assert float(((counts - 10_000.0) ** 2 / 10_000).sum()) < 22.5  # chi-square, 6 degrees, one in a thousand


def test_streams_seeds_and_purposes_share_no_numbers():
    base = set(philox(1, stream_ids(1), 1, 1000)[0].tolist())
    for seed, stream, purpose in ((2, 1, 1), (1 + 2**32, 1, 1), (1, 2, 1), (1, 1 + 2**32, 1), (1, 1, 2)):
        other = set(philox(seed, stream_ids(stream), purpose, 1000)[0].tolist())
        assert len(base & other) <= 2, (seed, stream, purpose)


# ---------------------------------------------------------------------------------------- Draws.sample


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("random_order", [True, False], ids=["random", "fixed"])
def test_image_draws_do_not_depend_on_the_rest_of_the_batch(training, random_order):
    config = small_config(random_order=random_order)
    batch = Draws.sample(config, (4, *SHAPE[1:]), 9, streams=[5, 2**31, 0, 2**40], training=training)
    for place, stream in ((1, 2**31), (3, 2**40)):
        alone = Draws.sample(config, (1, *SHAPE[1:]), 9, streams=[stream], training=training)
        assert equal_draws(batch.slice(place, place + 1), alone)


def test_streams_count_from_zero_by_default():
    config = small_config()
    assert equal_draws(Draws.sample(config, SHAPE, 4), Draws.sample(config, SHAPE, 4, streams=[0, 1, 2]))


def test_equal_streams_get_equal_draws_and_others_do_not():
    draws = Draws.sample(small_config(), SHAPE, 4, streams=[6, 7, 6], training=True)
    for name in ("order", "image_noise", "feature_noise"):
        value = getattr(draws, name)
        assert torch.equal(value[0], value[2]) and not torch.equal(value[0], value[1]), name


def test_seed_fixes_the_draws_and_none_takes_fresh_ones():
    config = small_config()
    assert equal_draws(Draws.sample(config, SHAPE, 2**63 + 5), Draws.sample(config, SHAPE, 2**63 + 5))
    assert not equal_draws(Draws.sample(config, SHAPE, 1), Draws.sample(config, SHAPE, 2))
    assert not equal_draws(Draws.sample(config, SHAPE, None), Draws.sample(config, SHAPE, None))


def test_each_image_can_have_its_own_seed():
    config, seeds = small_config(), (5, -1, 2**40)
    with backend("reference"):  # as a seed in a tensor has it
        together = Draws.sample(config, SHAPE, torch.tensor(seeds), [7, 7, 7], training=True)
        for i, seed in enumerate(seeds):
            alone = Draws.sample(config, (1, *SHAPE[1:]), seed, [7], training=True)
            assert equal_draws(together.slice(i, i + 1), alone)
    with pytest.raises(InputTypeError, match=r"seed is tensor\(\[5, 6\]\); wanted an integer or None\."):
        Draws.sample(config, SHAPE, torch.tensor([5, 6]))


def test_global_generator_is_neither_read_nor_moved():
    config = small_config()
    with global_generator_untouched():
        first = Draws.sample(config, SHAPE, 1, training=True)
        Draws.sample(config, SHAPE, None)
        MixDraws.sample(24, 3, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        assert equal_draws(first, Draws.sample(config, SHAPE, 1, training=True))


def test_shapes_and_types_are_those_of_the_class():
    draws = Draws.sample(small_config(), SHAPE, 0, training=True)
    shapes = {name: tuple(getattr(draws, name).shape) for name in TENSORS}
    assert shapes == {
        "positions": (3, 2),
        "order": (3, 24),
        "image_step": (3,),
        "feature_step": (3, 4),
        "image_noise": SHAPE,
        "feature_noise": (3, 4, 6, 24),
    }
    assert {getattr(draws, name).dtype for name in TENSORS[:4]} == {torch.int64}
    assert {getattr(draws, name).dtype for name in TENSORS[4:]} == {torch.float32}


def test_noises_are_independent_normals_of_their_own_purpose():
    draws = Draws.sample(small_config(), SHAPE, 3, streams=[8, 9, 10])
    pixels = normal(3, stream_ids(9), IMAGE_NOISE, 3 * 24 * 16).view(3, 24, 16)
    features = normal(3, stream_ids(9), FEATURE_NOISE, 24 * 24).view(4, 6, 24)
    assert (draws.image_noise[1] - pixels).abs().max() <= 1e-6
    assert (draws.feature_noise[1] - features).abs().max() <= 1e-6


@pytest.mark.parametrize("image_mask", ["noise", "mask"])
@pytest.mark.parametrize("feature_mask", ["noise", "mask"])
def test_a_noise_is_drawn_exactly_where_its_mask_is_noise(image_mask, feature_mask):
    draws = Draws.sample(small_config(image_mask=image_mask, feature_mask=feature_mask), SHAPE, 0)
    assert (draws.image_noise is None, draws.feature_noise is None) == (image_mask == "mask", feature_mask == "mask")


def test_empty_batch_gives_empty_draws():
    draws = Draws.sample(small_config(), (0, 3, 24, 16), 0, training=True)
    assert draws.order.shape == (0, 24) and draws.feature_noise.shape == (0, 4, 6, 24)


@pytest.mark.parametrize(
    ("side", "centre"), [((24, 24), (3, 3)), ((24, 16), (3, 4)), ((4, 48), (6, 0)), ((20, 16), (4, 4))]
)
def test_evaluation_takes_the_centre_along_each_axis_and_the_config_steps(side, centre):
    config = small_config(image_step=17, feature_step=900)  # the table has 12x12 cells
    draws = Draws.sample(config, (2, 3, *side), 0)
    assert draws.positions.tolist() == [list(centre)] * 2
    assert draws.image_step.tolist() == [17, 17] and draws.feature_step.tolist() == [[900] * 4] * 2


BARE = {"image_mask": "mask", "feature_mask": "mask"}  # no noise: many images cost little


def test_training_positions_fill_the_table_and_never_leave_it():
    draws = Draws.sample(small_config(**BARE), (4000, 3, 24, 40), 0, training=True)
    rows, cols = draws.positions.unbind(1)  # spare cells: 12 - 6 rows, 12 - 10 columns
    for values, spare in ((rows, 6), (cols, 2)):
        counts = values.bincount()
        assert len(counts) == spare + 1
        mean = 4000 / (spare + 1)
        assert float(((counts - mean) ** 2 / mean).sum()) < 22.5
    table = draws.positions.double().T
    assert abs(float(torch.corrcoef(table)[0, 1])) < 4 / 4000**0.5  # the two axes are drawn apart


def test_training_offset_of_an_image_as_large_as_the_table_is_zero():
    draws = Draws.sample(small_config(**BARE), (50, 3, 48, 48), 0, training=True)
    assert int(draws.positions.abs().max()) == 0


def test_training_steps_fill_half_open_ranges_afresh_for_each_chunk():
    config = small_config(image_step_range=(200, 204), feature_step_range=(995, 1000), **BARE)
    draws = Draws.sample(config, (3000, 3, 8, 8), 0, training=True)
    assert draws.image_step.unique().tolist() == [200, 201, 202, 203]
    assert draws.feature_step.unique().tolist() == [995, 996, 997, 998, 999]
    steps = draws.feature_step
    for a in range(4):
        for b in range(a):
            share = float((steps[:, a] == steps[:, b]).double().mean())
            assert abs(share - 1 / 5) < 4 * (0.16 / 3000) ** 0.5, "two chunks share their step"


def test_order_is_a_uniform_permutation_and_restore_its_inverse():
    draws = Draws.sample(small_config(**BARE), (4000, 3, 16, 16), 1)
    raster = torch.arange(16).expand(4000, 16)
    assert torch.equal(draws.order.sort(dim=1).values, raster)
    assert torch.equal(draws.order.gather(1, draws.restore), raster)
    for place in (0, 7, 15):
        counts = draws.order[:, place].bincount(minlength=16)
        assert float(((counts - 250.0) ** 2 / 250).sum()) < 37.7  # chi-square, 15 degrees, one in a thousand


PATTERNS = {2: [[1, 2], [2, 1]], 3: [[1, 2, 3], [3, 1, 2], [2, 3, 1]], 4: [[1, 2], [3, 4]]}  # SPEC 2.5


@pytest.mark.parametrize("grid", [(6, 6), (6, 12), (12, 6)], ids=str)
@pytest.mark.parametrize("chunks", PATTERNS)
def test_fixed_order_puts_exactly_one_class_in_each_chunk_in_raster_order(chunks, grid):
    rows, cols = grid
    config = small_config(num_chunks=chunks, random_order=False)
    order = Draws.sample(config, (2, 3, 4 * rows, 4 * cols), 0).order
    pattern, side = PATTERNS[chunks], len(PATTERNS[chunks])
    classes = [pattern[r % side][c % side] for r in range(rows) for c in range(cols)]
    wanted = [cell for k in range(1, chunks + 1) for cell, found in enumerate(classes) if found == k]
    assert order.tolist() == [wanted, wanted]


def test_fixed_order_refuses_grids_of_unequal_classes_and_other_chunk_counts():
    config = small_config(random_order=False)
    with pytest.raises(InputError, match=r"1x4 patch grid .* 4 equal classes.*random order"):
        Draws.sample(config, (1, 3, 4, 16), 0)
    with pytest.raises(InputError, match=r"K in \(2, 3, 4\), not for K=6"):
        fixed_order(small_config(num_chunks=6), 6, 6)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((2, 1, 24, 24), ["(2, 1, 24, 24)", "[N, 3, H, W]"]),
        ((3, 24, 24), ["(3, 24, 24)", "[N, 3, H, W]"]),
        ((1, 3, 22, 24), ["22x24", "patches of 4", "model.purify"]),
        ((1, 3, 0, 24), ["0x24"]),
        ((1, 3, 52, 24), ["52x24", "table of 48", "model.purify"]),
        ((1, 3, 20, 20), ["5x5 patches", "4 equal chunks", "model.purify"]),
    ],
    ids=str,
)
def test_shapes_that_cannot_be_cut_are_refused(shape, words):
    with pytest.raises(InputError) as caught:
        Draws.sample(small_config(), shape, 0)
    assert [word for word in words if word not in str(caught.value)] == []


def test_wrong_number_of_streams_is_refused():
    with pytest.raises(InputError, match=r"streams has shape \(2,\), but there are 3 images"):
        Draws.sample(small_config(), SHAPE, 0, streams=[1, 2])


# ---------------------------------------------------------------------------------------- moving, slicing, checking


def test_slice_keeps_the_draws_of_its_images_and_says_how_many():
    config = small_config()
    draws = Draws.sample(config, SHAPE, 0, streams=[4, 5, 6], training=True)
    part = draws.slice(1, 3)
    assert part.shape == (2, *SHAPE[1:])
    assert equal_draws(part, Draws.sample(config, part.shape, 0, streams=[5, 6], training=True))
    part.check(config, part.shape)


def test_to_moves_every_tensor():
    moved = Draws.sample(small_config(), SHAPE, 0).to("meta")
    assert {getattr(moved, name).device.type for name in TENSORS} == {"meta"}
    assert moved.shape == SHAPE
    bare = Draws.sample(small_config(**BARE), SHAPE, 0).to("meta")
    assert bare.image_noise is None and bare.order.device.type == "meta"


def test_given_tensors_are_kept_and_the_rest_is_that_of_an_evaluation():
    config = small_config()
    wanted = Draws.sample(config, SHAPE, 0)
    draws = Draws.from_tensors(
        config, SHAPE, order=wanted.order, image_noise=wanted.image_noise, feature_noise=wanted.feature_noise
    )
    assert equal_draws(draws, wanted)
    steps = torch.tensor([1, 2, 3])
    full = {name: getattr(wanted, name) for name in TENSORS}
    assert torch.equal(Draws.from_tensors(config, SHAPE, **{**full, "image_step": steps}).image_step, steps)


def test_missing_given_tensors_are_named():
    config = small_config()
    full = {name: getattr(Draws.sample(config, SHAPE, 0), name) for name in ("order", "image_noise", "feature_noise")}
    for name in full:
        rest = {key: value for key, value in full.items() if key != name}
        with pytest.raises(InputError, match=f"{name} is missing: this config draws it, shape"):
            Draws.from_tensors(config, SHAPE, **rest)


@pytest.mark.parametrize("name", TENSORS)
def test_given_tensors_of_another_shape_are_refused_naming_both_shapes(name):
    config = small_config()
    full = {key: getattr(Draws.sample(config, SHAPE, 0), key) for key in TENSORS}
    short = full[name][:2]
    with pytest.raises(InputError) as caught:
        Draws.from_tensors(config, SHAPE, **{**full, name: short})
    message = str(caught.value)
    assert name in message and str(tuple(short.shape)) in message and str(tuple(full[name].shape)) in message


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("order", 0, "order is no permutation of 0..23 for every image"),
        ("positions", -1, r"positions has values from \[-1, -1\]"),
        ("positions", 99, r"positions has values from \[99, 99\]"),
        ("image_step", -1, "image_step has values from -1 to -1; images and config want 0 to 999"),
        ("feature_step", 1000, "feature_step has values from"),
    ],
)
def test_given_values_that_cannot_be_are_refused(name, value, message):
    config = small_config()
    full = {key: getattr(Draws.sample(config, SHAPE, 0), key) for key in TENSORS}
    with pytest.raises(InputError, match=message):
        Draws.from_tensors(config, SHAPE, **{**full, name: torch.full_like(full[name], value)})


def test_draws_lie_where_their_streams_lie():
    draws = Draws.sample(small_config(), SHAPE, 0, streams=torch.arange(3, device="meta"))
    assert {getattr(draws, name).device.type for name in TENSORS} == {"meta"}


def test_draws_fit_the_config_and_shape_they_were_made_for():
    for masks in ({}, BARE, {"image_mask": "mask"}, {"feature_mask": "mask"}):
        config = small_config(**masks)
        Draws.sample(config, SHAPE, 0).check(config, SHAPE)


MISFITS = {  # overrides of the config that made the draws, shape they were made for, words of the message
    "batch": ({}, (2, 3, 24, 16), ["(2, 3, 24, 16)", "(3, 3, 24, 16)"]),
    "image size": ({}, (3, 3, 16, 24), ["(3, 3, 16, 24)", "(3, 3, 24, 16)"]),
    "chunks": ({"num_chunks": 2}, SHAPE, ["another config", "(3, 2, 12, 24)", "(3, 4, 6, 24)"]),
    "decoder width": (
        {"decoder_embed_dim": 36},
        SHAPE,
        ["another config", "(3, 4, 6, 36)", "(3, 4, 6, 24)"],
    ),
    "patch": ({"patch_size": 2}, SHAPE, ["another config", "(3, 4, 24, 24)", "(3, 4, 6, 24)"]),
    "table": ({"image_size": 48}, SHAPE, ["another config", "tables of 24 cells", "this one has 12"]),
    "image mask": ({"image_mask": "mask"}, SHAPE, ["another config", "(False, True)", "(True, True)"]),
    "feature mask": ({"feature_mask": "mask"}, SHAPE, ["another config", "(True, False)", "(True, True)"]),
}


@pytest.mark.parametrize("case", MISFITS)
def test_draws_of_another_kind_are_refused_naming_both(case):
    overrides, shape, words = MISFITS[case]
    draws = Draws.sample(small_config(**overrides), shape, 0)
    with pytest.raises(InputError) as caught:
        draws.check(small_config(), SHAPE)
    assert [word for word in words if word not in str(caught.value)] == []


def test_draws_without_noise_of_another_patch_size_are_refused_naming_both():
    draws = Draws.sample(small_config(patch_size=2, **BARE), SHAPE, 0)
    with pytest.raises(InputError, match=r"96.*24"):
        draws.check(small_config(**BARE), SHAPE)


def test_draws_cannot_be_changed_in_place_by_name():
    draws = Draws.sample(small_config(), SHAPE, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        draws.order = draws.restore


# ---------------------------------------------------------------------------------------- mixing


def test_mixing_counts_follow_their_law():
    drawn = [MixDraws.sample(8, 1, seed) for seed in range(1200)]
    pairs = {(chunks, index) for chunks in (2, 3, 4) for index in range(chunks)}
    assert {(d.chunks, d.index) for d in drawn} == pairs
    for chunks in (2, 3, 4):
        own = [d.index for d in drawn if d.chunks == chunks]
        assert abs(len(own) - 400) < 4 * (1200 * 2 / 9) ** 0.5
        for index in range(chunks):
            spread = math.sqrt(len(own) * (1 / chunks) * (1 - 1 / chunks))
            assert abs(own.count(index) - len(own) / chunks) < 4 * spread


def test_mixing_stops_at_the_largest_chunk_count():
    assert {MixDraws.sample(8, 1, seed, max_chunks=2).chunks for seed in range(50)} == {2}
    assert {MixDraws.sample(8, 1, seed, max_chunks=6).chunks for seed in range(200)} == {2, 3, 4, 5, 6}


def test_mixing_counts_are_shared_by_the_batch_and_each_image_has_its_own_permutation():
    batch = MixDraws.sample(24, 3, 7, streams=[4, 5, 6])
    alone = MixDraws.sample(24, 1, 7, streams=[5])
    assert (batch.chunks, batch.index) == (alone.chunks, alone.index)
    assert torch.equal(batch.order[1:2], alone.order)
    assert torch.equal(batch.order.sort(dim=1).values, torch.arange(24).expand(3, 24))
    assert not torch.equal(batch.order[0], batch.order[1])


def test_each_guide_mixes_in_its_own_way():
    first, second = (MixDraws.sample(24, 1, 7, guide=guide) for guide in (0, 1))
    assert not torch.equal(first.order, second.order)
    both = [[MixDraws.sample(4, 1, seed, guide=guide).chunks for seed in range(40)] for guide in (0, 1)]
    assert both[0] != both[1]


def test_mixing_order_is_not_the_masking_order():
    draws = Draws.sample(small_config(), SHAPE, 7)
    assert not torch.equal(MixDraws.sample(24, 3, 7).order, draws.order)
