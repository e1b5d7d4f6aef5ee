"""The latency benchmark: what its clock counts, what it refuses to time, what it writes."""

import csv
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import latency, results
from impure_fast import load

ROOT = Path(__file__).parents[1]
LABELS = {  # the README's name of a provider
    "the authors' code": "authors",
    "the authors' code, bf16 autocast": "authors bf16 autocast",
    "reference path": "reference",
    "operators": "operators",
    "engine, fp32": "engine fp32",
    "engine, bf16": "engine bf16",
    "engine, int8": "engine int8",
    "no purifier": "no purifier",
}


class Clock:
    """Time that passes only when somebody sleeps or works."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.pass_)

    def pass_(self, seconds):
        self.now += seconds


def test_open_loop_counts_from_arrival_and_takes_what_waits(monkeypatch):
    clock, sizes = Clock(monkeypatch), []

    def answer(images):  # two seconds a call, one image arrives a second
        sizes.append(len(images))
        clock.pass_(2)

    taken = latency.open_loop(answer, torch.zeros(3, 3, 4, 4), rate=1.0, seconds=5)
    assert sizes == [1, 2, 2]
    assert taken == pytest.approx([2, 3, 2, 3, 2])


def test_open_loop_waits_for_arrivals_and_bounds_a_call(monkeypatch):
    clock, sizes = Clock(monkeypatch), []
    quick = latency.open_loop(lambda images: clock.pass_(0.25), torch.zeros(3, 3, 4, 4), rate=1.0, seconds=4)
    assert quick == pytest.approx([0.25] * 4)

    def slow(images):
        sizes.append(len(images))
        clock.pass_(10)

    latency.open_loop(slow, torch.zeros(3, 3, 4, 4), rate=1.0, seconds=8)
    assert sizes == [1, 3, 3, 1]


def test_closed_loop_rate_is_images_over_time(monkeypatch):
    clock = Clock(monkeypatch)
    taken = latency.closed_loop(lambda images: clock.pass_(0.5), torch.zeros(8, 3, 4, 4), seconds=10)
    figures = latency.summary(taken, 8)
    assert (figures["count"], figures["p50_ms"], figures["images_per_second"]) == (20, 500, 16)


def test_a_percentile_needs_the_calls_to_tell_it():
    assert latency.summary([1, 2], 1).keys() == {"p50_ms", "images_per_second", "count"}
    assert "p90_ms" in latency.summary([1] * 10, 1) and "p99_ms" not in latency.summary([1] * 99, 1)
    assert latency.summary([*range(101)], 1)["p99_ms"] == 99_000


def test_a_run_writes_rows_and_a_picture_and_appends(tmp_path, monkeypatch, capsys):
    table, picture = tmp_path / "latency.csv", tmp_path / "latency.png"
    arguments = ["--side", "32", "--batches", "1,2", "--rates", "50", "--seconds", "0"]
    wanted = ["--providers", "engine fp32,authors", "--csv", str(table), "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", ["latency", *arguments, *wanted])
    latency.main()
    once = list(csv.DictReader(table.open()))
    found = {(row["provider"], row["loop"], row["load"], row["statistic"]): row["value"] for row in once}
    assert float(found["engine fp32", "parity", "0", "psnr"]) >= 100
    assert float(found["engine fp32", "closed", "2", "p50_ms"]) > 0
    assert 0 < float(found["engine fp32", "open", "50.0", "images_per_second"]) <= 75  # three images, two intervals
    assert found["authors", "none", "0", "why_not"] == "needs --authors, a checkout of their repository"
    assert picture.read_bytes().startswith(b"\x89PNG") and "engine fp32" in capsys.readouterr().out
    latency.main()
    assert len(list(csv.DictReader(table.open()))) == 2 * len(once)


def test_readme_says_what_the_measurement_said():
    rows = [
        row for row in csv.DictReader(latency.CSV.open()) if (row["loop"], row["statistic"]) == ("closed", "p50_ms")
    ]
    p50, xeon = (
        {(r["provider"], r["model"], float(r["load"])): r["value"] for r in rows if r["machine"].startswith(machine)}
        for machine in ("AMD EPYC", "Intel(R) Xeon(R)")
    )
    loads = [("impure_tiny", 1), ("impure_tiny", 64), ("impure_base_patch16_224", 1), ("impure_base_patch16_224", 4)]
    readme = (ROOT / "README.md").read_text().splitlines()
    said = readme[readme.index(next(line for line in readme if line.startswith("| | `impure_tiny`, batch 1"))) + 2 :]
    said = said[: said.index("")]
    assert [line.split(" |")[0] for line in said] == [f"| {label}" for label in LABELS]
    for line, provider in zip(said, LABELS.values(), strict=True):
        found = [p50.get((provider, *at)) for at in loads]
        cells = [f"{float(value):.0f}" if value else "" for value in found]
        assert [cell.strip() for cell in line.split("|")[2:-1]] == cells
    words = " ".join(readme)
    for provider, phrase in (
        ("authors", "{} ms in the authors' code"),
        ("reference", "{} on the reference path, "),
        ("operators", "{} with the operators"),
        ("engine fp32", "{} in the fp32 engine, which gain nothing there"),
        ("authors bf16 autocast", "{} under the authors' bf16 autocast"),
        ("engine bf16", "{} in the bf16 engine"),
        ("engine int8", "{} in int8."),
    ):
        assert phrase.format(f"{float(xeon[provider, 'impure_base_patch16_224', 1]):.0f}") in words
    own = [f"{float(xeon[name, 'impure_tiny', 1]):.0f}" for name in ("reference", "engine bf16")]
    assert "`impure_tiny` takes {} on the reference path, {} in bf16".format(*own) in words


def test_the_documents_say_what_a_precision_costs():
    rows = json.loads((ROOT / "benchmarks" / "results" / "precision-cpu.json").read_text())
    lines = (ROOT / "docs" / "defend.md").read_text().splitlines()
    for precision in ("fp32", "bf16", "int8"):
        own = [row for row in rows if row["precision"] == precision]
        worst = min(row["psnr_to_fp32"] or 0 for row in own)
        cells = [*(f"{row['accuracy']:.1f}" for row in own), f"{worst:.1f}" if worst else ""]
        assert f"| {precision} | {' | '.join(cells)} |" in lines


def test_the_picture_shows_the_open_loop_where_it_was_measured(tmp_path):
    rows = results.read(latency.CSV)
    closed = [row for row in rows if row["loop"] != "open"]
    row = {**rows[0], "provider": "engine fp32", "loop": "open", "load": "2.0"}
    opened = [{**row, "statistic": "p50_ms", "value": "5"}, {**row, "statistic": "images_per_second", "value": "2"}]
    sizes = []
    for name, drawn in {"closed": closed, "both": closed + opened}.items():
        latency.draw(tmp_path / f"{name}.png", drawn)
        sizes.append(Image.open(tmp_path / f"{name}.png").size)
    assert sizes[1][0] == 2 * sizes[0][0] and sizes[1][1] == sizes[0][1]
    latency.draw(tmp_path / "none.png", [])
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--batches 1,x", "x: wanted a whole number of at least 1"),
        ("--rates -1", "rates are above 0"),
        ("--device tpu", "tpu: choose cpu, or cuda"),
        ("--model impure_huge", "'impure_huge' is no preset"),
        ("--providers fastest", "fastest: no such provider; there are reference, no purifier"),
        ("--authors nowhere", "nowhere is no checkout of the authors' repository"),
    ],
)
def test_a_wrong_command_says_what_to_do(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["latency", *arguments.split()])
    with pytest.raises(SystemExit) as end:
        latency.main()
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_a_provider_that_fails_does_not_end_the_run(tmp_path, monkeypatch):
    def broken(model, device, folder):
        def make():
            raise RuntimeError("no such precision here")

        yield from list(real(model, device, folder))[:1]
        yield "broken", make
        yield from list(real(model, device, folder))[1:2]

    real = latency.providers
    monkeypatch.setattr(latency, "providers", broken)
    table = tmp_path / "latency.csv"
    wanted = ["--side", "32", "--batches", "1", "--seconds", "0", "--csv", str(table)]
    monkeypatch.setattr(sys, "argv", ["latency", *wanted])
    latency.main()
    found = {(row["provider"], row["statistic"]): row["value"] for row in results.read(table)}
    assert found["broken", "why_not"] == "RuntimeError: no such precision here"
    assert ("no purifier", "p50_ms") in found


def test_what_differs_from_the_reference_is_not_timed(monkeypatch, capsys):
    real = latency.providers

    def planted(model, device, folder):
        yield from list(real(model, device, folder))[:1]
        yield "wrong", lambda: lambda images, seed: images.float() / 255

    monkeypatch.setattr(latency, "providers", planted)
    monkeypatch.setattr(sys, "argv", ["latency", "--side", "32", "--batches", "1", "--seconds", "0"])
    latency.main()
    assert "its pictures differ from the reference's" in capsys.readouterr().out


def test_the_authors_network_needs_its_shape_and_its_folder(tmp_path):
    names = dict(latency.providers(load("impure_tiny"), "cpu", str(tmp_path)))
    assert names["authors"] == "their code has no network of this shape"
