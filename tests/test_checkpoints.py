"""Weights on disk: safetensors, the authors' .pth, folders and the hub; bad files are named and never run."""

import argparse
import json
import os
import pickle
import stat
import sys
from collections import OrderedDict

import pytest
import torch

from impure_fast import Error, IMPure, create_model, load, load_official
from impure_fast import checkpoints as ckpt
from impure_fast.config import PRESETS
from impure_fast.errors import CheckpointError, InputTypeError, MissingExtraError, MissingFileError
from impure_fast.images import write_atomically
from impure_fast.model import noise_schedule, sincos_table

from .conftest import SMALL, random_images, small_config, small_model

# A network whose heads have the released widths (64 and 32), so that shapes alone tell its config.
OFFICIAL = {
    "image_size": 32,
    "patch_size": 8,
    "embed_dim": 128,
    "depth": 3,
    "num_heads": 2,
    "decoder_embed_dim": 64,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "out_indices": (0, 2),
    "tile_size": 64,
    "tile_stride": 48,
}
TABLES = ["pos_embed", "decoder_pos_embed", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"]


def official_state(model, guides=0):
    """The model's weights as the authors' class stores them: with tables, schedule and guide networks."""
    c = model.config
    values = (sincos_table(c.embed_dim, c.table_side), sincos_table(c.decoder_embed_dim, c.table_side))
    tables = dict(zip(TABLES, (*values, *noise_schedule()), strict=True))
    if "noise" not in (c.image_mask, c.feature_mask):
        tables = {name: tables[name] for name in TABLES[:2]}
    extra = {f"hgds.{g}.features.0.weight": torch.zeros(2, 3) for g in range(guides)}
    return OrderedDict({**model.state_dict(), **tables, **extra})


def official_file(path, state, prefix="", **args):
    """The five entries of a released checkpoint."""
    options = argparse.Namespace(lr=1e-4, output_dir="out", distributed=True, **args)
    content = {"model": OrderedDict((prefix + k, v) for k, v in state.items()), "args": options}
    content |= {"optimizer": {"state": {}, "param_groups": [{"lr": 1e-4, "params": [0]}]}, "epoch": 99}
    torch.save({**content, "scaler": {"scale": 65536.0}}, path)
    return path


def same_weights(model, other):
    a, b = model.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------- safetensors


def test_safetensors_bring_back_config_and_weights(tmp_path):
    model = small_model(image_step=123)
    path = tmp_path / "deep" / "model.safetensors"
    ckpt.save_safetensors(path, model.state_dict(), model.config)
    config, state = ckpt.read_safetensors(path)
    assert config == model.config
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items()) and len(state) == len(
        model.state_dict()
    )
    loaded = load(path)
    assert same_weights(loaded, model) and loaded.config == model.config and not loaded.training
    images = random_images(1, 3, 24, 24)
    assert torch.equal(loaded.purify(images, seed=0), model.purify(images, seed=0))


def test_half_precision_files_load_as_fp32(tmp_path):
    model = small_model()
    ckpt.save_safetensors(tmp_path / "m.safetensors", model.state_dict(), SMALL, dtype=torch.float16)
    _, state = ckpt.read_safetensors(tmp_path / "m.safetensors")
    assert {v.dtype for v in state.values()} == {torch.float16}
    loaded = load(tmp_path / "m.safetensors").state_dict()
    assert {v.dtype for v in loaded.values()} == {torch.float32}
    assert all(torch.equal(loaded[k], v.half().float()) for k, v in model.state_dict().items())


def test_tables_are_never_written(tmp_path):
    ckpt.save_safetensors(tmp_path / "m.safetensors", small_model().state_dict(), SMALL)
    _, state = ckpt.read_safetensors(tmp_path / "m.safetensors")
    assert set(TABLES) & set(state) == set()


def test_safetensors_without_config_are_refused_by_load_and_read_by_load_official(tmp_path):
    from safetensors.torch import save_file

    model = IMPure(small_config(**OFFICIAL))
    save_file(dict(model.state_dict()), tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match=r"bare.safetensors carries no config.*load_official"):
        load(tmp_path / "bare.safetensors")
    assert same_weights(load_official(tmp_path / "bare.safetensors", model.config), model)


@pytest.mark.parametrize(
    ("stored", "word"), [("{", "config"), ("[1]", "config"), ('{"dpeth": 3}', "dpeth"), ('{"depth": 0}', "depth=0")]
)
def test_stored_config_that_cannot_be_is_refused_naming_the_file(tmp_path, stored, word):
    from safetensors.torch import save_file

    path = tmp_path / "odd.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"config": stored})
    with pytest.raises(CheckpointError, match=word) as caught:
        load(path)
    assert "odd.safetensors" in str(caught.value)


# ---------------------------------------------------------------------------------------- folders


def test_folder_brings_back_config_and_weights(tmp_path):
    model = small_model(feature_step=77)
    model.save_pretrained(tmp_path / "out", card="# A card\n")
    assert files_in(tmp_path / "out") == ["README.md", "config.json", "model.safetensors"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["feature_step"] == 77
    assert (tmp_path / "out" / "README.md").read_text() == "# A card\n"
    for loaded in (IMPure.from_pretrained(tmp_path / "out"), load(tmp_path / "out"), load(str(tmp_path / "out"))):
        assert same_weights(loaded, model) and loaded.config == model.config and not loaded.training


def test_folder_without_a_card_has_none(tmp_path):
    small_model().save_pretrained(tmp_path)
    assert files_in(tmp_path) == ["config.json", "model.safetensors"]


def test_config_beside_the_weights_is_used_where_they_carry_none(tmp_path):
    from safetensors.torch import save_file

    model = small_model(feature_step=77)
    model.save_pretrained(tmp_path)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    assert IMPure.from_pretrained(tmp_path).config == model.config
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"carries no config and no config.json"):
        IMPure.from_pretrained(tmp_path)


def test_folder_without_weights_is_reported(tmp_path):
    with pytest.raises(MissingFileError, match=r"model.safetensors does not exist"):
        IMPure.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------- the authors' files


@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "distributed"])
def test_official_checkpoint_loads_with_its_config_told_by_shapes(tmp_path, prefix):
    model = IMPure(small_config(**OFFICIAL))
    path = official_file(tmp_path / "released.pth", official_state(model, guides=2), prefix)
    loaded = load_official(path)
    assert loaded.config == model.config
    assert same_weights(loaded, model) and not loaded.training
    report = loaded.load_report
    assert sorted(report.dropped) == sorted([*TABLES, "hgds.0.features.0.weight", "hgds.1.features.0.weight"])
    assert (report.missing, report.unexpected) == ((), ())
    assert same_weights(load(path), model)  # load knows the ending


@pytest.mark.parametrize("as_file", [True, False], ids=["file", "dict"])
def test_bare_official_state_dict_loads(tmp_path, as_file):
    model = IMPure(small_config(**OFFICIAL))
    state = official_state(model)
    if as_file:
        torch.save(state, tmp_path / "bare.pth")
    loaded = load_official(tmp_path / "bare.pth" if as_file else state)
    assert loaded.config == model.config and same_weights(loaded, model)
    assert set(TABLES) <= set(state)  # the caller's dict is left alone


def test_loading_reports_dropped_keys_of_other_files_too(tmp_path):
    model = small_model()
    ckpt.save_safetensors(tmp_path / "m.safetensors", official_state(model), SMALL)
    assert sorted(load(tmp_path / "m.safetensors").load_report.dropped) == sorted(TABLES)


def test_tables_of_a_checkpoint_are_ignored():
    model = IMPure(small_config(**OFFICIAL))
    state = official_state(model)
    state["pos_embed"] = torch.full_like(state["pos_embed"], float("nan"))
    loaded = load_official(state)
    assert torch.equal(loaded.pos_embed, model.pos_embed)


@pytest.mark.parametrize("name", ["impure_base_patch16_224", "impure_base_patch16_224_dec384"])
def test_released_shapes_tell_the_released_config(name):
    with torch.device("meta"):
        state = official_state(create_model(name))
    assert ckpt.infer_config(state, {}, "released") == PRESETS[name]
    bare = {k: v for k, v in state.items() if k not in TABLES}  # without tables: the released 14 x 14 grid
    assert ckpt.infer_config(bare, {}, "released") == PRESETS[name]


@pytest.mark.parametrize("ratio", [3.0, 2.5, 8 / 3, 1.6])
def test_mlp_widths_are_told_by_shapes(ratio):
    # 704 * (1877 / 704) is just below 1877 in floating point
    wide = {"embed_dim": 704, "num_heads": 11, "depth": 1, "out_indices": (0,), "mlp_ratio": ratio}
    with torch.device("meta"):
        model = IMPure(small_config(**{**OFFICIAL, **wide}))
        found = IMPure(ckpt.infer_config(official_state(model), {}, "x"))
    assert {k: v.shape for k, v in found.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_checkpoint_without_schedule_is_of_plain_masking():
    model = IMPure(small_config(**OFFICIAL, image_mask="mask", feature_mask="mask"))
    loaded = load_official(official_state(model))
    assert (loaded.config.image_mask, loaded.config.feature_mask) == ("mask", "mask")


def test_stored_options_settle_what_shapes_cannot(tmp_path):
    config = small_config(**{**OFFICIAL, "num_heads": 8, "out_indices": (1, 2)}, image_mask="mask", pixel_conv=False)
    model = IMPure(config)
    stored = {"num_heads": 8, "out_indices": [1, 2], "img_mask": "mask", "use_conv": False, "random_mask": False}
    loaded = load_official(official_file(tmp_path / "a.pth", official_state(model), **stored))
    assert loaded.config == config  # the evaluation program's fixed order is an option, not a weight
    plain = official_file(tmp_path / "b.pth", official_state(model), num_heads=None)
    assert load_official(plain).config.num_heads == 2


def test_stored_options_of_another_kind_do_not_get_in_the_way(tmp_path):
    model = IMPure(small_config(**OFFICIAL))
    for args in ("--lr 1e-4", ["--lr"], None, 3):
        assert load_official({"model": official_state(model), "args": args}).config == model.config


def test_given_config_wins_over_shapes_and_options():
    config = small_config(**OFFICIAL, image_step=5)
    loaded = load_official(official_state(IMPure(small_config(**OFFICIAL))), config=config)
    assert loaded.config == config


# ---------------------------------------------------------------------------------------- keys and values


def test_missing_and_unexpected_keys_are_named_with_the_file(tmp_path):
    state = official_state(IMPure(small_config(**OFFICIAL)))
    del state["norm.weight"]
    state["head.bias"] = torch.zeros(3)
    path = official_file(tmp_path / "changed.pth", state)
    with pytest.raises(CheckpointError) as caught:
        load_official(path)
    words = [str(path), "misses norm.weight", "extra head.bias", "strict=False"]
    assert [word for word in words if word not in str(caught.value)] == []


def test_not_strict_loads_what_fits_and_reports_the_rest():
    model = IMPure(small_config(**OFFICIAL))
    state = official_state(model)
    with torch.no_grad():
        state["cls_token"] = state["cls_token"] + 1
    del state["norm.weight"]
    state["head.bias"] = torch.zeros(3)
    loaded = load_official(state, strict=False)
    assert loaded.load_report.missing == ("norm.weight",)
    assert loaded.load_report.unexpected == ("head.bias",)
    assert torch.equal(loaded.cls_token, state["cls_token"])


def test_many_keys_are_counted_not_listed():
    state = official_state(IMPure(small_config(**OFFICIAL)))
    for name in [name for name in state if name.startswith("blocks.1.")]:
        del state[name]
    with pytest.raises(CheckpointError, match=r"misses blocks.1.norm1.weight, .* and 8 more"):
        load_official(state)


@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_another_shape_are_refused_naming_key_and_shapes(strict):
    state = official_state(IMPure(small_config(**OFFICIAL)))
    state["decoder_pred.weight"] = torch.zeros(192, 63)
    with pytest.raises(CheckpointError, match=r"decoder_pred.weight: shape \(192, 63\), wanted \(192, 64\)"):
        load_official(state, strict=strict)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(value, tmp_path):
    state = dict(small_model().state_dict())
    state["blocks.1.mlp.fc1.weight"] = state["blocks.1.mlp.fc1.weight"].clone()
    state["blocks.1.mlp.fc1.weight"][3, 4] = value
    ckpt.save_safetensors(tmp_path / "m.safetensors", state, SMALL)
    with pytest.raises(CheckpointError, match=r"m.safetensors: blocks.1.mlp.fc1.weight holds NaN or infinite"):
        load(tmp_path / "m.safetensors")


RESNET = {"conv1.weight": (8, 3, 7, 7), "bn1.weight": (8,), "layer1.0.conv1.weight": (8, 8, 3, 3), "fc.weight": (10, 8)}
TIMM_VIT = {"patch_embed.proj.weight": (128, 3, 8, 8), "cls_token": (1, 1, 128), "blocks.0.mlp.fc1.weight": (512, 128)}


@pytest.mark.parametrize("shapes", [RESNET, TIMM_VIT], ids=["resnet", "vit"])
def test_another_architecture_is_refused(tmp_path, shapes):
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other.pth is no IMPure checkpoint: .* missing"):
        load_official(tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other.pth( misses .* has extra|: .* of another config)"):
        load_official(tmp_path / "other.pth", config=SMALL)


def test_weights_without_axes_are_refused():
    state = official_state(IMPure(small_config(**OFFICIAL)))
    state["proj_weights"] = torch.tensor(1.0)
    with pytest.raises(CheckpointError, match="proj_weights|is no IMPure checkpoint"):
        load_official(state)


def test_shapes_that_no_config_fits_are_refused():
    state = official_state(IMPure(small_config(**OFFICIAL)))
    state["decoder_head_embed.weight"] = torch.zeros(64, 64)  # less than one chunk
    with pytest.raises(CheckpointError, match=r"no config fits its shapes \(num_chunks=1.*pass config="):
        load_official(state)


# ---------------------------------------------------------------------------------------- damaged and hostile files


@pytest.mark.parametrize("name", ["none.pth", "none.pt", "none.safetensors", "no/folder/none.safetensors"])
def test_missing_file_is_named(tmp_path, name):
    path = tmp_path / name
    for function in (load, load_official):
        with pytest.raises(FileNotFoundError, match="none") as caught:
            function(path)
        assert isinstance(caught.value, MissingFileError) and isinstance(caught.value, Error)


def damaged(path, kind):
    """A file of the ending's format with one thing wrong."""
    state = small_model().state_dict()
    if path.suffix == ".safetensors":
        ckpt.save_safetensors(path, state, SMALL)
    else:
        official_file(path, state)
    content = path.read_bytes()
    header = (2**60).to_bytes(8, "little")
    wrong = {
        "truncated": content[: len(content) // 2],
        "last byte gone": content[:-1],
        "only a start": content[:20],
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n",
        "empty": b"",
        "huge header": header + content[8:],
        "noise": bytes(range(256)) * 8,
    }
    path.write_bytes(wrong[kind])
    return path


@pytest.mark.parametrize(
    "kind", ["truncated", "last byte gone", "only a start", "text", "empty", "huge header", "noise"]
)
@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_damaged_file_is_refused_naming_it(tmp_path, ending, kind):
    path = damaged(tmp_path / f"damaged{ending}", kind)
    for function in (load, load_official):
        with pytest.raises(CheckpointError, match="damaged"):
            function(path)


def test_file_of_no_known_ending_is_read_as_safetensors(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match=r"weights.bin is no readable safetensors file"):
        load(tmp_path / "weights.bin")


class Hostile:
    """Makes a folder when unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


HOSTILE = {
    "beside the weights": lambda path, bad: torch.save({"model": {"x": torch.zeros(1)}, "args": bad}, path),
    "as the weights": lambda path, bad: torch.save({"model": bad}, path),
    "legacy format": lambda path, bad: torch.save([bad], path, _use_new_zipfile_serialization=False),
    "bare pickle": lambda path, bad: path.write_bytes(pickle.dumps(bad, protocol=2)),
}


@pytest.mark.parametrize("way", HOSTILE)
@pytest.mark.parametrize("function", [load, load_official])
def test_code_in_a_checkpoint_is_never_run(tmp_path, way, function):
    path, marker = tmp_path / "hostile.pth", tmp_path / "ran"
    HOSTILE[way](path, Hostile(marker))
    with pytest.raises(CheckpointError, match=r"hostile.pth holds no plain weights \(code in it is never run\)"):
        function(path)
    assert not marker.exists()


def test_the_hostile_file_would_run_if_it_were_unpickled(tmp_path):
    path, marker = tmp_path / "hostile.pth", tmp_path / "ran"
    HOSTILE["as the weights"](path, Hostile(marker))
    torch.load(path, weights_only=False)
    assert marker.exists()


CONTENTS = {
    "a list": [torch.zeros(1)],
    "nothing": {},
    "numbers": {"epoch": 3},
    "no weights": {"model": {}},
    "weights and numbers": {"model": {"x": torch.zeros(1), "epoch": 3}},
    "numbered weights": {0: torch.zeros(1)},
    "a tensor": torch.zeros(3),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_contents_that_are_no_state_dict_are_refused(tmp_path, kind):
    torch.save(CONTENTS[kind], tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"odd.pth is no checkpoint: wanted a state dict"):
        load_official(tmp_path / "odd.pth")


def test_the_state_of_a_training_run_names_the_weights_beside_it(tmp_path):
    torch.save({"step": 3, "model": {"x": torch.zeros(1)}, "optimizer": {}, "average": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(
        CheckpointError, match=r"checkpoint.pt is the state of a training run; its weights are model.safetensors"
    ):
        load_official(tmp_path / "checkpoint.pt")


def test_given_dict_that_is_no_state_dict_is_refused():
    with pytest.raises(CheckpointError, match="the given state dict is no checkpoint"):
        load_official({"epoch": 3})


@pytest.mark.parametrize("given", [3, None, [torch.zeros(1)]], ids=repr)
def test_neither_path_nor_dict_is_refused(given):
    with pytest.raises(InputTypeError, match=f"not {type(given).__name__}"):
        load_official(given)


# ---------------------------------------------------------------------------------------- writing


def test_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    ckpt.save_safetensors(path, small_model().state_dict(), SMALL)
    before = path.read_bytes()

    def half_written(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ckpt, "save_file", half_written)
    with pytest.raises(CheckpointError, match=r"m.safetensors cannot be written: .*No space left"):
        ckpt.save_safetensors(path, small_model(1).state_dict(), SMALL)
    assert path.read_bytes() == before and files_in(tmp_path) == ["m.safetensors"]
    with pytest.raises(CheckpointError, match=r"new.safetensors cannot be written"):
        ckpt.save_safetensors(tmp_path / "new.safetensors", small_model().state_dict(), SMALL)
    assert files_in(tmp_path) == ["m.safetensors"]


def test_interrupted_write_leaves_nothing(tmp_path):
    def interrupted(temporary):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "x.json", interrupted)
    assert files_in(tmp_path) == []


def test_written_files_have_ordinary_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        ckpt.save_safetensors(tmp_path / "m.safetensors", small_model().state_dict(), SMALL)
        assert os.umask(0o027) == 0o027  # asking for the mask does not change it
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "m.safetensors").stat().st_mode) == 0o640


# ---------------------------------------------------------------------------------------- the hub

BAD_IDS = ["no_owner", "a/b/c", "owner/", "/name", "owner/na me", "https://hf.co/a/b", "../x/y"]


@pytest.mark.parametrize("name", BAD_IDS)
def test_malformed_hub_id_is_refused_without_asking_the_hub(hub, monkeypatch, name):
    monkeypatch.setattr(hub, "hf_hub_download", lambda *args, **kwargs: pytest.fail("the hub was asked"))
    with pytest.raises(MissingFileError, match="neither a folder nor a hub id"):
        IMPure.from_pretrained(name)


def test_without_a_network_the_hub_id_is_reported(hub, tmp_path):
    with pytest.raises(MissingFileError, match="model.safetensors of the hub repository owner/name cannot be had"):
        IMPure.from_pretrained("owner/name", cache_dir=tmp_path)


def test_failing_hub_is_reported_with_its_reason(hub, monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("401 Unauthorized")

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    with pytest.raises(MissingFileError, match="owner/name cannot be had: 401 Unauthorized"):
        load("owner/name")


def test_hub_id_loads_what_the_hub_gives(hub, monkeypatch, tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    asked = []

    def give(repo_id, file, **options):
        asked.append((repo_id, file, options))
        return str(tmp_path / file)

    monkeypatch.setattr(hub, "hf_hub_download", give)
    assert same_weights(IMPure.from_pretrained("owner/name", revision="v1"), model)
    assert same_weights(load("owner/name"), model)
    assert asked == [
        ("owner/name", "model.safetensors", {"revision": "v1"}),
        ("owner/name", "model.safetensors", {}),
    ]


def test_push_uploads_the_folder(hub, monkeypatch):
    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options))

        def upload_folder(self, *, repo_id, folder_path, **options):
            calls.append(("upload", repo_id, sorted(os.listdir(folder_path)), options))

    monkeypatch.setattr(hub, "HfApi", Api)
    small_model().push_to_hub("owner/name", card="# card", token="t", private=True, commit_message="first")
    assert calls == [
        ("token", "t"),
        ("create", "owner/name", {"exist_ok": True, "private": True}),
        ("upload", "owner/name", ["README.md", "config.json", "model.safetensors"], {"commit_message": "first"}),
    ]


def test_hub_without_its_extra_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r'pip install "impure-fast\[hub\]"'):
        IMPure.from_pretrained("owner/name")
