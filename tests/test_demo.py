"""The demonstration end to end, on few pictures and a random purifier: figures, files, and what it may not do."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from impure_fast import demo
from impure_fast.classifiers import LITE0_MEAN, LITE0_SIZE, LITE0_STD, Normalised, efficientnet_lite
from impure_fast.errors import InputError, MissingExtraError
from impure_fast.images import encode_jpeg, write_packed


@pytest.fixture(scope="module")
def classifier():
    return Normalised(efficientnet_lite(0), LITE0_MEAN, LITE0_STD).eval()


@pytest.fixture(scope="module")
def results(tmp_path_factory, weights):
    folder = tmp_path_factory.mktemp("demo")
    options = dict(model=str(weights), views=5, attack_steps=2, white_box=9)
    return demo.run(folder / "demo.json", folder / "demo.png", **options), folder


def test_figures_have_the_promised_keys_and_are_written(results):
    figures, folder = results
    promised = {"n", "classifier", "clean", "attacked", "purified_clean", "purified", "baselines", "psnr"}
    assert promised | {"images_per_second", "backend", "versions"} <= set(figures)
    assert set(figures["attacked"]) == set(figures["purified"]) == {"4", "8"}
    assert set(figures["baselines"]) == {"jpeg75", "blur"}
    assert all(set(row) == {"clean", "4", "8"} for row in figures["baselines"].values())
    assert json.loads((folder / "demo.json").read_text()) == figures
    assert figures["n"] == 5
    assert figures["white_box"]["n"] == 5  # no picture twice


def test_pictures_without_labels_are_named(tmp_path):
    write_packed(tmp_path / "a.npz", [encode_jpeg(np.zeros((9, 9, 3), np.uint8), 90)], [-1], ["a"])
    with pytest.raises(InputError, match=r"a\.npz holds no labelled picture"):
        demo.packed_views(tmp_path / "a.npz")


@pytest.mark.parametrize("package", ["skimage", "matplotlib"])
def test_a_missing_package_is_named_before_anything_is_attacked(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r'pip install "impure-fast\[demo\]"'):
        demo.run(None, tmp_path / "demo.png")


def test_views_are_right_when_clean_and_the_attack_works(results):
    figures, _ = results
    assert figures["clean"] == 100
    assert figures["attacked"]["8"] < 60  # two steps already change most decisions


def test_random_weights_do_not_purify(results):
    figures, _ = results
    assert figures["purified_clean"] < 50
    assert figures["psnr"] < 20


def test_the_picture_has_a_row_for_each_photograph(results):
    _, folder = results
    with Image.open(folder / "demo.png") as picture:
        width, height = picture.size
        assert picture.format == "PNG"
    assert height > width * 5 / 4 * 0.9


def test_the_table_says_what_the_attacker_knows(results):
    from rich.console import Console

    out = io.StringIO()
    Console(width=120, file=out).print(demo.table(results[0]))
    text = out.getvalue()
    assert "An attacker who knows the purifier (5 pictures) leaves" in text
    out.truncate(0)
    Console(width=120, file=out).print(demo.table({**results[0], "white_box": {}}))
    assert "does not know the purifier" in out.getvalue()
    for name in ("none", "JPEG, quality 75", "Gaussian blur, sigma 1", "attacked 8/255"):
        assert name in text


def test_views_depend_on_the_seed_alone(classifier):
    first, again = (demo.photograph_views(classifier, 5) for _ in range(2))
    other = demo.photograph_views(classifier, 5, seed=1)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert first.names == ["chelsea", "coffee", "camera", "motorcycle_left", "rocket"]


def test_packed_pictures_are_all_taken_right_or_wrong(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [encode_jpeg(rng.integers(0, 256, (50, 60, 3), dtype=np.uint8), 90) for _ in range(3)]
    write_packed(tmp_path / "data.npz", pictures, [7, -1, 3], ["a", "b", "c"])
    views = demo.packed_views(tmp_path / "data.npz")
    assert views.images.shape == (2, 3, LITE0_SIZE, LITE0_SIZE)
    assert sorted(views.right) == [(3,), (7,)]


def test_psnr_of_a_known_difference():
    a = torch.full((2, 3, 4, 4), 0.5)
    assert demo.psnr(a, a + 0.1) == pytest.approx(20, abs=1e-4)


def test_weights_by_position_are_the_package_s_own(classifier):
    """Mapped in the wrong order, the classifier would not name these photographs."""
    views = demo.photograph_views(classifier, 5)
    confidence = demo.decide(classifier, views.images).softmax(dim=1).max(dim=1).values
    assert confidence.mean() > 0.4
