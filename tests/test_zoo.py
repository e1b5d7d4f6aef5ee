"""Names: presets, shipped weights, and what is said of names that do not exist."""

import dataclasses

import pytest
import torch

import impure_fast as imp
from impure_fast import checkpoints, create_model, list_models, load, zoo
from impure_fast.config import PRESETS, IMPureConfig
from impure_fast.errors import CheckpointError, ConfigError, MissingFileError

from .conftest import random_images


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A weights folder with two tags of impure_tiny; {tag: model}."""
    monkeypatch.setattr(zoo, "weights_folder", lambda: tmp_path)
    models = {}
    for seed, tag in enumerate(("robust", "standard")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            models[tag] = create_model("impure_tiny", image_step=100 + seed)
        path = tmp_path / f"impure_tiny.{tag}.safetensors"
        checkpoints.save_safetensors(path, models[tag].state_dict(), models[tag].config, dtype=torch.float16)
    return models


def test_every_preset_is_listed_and_can_be_made():
    assert list_models() == sorted(PRESETS)
    for name in list_models():
        with torch.device("meta"):
            model = create_model(name)
        assert model.config == PRESETS[name] and model.training


def test_overrides_are_config_fields():
    model = create_model("impure_tiny", depth=3, out_indices=(0, 2), image_mask="mask")
    assert model.config == dataclasses.replace(PRESETS["impure_tiny"], depth=3, out_indices=(0, 2), image_mask="mask")
    assert len(model.blocks) == 3


def test_made_models_have_random_weights_of_the_global_generator():
    states = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            states.append(create_model("impure_tiny").state_dict()["blocks.0.attn.qkv.weight"])
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_unknown_preset_is_refused_listing_the_known():
    with pytest.raises(ConfigError) as caught:
        create_model("impure_tiney")
    assert "'impure_tiney' is no preset" in str(caught.value)
    assert [name for name in PRESETS if name not in str(caught.value)] == []


def test_unknown_override_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"Unknown config fields \['dpeth'\]"):
        create_model("impure_tiny", dpeth=3)


def test_impossible_override_is_refused_naming_field_and_value():
    with pytest.raises(ConfigError, match="num_heads=5"):
        create_model("impure_tiny", num_heads=5)


def test_shipped_weights_load_by_name_and_tag(shipped):
    assert list_models(pretrained=True) == ["impure_tiny.robust", "impure_tiny.standard"]
    for name, tag in (
        ("impure_tiny", "standard"),
        ("impure_tiny.standard", "standard"),
        ("impure_tiny.robust", "robust"),
    ):
        model = load(name)
        assert model.config == shipped[tag].config and not model.training
        assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "cpu")}
        assert all(torch.equal(v, shipped[tag].state_dict()[k].half().float()) for k, v in model.state_dict().items())


def test_shipped_model_purifies(shipped):
    images = random_images(1, 3, 20, 20, dtype=torch.uint8)
    model = load("impure_tiny")
    assert torch.equal(model.purify(images, seed=0), load("impure_tiny").purify(images, seed=0))


def test_files_and_folders_go_before_nothing(shipped, tmp_path):
    shipped["robust"].save_pretrained(tmp_path / "folder")
    from_file = load(tmp_path / "impure_tiny.robust.safetensors")
    from_folder = load(tmp_path / "folder")
    assert from_file.config == from_folder.config == shipped["robust"].config


UNKNOWN = {
    "impure_base_patch16_224": "No weights are shipped for impure_base_patch16_224",
    "impure_tiny.sharp": "impure_tiny.sharp is no shipped model and no file",
    "impure_tiney": "impure_tiney is no shipped model and no file",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_names_without_weights_are_refused_listing_the_shipped(shipped, name):
    with pytest.raises(MissingFileError) as caught:
        load(name)
    words = [UNKNOWN[name], "impure_tiny.robust", "impure_tiny.standard"]
    assert [word for word in words if word not in str(caught.value)] == []


def test_shipped_file_that_is_damaged_is_reported(shipped, tmp_path):
    (tmp_path / "impure_tiny.standard.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"impure_tiny.standard.safetensors"):
        load("impure_tiny")


@pytest.mark.parametrize(
    "name", list_models(pretrained=True) or [pytest.param("", marks=pytest.mark.skip("no weights"))]
)
def test_weights_of_this_installation_load(name):
    model = load(name)
    assert model.config == IMPureConfig.from_dict(model.config.to_dict())
    images = random_images(1, 3, 64, 64)
    assert bool(model.purify(images, seed=0).isfinite().all())


def test_public_names_are_there_and_misspelt_ones_are_not():
    assert [name for name in imp.__all__ if not hasattr(imp, name)] == []
    assert set(imp.__all__) <= set(dir(imp))
    with pytest.raises(AttributeError, match="purifi"):
        _ = imp.purifi
