"""IMPure: names, counts, initialisation, masking law, positions, gradients, copies."""

import copy
import math
import multiprocessing
import pickle

import pytest
import torch
import torch.nn.functional as F

from impure_fast import Draws, IMPure, backend, create_model
from impure_fast.errors import ConfigError, InputError
from impure_fast.model import noise_schedule, sincos_table
from impure_fast.ops.patch_assemble import patchify, unpatchify

from .conftest import SMALL, global_generator_untouched, random_images, small_config, small_model

MASKS = [("noise", "noise"), ("mask", "noise"), ("noise", "mask"), ("mask", "mask")]
by_masks = pytest.mark.parametrize(("image_mask", "feature_mask"), MASKS, ids=["-".join(m) for m in MASKS])
ORDERS = [(2, True), (3, True), (4, True), (8, True), (2, False), (3, False), (4, False)]
TABLES = ("pos_embed", "decoder_pos_embed", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")


def close(a, b, tolerance=1e-5):
    return a.shape == b.shape and float((a - b).detach().abs().max()) <= tolerance


@pytest.fixture(autouse=True, params=["reference", "auto"])
def path(request):
    """Every claim holds for the authors' order of operations and for the operators' path."""
    with backend(request.param):
        yield request.param


@pytest.fixture
def oracle(path):
    """For checkpoints that only the authors' order of operations has."""
    with backend("reference"):
        yield


# ---------------------------------------------------------------------------------------- every mode runs


@by_masks
@pytest.mark.parametrize(("chunks", "random_order"), ORDERS)
def test_every_mode_gives_finite_predictions_of_the_right_shape(image_mask, feature_mask, chunks, random_order):
    model = small_model(
        image_mask=image_mask, feature_mask=feature_mask, num_chunks=chunks, random_order=random_order, tile_size=48
    )
    side = 16 if chunks == 8 else 24  # 16 or 36 tokens
    images = random_images(2, 3, side, side)
    with torch.no_grad():
        prediction, kept = model.reconstruct(images, Draws.sample(model.config, images.shape, 0))
        image = model(images)
    assert prediction.shape == image.shape == images.shape and kept == {}
    assert bool(prediction.isfinite().all()) and bool(image.isfinite().all())


def test_without_the_pixel_convolution_the_prediction_stays_patches():
    model = small_model(pixel_conv=False)
    images = random_images(2, 3, 24, 24)
    prediction, kept = model.reconstruct(images, Draws.sample(model.config, images.shape, 0), keep=("pred_raw",))
    assert prediction.shape == (2, 36, 48) and torch.equal(prediction, kept["pred_raw"])
    image = model.to_image(prediction, 6, 6)
    assert torch.equal(image, model.unnormalise(unpatchify(prediction, 6, 6)))


def test_patches_hold_row_then_column_then_channel():
    image = random_images(1, 3, 8, 12)
    patches = patchify(image, 4)
    assert patches.shape == (1, 6, 48)
    r, c, channel = 2, 3, 1
    assert float(patches[0, 4, (r * 4 + c) * 3 + channel]) == float(image[0, channel, 4 + r, 4 + c])
    assert torch.equal(unpatchify(patches, 2, 3), image)


def test_only_asked_checkpoints_are_kept(oracle):
    model = small_model()
    images = random_images(1, 3, 24, 24)
    _, kept = model.reconstruct(images, Draws.sample(model.config, images.shape, 0), keep=("latent", "head"))
    assert {name: tuple(value.shape) for name, value in kept.items()} == {"latent": (4, 10, 32), "head": (4, 1, 24)}


def test_forward_with_given_draws_is_the_unnormalised_reconstruction():
    model = small_model()
    images = random_images(2, 3, 24, 24)
    draws = Draws.sample(model.config, images.shape, 3)
    prediction, _ = model.reconstruct(images, draws)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (SMALL.mean, SMALL.std))
    assert close(model(images, draws), prediction * std + mean, 1e-6)


def test_forward_without_draws_takes_fresh_ones_and_leaves_the_global_generator_alone():
    model = small_model()
    images = random_images(1, 3, 24, 24)
    with global_generator_untouched(), torch.no_grad():
        assert not close(model(images), model(images))


def test_forward_of_an_empty_batch_is_empty():
    assert small_model()(torch.zeros(0, 3, 24, 24)).shape == (0, 3, 24, 24)


def test_bytes_are_not_taken_for_unit_range():
    model = small_model()
    with pytest.raises(TypeError, match="uint8"):
        model(random_images(1, 3, 24, 24, dtype=torch.uint8))


def test_draws_of_other_images_are_refused():
    model = small_model()
    with pytest.raises(InputError, match=r"\(2, 3, 24, 24\).*\(1, 3, 24, 24\)"):
        model.reconstruct(random_images(1, 3, 24, 24), Draws.sample(SMALL, (2, 3, 24, 24), 0))


def test_a_name_is_no_config():
    with pytest.raises(ConfigError, match="create_model"):
        IMPure("impure_tiny")


# ---------------------------------------------------------------------------------------- what is hidden from what


def changed_by_chunk(model, chunk, draws, images, keep=()):
    """Predictions before and after the pixels of one chunk's patches are replaced, and that chunk's raster places."""
    m = draws.order.shape[1] // model.config.num_chunks
    places = draws.order[:, chunk * m : (chunk + 1) * m]  # [N, M]
    patches = patchify(images, model.config.patch_size)
    other = patchify(random_images(*images.shape, seed=99), model.config.patch_size)
    index = places[:, :, None].expand(-1, -1, patches.shape[2])
    rows, cols = (side // model.config.patch_size for side in images.shape[2:])
    altered = unpatchify(patches.scatter(1, index, other.gather(1, index)), rows, cols)
    with torch.no_grad():
        return model.reconstruct(images, draws, keep), model.reconstruct(altered, draws, keep), places


@pytest.mark.parametrize("chunk", range(4))
def test_masked_chunk_is_rebuilt_without_its_own_pixels(chunk):
    model = small_model(image_mask="mask", feature_mask="mask", pixel_conv=False)
    images = random_images(2, 3, 24, 24)
    draws = Draws.sample(model.config, images.shape, 5)
    (before, _), (after, _), places = changed_by_chunk(model, chunk, draws, images)
    moved = (before - after).abs().amax(dim=2)  # [N, L]
    own = torch.zeros_like(moved, dtype=torch.bool).scatter(1, places, True)
    assert float(moved[own].max()) == 0
    assert float(moved[~own].min()) > 0  # all others see it


@pytest.mark.parametrize("image_mask", ["noise", "mask"])
def test_noised_chunk_is_rebuilt_from_what_the_noise_leaves_of_it(image_mask):
    model = small_model(image_mask=image_mask, pixel_conv=False)
    images = random_images(1, 3, 24, 24)
    moved = {}
    for step in (0, 999):
        config = small_config(image_mask=image_mask, image_step=step, feature_step=step)
        draws = Draws.sample(config, images.shape, 5)
        (before, _), (after, _), places = changed_by_chunk(model, 1, draws, images)
        own = places[:, :, None].expand(-1, -1, 48)
        moved[step] = float((before - after).gather(1, own).abs().mean())
    assert moved[0] > 20 * moved[999] > 0


def test_chunks_are_encoded_apart(oracle):
    model = small_model()
    images = random_images(2, 3, 24, 24)
    draws = Draws.sample(model.config, images.shape, 5)
    (_, before), (_, after), _ = changed_by_chunk(model, 2, draws, images, keep=("latent", "noise_latent"))
    for name in ("latent", "noise_latent"):
        moved = (before[name] - after[name]).abs().amax(dim=(1, 2)).view(2, 4)  # image-major
        assert bool((moved[:, 2] > 0).all()) and float(moved[:, [0, 1, 3]].max()) == 0, name


def test_head_token_of_a_replica_holds_the_other_chunks_class_tokens_only(oracle):
    model = small_model()
    images = random_images(2, 3, 24, 24)
    draws = Draws.sample(model.config, images.shape, 5)
    (_, before), (_, after), _ = changed_by_chunk(model, 2, draws, images, keep=("head",))
    moved = (before["head"] - after["head"]).abs().amax(dim=(1, 2)).view(4, 2)  # replica-major
    assert float(moved[2].max()) == 0 and float(moved[[0, 1, 3]].min()) > 0


@by_masks
def test_hidden_chunk_is_what_the_table_of_masks_says(image_mask, feature_mask):
    model = small_model(image_mask=image_mask, feature_mask=feature_mask)
    shape = (2, 3, 24, 24)
    draws = Draws.sample(model.config, shape, 1, training=True)
    clean, noised = random_images(2, 4, 9, 24, seed=1), random_images(2, 4, 9, 24, seed=2)
    got = model.hide(clean, noised if image_mask == "noise" else None, draws)
    base = noised if image_mask == "noise" else clean
    if feature_mask == "noise":
        a, b = (v[draws.feature_step][:, :, None, None] for v in noise_schedule())
        wanted = a * base + b * draws.feature_noise
    else:
        wanted = noised if image_mask == "noise" else model.mask_token.expand(2, 4, 9, 24)
    assert close(got, wanted, 1e-6)


def test_noised_image_follows_the_schedule_in_normalised_units(oracle):
    model = small_model()
    images = random_images(3, 3, 24, 24)
    draws = Draws.sample(model.config, images.shape, 1, training=True)
    _, kept = model.reconstruct(images, draws, keep=("noised_image",))
    x = (images - torch.tensor(SMALL.mean).view(3, 1, 1)) / torch.tensor(SMALL.std).view(3, 1, 1)
    for n, step in enumerate(draws.image_step.tolist()):
        kept_share = math.prod(1 - (0.0001 + (0.02 - 0.0001) * s / 999) for s in range(step + 1))
        wanted = kept_share**0.5 * x[n] + (1 - kept_share) ** 0.5 * draws.image_noise[n]
        assert close(kept["noised_image"][n], wanted, 1e-5)


def test_schedule_has_the_released_values():
    released = {  # SPEC 2.7
        0: (0.99994999, 0.01000083),
        200: (0.81015247, 0.58621919),
        400: (0.43996814, 0.89801341),
        599: (0.16087070, 0.98697549),
        600: (0.15989836, 0.98713350),
        999: (0.00635282, 0.99997985),
    }
    signal, noise = noise_schedule()
    for step, (a, b) in released.items():
        assert abs(float(signal[step]) - a) < 2e-6 and abs(float(noise[step]) - b) < 2e-6, step
    assert close(signal**2 + noise**2, torch.ones(1000), 1e-6)


# ---------------------------------------------------------------------------------------- order and positions


def test_images_of_a_batch_do_not_see_each_other():
    model = small_model()
    images = random_images(3, 3, 24, 24)
    draws = Draws.sample(model.config, images.shape, 2)
    with torch.no_grad():
        together = model(images, draws)
        for n in range(3):
            assert close(model(images[n : n + 1], draws.slice(n, n + 1)), together[n : n + 1])


def test_order_of_the_tokens_inside_a_chunk_does_not_matter():
    model = small_model()
    images = random_images(2, 3, 24, 24)
    draws = Draws.sample(model.config, images.shape, 2)
    inside = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(k)) for k in range(4)])  # [K, M]
    order = draws.order.view(2, 4, 9).gather(2, inside.expand(2, -1, -1)).flatten(1)
    noise = draws.feature_noise.gather(2, inside[None, :, :, None].expand(2, -1, -1, 24))
    moved = Draws.from_tensors(
        model.config, images.shape, order=order, image_noise=draws.image_noise, feature_noise=noise
    )
    unmatched = Draws.from_tensors(
        model.config, images.shape, order=order, image_noise=draws.image_noise, feature_noise=draws.feature_noise
    )
    with torch.no_grad():
        assert close(model(images, moved), model(images, draws))
        assert not close(model(images, unmatched), model(images, draws), 1e-3)  # noise rows belong to tokens


def test_table_holds_the_column_before_the_row_and_a_zero_head():
    table = sincos_table(32, 12)[0]
    assert table.shape == (145, 32) and float(table[0].abs().max()) == 0
    row, col, quarter = 3, 7, 8
    for k in range(quarter):
        angle = 10000 ** (-k / quarter)
        wanted = [math.sin(col * angle), math.cos(col * angle), math.sin(row * angle), math.cos(row * angle)]
        assert torch.allclose(table[1 + row * 12 + col].view(4, 8)[:, k], torch.tensor(wanted), atol=2e-6)


@pytest.mark.parametrize(
    ("height", "width", "row", "col"),
    [(24, 24, 3, 3), (8, 24, 5, 3), (24, 8, 3, 5), (12, 16, 5, 4), (48, 4, 0, 6)],  # odd remainders: the larger half
)
def test_grids_lie_in_the_centre_of_the_table_along_each_axis(height, width, row, col):
    model = small_model()
    images = random_images(1, 3, height, width)
    _, kept = model.reconstruct(images, Draws.sample(model.config, images.shape, 0), keep=("index_pos",))
    cells = kept["index_pos"][0].view(height // 4, width // 4)
    wanted = (row + torch.arange(height // 4))[:, None] * 12 + col + torch.arange(width // 4)
    assert torch.equal(cells, wanted)


def test_rectangular_image_is_embedded_patch_by_patch(oracle):
    model = small_model()
    images = random_images(1, 3, 8, 24)
    _, kept = model.reconstruct(images, Draws.sample(model.config, images.shape, 0), keep=("embedded", "index_pos"))
    rows = patchify(model.normalise(images), 4).view(1, 12, 4, 4, 3).permute(0, 1, 4, 2, 3).flatten(2)
    weight = model.patch_embed.proj.weight.flatten(1)
    wanted = F.linear(rows, weight, model.patch_embed.proj.bias) + model.pos_embed[0, 1:][kept["index_pos"]]
    assert close(kept["embedded"], wanted)


# ---------------------------------------------------------------------------------------- names, counts, first weights


def block_names(prefix):
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    return [f"{prefix}.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]


def authors_names(depth, decoder_depth, sides):
    """The trained entries of SPEC 2.1."""
    pairs = ["patch_embed.proj", "norm", *(f"proj_layers.{j}" for j in range(sides)), "decoder_head_embed"]
    pairs += ["decoder_embed", "decoder_embed_norm", "decoder_norm", "decoder_pred", "decoder_rb1"]
    names = ["cls_token", "proj_weights", "mask_token"]
    names += [f"{pair}.{kind}" for pair in pairs for kind in ("weight", "bias")]
    for prefix, blocks in (("blocks", depth), ("decoder_blocks", decoder_depth)):
        names += [name for b in range(blocks) for name in block_names(f"{prefix}.{b}")]
    return names


@by_masks
def test_state_dict_has_exactly_the_authors_trained_names(image_mask, feature_mask):
    model = IMPure(small_config(image_mask=image_mask, feature_mask=feature_mask))
    assert sorted(model.state_dict()) == sorted(authors_names(2, 2, 1))
    assert sorted(name for name, _ in model.named_parameters()) == sorted(model.state_dict())


def test_released_network_has_273_items_less_tables_and_schedule():
    with torch.device("meta"):
        state = create_model("impure_base_patch16_224").state_dict()
    assert len(state) == 273 - len(TABLES)
    assert sorted(state) == sorted(authors_names(12, 8, 5))


COUNTS = {  # SPEC section 4
    "impure_base_patch16_224": {
        "": 115_789_914,
        "patch_embed": 590_592,
        "blocks": 85_054_464,
        "norm": 1_536,
        "proj": 2_952_966,
        "decoder_head_embed": 1_180_160,
        "decoder_embed": 394_752,
        "decoder_blocks": 25_219_072,
        "decoder_norm": 1_024,
        "decoder_pred": 393_984,
        "decoder_rb1": 84,
        "token": 1_280,
    },
    "impure_base_patch16_224_dec384": {
        "": 104_274_138,
        "decoder_head_embed": 885_120,
        "decoder_embed": 296_064,
        "decoder_blocks": 14_195_712,
        "decoder_norm": 768,
        "decoder_pred": 295_680,
        "token": 1_152,
    },
}


def group_of(name):
    top = name.split(".")[0]
    merged = {"proj_layers": "proj", "proj_weights": "proj", "decoder_embed_norm": "decoder_embed"}
    return merged.get(top, "token" if top.endswith("_token") else top)


@pytest.mark.parametrize("name", COUNTS)
def test_released_networks_have_the_released_parameter_counts(name):
    with torch.device("meta"):
        model = create_model(name)
    groups = {"": 0}
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad
        for group in ("", group_of(key)):
            groups[group] = groups.get(group, 0) + parameter.numel()
    assert {group: groups[group] for group in COUNTS[name]} == COUNTS[name]


def test_tiny_network_keeps_its_promised_size():
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model("impure_tiny").parameters()) <= 1_500_000


def test_first_weights_follow_the_authors_initialisation():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = IMPure(small_config(embed_dim=64, decoder_embed_dim=48))
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        layer, _, kind = name.rpartition(".")
        if layer in ("patch_embed.proj", "decoder_rb1") and (kind == "bias" or layer == "decoder_rb1"):
            bound = {"patch_embed.proj": 48**-0.5, "decoder_rb1": 27**-0.5}[layer]  # torch's Conv2d default
            assert 0 < float(value.abs().max()) <= bound, name
        elif "norm" in layer:
            assert bool((value == (1 if kind == "weight" else 0)).all()), name
        elif name.endswith("_token"):
            assert 0.01 < float(value.std()) < 0.03, name
        elif name == "proj_weights":
            assert bool((value == 1).all())
        elif kind == "bias":
            assert bool((value == 0).all()), name
        else:  # Xavier-uniform of the matrix, qkv as one
            matrix = value.flatten(1)
            bound = (6 / sum(matrix.shape)) ** 0.5
            assert 0.97 * bound < float(matrix.abs().max()) <= bound, name
            assert abs(float(matrix.std()) / (bound / 3**0.5) - 1) < 0.06, name


def test_every_layer_norm_has_the_config_epsilon():
    model = IMPure(small_config(norm_eps=1e-4))
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 2 * (2 + 2) + 3 and {m.eps for m in norms} == {1e-4}


def test_side_outputs_are_weighted_by_a_softmax_over_all_of_them():
    model = small_model()
    tokens = random_images(4, 9, 32)
    kept = {}
    model.encode(tokens, lambda name, x: kept.setdefault(name, x))
    x = torch.cat((model.cls_token.expand(4, -1, -1), tokens), dim=1)
    first = model.blocks[0](x)
    share = model.proj_weights.flatten().softmax(0)
    wanted = share[0] * model.proj_layers[0](first) + share[1] * model.blocks[1](first)
    assert close(kept["enc_mix"], wanted) and close(kept["latent"], model.norm(wanted))


# ---------------------------------------------------------------------------------------- loading and copying


def test_tables_and_guides_of_a_state_dict_are_ignored_and_the_callers_dict_is_kept():
    model, other = small_model(0), small_model(1)
    state = {**other.state_dict(), "pos_embed": torch.full((1, 145, 32), float("nan")), "hgds.0.w": torch.zeros(1)}
    names = set(state)
    model.load_state_dict(state, strict=True)
    assert set(state) == names
    assert torch.equal(model.pos_embed, sincos_table(32, 12))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in other.state_dict().items())


def answer(model):
    """One purification with fixed draws."""
    with torch.no_grad():
        images = random_images(2, 3, 24, 24)
        return model(images, Draws.sample(model.config, images.shape, 0))


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_give_the_same_result(way):
    model = small_model()
    other = COPIES[way](model)
    assert other.config == model.config
    assert torch.equal(answer(other), answer(model))


def test_deep_copy_shares_no_weights():
    model = small_model()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.cls_token.add_(1)
    assert not torch.equal(answer(other), answer(model))


def answer_in_child(pickled):
    torch.set_num_threads(1)
    return answer(pickle.loads(pickled)).numpy()


@pytest.mark.slow
def test_spawned_process_gives_the_same_result():
    model = small_model()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply(answer_in_child, (pickle.dumps(model),))
    assert close(torch.from_numpy(result), answer(model), 1e-6)


# ---------------------------------------------------------------------------------------- gradients


@by_masks
def test_image_gradient_agrees_with_central_differences(image_mask, feature_mask):
    model = small_model(image_mask=image_mask, feature_mask=feature_mask).double()
    images = random_images(1, 3, 16, 16, dtype=torch.float64).requires_grad_()
    draws = Draws.sample(model.config, images.shape, 0)
    weight = random_images(1, 3, 16, 16, seed=1, dtype=torch.float64)

    def loss(x):
        return (model(x, draws) * weight).sum()

    (gradient,) = torch.autograd.grad(loss(images), images)
    assert int((gradient == 0).sum()) == 0  # every pixel matters
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _ in range(5):
            direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
            h = 1e-4
            slope = float(loss(images + h * direction) - loss(images - h * direction)) / (2 * h)
            assert abs(slope - float((gradient * direction).sum())) < 1e-6 * max(1, abs(slope))


def test_every_parameter_that_a_mode_uses_gets_a_gradient():
    unused = {"mask_token"}  # used in (mask, mask) only
    for masks in ({}, {"image_mask": "mask", "feature_mask": "mask"}):
        model = small_model(**masks)
        model(random_images(1, 3, 24, 24)).square().sum().backward()
        without = {name for name, p in model.named_parameters() if p.grad is None or float(p.grad.abs().max()) == 0}
        assert without == (unused if not masks else set())
