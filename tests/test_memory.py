"""Memory policies: they change what is kept for backward, never a value; and the ledger that counts it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from impure_fast import Draws, IMPure, IMPureConfig, backend
from impure_fast.config import PRESETS
from impure_fast.errors import ConfigError
from impure_fast.memory import ALL, POLICIES, kept_by
from impure_fast.training.plan import blocks_of, count_kept

TOY = IMPureConfig(
    image_size=16,
    patch_size=4,
    embed_dim=32,
    depth=3,
    num_heads=4,
    decoder_embed_dim=24,
    decoder_depth=3,
    decoder_num_heads=3,
    out_indices=(2, 0),
    tile_size=32,
    tile_stride=16,
)
CONFIGS = {
    "three decoder blocks": TOY,
    "one decoder block": dataclasses.replace(TOY, decoder_depth=1),
    "no noised pass, no side outputs": dataclasses.replace(TOY, image_mask="mask", out_indices=()),
}
SETS = {**POLICIES, "attention": frozenset({"attention"}), "cheap ones": frozenset({"norm1", "norm2", "gelu"})}


def step(config, kept, autocast=False, wish="auto"):
    """Prediction, and gradients to the images and all parameters."""
    torch.manual_seed(0)
    model = IMPure(config)
    model.kept = kept
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    draws = Draws.sample(config, images.shape, 1, training=True)
    with backend(wish), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        prediction, _ = model.reconstruct(images, draws)
    prediction.float().square().mean().backward()
    return {"prediction": prediction, "images": images.grad, **{n: p.grad for n, p in model.named_parameters()}}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("wish", ["auto", "reference"])
def test_no_policy_changes_a_bit_of_the_gradients(config, autocast, wish):
    whole = step(CONFIGS[config], ALL, autocast, wish)
    for name, kept in SETS.items():
        for key, value in step(CONFIGS[config], kept, autocast, wish).items():
            same = value is whole[key] is None or torch.equal(value, whole[key])
            assert same, f"{key} under {name}"


def kept_bytes(kept, forward=IMPure.reconstruct):
    model = IMPure(TOY)
    model.kept = kept
    images = torch.rand(2, 3, 16, 16)
    draws = Draws.sample(TOY, images.shape, 1)
    with count_kept(blocks_of(model), [*model.parameters(), *model.buffers(), images]) as counted:
        forward(model, images, draws)
    return counted


def test_each_policy_keeps_less_than_the_one_before():
    totals = [sum(kept_bytes(kept).values()) for kept in POLICIES.values()]
    assert totals == sorted(set(totals), reverse=True)


def test_a_block_keeps_what_its_policy_names():
    """In widths a token, 4 bytes each: the results' own sizes, the input, and the statistics of what is not again."""
    tokens, width = 2 * 2 * 4 * 5, TOY.embed_dim  # both passes, two images, four chunks of a class token and 4 patches
    unit, lse, statistics = 4 * tokens * width, 4 * tokens * TOY.num_heads, 2 * 4 * tokens
    block = "encoder block 1"
    assert kept_bytes(ALL)[block] == 16 * unit + lse + 2 * statistics
    assert kept_bytes(POLICIES["default"])[block] == 10 * unit + lse
    assert kept_bytes(POLICIES["tight"])[block] == 2 * unit
    assert kept_bytes(POLICIES["minimal"])[block] == unit


def test_released_network_keeps_at_most_these_shares_of_the_reference_path():
    """In fp32, where the reference path takes torch's attention; bf16 is measured by benchmarks/training_memory.py."""
    model = IMPure(PRESETS["impure_base_patch16_224"])
    weights, shape = [*model.parameters(), *model.buffers()], (1, 3, 224, 224)
    drawn = Draws.sample(model.config, shape, 0)

    def total(policy, wish):
        model.kept = POLICIES[policy]
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, backend(wish):
            images = torch.rand(shape)
            with count_kept({}, [*weights, *map(mode.from_tensor, weights), images]) as counted:
                model.reconstruct(images, drawn)
        return sum(counted.values())

    whole = total("all", "reference")
    assert total("default", "auto") <= 0.62 * whole
    assert total("tight", "auto") <= 0.25 * whole
    assert total("minimal", "auto") <= 0.1 * whole


def test_inference_ignores_the_policy(monkeypatch):
    monkeypatch.setattr("impure_fast.memory.checkpoint", None)  # would raise if called
    with torch.no_grad():
        assert sum(kept_bytes(POLICIES["minimal"]).values()) == 0
    purify = kept_bytes(POLICIES["minimal"], lambda model, images, draws: model.purify(images, seed=0))
    assert sum(purify.values()) == 0


def test_a_policy_is_no_part_of_the_weights():
    model = IMPure(TOY)
    names = list(model.state_dict())
    model.kept = kept_by("minimal")
    assert list(model.state_dict()) == names


def test_unknown_policies_are_refused():
    assert kept_by({"fc1"}) == {"fc1"}
    with pytest.raises(ConfigError, match="memory='less': wanted one of all, default, tight, minimal, or a set"):
        kept_by("less")
    with pytest.raises(ConfigError, match="fc3"):
        kept_by({"fc3"})
