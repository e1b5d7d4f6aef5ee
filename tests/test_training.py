"""The training loop on a toy network: what it learns from, what it refuses, and that it resumes exactly."""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from impure_fast import Error, IMPure, IMPureConfig, PurifiedClassifier
from impure_fast import config as config_module
from impure_fast.checkpoints import save_safetensors
from impure_fast.classifiers import Normalised
from impure_fast.draws import MixDraws
from impure_fast.errors import CheckpointError, ConfigError, InputError, MissingExtraError, MissingFileError
from impure_fast.images import PackedImages
from impure_fast.memory import POLICIES, kept_by
from impure_fast.ops.patch_mix import mix_mask
from impure_fast.training import loop
from impure_fast.training.config import FROZEN, RECIPES, TrainConfig
from impure_fast.training.data import Batches, adversarial_pairs, stored_pairs
from impure_fast.training.guide import Guide
from impure_fast.training.loop import (
    Networks,
    Objective,
    attack,
    draw,
    from_tiles,
    gradients,
    learning_rate,
    make_optimizer,
    step_losses,
    to_tiles,
    train,
)
from impure_fast.training.losses import lpips_network
from impure_fast.training.plan import blocks_of, count_kept, plan, size_of

TOY = IMPureConfig(
    image_size=8,
    patch_size=4,
    embed_dim=16,
    depth=1,
    num_heads=2,
    decoder_embed_dim=16,
    decoder_depth=1,
    decoder_num_heads=2,
    out_indices=(0,),
    tile_size=16,
    tile_stride=16,
)


OPTIONS = dict(
    **dict(steps=6, batch=2, crop=32, view=40, pairs=8, held_out=2, warmup=2, save_every=100),
    **dict(guide_nodes=("0", "4"), guide_weights=(1.0, 0.5)),
)


def toy_classifier():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    return Normalised(network, (0.5,) * 3, (0.5,) * 3).eval().requires_grad_(False)


@pytest.fixture
def classifier():
    return toy_classifier()


@pytest.fixture
def settings(monkeypatch):
    monkeypatch.setitem(config_module.PRESETS, "toy", TOY)
    return TrainConfig(model="toy", **OPTIONS)


@pytest.fixture
def packed(tmp_path):
    rng = np.random.default_rng(0)
    files = []
    for _ in range(10):
        buffer = io.BytesIO()
        low = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
        Image.fromarray(low).resize((60, 50), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        files.append(np.frombuffer(buffer.getvalue(), np.uint8))
    path = tmp_path / "data.npz"
    offsets = np.cumsum([0, *map(len, files)])
    np.savez(path, jpeg=np.concatenate(files), offsets=offsets, labels=np.full(10, -1))
    return path


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def terminate_at(step):
    def progress(phase, done, total, figures):
        if phase == "train" and done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return progress


def test_a_run_stopped_by_sigterm_goes_on_to_the_same_weights(settings, packed, classifier, tmp_path):
    assert train(settings, packed, tmp_path / "whole", classifier)
    assert not train(settings, packed, tmp_path / "cut", classifier, progress=terminate_at(3))
    assert train(settings, packed, tmp_path / "cut", classifier)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(6))
    assert (tmp_path / "cut" / "curves.png").stat().st_size > 0
    assert (tmp_path / "cut" / "model.safetensors").stat().st_size > 0


def test_training_lowers_the_loss(settings, packed, classifier, tmp_path):
    figures = []
    longer = dataclasses.replace(settings, steps=100, lr=1e-2)
    train(longer, packed, tmp_path / "run", classifier, progress=lambda p, d, t, f: figures.append(f.get("loss")))
    losses = [x for x in figures if x is not None]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])


def test_another_config_in_the_same_folder_is_refused(settings, packed, classifier, tmp_path):
    train(dataclasses.replace(settings, steps=1), packed, tmp_path / "run", classifier)
    with pytest.raises(ConfigError, match="run of another config"):
        train(dataclasses.replace(settings, steps=1, lr=1.0), packed, tmp_path / "run", classifier)


def test_a_damaged_checkpoint_is_named(settings, packed, classifier, tmp_path):
    train(dataclasses.replace(settings, steps=1), packed, tmp_path / "run", classifier)
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(CheckpointError, match=r"checkpoint.pt cannot be resumed from"):
        train(dataclasses.replace(settings, steps=1), packed, tmp_path / "run", classifier)


def test_learned_weights_are_scales_of_laplace_noise(settings, classifier):
    config = dataclasses.replace(settings, learned_weights=True)
    objective = Objective(Networks.make(config, classifier), config)
    images, clean = torch.rand(2, 2, 3, 32, 32)
    plain = gradients(Objective(objective.networks, settings), settings, (images, clean), step=0)
    names = ["pix", "hgd0_loss", "hgd1_loss"]
    terms, scales = torch.stack([plain[name] for name in names]), torch.tensor([0.5, -1.0, 0.0])
    assert gradients(objective, config, (images, clean), step=0)["loss"] == pytest.approx(plain["loss"])

    objective.log_scales.data.copy_(scales)
    objective.zero_grad()
    figures = gradients(objective, config, (images, clean), step=0)
    assert figures["loss"] == pytest.approx((terms / scales.exp() + scales).sum())
    assert [figures[f"{name}_weight"] for name in names] == pytest.approx((1 / scales.exp()).tolist())
    torch.testing.assert_close(objective.log_scales.grad, 1 - terms / scales.exp())
    decayed, free = make_optimizer(objective, config).param_groups
    assert any(p is objective.log_scales for p in free["params"])
    assert not any(p is objective.log_scales for p in decayed["params"])


def test_tensorboard_holds_the_log_once_whatever_was_cut(settings, packed, classifier, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = dataclasses.replace(settings, tensorboard=True, save_every=2)

    class CutError(Exception):
        pass

    def cut(phase, done, total, figures):
        if done == 3 and phase == "train":
            raise CutError

    with pytest.raises(CutError):
        train(settings, packed, tmp_path / "run", classifier, progress=cut)
    assert train(settings, packed, tmp_path / "run", classifier)
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    rows = log_of(tmp_path / "run")
    assert set(events.Tags()["scalars"]) == set(rows[0]) - {"step"}
    scalars = [(event.step, event.value) for event in events.Scalars("pix")]
    assert scalars == [(row["step"], pytest.approx(row["pix"], rel=1e-5)) for row in rows]


def test_moments_of_8_bits_are_planned_saved_and_resumed(settings, packed, classifier, tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.setattr("torch.compile", lambda function, **options: function)  # which takes a minute for every shape
    monkeypatch.setitem(config_module.PRESETS, "toy", dataclasses.replace(TOY, embed_dim=64, decoder_embed_dim=64))
    config = dataclasses.replace(settings, optimizer="adamw8bit")
    for name, end in (("whole", None), ("cut", 3), ("cut", None)):
        train(config, packed, tmp_path / name, classifier, progress=terminate_at(end))
    assert log_of(tmp_path / "whole")[-1]["pix"] == log_of(tmp_path / "cut")[-1]["pix"]
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    networks = Networks.make(config, classifier)
    networks.model.mask_token.requires_grad_(False)  # it is never used, so it has no moments
    moments = torch.load(tmp_path / "whole" / "checkpoint.pt")["optimizer"]["state"].values()
    stored = [m for state in moments for name in ("exp_avg", "exp_avg_sq") if (m := state[name]) is not None]
    parts = [[m.codes, m.scale, m.qmap] if hasattr(m, "codes") else [m] for m in stored]
    assert any(len(part) == 3 for part in parts)
    ledger = plan(networks, config)
    assert ledger.fixed["optimizer"] == size_of(sum(parts, []))
    assert ledger.fixed["optimizer"] < 0.5 * ledger.optimizers["adamw"]


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.json")), ids=lambda path: path.stem)
def test_every_recipe_is_a_config_by_its_name(recipe, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig.from_file(recipe.stem, steps=7)
    assert config == dataclasses.replace(TrainConfig.from_file(recipe), steps=7)
    if recipe.stem.startswith("impure_base"):  # the authors' rule (SPEC section 6)
        assert config.lr == pytest.approx(1e-4 * np.mean(config.batches) / 256, rel=1e-3)


def test_a_recipe_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing is no file .* and no recipe: impure_base_adversarial, "):
        TrainConfig.from_file("nothing")


def test_what_accelerate_cannot_do_here_is_refused(settings, packed, classifier, tmp_path, monkeypatch):
    from accelerate import Accelerator, DistributedType

    config = dataclasses.replace(settings, optimizer="adamw8bit")
    with monkeypatch.context() as patch:
        sharded = SimpleNamespace(process_index=0, num_processes=1, is_fsdp2=True)
        patch.setattr(loop, "_accelerator", lambda device: sharded)
        with pytest.raises(ConfigError, match="FSDP shards moments already"):
            train(config, packed, tmp_path / "run", classifier)
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
        with pytest.raises(
            ConfigError, match="configured for FSDP: choose one process, DDP or FSDP with fsdp_version 2"
        ):
            train(settings, packed, tmp_path / "run", classifier)
    for package, changes, message in (
        ("accelerate", {}, "Training needs"),
        ("torchao.optim", {"optimizer": "adamw8bit"}, "optimizer='adamw8bit' needs"),
        ("torch.utils.tensorboard", {"tensorboard": True}, "tensorboard=True needs"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(MissingExtraError, match=f'{message} the extra "train"'):
                train(dataclasses.replace(settings, **changes), packed, tmp_path / package, classifier)


def test_a_loss_that_is_not_finite_stops_the_run(settings, packed, classifier, tmp_path):
    with pytest.raises(Error, match=r"The loss is nan at step 0, pairs \[\d, \d\]: "):
        train(dataclasses.replace(settings, pixel_weight=float("nan")), packed, tmp_path / "run", classifier)


def test_the_weights_are_written_before_the_step_that_promises_them(
    settings, packed, classifier, tmp_path, monkeypatch
):
    def full(path, write):
        raise OSError("no space left")

    monkeypatch.setattr(loop, "write_atomically", full)  # of the checkpoint alone
    with pytest.raises(OSError, match="no space left"):
        train(dataclasses.replace(settings, steps=1, save_every=1), packed, tmp_path / "run", classifier)
    assert (tmp_path / "run" / "model.safetensors").exists() and not (tmp_path / "run" / "checkpoint.pt").exists()


def test_other_pictures_are_no_continuation(settings, packed, classifier, tmp_path):
    options = dict(count=4, side=24, seed=0)
    images = PackedImages(packed)
    adversarial_pairs(tmp_path, images, classifier, **options)
    images._jpeg = images._jpeg.copy()
    images._jpeg[-1] ^= 1
    with pytest.raises(InputError, match="pairs of another recipe"):
        adversarial_pairs(tmp_path, images, classifier, **options)


def test_a_loaders_process_outlives_sigterm():
    process = multiprocessing.get_context("fork").Process(target=lambda: (loop._outlive(0), os.kill(os.getpid(), 15)))
    process.start()
    process.join(10)
    assert process.exitcode == 0


def test_missing_and_foreign_data_are_named(tmp_path):
    with pytest.raises(MissingFileError, match="does not exist"):
        PackedImages(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", a=1)
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:100])
    for name in ("other", "empty", "cut"):
        with pytest.raises(InputError, match="no packed image file"):
            PackedImages(tmp_path / f"{name}.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop": 24}, "crop=24: must be a multiple of the tile"),
        ({"crop": 48}, "of at most view=40"),
        ({"crop": 10}, "crop=10: must give patches of 4, in 4s"),
        ({"crops": ((16, 2), (12, 2))}, "crop=12: must give patches of 4, in 4s"),
        ({"guide_weights": (1.0,)}, "give one for each of guide_nodes"),
        ({"accumulate": 3}, "accumulate=3: must divide batch=2"),
        ({"steps": "6"}, "steps='6': must be int"),
        ({"crops": ((32, 2, 1),)}, r"crops=\(\(32, 2, 1\),\): must be tuple\[tuple\[int, int\], ...\]"),
        ({"init": 1}, r"init=1: must be str \| None"),
        ({"pairs": 1}, "pairs=1: must be at least the batch, 2"),
        ({"cycles": 0}, "cycles=0: must be at least 1"),
        ({"optimizer": "sgd"}, "optimizer='sgd': must be adamw or adamw8bit"),
        ({"precision": "fp8"}, "precision='fp8': must be bf16 or fp32"),
        ({"memory": "least"}, "memory='least': wanted one of all, default, tight, minimal"),
        ({"freeze": "head"}, "freeze='head': must be empty, encoder or decoder"),
        ({"lpips_trunk": "resnet"}, "lpips_trunk='resnet': must be one of alex, squeeze, vgg"),
        ({"mix_chunks": 1}, "mix_chunks=1: must be 0 or at least 2"),
        ({"model": "nothing"}, "model='nothing': known presets"),
        ({"network": {"width": 96}}, r"Unknown config fields \['width'\]"),
        ({"network": {"depth": 0}}, "depth=0: must be at least one block"),
        ({"network": [1]}, r"network=\(1,\): must be dict\[str, Any\]"),
    ],
)
def test_impossible_settings_are_refused(settings, change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(settings, **change)


def test_a_run_may_change_the_preset_s_network(settings, classifier, tmp_path):
    model = loop.Networks.make(dataclasses.replace(settings, network={"embed_dim": 24}), classifier).model
    assert (model.config.embed_dim, model.config.depth) == (24, TOY.depth)
    (tmp_path / "wide.json").write_text(json.dumps({"network": {"embed_dim": 24, "out_indices": [0]}}))
    network = TrainConfig.from_file(tmp_path / "wide.json").model_config
    assert (network.embed_dim, network.out_indices, network.patch_size) == (24, (0,), 4)


def test_a_guide_node_that_does_not_exist_is_named(classifier):
    with pytest.raises(ConfigError, match="network.9"):
        Guide(classifier, ["network.9"])


class Normed(nn.Module):
    """Convolutions with batch norms that have seen data, an activation in place, and a head."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.act = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.conv2, self.bn2, self.head = nn.Conv2d(8, 8, 3, 2), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.unused, self.heads = nn.Identity(), 0

    def forward(self, x):
        x = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        self.heads += 1
        return self.head(x)


@pytest.fixture
def normed():
    torch.manual_seed(0)
    network = Normed()
    for _ in range(3):
        network(torch.rand(4, 3, 20, 20))
    return network.eval()


def test_guide_features_are_the_modules_outputs(normed):
    x = torch.rand(2, 3, 16, 16)
    features = Guide(normed, ["bn2", "conv1", "bn1"])(x)
    assert list(features) == ["bn2", "conv1", "bn1"]
    torch.testing.assert_close(features["conv1"], normed.conv1(x))
    torch.testing.assert_close(features["bn1"], first := normed.bn1(normed.conv1(x)))
    torch.testing.assert_close(features["bn2"], normed.bn2(normed.conv2(normed.act(first))))


def test_a_guide_takes_the_runs_pictures_alone(settings):
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Flatten(), nn.Linear(4 * 15 * 15, 5))  # 32 pixels, no other
    nodes = dict(guide_nodes=("0", "2"), guide_weights=(1.0, 1.0))
    assert Networks.make(dataclasses.replace(settings, **nodes), network).guide.nodes == ("0", "2")


def test_a_guide_leaves_after_its_last_node(normed):
    guide = Guide(normed, ["act", "bn1"])
    before = guide.network.heads
    guide(torch.rand(1, 3, 16, 16))
    assert guide.network.heads == before
    assert list(normed.state_dict()) != list(guide.network.state_dict())  # the caller's network is left alone


def test_a_folded_guide_keeps_less_for_backward(normed):
    x = torch.rand(2, 3, 64, 64, requires_grad=True)
    kept = []
    for network in (Guide(normed, ["bn2"]), normed.requires_grad_(False)):
        with count_kept({}, [*normed.parameters(), *normed.buffers(), x]) as counted:
            network(x)
        kept.append(sum(counted.values()))
    assert kept[0] < 0.6 * kept[1]


def test_a_guide_node_that_is_never_called_is_named(normed):
    with pytest.raises(ConfigError, match=r"\['unused'\] are never called"):
        Guide(normed, ["bn1", "unused"])(torch.rand(1, 3, 16, 16))


def test_pairs_change_pixels_and_stay_within_eps(packed, classifier, tmp_path):
    pairs = adversarial_pairs(tmp_path, PackedImages(packed), classifier, count=8, side=40, seed=1, batch=4)
    change = pairs.adversarial.astype(int) - pairs.clean
    assert 0 < np.abs(change).max() <= 14


def test_pairs_cut_in_the_middle_are_finished_alike(packed, classifier, tmp_path):
    class CutError(Exception):
        pass

    def cut(done, total):
        raise CutError

    options = dict(count=8, side=40, seed=1, batch=4)
    images = PackedImages(packed)
    whole = adversarial_pairs(tmp_path / "whole", images, classifier, **options)
    with pytest.raises(CutError):
        adversarial_pairs(tmp_path / "cut", images, classifier, progress=cut, **options)
    resumed = adversarial_pairs(tmp_path / "cut", images, classifier, **options)
    assert np.array_equal(whole.clean, resumed.clean)
    assert np.array_equal(whole.adversarial, resumed.adversarial)
    with pytest.raises(InputError, match="pairs of another recipe"):
        adversarial_pairs(tmp_path / "cut", images, classifier, **{**options, "seed": 2})


@pytest.fixture
def attacked_elsewhere(tmp_path):
    """{key: (clean, adversarial)} and how to store it; the adversarial picture is the clean one turned by 128."""
    rng = np.random.default_rng(1)
    clean = {f"set/{i:03d}": rng.integers(0, 256, (44, 48, 3), dtype=np.uint8) for i in range(6)}

    def png(rgb):
        Image.fromarray(rgb).save(buffer := io.BytesIO(), "PNG")
        return buffer.getvalue()

    def store(shards):
        source = tmp_path / "source"
        source.mkdir()
        for i, (key, rgb) in enumerate(clean.items()):
            if shards:
                with tarfile.open(source / f"{i // 4:06d}.tar", "a") as tar:
                    for kind, data in (("adv.png", png(rgb ^ 128)), ("clean.jpg", png(rgb)), ("cls", b"7")):
                        (member := tarfile.TarInfo(f"{key}.{kind}")).size = len(data)
                        tar.addfile(member, io.BytesIO(data))
            else:
                for folder, picture in (("adv", rgb ^ 128), ("clean", rgb)):
                    (path := source / folder / f"{key}.png").parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(png(picture))
        return source

    return list(clean.values()), store


@pytest.mark.parametrize("shards", [True, False], ids=["shards", "folders"])
def test_pairs_attacked_elsewhere_are_cut_alike(attacked_elsewhere, tmp_path, shards):
    clean, store = attacked_elsewhere
    source, options = store(shards), dict(count=6, side=40, seed=3)
    pairs = stored_pairs(tmp_path / "pairs", source, **options)
    assert np.array_equal(pairs.adversarial, pairs.clean ^ 128)
    for picture, view in zip(clean, pairs.clean, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(picture, (40, 40, 3))[:, :, 0]
        assert (windows == view).all(axis=(2, 3, 4)).sum() == 1
    again = stored_pairs(tmp_path / "pairs", tmp_path / "source", **options)
    assert np.array_equal(again.clean, pairs.clean)
    with pytest.raises(InputError, match=r"holds 6 pairs; pairs=7 asks for more"):
        stored_pairs(tmp_path / "more", source, count=7, side=40, seed=3)
    with pytest.raises(InputError, match=r"000.*: clean \(44, 48\), adv \(44, 48\); wanted one size from 45"):
        stored_pairs(tmp_path / "large", source, count=6, side=45, seed=3)


def test_a_damaged_pair_is_named(attacked_elsewhere, tmp_path):
    source = attacked_elsewhere[1](False)
    (source / "adv" / "set" / "002.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"002.png holds a picture that cannot be read"):
        stored_pairs(tmp_path / "pairs", source, count=6, side=40, seed=3)


def test_a_run_trains_on_pairs_attacked_elsewhere(settings, attacked_elsewhere, classifier, tmp_path):
    source = attacked_elsewhere[1](True)
    assert train(dataclasses.replace(settings, pairs=6), source, tmp_path / "run", classifier)
    assert len(log_of(tmp_path / "run")) == settings.steps


def test_batches_are_a_function_of_seed_and_step(settings, packed, classifier, tmp_path):
    pairs = adversarial_pairs(tmp_path, PackedImages(packed), classifier, count=8, side=40, seed=1)
    config = dataclasses.replace(settings, batch=4, adversarial=0.5, noisy=0.2)
    whole = Batches(pairs, config)
    keys, inputs, clean = whole[5]
    shares = [Batches(pairs, config, rank, 2)[5] for rank in range(2)]
    assert [share[0] for share in shares] == [keys, keys]
    assert torch.equal(torch.cat([share[1] for share in shares]), inputs)
    assert torch.equal(torch.cat([share[2] for share in shares]), clean)
    assert inputs.min() >= 0 and inputs.max() <= 1
    assert sorted(whole[2][0] + whole[3][0]) == list(range(8))


def test_inputs_carry_their_perturbation_at_the_strength(settings, packed, classifier, tmp_path):
    pairs = adversarial_pairs(tmp_path, PackedImages(packed), classifier, count=8, side=32, seed=1)
    for strength in (1.0, 0.5):
        options = dict(batch=8, crop=32, view=32, adversarial=1.0, noisy=0.0, strength=(strength, strength))
        places, inputs, clean = Batches(pairs, dataclasses.replace(settings, **options))[0]
        stored = [torch.from_numpy(x[places]).permute(0, 3, 1, 2) / 255 for x in (pairs.clean, pairs.adversarial)]
        mirrored = torch.tensor([not torch.equal(x, y) for x, y in zip(clean, stored[0], strict=True)])
        wanted, attacked = (torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x) for x in stored)
        assert torch.equal(clean, wanted) and 0 < mirrored.sum() < 8
        torch.testing.assert_close(inputs, wanted + strength * (attacked - wanted))


def test_tiles_go_out_and_back():
    pictures = torch.rand(2, 3, 32, 32)
    tiles = to_tiles(pictures, 16)
    assert torch.equal(tiles[1], pictures[0, :, :16, 16:])
    assert torch.equal(from_tiles(tiles, 2, 32), pictures)


def test_learning_rate_warms_up_and_falls_to_zero(settings):
    rates = [learning_rate(settings, step) for step in range(settings.steps + 1)]
    assert rates[0] == settings.lr / 2
    assert rates[1] == rates[2] == settings.lr
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert all(a > b for a, b in zip(rates[2:], rates[3:], strict=False))


def test_cosine_cycles_restart_without_a_warm_up(settings):
    settings = dataclasses.replace(settings, steps=32, warmup=2, cycles=3)
    rates = [learning_rate(settings, step) for step in range(33)]
    assert rates[2] == rates[12] == rates[22] == settings.lr
    assert max(rates[11], rates[21], rates[31]) < 0.03 * settings.lr
    assert rates[2:12] == pytest.approx(rates[12:22])


def test_weight_decay_reaches_the_authors_tensors():
    """93 decayed and 176 undecayed tensors in the released model (SPEC section 6)."""
    with torch.device("meta"):
        groups = make_optimizer(IMPure(IMPureConfig()), TrainConfig(weight_decay=0.05)).param_groups
    assert [len(g["params"]) for g in groups] == [93, 176]
    assert [g["weight_decay"] for g in groups] == [0.05, 0.0]


def test_loss_terms_depend_on_the_mixing_switch(settings, classifier):
    networks = Networks.make(settings, classifier)
    images, clean = torch.rand(2, 2, 3, 32, 32)
    mixed, alone = (
        step_losses(networks, config, images, clean, *draw(config, TOY, range(2), 0))
        for config in (settings, dataclasses.replace(settings, mix_chunks=0))
    )
    assert list(mixed) == ["pix", "hgd0_loss", "hgd1_loss"]
    assert mixed["pix"] == alone["pix"]
    assert mixed["hgd0_loss"] != alone["hgd0_loss"]


@pytest.mark.parametrize("memory", sorted(POLICIES))
def test_the_plan_says_what_a_step_keeps(settings, memory):
    config = dataclasses.replace(settings, memory=memory, ema=0.9)
    networks = Networks.make(config, toy_classifier())
    model, guide, ledger = networks.model, networks.guide, plan(networks, config)
    assert model.kept == kept_by(memory)
    sizes = [4 * p.numel() for p in model.parameters()]
    assert ledger.fixed["gradients"] == ledger.fixed["running average"] == ledger.fixed["optimizer"] / 2 == sum(sizes)

    images, clean = torch.rand(2, config.batch, 3, config.crop, config.crop)
    owned = [t for m in (model, guide.network) for t in (*m.parameters(), *m.buffers())]
    with count_kept({**blocks_of(model), "guide": guide.network}, [*owned, images, clean]) as measured:
        step_losses(networks, config, images, clean, *draw(config, TOY, range(config.batch), 0))
    assert ledger.activations[memory] == pytest.approx(measured, rel=0.01)  # fake norms keep bf16 statistics
    assert min(measured.values()) > 0


def test_a_run_goes_on_under_another_memory_policy_to_the_same_weights(settings, packed, classifier, tmp_path):
    train(settings, packed, tmp_path / "whole", classifier)
    for memory, stop in (("all", 3), ("minimal", None)):
        config = dataclasses.replace(settings, memory=memory)
        train(config, packed, tmp_path / "cut", classifier, progress=terminate_at(stop))
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_config_without_newer_fields_still_resumes(settings, packed, classifier, tmp_path):
    train(settings, packed, tmp_path / "run", classifier, progress=terminate_at(3))
    stored = tmp_path / "run" / "config.json"
    fields = json.loads(stored.read_text())
    del fields["memory"], fields["ema"]
    stored.write_text(json.dumps(fields))
    assert train(settings, packed, tmp_path / "run", classifier)


def test_pre_training_draws_a_crop_for_each_step_and_attacks_nothing(settings, packed, classifier, tmp_path):
    clean = dict(adversarial=0.0, noisy=0.0, guide_nodes=(), guide_weights=(), crops=((8, 8), (32, 2), (16, 4)))
    settings = dataclasses.replace(settings, **clean)
    drawn = [settings.at(step) for step in range(40)]
    assert {(now.crop, now.batch) for now in drawn} == set(settings.crops)
    assert drawn == [settings.at(step) for step in range(40)]
    for name, end in (("whole", None), ("cut", 3), ("cut", None)):
        train(settings, packed, tmp_path / name, classifier, progress=terminate_at(end))
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert np.load(tmp_path / "whole" / "pairs" / "clean.npy").any()
    assert not (tmp_path / "whole" / "pairs" / "adversarial.npy").exists()
    assert TrainConfig.from_file(tmp_path / "whole" / "config.json") == settings


@pytest.mark.parametrize("half", FROZEN)
def test_a_frozen_half_keeps_its_weights(settings, packed, classifier, tmp_path, half):
    settings = dataclasses.replace(settings, freeze=half, steps=2)
    with pytest.raises(ConfigError, match=f"freeze='{half}': needs init"):
        train(settings, packed, tmp_path / "run", classifier)
    model = Networks.make(settings, classifier).model
    before = model.state_dict()
    save_safetensors(tmp_path / "init.safetensors", before, model.config)
    settings = dataclasses.replace(settings, init=str(tmp_path / "init.safetensors"))
    train(settings, packed, tmp_path / "run", classifier)
    still = {name for name, value in weights(tmp_path / "run").items() if torch.equal(value, before[name])}
    mask_token = {"mask_token"}  # nothing reads it where noise hides
    assert still - mask_token == {name for name in before if name.startswith(FROZEN[half])} - mask_token
    assert {name for name in before if name.startswith(sum(FROZEN.values(), ()))} == set(before)


def test_adversarial_training_adds_pictures_attacked_through_the_purifier(settings, classifier):
    settings = dataclasses.replace(settings, attack_steps=3, precision="fp32")
    networks = Networks.make(settings, classifier)
    objective = Objective(networks, settings)
    images, clean = torch.rand(2, 2, 3, 32, 32)
    attacked = attack(objective, settings, images, clean, 5, [0, 1])
    assert 3 / 255 < (attacked - images).abs().max() <= settings.attack_eps + 1e-6
    alone = torch.cat([attack(objective, settings, images[i : i + 1], clean[i : i + 1], 5, [i]) for i in range(2)])
    assert (alone != attacked).float().mean() < 1e-3  # a sign may turn where a gradient is nought
    whole = PurifiedClassifier(classifier, networks.model, mean=(0.0,) * 3, std=(1.0,) * 3, seed=1)
    with torch.no_grad():
        labels = classifier(clean).argmax(dim=1)
        started = attack(objective, dataclasses.replace(settings, attack_steps=0), images, clean, 5, [0, 1])
        loss = [F.cross_entropy(whole(x.clamp(0, 1)), labels) for x in (started, attacked)]
    assert loss[1] > loss[0]
    assert networks.model.training
    assert all(p.grad is None for p in networks.model.parameters())

    shown = []
    reconstruct = networks.model.reconstruct
    networks.model.reconstruct = lambda tiles, draws: shown.append(len(tiles)) or reconstruct(tiles, draws)
    gradients(objective, settings, (images, clean), step=0)
    assert shown[-1] == 2 * 2 * (32 // TOY.tile_size) ** 2


@pytest.fixture
def random_lpips(monkeypatch):
    monkeypatch.setattr(loop, "lpips_network", lambda trunk: lpips_network("squeeze", random=True))


def test_lpips_stands_in_for_the_guide(settings, classifier, random_lpips):
    config = dataclasses.replace(settings, guide_nodes=(), guide_weights=(), lpips=0.5)
    networks = Networks.make(config, classifier)
    images, clean = torch.rand(2, 2, 3, 32, 32)
    terms = gradients(Objective(networks, config), config, (images, clean), step=0)
    assert list(terms) == ["loss", "pix", "lpips_loss"]
    networks.model.zero_grad()
    louder = dataclasses.replace(config, lpips=1.0)
    double = gradients(Objective(networks, louder), louder, (images, clean), step=0)
    assert double["lpips_loss"] == pytest.approx(2 * terms["lpips_loss"])
    assert all(p.grad is None for p in networks.lpips.parameters())


def test_a_missing_lpips_trunk_names_file_and_folder(monkeypatch):
    def offline(**options):
        raise URLError("no network")

    monkeypatch.setattr("lpips.LPIPS", offline)
    with pytest.raises(MissingFileError, match=r"alexnet-owt-\w+.pth into .*checkpoints"):
        lpips_network("alex")


def test_mixing_shows_about_one_chunk_of_the_input():
    tokens, patch = 196, 2
    for seed in range(20):
        draws = MixDraws.sample(tokens, 3, seed)
        mask = mix_mask(draws, 14, 14, patch)
        shares = 1 - mask.mean(dim=(1, 2, 3))
        assert torch.allclose(shares, torch.full((3,), 1 / draws.chunks), atol=2 / tokens)
        blocks = mask.view(3, 14, patch, 14, patch)
        assert torch.equal(blocks, blocks[:, :, :1, :, :1].expand_as(blocks))


def sharding(device, make=loop._accelerator):
    """accelerate shards on accelerators alone, so that on a CPU a test makes its choice."""
    from accelerate import DistributedType, FullyShardedDataParallelPlugin

    accelerator = make(device)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
    )
    prepare = accelerator.prepare

    def prepared(*parts):
        model, optimizer = prepare(*parts)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        assert sum(isinstance(m, FSDPModule) for m in model.modules()) == 1 + TOY.depth + TOY.decoder_depth
        return model, optimizer

    accelerator.prepare = prepared
    return accelerator


WORKER = """
import sys, torch
torch.set_num_threads({threads})
sys.path.insert(0, {root!r})
from impure_fast import config
from impure_fast.training import loop
from tests.test_training import TOY, sharding, terminate_at, toy_classifier
config.PRESETS["toy"] = TOY
if {sharded}:
    loop._accelerator = sharding
settings = loop.TrainConfig.from_file({recipe!r})
finished = loop.train(settings, {data!r}, {out!r}, toy_classifier(), progress=terminate_at({end}))
assert finished is {finished}
"""


@pytest.fixture
def start(packed, tmp_path):
    """start(settings, folder, **environment) -> a process that trains, sharded or to a certain step if wished."""

    def call(settings, folder, sharded=False, end=None, **environment):
        recipe = tmp_path / "recipe.json"
        recipe.write_text(json.dumps(dataclasses.asdict(settings)))
        values = dict(
            threads=torch.get_num_threads(),
            root=str(Path(__file__).parents[1]),
            recipe=str(recipe),
            data=str(packed),
            out=str(folder),
            sharded=sharded,
            end=end,
            finished=end is None,
        )
        return subprocess.Popen([sys.executable, "-c", WORKER.format(**values)], env={**os.environ, **environment})

    return call


@pytest.fixture
def start_two(start):
    """start_two(settings, folder, sharded, end): two processes train to their end."""

    def call(settings, folder, sharded=False, end=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        workers = [start(settings, folder, sharded, end, **shared, **rank) for rank in ranks]
        assert [worker.wait(timeout=600) for worker in workers] == [0, 0]

    return call


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_run(one, other, tolerance=1e-5):
    assert [row["step"] for row in other] == [row["step"] for row in one]
    for a, b in zip(one, other, strict=True):
        for name in ("loss", "pix", "hgd0_loss", "hgd1_loss"):
            assert b[name] == pytest.approx(a[name], rel=tolerance), f"{name} of step {a['step']}"


def test_two_processes_log_what_one_logs(settings, packed, classifier, start_two, tmp_path):
    settings = dataclasses.replace(settings, precision="fp32")
    train(settings, packed, tmp_path / "one", classifier)
    start_two(settings, tmp_path / "two")
    assert_same_run(log_of(tmp_path / "one"), log_of(tmp_path / "two"))


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes_with_every_option_go_on_to_the_same_run(
    settings, packed, classifier, start_two, tmp_path, sharded
):
    options = dict(batch=4, accumulate=2, attack_steps=2, ema=0.9, learned_weights=True, memory="minimal")
    settings = dataclasses.replace(settings, precision="fp32", **options)
    train(settings, packed, tmp_path / "one", classifier)
    start_two(settings, tmp_path / "two", sharded)
    assert_same_run(log_of(tmp_path / "one"), log_of(tmp_path / "two"))
    for end in (3, None):
        start_two(settings, tmp_path / "cut", sharded, end)
    assert_same_run(log_of(tmp_path / "two"), log_of(tmp_path / "cut"), tolerance=0)
    whole, cut = (tree_leaves(torch.load(tmp_path / name / "checkpoint.pt")) for name in ("two", "cut"))
    assert all(torch.equal(*map(torch.as_tensor, pair)) for pair in zip(whole, cut, strict=True) if pair[0] is not None)


def test_accumulated_parts_log_what_the_whole_batch_logs(settings, packed, classifier, tmp_path):
    settings = dataclasses.replace(settings, precision="fp32")
    train(settings, packed, tmp_path / "one", classifier)
    train(dataclasses.replace(settings, accumulate=2), packed, tmp_path / "two", classifier)
    assert_same_run(log_of(tmp_path / "one"), log_of(tmp_path / "two"))


def test_a_run_killed_at_any_moment_goes_on_to_the_same_losses_and_weights(
    settings, packed, classifier, start, tmp_path
):
    settings = dataclasses.replace(settings, steps=20, save_every=5, ema=0.9, learned_weights=True)
    settings = dataclasses.replace(settings, workers=1)
    train(settings, packed, tmp_path / "whole", classifier)
    victim, log = start(settings, tmp_path / "cut"), tmp_path / "cut" / "log.jsonl"
    until = 1 + int.from_bytes(os.urandom(1)) % 15
    while victim.poll() is None and not (log.exists() and log.read_text().count("\n") >= until):
        time.sleep(0.002)
    victim.kill()
    assert victim.wait(timeout=60) == -signal.SIGKILL
    assert train(settings, packed, tmp_path / "cut", classifier)
    assert_same_run(log_of(tmp_path / "whole"), log_of(tmp_path / "cut"), tolerance=0)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
