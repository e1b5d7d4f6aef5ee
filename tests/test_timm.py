"""The presets inside timm: names, overrides, weights, and what timm's own arguments are answered."""

import importlib
import pickle
import warnings

import pytest
import torch

from impure_fast import checkpoints, create_model, zoo
from impure_fast.config import PRESETS
from impure_fast.errors import CheckpointError, ConfigError, MissingFileError

from .conftest import random_images

timm = pytest.importorskip("timm", reason="the extra timm is not installed")
registered = importlib.import_module("impure_fast.timm")

TINY = "impure_tiny"


def tiny(seed=0, **overrides):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create_model(TINY, **overrides)


def same_weights(model, other):
    a, b = model.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """The registration as it is with two tags of impure_tiny in the installation; {tag: model}."""
    monkeypatch.setattr(zoo, "weights_folder", lambda: tmp_path)
    models = {tag: tiny(seed, image_step=100 + seed) for seed, tag in enumerate(("robust", "standard"))}
    for tag, model in models.items():
        checkpoints.save_safetensors(tmp_path / f"{TINY}.{tag}.safetensors", model.state_dict(), model.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm warns of every name that is registered twice
        importlib.reload(registered)
        yield models
        monkeypatch.undo()
        importlib.reload(registered)


def test_presets_are_listed_under_their_own_names():
    assert sorted(timm.list_models("impure*")) == sorted(PRESETS)
    assert timm.is_model(TINY)


@pytest.mark.parametrize("name", PRESETS)
def test_timm_makes_the_same_network_as_create_model(name):
    with torch.device("meta"):
        model, ours = timm.create_model(name), create_model(name)
    assert model.config == ours.config
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}


def test_random_weights_are_those_of_create_model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(TINY)
    assert same_weights(model, tiny(0))


@pytest.mark.parametrize("name", PRESETS)
def test_description_tells_input_and_normalisation(name):
    cfg = timm.get_pretrained_cfg(name)
    config = PRESETS[name]
    assert (cfg.mean, cfg.std) == (config.mean, config.std)
    assert (cfg.num_classes, cfg.classifier, cfg.first_conv) == (0, None, None)
    assert cfg.input_size == (3, config.image_size, config.image_size)


def test_described_input_goes_through_the_network():
    model = timm.create_model(TINY).eval()
    images = random_images(1, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        assert model(images).shape == images.shape
    assert model.purify(random_images(1, 3, 30, 70), seed=0).shape == (1, 3, 30, 70)


def test_keyword_arguments_are_config_fields():
    model = timm.create_model(TINY, depth=3, out_indices=(0, 2), image_step=50)
    assert (model.config.depth, model.config.out_indices, model.config.image_step) == (3, (0, 2), 50)
    assert len(model.blocks) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dpeth": 3}, "dpeth"),
        ({"num_heads": 5}, "num_heads=5"),
        ({"in_chans": 1}, "'in_chans': 1"),
        ({"num_classes": 10}, "'num_classes': 10"),
        ({"global_pool": "avg"}, "'global_pool': 'avg'"),
        ({"features_only": True}, "features_only=True.*not supported"),
        ({"features_only": True, "out_indices": (0,)}, "features_only=True.*not supported"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused_by_name(options, words):
    with pytest.raises(ConfigError, match=words):
        timm.create_model(TINY, **options)


def test_wish_for_weights_that_are_not_shipped_says_what_to_do(shipped):
    with pytest.raises(
        MissingFileError, match=r"No weights are shipped for impure_base_patch16_224; .*pretrained=False"
    ):
        timm.create_model("impure_base_patch16_224", pretrained=True)


def test_shipped_weights_load_by_name_and_tag(shipped):
    for name, tag in ((TINY, "standard"), (f"{TINY}.standard", "standard"), (f"{TINY}.robust", "robust")):
        model = timm.create_model(name, pretrained=True)
        assert same_weights(model, shipped[tag])
        assert model.config == shipped[tag].config  # steps leave no trace in shapes: the stored config is taken
        assert model.pretrained_cfg["license"] == "apache-2.0"
    assert set(timm.list_models("impure*", pretrained=True)) == {f"{TINY}.robust", f"{TINY}.standard"}


def test_shipped_weights_give_the_same_picture_through_both_doors(shipped):
    images = random_images(1, 3, 40, 40)
    through_timm = timm.create_model(TINY, pretrained=True).purify(images, seed=0)
    assert torch.equal(through_timm, zoo.load(TINY).purify(images, seed=0))


def test_overrides_hold_for_shipped_weights_too(shipped):
    model = timm.create_model(TINY, pretrained=True, image_step=7)
    assert model.config.image_step == 7 and same_weights(model, shipped["standard"])
    with pytest.raises(CheckpointError, match=rf"{TINY}.standard.safetensors.*misses"):
        timm.create_model(TINY, pretrained=True, depth=5)


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_weights_of_ones_own_load_from_a_file(tmp_path, ending):
    model = tiny(4)
    path = tmp_path / f"own{ending}"
    if ending == ".pth":
        torch.save({"model": model.state_dict()}, path)
    else:
        checkpoints.save_safetensors(path, model.state_dict(), model.config)
    loaded = timm.create_model(TINY, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    assert same_weights(loaded, model)
    assert same_weights(timm.create_model(TINY, checkpoint_path=path), model)


def test_weights_in_memory_load():
    model = tiny(4)
    loaded = timm.create_model(TINY, pretrained=True, pretrained_cfg_overlay={"state_dict": model.state_dict()})
    assert loaded.load_report.missing == () and timm.create_model(TINY).load_report is None
    assert same_weights(loaded, model)


def test_file_that_is_missing_or_of_another_network_is_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"none.safetensors does not exist"):
        timm.create_model(TINY, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "none.safetensors")})
    torch.save({"conv1.weight": torch.zeros(8, 3, 7, 7)}, tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match=r"resnet.pth misses .* has extra conv1.weight"):
        timm.create_model(TINY, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "resnet.pth")})


def test_code_in_a_weights_file_is_never_run(tmp_path):
    marker = tmp_path / "ran"

    class Hostile:
        def __reduce__(self):
            return marker.mkdir, ()

    torch.save({"model": Hostile()}, tmp_path / "hostile.pth")
    with pytest.raises(CheckpointError, match="never run"):
        timm.create_model(TINY, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "hostile.pth")})
    assert not marker.exists()


def test_hub_id_is_asked_for_and_reported_offline():
    pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")
    with pytest.raises(MissingFileError, match="owner/none cannot be had"):
        timm.create_model(
            "impure_base_patch16_224", pretrained=True, pretrained_cfg_overlay={"hf_hub_id": "owner/none"}
        )


def test_unknown_tag_is_refused():
    with pytest.raises(RuntimeError, match="sharp"):
        timm.create_model(f"{TINY}.sharp", pretrained=True)


def test_models_of_timm_survive_pickling():
    model = timm.create_model(TINY)
    assert same_weights(pickle.loads(pickle.dumps(model)), model)
