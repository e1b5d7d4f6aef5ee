"""The shipped weights: they are what their card says, and they do purify."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from impure_fast import attacks, demo, load
from impure_fast.classifiers import LITE0_MEAN, LITE0_STD, Normalised, efficientnet_lite
from impure_fast.evaluation import report
from impure_fast.training.config import TrainConfig
from impure_fast.zoo import shipped, weights_folder

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RECIPES = ROOT / "impure_fast" / "training" / "recipes"


def test_the_default_model_is_shipped_with_its_card():
    assert "impure_tiny.standard" in shipped()
    for path in shipped().values():
        card = path.with_suffix(".md").read_text()
        for heading in ("Data", "Recipe", "Figures", "Limits"):
            assert re.search(rf"^## {heading}", card, re.MULTILINE), f"{path.stem}: no section {heading}"


def test_weights_are_small_enough_to_ship():
    total = sum(path.stat().st_size for path in weights_folder().glob("*.safetensors"))
    assert total <= 24e6
    assert sum(p.numel() for p in load("impure_tiny").parameters()) <= 1.5e6


def test_names_with_and_without_the_tag_are_one_model():
    a, b = load("impure_tiny").state_dict(), load("impure_tiny.standard").state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("impure_tiny_*.json")), ids=lambda path: path.stem)
def test_recipes_are_valid_and_named_in_the_card(path):
    TrainConfig.from_file(path)
    assert any(path.stem in card.read_text() for card in weights_folder().glob("*.md"))


def test_purification_brings_decisions_back():
    """Ten attacked views of five photographs; the whole measurement is `make demo`."""
    classifier = Normalised(efficientnet_lite(0), LITE0_MEAN, LITE0_STD).eval()
    views = demo.photograph_views(classifier, 10)
    labels = demo.decide(classifier, views.images).argmax(dim=1)
    attacked = attacks.pgd(classifier, views.images, labels, eps=8 / 255, steps=5, step_size=3 / 255, seed=0)
    purified = load("impure_tiny").purify(attacked, seed=0)

    def accuracy(images):
        return views.accuracy(demo.decide(classifier, images).argmax(dim=1))

    assert accuracy(attacked) <= 20
    assert accuracy(purified) >= accuracy(attacked) + 30
    assert demo.psnr(purified, views.images) > 20


def rows(name):
    """The README's lines of one committed result."""
    r = json.loads((RESULTS / name).read_text())
    table = {
        "no defence": {"clean": r["clean"], **r["attacked"]},
        "JPEG, quality 75": r["baselines"]["jpeg75"],
        "Gaussian blur, sigma 1": r["baselines"]["blur"],
        "`impure_tiny`": {"clean": r["purified_clean"], **r["purified"]},
    }
    return [
        f"| {key} | " + " | ".join(f"{row[c]:.1f}" for c in ("clean", "4", "8")) + " |" for key, row in table.items()
    ]


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("README.md", "impure_tiny-nips17.json"),
        ("docs/explained/results.md", "impure_tiny-nips17.json"),
        ("docs/explained/results.md", "impure_tiny-demo.json"),
        ("impure_fast/weights/impure_tiny.standard.md", "impure_tiny-nips17.json"),
        ("impure_fast/weights/impure_tiny.standard.md", "impure_tiny-demo.json"),
    ],
)
def test_tables_say_what_the_measurement_said(text, result):
    lines = (ROOT / text).read_text().splitlines()
    for row in rows(result):
        assert row in lines


@pytest.mark.parametrize("text", ["README.md", "impure_fast/weights/impure_tiny.standard.md"])
def test_the_attacker_who_knows_the_purifier_is_told_of(text):
    known = json.loads((RESULTS / "impure_tiny-white-box.json").read_text())["white_box"]
    words = " ".join((ROOT / text).read_text().split())
    assert f"leaves {known['2']:.0f} % at 2/255 and {known['4']:.0f} % at 4/255 ({known['n']} views" in words


@pytest.mark.parametrize("text", ["README.md", "impure_fast/weights/impure_tiny_cifar10.robust.md"])
def test_what_is_left_of_cifar10_is_told_as_measured(text):
    rows = json.loads((RESULTS / "impure_tiny_cifar10-ladder-resnet20.json").read_text())["rows"]
    words = " ".join((ROOT / text).read_text().split())
    for name in ("impure_tiny_cifar10", "impure_tiny_cifar10.robust"):
        (row,) = (row for row in rows if (row["level"], row["defence"]) == ("T4", name))
        assert f" {row['adversarial']['all']['mean']['value']:.1f} " in words and row["images"] == 128


def test_the_results_page_says_what_its_files_say():
    page = " ".join((ROOT / "docs" / "explained" / "results.md").read_text().split())
    for path in sorted(RESULTS.glob("*.json")):
        if "white_box" not in (r := json.loads(path.read_text())):
            continue
        told = f"[{path.name}](../../benchmarks/results/{path.name}): {r['n']} pictures ({r['pictures']}), "
        told += f"{r['classifier']}, {r['attack']}, steps {r['image_step']} and {r['feature_step']}, "
        assert told + f"PSNR purified/clean {r['psnr']:.2f} dB, {r['date']}." in page
        if known := r["white_box"]:
            assert f"| knows the classifier | | {r['purified']['4']:.1f} | {r['purified']['8']:.1f} |" in page
            assert f"| knows the purifier too | {known['2']:.1f} | {known['4']:.1f} | |" in page
            assert f"Without an attack {r['purified_clean']:.1f} of these are right" in page


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*-lite?-t0.json")), ids=lambda path: path.stem)
def test_the_results_page_has_the_unseen_classifiers_figures(path):
    page = (ROOT / "docs" / "explained" / "results.md").read_text()
    rows = json.loads(path.read_text())["rows"]
    assert path.name in page
    for defence, name in (("none", "no defence"), ("jpeg75", "JPEG, quality 75"), ("impure_tiny", "`impure_tiny`")):
        four, eight = (row for row in rows if row["defence"] == defence)
        figures = (four["clean"], four["adversarial"], eight["adversarial"])
        assert f"| {name} | {' | '.join(format(x['all']['mean']['value'], '.1f') for x in figures)} |" in page


@pytest.mark.parametrize(
    "path", sorted([*RESULTS.glob("*-ladder-*.json"), *RESULTS.glob("*-autoattack-*.json")]), ids=lambda path: path.stem
)
def test_the_results_page_has_every_ladder(path):
    results = json.loads(path.read_text())
    page = (ROOT / "docs" / "explained" / "results.md").read_text()
    assert path.name in page and report.table(*report.overview(results)) in page
    for pair in results["paired"]:
        figures = (pair["from"], pair["to"], pair["level"], f"{pair['eps']:g}", str(pair["images"]))
        assert f"| {' | '.join(figures)} | {report.cell(pair['gain'])} |" in page


def test_the_results_page_has_the_strengths():
    results = json.loads((RESULTS / "impure_tiny-strength-lite1.json").read_text())
    page = (ROOT / "docs" / "explained" / "results.md").read_text()
    assert report.table(*report.overview(results)) in page
    default = f"steps-{(c := load('impure_tiny').config).image_step}-{c.feature_step}.safetensors"
    pairs = [pair for pair in results["paired"] if default in (pair["from"], pair["to"])]
    assert len(pairs) == 8 and all(report.cell(pair["gain"]) in page for pair in pairs)
