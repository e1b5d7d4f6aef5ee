"""Adversarial shards: exact pairs of the pictures that a classifier gets right, the same bytes after a kill."""

import io
import json
import os
import re
import signal
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

from impure_fast import attacks, cli
from impure_fast.errors import InputError
from impure_fast.evaluation.targets import labelled, load_pictures, load_target
from impure_fast.images import decode, encode_jpeg, read_shard, shards_of, write_packed
from impure_fast.purify import to_bytes, to_float
from impure_fast.training import shards
from impure_fast.training.data import stored_pairs

from .conftest import random_images

pytest.importorskip("torchattacks", reason="the extra attack is not installed")

CLASSES, SIDE = 10, 16
PGD = "pgd,steps=3,step_size=4,eps=8"


class Toy(nn.Module):
    side = SIDE

    def __init__(self):
        super().__init__()
        weights = torch.randn(CLASSES, 3 * SIDE * SIDE, generator=torch.Generator().manual_seed(0))
        self.weights = nn.Parameter(weights / 10)

    def forward(self, images):
        return (images.flatten(1) - 0.5) @ self.weights.T


def toy():
    return Toy()


@pytest.fixture(scope="module")
def target():
    return load_target(f"{__name__}:toy")


@pytest.fixture(scope="module", params=[SIDE, 2 * SIDE], ids=["own size", "resized"])
def data(request, target, tmp_path_factory):
    """Eleven smooth pictures, named by the toy itself; three labels are wrong."""
    side = request.param
    coarse = random_images(11, 3, 5, 5, seed=1)
    images = to_bytes(nn.functional.interpolate(coarse, (side, side), mode="bicubic"))
    jpegs = [encode_jpeg(image, 95) for image in images]
    labels = target.model(to_float(np.stack([target.prepare(decode(jpeg)) for jpeg in jpegs]))).argmax(dim=1)
    labels[[1, 4, 8]] = (labels[[1, 4, 8]] + 1) % CLASSES
    path = tmp_path_factory.mktemp("data") / "toy.npz"
    write_packed(path, jpegs, labels.tolist(), [str(i) for i in range(len(jpegs))])
    return path


@pytest.fixture
def write(data, target):
    """write(folder, text) -> pairs kept, four pictures a shard."""

    def call(folder, text=PGD, **options):
        options = dict(recipe={"classifier": "toy"}, size=4, batch=2, **options)
        return shards.write_shards(folder, labelled(data, 99), target.model, target.prepare, text, **options)

    return call


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_pairs_are_the_attack_of_the_pictures_that_are_right(write, data, target, tmp_path):
    assert write(tmp_path / "out") == 8
    found = load_pictures(tmp_path / "out", target.prepare, 99)
    source = load_pictures(data, target.prepare, 99)
    right = [int(name) for name in found.names]
    logits = target.model(source.images)
    assert right == (logits.argmax(dim=1) == source.labels).nonzero()[:, 0].tolist()
    assert np.array_equal(found.clean, source.clean[right]) and torch.equal(found.labels, source.labels[right])
    change = found.adversarial.astype(int) - found.clean
    assert (
        4 < abs(change).max() <= 8 and (target.model(to_float(found.adversarial)).argmax(dim=1) != found.labels).all()
    )
    first = [i for i in right if i < 4]
    own = int(np.random.default_rng([0, 0]).integers(2**31))
    name, parameters = attacks.parse(PGD)
    images, labels = source.images[first], source.labels[first]
    wanted = attacks.attack(name, target.model, images, labels, seed=own, batch=2, **parameters)
    assert np.array_equal(found.adversarial[: len(first)], to_bytes(wanted))


def test_training_reads_the_same_pairs(write, target, tmp_path):
    write(tmp_path / "out")
    pairs = stored_pairs(tmp_path / "pairs", tmp_path / "out", count=8, side=SIDE, seed=0)
    found = load_pictures(tmp_path / "out", target.prepare, 99)
    assert np.array_equal(pairs.clean, found.clean) and np.array_equal(pairs.adversarial, found.adversarial)


def test_clean_jpg_is_the_file_itself_where_that_is_the_picture(write, data, tmp_path):
    write(tmp_path / "out")
    source = labelled(data, 99)
    whole = source[0].rgb().shape == (SIDE, SIDE, 3)
    for shard in shards_of(tmp_path / "out"):
        for key, parts in read_shard(shard):
            assert (parts["clean"] == source[int(key)].file()) == whole
            assert Image.open(io.BytesIO(parts["clean"])).format == ("JPEG" if whole else "PNG")
            assert Image.open(io.BytesIO(parts["adv"])).format == "PNG"


def test_a_jpeg_that_decodes_to_something_else_is_no_clean_jpg():
    """A turned camera picture: of the right kind and size, but not what was attacked."""
    rgb = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    jpeg = encode_jpeg(rgb, 95)
    turned = np.rot90(decode(jpeg)).copy()
    assert shards._exact(jpeg, decode(jpeg)) == jpeg
    assert np.array_equal(decode(shards._exact(jpeg, turned)), turned)


def test_a_killed_run_goes_on_to_the_same_bytes(write, tmp_path, monkeypatch):
    write(tmp_path / "whole")
    real, made = shards.attack, []

    def killed(*arguments, **options):
        made.append(options["seed"])
        if len(made) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(shards, "attack", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "killed")
    (tmp_path / "killed" / ".impure-fast-0.tar").write_bytes(b"half")  # what SIGKILL leaves
    assert [path.name for path in shards_of(tmp_path / "killed")] == ["000000.tar"]
    assert write(tmp_path / "killed") == 8
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert len(set(made)) == len(made) - 1 == 3  # one seed a shard; the finished one is not attacked again


def test_shards_without_a_right_picture_are_empty(data, target, tmp_path):
    def wrong(images):
        return -target.model(images) * torch.eye(CLASSES)[0]

    model = nn.Module()
    model.forward = wrong
    options = dict(recipe={}, size=4)
    assert shards.write_shards(tmp_path, labelled(data, 4)[:0], model, target.prepare, PGD, **options) == 0
    pictures = [p for p in labelled(data, 99) if p.label != 0][:4]
    with torch.no_grad():
        decided = wrong(to_float(np.stack([target.prepare(p.rgb()) for p in pictures]))).argmax(dim=1)
    pictures = [p for p, d in zip(pictures, decided.tolist(), strict=True) if p.label != d]
    kept = shards.write_shards(tmp_path / "none", pictures, model, target.prepare, PGD, **options)
    assert kept == 0 and list(read_shard(tmp_path / "none" / "000000.tar")) == []


def test_another_recipe_in_the_folder_is_refused(write, tmp_path):
    write(tmp_path / "out")
    for changes in (dict(text=PGD.replace("3", "2")), dict(seed=1)):
        with pytest.raises(InputError, match="holds shards of another recipe"):
            write(tmp_path / "out", **changes)


def test_sizes_and_labels_that_do_not_fit_are_named(target, tmp_path):
    jpegs = [encode_jpeg(np.zeros((side, SIDE, 3), np.uint8), 90) for side in (SIDE, SIDE + 1)]
    write_packed(tmp_path / "sizes.npz", jpegs, [0, 0], ["a", "b"])
    write_packed(tmp_path / "label.npz", jpegs[:1], [77], ["a"])
    for name, says in (("sizes", "several sizes"), ("label", "label 77, but the classifier knows 10 classes")):
        pictures = labelled(tmp_path / f"{name}.npz", 9)
        with pytest.raises(InputError, match=says):
            shards.write_shards(tmp_path / name, pictures, target.model, lambda rgb: rgb, PGD, recipe={})


def command(data, out, *more):
    fixed = ["attack", "--data", data, "--output", out, "--classifier", f"{__name__}:toy", "--batch", 4, "--shard", 4]
    return [str(a) for a in (*fixed, *more)]


def test_the_command_makes_the_authors_nine(data, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(command(data, tmp_path / "out", "--eps", 4, "--images", 6))
    text, errors = capsys.readouterr()
    assert (ended.value.code or 0, errors) == (0, "")
    folders = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert folders == sorted(f"{spec},eps=4" for spec in attacks.AUTHORS) and len(folders) == 9
    assert text.count("5 pairs of 6 pictures") == 9
    for folder in folders:
        recipe = json.loads((tmp_path / "out" / folder / "attack.json").read_text())
        assert recipe["attack"] == folder and recipe["pictures"] == 6 and len(recipe["weights"]) == 16
        found = load_pictures(tmp_path / "out" / folder, lambda rgb: rgb, 9)
        change = found.adversarial.astype(int) - found.clean
        assert "cw2" in folder or 0 < abs(change).max() <= 4  # theirs may fail, or leave the ball


def test_the_command_takes_any_attack_by_name_and_names_what_is_wrong(data, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(command(data, tmp_path / "out", "--attack", "eot-pgd,steps=2,step_size=2,eps=8,loss=margin"))
    assert (ended.value.code or 0, capsys.readouterr().err) == (0, "")
    for spec, says in (
        ("pdg", "no attack 'pdg'"),
        ("eot-pgd,loss=margin", "cannot run with parameters.*steps"),
        ("pgd,steps", "'steps' in"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(command(data, tmp_path / "wrong", "--attack", spec))
        assert ended.value.code == 1
        assert re.search(says, capsys.readouterr().err.replace("\n", " "))


@pytest.mark.slow
def test_the_command_goes_on_after_sigkill(data, tmp_path):
    root = Path(__file__).parent.parent
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(out):
        arguments = command(data, out, "--attack", "pgd,steps=3000,step_size=1,eps=8")
        return subprocess.Popen([sys.executable, "-m", "impure_fast.cli", *arguments], cwd=root, env=environment)

    assert start(tmp_path / "whole").wait() == 0
    victim = start(tmp_path / "killed")
    while not list((tmp_path / "killed").rglob("*.tar")):
        assert victim.poll() is None
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    (left,), (whole,) = ((tmp_path / name).iterdir() for name in ("killed", "whole"))
    assert len(shards_of(left)) < len(shards_of(whole))
    assert start(tmp_path / "killed").wait() == 0
    assert contents(left) == contents(whole)


def test_a_damaged_shard_is_named(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"no archive, but longer than nothing" * 40)
    with pytest.raises(InputError, match=r"0\.tar is no shard \(tar\), or is damaged"):
        list(read_shard(tmp_path / "0.tar"))


def test_a_sample_is_what_shares_a_name_up_to_its_first_dot(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name in ("a.b", "a.b/1.adv.png", "a.b/1.cls", "2.clean.jpg"):
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if name == "a.b" else tarfile.REGTYPE
            member.size = 0 if name == "a.b" else len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
    found = [(key, parts) for key, parts in read_shard(tmp_path / "0.tar") if parts]
    assert found == [("a.b/1", {"adv": b"a.b/1.adv.png", "cls": b"a.b/1.cls"}), ("2", {"clean": b"2.clean.jpg"})]
