"""The examples run as they are given, on small settings, and do what they say."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from benchmarks.__main__ import main as benchmark
from impure_fast import load
from impure_fast.evaluation.analysis import psnr
from impure_fast.images import read_image

skimage = pytest.importorskip("skimage", reason="the extra demo is not installed")
EXAMPLES = Path(__file__).parents[1] / "examples"
PHOTOGRAPHS = Path(*skimage.__path__) / "data"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an example with these arguments; returns what it printed, and keeps its variables as ``run.scope``."""

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with torch.random.fork_rng(devices=[]):
            call.scope = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_timm_classifier_names_the_cat_with_and_without_the_purifier(run):
    lines = run("timm_classifier.py").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["as it is", "purified"]
    assert all(re.search("tabby|tiger cat|Egyptian cat", line) for line in lines)


def test_video_keeps_order_and_size_and_streams_the_engine_s_frames(run, tmp_path):
    frames = [np.asarray(Image.open(PHOTOGRAPHS / "coffee.png").convert("RGB"))[i : i + 40, :56] for i in (0, 90, 180)]
    first, *rest = map(Image.fromarray, frames)
    first.save(tmp_path / "in.png", save_all=True, append_images=rest)
    printed = run("video.py", tmp_path / "out.webp", tmp_path / "in.png")
    with Image.open(tmp_path / "out.webp") as file:
        purified = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(file)]
    wanted = load("impure_tiny").purify(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2), seed=0)
    for got, want in zip(purified, wanted.permute(0, 2, 3, 1), strict=True):
        assert psnr(torch.from_numpy(got)[None] / 255, want[None] / 255) > 40
    assert printed.startswith("3 frames")


def test_video_makes_its_own_frames(run, tmp_path, monkeypatch):
    monkeypatch.setattr("impure_fast.Engine.stream", lambda self, frames, seed: frames)  # the frames themselves
    run("video.py", tmp_path / "out.gif")
    with Image.open(tmp_path / "out.gif") as file:
        assert (file.n_frames, file.size) == (16, (192, 128))


def test_attack_libraries_attack_the_pipeline(run):
    pytest.importorskip("art", reason="the extra art is not installed")
    rows = run("attack_libraries.py", "--views", 2, "--side", 64, "--steps", 2, "--eot", 2).splitlines()
    scores = {row.partition("bare")[0].strip(): [float(x) for x in re.findall(r"([\d.]+) %", row)] for row in rows}
    assert scores.keys() == run.scope["attacked"].keys() and all(len(pair) == 2 for pair in scores.values())
    clean, *attacked = run.scope["attacked"].values()
    assert all(1.5 / 255 < (x - clean).abs().max() <= 4 / 255 + 1e-6 for x in attacked)
    assert not torch.allclose(attacked[0], attacked[1])


def test_own_classifier_is_attacked_and_defended(run):
    rows = run("own_classifier.py").splitlines()
    (clean, _), (attacked, purified) = ([float(x) for x in re.findall(r"([\d.]+) %", row)] for row in rows)
    assert clean >= 80 and attacked <= clean - 40 and purified >= attacked + 20


def test_own_classifier_s_factory_is_one_for_the_evaluation(monkeypatch):
    from impure_fast.evaluation.targets import load_target

    monkeypatch.syspath_prepend(str(EXAMPLES))
    target = load_target("own_classifier:factory")
    assert target.side == 128 and target.model(torch.rand(2, 3, 128, 128)).shape == (2, 5)


def test_training_on_a_folder_gives_weights_that_purify(run, tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for name in ("rocket.jpg", "chelsea.png"):
        shutil.copy(PHOTOGRAPHS / name, folder)
    printed = run("train_on_folder.py", folder, tmp_path / "run", 2)
    assert "train 2 2" in printed
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    shapes = [read_image(path).rgb.shape for path in (folder / "chelsea.png", tmp_path / "run" / "first.png")]
    assert shapes[0] == shapes[1]


def test_own_kernel_is_a_provider_that_agrees(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.json"
    arguments = ["run", "--ops", "order", "--small", "--rounds", "2", "--json", str(out)]
    provider = str(EXAMPLES / "own_kernel.py")
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments, "--providers", f"reference,{provider}"])
    assert benchmark() == 0
    (row,) = [row for row in json.loads(out.read_text()) if row["provider"] == "own_kernel"]
    assert row["parity"] == 0 and row["median_us"] > 0
