"""The latency benchmark: what its clock counts, what it refuses to time, what it writes."""

import csv
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import latency
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


def test_a_run_writes_rows_and_a_picture_and_appends(tmp_path, monkeypatch, capsys):
    table, picture = tmp_path / "latency.csv", tmp_path / "latency.png"
    arguments = ["--side", "32", "--batches", "1,2", "--rates", "50", "--seconds", "0"]
    wanted = ["--providers", "engine fp32,authors", "--csv", str(table), "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", ["latency", *arguments, *wanted])
    latency.main()
    once = list(csv.DictReader(table.open()))
    found = {(row["provider"], row["loop"], row["load"], row["statistic"]): row["value"] for row in once}
    assert float(found["engine fp32", "parity", "0", "psnr"]) >= 100
    assert (
        float(found["engine fp32", "closed", "2", "p50_ms"]) > 0 and ("engine fp32", "open", "50.0", "p50_ms") in found
    )
    assert found["authors", "none", "0", "why_not"] == "needs --authors, a checkout of their repository"
    assert picture.read_bytes().startswith(b"\x89PNG") and "engine fp32" in capsys.readouterr().out
    latency.main()
    assert len(list(csv.DictReader(table.open()))) == 2 * len(once)


def test_readme_says_what_the_measurement_said():
    rows = list(csv.DictReader((ROOT / "benchmarks" / "results" / "latency.csv").open()))
    p50 = {(r["provider"], r["model"], float(r["load"])): r["value"] for r in rows if r["statistic"] == "p50_ms"}
    loads = [("impure_tiny", 1), ("impure_tiny", 64), ("impure_base_patch16_224", 1), ("impure_base_patch16_224", 4)]
    readme = (ROOT / "README.md").read_text().splitlines()
    for label, provider in LABELS.items():
        found = [p50.get((provider, *at)) for at in loads]
        cells = [f"{float(value):.0f}" if value else "" for value in found]
        assert " ".join(f"| {label} | {' | '.join(cells)} |".split()) in readme


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
