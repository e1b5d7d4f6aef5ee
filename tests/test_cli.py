"""The command line: what each command writes, skips and refuses, its messages and its exit codes."""

import errno
import json
import os
import re
import socket
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from impure_fast import Engine, can_run, cli, zoo
from impure_fast.checkpoints import read_safetensors
from impure_fast.classifiers import CifarResNet
from impure_fast.evaluation.targets import load_pictures, load_target
from impure_fast.images import PackedImages, encode_jpeg, read_image, write_packed
from impure_fast.ops._lib import OPERATORS
from impure_fast.serving import bulk

from .conftest import files, picture

AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def test_purify_one_file_is_the_models_purification(tmp_path, purify, weights):
    source, out = picture(tmp_path / "a.png"), tmp_path / "new" / "b.png"
    code, text, errors = purify(source, "-o", out)
    assert (code, errors) == (0, "")
    assert text.startswith("purified 1, skipped 0, failed 0; ")
    image = torch.from_numpy(read_image(source).rgb).permute(2, 0, 1)
    wanted = zoo.load(weights).purify(image, seed=1)
    assert torch.equal(torch.from_numpy(read_image(out).rgb).permute(2, 0, 1), wanted)


def test_precision_reaches_the_engine(tmp_path, photos, purify):
    for precision in ("fp32", "bf16"):
        assert purify(photos / "a.png", "-o", tmp_path / f"{precision}.png", "--precision", precision)[0] == 0
    a, b = (np.asarray(Image.open(tmp_path / f"{p}.png")).astype(int) for p in ("fp32", "bf16"))
    assert 0 < np.abs(a - b).max() <= 8
    assert "on cpu choose one of" in purify(photos / "a.png", "-o", tmp_path / "c.png", "--precision", "fp16")[2]


def test_purify_folder_keeps_structure(tmp_path, photos, purify):
    assert purify(photos, "-o", tmp_path / "flat")[0] == 0
    assert files(tmp_path / "flat") == ["a.png", "b.png"]
    assert purify(photos, "-o", tmp_path / "deep", "--recursive", "--format", "webp")[0] == 0
    assert files(tmp_path / "deep") == ["a.webp", "b.webp", "sub/c.webp"]


def test_result_does_not_depend_on_the_other_files(tmp_path, photos, purify):
    purify(photos, "-o", tmp_path / "all")
    purify(photos / "b.jpg", "-o", tmp_path / "one")
    assert (tmp_path / "all" / "b.png").read_bytes() == (tmp_path / "one" / "b.png").read_bytes()


def test_without_a_seed_every_run_differs(tmp_path, photos, run, weights):
    for name in ("x.png", "y.png"):
        assert run("purify", photos / "a.png", "-o", tmp_path / name, "--model", weights)[0] == 0
    assert (tmp_path / "x.png").read_bytes() != (tmp_path / "y.png").read_bytes()


def test_steps_reach_the_model(tmp_path, photos, purify):
    purify(photos / "a.png", "-o", tmp_path / "x.png")
    purify(photos / "a.png", "-o", tmp_path / "y.png", "--image-step", 400, "--feature-step", 10, "--max-batch", 1)
    assert (tmp_path / "x.png").read_bytes() != (tmp_path / "y.png").read_bytes()
    code, _, errors = purify(photos / "a.png", "-o", tmp_path / "z.png", "--image-step", 1000)
    assert (code, "'--image-step'" in errors) == (2, True)


def test_alpha_comes_through(tmp_path, purify):
    source = picture(tmp_path / "a.png", channels=4)
    purify(source, "-o", tmp_path / "b.png")
    assert np.array_equal(read_image(tmp_path / "b.png").alpha, read_image(source).alpha)
    code, _, errors = purify(source, "-o", tmp_path / "b.jpg")
    assert (code, errors) == (
        0,
        f"warning: {tmp_path / 'b.jpg'}: a JPEG holds no transparency, so it was dropped.\n",
    )


def test_broken_files_are_named_and_the_rest_goes_on(tmp_path, photos, purify):
    (photos / "0.png").touch()
    (photos / "z.png").write_text("no picture")
    code, text, errors = purify(photos, tmp_path / "nowhere", "-o", tmp_path / "out")
    assert code == 1
    assert errors.splitlines() == [
        f"error: {tmp_path / 'nowhere'} does not exist.",
        f"error: {photos / '0.png'} is empty (0 bytes).",
        f"error: {photos / 'z.png'} is not an image of a known kind (PNG, JPEG, WEBP, GIF, BMP).",
    ]
    assert text.startswith("purified 2, skipped 0, failed 3; ")
    assert files(tmp_path / "out") == ["a.png", "b.png"]


def test_folder_without_images(tmp_path, purify):
    (tmp_path / "empty").mkdir()
    code, text, errors = purify(tmp_path / "empty", "-o", tmp_path / "out")
    assert (code, text) == (1, "purified 0, skipped 0, failed 1\n")
    assert errors.startswith(f"error: {tmp_path / 'empty'} holds no images (.png .jpg .jpeg .webp).")
    assert not (tmp_path / "out").exists()


def test_existing_results_are_skipped_unless_overwritten(tmp_path, photos, purify):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.png").write_text("mine")
    code, text, _ = purify(photos, "-o", out)
    assert code == 0
    assert text.startswith("purified 1, skipped 1 (results exist; --overwrite replaces them), failed 0; ")
    assert (out / "a.png").read_text() == "mine"
    assert purify(photos, "-o", out, "--overwrite")[1].startswith("purified 2, skipped 0, failed 0; ")
    assert read_image(out / "a.png").rgb.shape == (20, 24, 3)


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_an_input_is_never_overwritten(photos, purify, overwrite):
    before = (photos / "a.png").read_bytes()
    code, text, errors = purify(photos, "-o", photos, *overwrite)
    assert code == 1
    assert errors == (
        f"error: {photos / 'a.png'}: its result would overwrite the input {photos / 'a.png'}; choose another folder.\n"
    )
    assert text.startswith("purified 1, skipped 0, failed 1; ")
    assert (photos / "a.png").read_bytes() == before


def test_another_input_under_another_name_is_never_overwritten(tmp_path, purify):
    first, second = picture(tmp_path / "in" / "a.jpg"), picture(tmp_path / "in" / "a.png", seed=1)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    before = second.read_bytes()
    code, _, errors = purify(first, second, "-o", tmp_path / "link", "--overwrite")
    assert code == 1
    assert errors.count("would overwrite the input") == 2
    assert second.read_bytes() == before


def test_two_files_with_one_result(tmp_path, purify):
    first, second = picture(tmp_path / "in" / "a.jpg"), picture(tmp_path / "in" / "a.png")
    out = tmp_path / "out"
    code, text, errors = purify(tmp_path / "in", second, first, "-o", out)  # naming a file twice does no harm
    assert code == 1
    assert text.startswith("purified 1, skipped 0, failed 1; ")
    assert errors == f"error: {second}: {first} already becomes {out / 'a.png'}; purify it into another folder.\n"


def test_results_in_a_sub_folder_are_not_purified_again(photos, purify):
    for expected in ("purified 3, skipped 0", "purified 0, skipped 3"):
        assert purify(photos, "-o", photos / "out", "--recursive")[1].startswith(expected)
    assert files(photos / "out") == ["a.png", "b.png", "sub/c.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in", "-o", "b.png"], "b.png is one image, but INPUT is a folder or more than one; name a folder instead."),
        (["in/a.png", "in/a.png", "-o", "b.png"], "b.png is one image, but INPUT is a folder or more than one;"),
        (["in/a.png", "-o", "b.png", "--format", "jpg"], "--format jpg contradicts b.png; leave one of them out."),
        (["in/a.png", "-o", "note"], "note exists and is no folder; name a folder or an image (.png .jpg .jpeg .webp)"),
        (["in/a.png", "-o", "out", "--device", "cuda:99"], "--device cuda:99 cannot be used here: "),
        (["in/a.png", "-o", "out", "--model", "impure_huge"], "impure_huge is no shipped model and no file;"),
    ],
)
def test_purify_refuses(tmp_path, monkeypatch, run, arguments, message):
    picture(tmp_path / "in" / "a.png")
    (tmp_path / "note").touch()
    monkeypatch.chdir(tmp_path)
    code, text, errors = run("purify", *arguments)
    assert (code, text) == (1, "")
    assert errors.startswith(f"error: {message}")
    assert "Traceback" not in errors
    assert files(tmp_path) == ["in/a.png", "note"]


def test_suffix_jpeg_agrees_with_format_jpg(tmp_path, photos, purify):
    assert purify(photos / "a.png", "-o", tmp_path / "b.JPEG", "--format", "jpg")[0] == 0
    assert Image.open(tmp_path / "b.JPEG").format == "JPEG"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
    ids=["GPU", "host", "torch's allocator"],
)
def test_a_picture_that_does_not_fit_in_memory_is_named_and_the_rest_goes_on(
    tmp_path, photos, purify, monkeypatch, error
):
    real = Engine.purify

    def purified(engine, images, **options):
        if "b.jpg" in calls:
            calls.clear()
            raise error
        return real(engine, images, **options)

    calls, reading = [], bulk.read_image
    monkeypatch.setattr(bulk, "read_image", lambda path: (calls.append(path.name), reading(path))[1])
    monkeypatch.setattr(Engine, "purify", purified)
    code, text, errors = purify(photos, "-o", tmp_path / "out", "--recursive")
    assert code == 1 and files(tmp_path / "out") == ["a.png", "sub/c.png"]
    assert "b.jpg does not fit in memory" in " ".join(errors.split())


def test_a_sub_folder_that_cannot_be_listed_is_named_and_the_rest_goes_on(tmp_path, photos, purify, monkeypatch):
    real = os.scandir

    def scandir(place):
        if os.fspath(place) == os.fspath(photos / "sub"):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(place))
        return real(place)

    monkeypatch.setattr(os, "scandir", scandir)
    code, text, errors = purify(photos, "-o", tmp_path / "out", "--recursive")
    monkeypatch.undo()
    assert (code, errors) == (1, f"error: {photos / 'sub'} cannot be listed: Permission denied.\n")
    assert text.startswith("purified 2, skipped 0, failed 1; ")
    assert files(tmp_path / "out") == ["a.png", "b.png"]


def test_colour_profile_comes_through(tmp_path, purify):
    source = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(source, icc_profile=b"a profile")
    for name in ("b.png", "b.jpg", "b.webp"):
        purify(source, "-o", tmp_path / name)
        assert Image.open(tmp_path / name).info["icc_profile"] == b"a profile"


def test_ctrl_c_ends_cleanly_and_the_same_command_goes_on(tmp_path, photos, purify, monkeypatch):
    save, calls = Image.Image.save, []

    def interrupted(image, name, **options):
        calls.append(name)
        save(image, name, **options)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    code, text, errors = purify(photos, "-o", tmp_path / "out")
    assert (code, text) == (130, "")
    assert errors == "interrupted; nothing is half-written, and the same command can be run again.\n"
    assert files(tmp_path / "out") == ["a.png"]
    assert purify(photos, "-o", tmp_path / "out")[1].startswith("purified 1, skipped 1 ")


@pytest.mark.skipif(AS_ROOT, reason="the superuser may read and write everything")
def test_output_without_permission(tmp_path, photos, purify):
    (tmp_path / "out").mkdir(mode=0o500)
    code, text, errors = purify(photos / "a.png", "-o", tmp_path / "out")
    assert (code, text) == (1, "purified 0, skipped 0, failed 1\n")
    assert errors == f"error: {tmp_path / 'out' / 'a.png'} cannot be written: Permission denied.\n"


def test_bars_are_drawn_on_a_terminal(tmp_path, photos, purify, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal
    code, text, errors = purify(photos, "-o", tmp_path / "out")
    assert code == 0
    assert "purifying" in errors
    assert "\x1b" not in text


def test_data_labels_class_folders(tmp_path, run):
    for i, name in enumerate(("cat/1.jpg", "cat/deep/2.png", "dog/3.jpg", "loose.png")):
        picture(tmp_path / "in" / name, seed=i, channels=4 if name.endswith("png") else 3)
    (tmp_path / "in" / "bird").mkdir()  # a class without images keeps its place
    out = tmp_path / "out.npz"
    code, text, errors = run("data", tmp_path / "in", "-o", out, "--max-side", 22)
    assert (code, text, errors) == (0, f"packed 4 images into {out}, failed 0\n", "")
    images = PackedImages(out)
    with np.load(out, allow_pickle=False) as file:
        names = file["names"].tolist()
    assert dict(zip(names, images.labels.tolist(), strict=True)) == {
        "cat/1.jpg": 1,
        "cat/deep/2.png": 1,
        "dog/3.jpg": 2,
        "loose.png": -1,
    }
    assert {images[i].shape[1:] for i in range(4)} == {(22, 3)}


def test_data_keeps_jpegs_and_repeats_itself(tmp_path, photos, run):
    for name in ("x.npz", "y.npz"):
        assert run("data", photos, "-o", tmp_path / name)[0] == 0
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "y.npz").read_bytes()
    assert (photos / "b.jpg").read_bytes() in (tmp_path / "x.npz").read_bytes()


def test_data_names_broken_files(tmp_path, photos, run):
    (photos / "bad.jpg").write_bytes((photos / "b.jpg").read_bytes()[:-99])
    code, text, errors = run("data", photos, "-o", tmp_path / "out.npz")
    assert (code, text) == (1, f"packed 3 images into {tmp_path / 'out.npz'}, failed 1\n")
    assert errors.startswith(f"error: {photos / 'bad.jpg'} is damaged: ")


def test_data_refuses(tmp_path, photos, run):
    out = tmp_path / "out.npz"
    assert run("data", photos, "-o", tmp_path / "out.zip")[2] == f"error: {tmp_path / 'out.zip'} must end in .npz.\n"
    out.touch()
    assert run("data", photos, "-o", out)[2] == f"error: {out} exists; --overwrite replaces it.\n"
    assert run("data", photos, "-o", out, "--overwrite")[0] == 0
    message = run("data", photos / "a.png", "-o", tmp_path / "new.npz")[2]
    assert message.startswith(f"error: {photos / 'a.png'} is no folder; ")


def test_data_cifar10(tmp_path, monkeypatch, run):
    def cifar10(root, train, download):
        assert not download
        if train:
            raise RuntimeError("Dataset not found or corrupted.")
        return types.SimpleNamespace(data=np.zeros((2, 32, 32, 3), np.uint8), targets=[7, 3])

    monkeypatch.setitem(sys.modules, "torchvision.datasets", types.SimpleNamespace(CIFAR10=cifar10))
    assert run("data", tmp_path, "-o", tmp_path / "out.npz", "--cifar10", "test")[0] == 0
    images = PackedImages(tmp_path / "out.npz")
    assert (sorted(images.labels), images[0].shape) == ([3, 7], (32, 32, 3))
    code, _, errors = run("data", tmp_path, "-o", tmp_path / "new.npz", "--cifar10", "train")
    assert code == 1
    assert errors.startswith(f"error: {tmp_path} does not hold CIFAR-10 as torchvision stores it")
    assert f"CIFAR10('{tmp_path}', download=True)" in errors


def official(path, weights, **extra):
    config, state = read_safetensors(weights)
    options = {"num_heads": config.num_heads, "decoder_num_heads": config.decoder_num_heads, "img_size": 64}
    torch.save({"model": {**state, **extra}, "args": {**options, "out_indices": (0,)}}, path)
    return path


def test_convert(tmp_path, run, weights):
    extra = {"hgds.0.weight": torch.zeros(1), "pos_embed": torch.zeros(1, 1025, 96)}
    extra["sqrt_alphas_cumprod"] = torch.zeros(1000)
    source, out = official(tmp_path / "in.pth", weights, **extra), tmp_path / "out.safetensors"
    code, text, errors = run("convert", source, out, "--dtype", "fp16")
    assert (code, errors) == (0, "")
    assert text.splitlines() == [
        f"wrote {out} (fp16)",
        "dropped 3 (tables and guide networks, never needed)",
        "missing 0",
        "unexpected 0",
    ]
    assert {value.dtype for value in read_safetensors(out)[1].values()} == {torch.float16}
    zoo.load(out)


def test_convert_reports_and_refuses(tmp_path, run, weights):
    source, out = official(tmp_path / "in.pth", weights, odd=torch.zeros(1)), tmp_path / "out.safetensors"
    code, _, errors = run("convert", source, out)
    assert code == 1
    assert errors == f"error: {source} has extra odd. strict=False loads what fits.\n"
    assert not out.exists()
    assert "unexpected 1: odd" in run("convert", source, out, "--no-strict")[1]
    assert run("convert", source, out)[2] == f"error: {out} exists; --overwrite replaces it.\n"
    assert "must end in .safetensors" in run("convert", source, tmp_path / "out.pth")[2]
    assert "missing.pth does not exist" in run("convert", tmp_path / "missing.pth", tmp_path / "new.safetensors")[2]


def test_export_writes_a_program_and_refuses(tmp_path, run, weights):
    out = tmp_path / "purifier.pt2"
    code, text, errors = run("export", out, "--model", weights, "--height", 24, "--width", 24)
    assert (code, text, errors) == (0, f"wrote {out} (program, pictures of 24 x 24)\n", "")
    images = torch.rand(1, 3, 24, 24)
    got = torch.export.load(out).module()(images, torch.tensor(3), torch.tensor([0]))
    assert (got - zoo.load(weights).purify(images, seed=3)).abs().max() <= 1e-5
    assert run("export", out, "--model", weights)[2] == f"error: {out} exists; --overwrite replaces it.\n"
    assert "must end in .onnx" in run("export", tmp_path / "a.pt2", "--format", "onnx")[2]
    for both_or_neither in ([], [tmp_path / "a.pt2", "--triton", tmp_path], ["--triton", tmp_path, "--decomposed"]):
        assert run("export", *both_or_neither)[2].startswith("error: Name one: OUT, a .pt2 or .onnx file, or --triton")


def test_export_adds_to_a_model_repository(tmp_path, run, weights, monkeypatch):
    """Without the export to ONNX itself, which takes long."""
    from impure_fast.engine import export

    monkeypatch.setattr(export, "export", lambda model, path, *size, format: picture(path.with_suffix(".png")))
    arguments = ("export", "--triton", tmp_path / "models", "--model", weights, "--height", 24, "--width", 28)
    folder = tmp_path / "models" / "small_24x28"
    assert run(*arguments)[:2] == (0, f"wrote {folder} (Triton, pictures of 24 x 28)\n")
    assert files(tmp_path / "models") == ["small_24x28/1/model.png", "small_24x28/config.pbtxt"]
    assert run(*arguments)[2] == f"error: {folder / 'config.pbtxt'} exists; --overwrite replaces it.\n"


@pytest.fixture
def training(monkeypatch):
    """Replaces the training itself; collects its arguments."""
    from impure_fast.evaluation import targets
    from impure_fast.training import loop

    calls = []

    def train(config, data, output, classifier, progress, device, guide=None):
        assert (guide is None) == (not config.guide)
        calls.append((config, data, output, device))
        progress("pairs", 1, 2, {})
        progress("train", 1, config.steps, {"loss": 0.5, "pictures_per_second": 3.0})
        return config.steps == 7

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(targets, "efficientnet_lite", lambda version: torch.nn.Identity())
    return calls


def test_train_passes_only_what_was_given(tmp_path, run, training):
    from impure_fast.training.config import TrainConfig

    recipe = tmp_path / "recipe.json"
    recipe.write_text('{"lr": 0.5, "crop": 128, "mix_chunks": 0, "guide_nodes": ["a"], "guide_weights": [2.0]}')
    arguments = ["--data", tmp_path / "d.npz", "--output", tmp_path / "run", "--steps", 7, "--lr", 0.1]
    code, text, errors = run("train", *arguments, "--config", recipe)
    assert (code, errors) == (0, "")
    assert text == f"trained; the weights are {tmp_path / 'run' / 'model.safetensors'}\n"
    wanted = TrainConfig(steps=7, lr=0.1, crop=128, mix_chunks=0, guide_nodes=("a",), guide_weights=(2.0,))
    assert training == [(wanted, tmp_path / "d.npz", tmp_path / "run", "cpu")]


def test_train_takes_classifier_and_guide_by_name(tmp_path, run, training):
    files = {}
    for depth in (8, 14):
        files[depth] = tmp_path / f"{depth}.safetensors"
        save_file(CifarResNet(depth).state_dict(), files[depth])
    names = [f"cifar_resnet{depth}={file}" for depth, file in files.items()]
    given = ["--data", "d.npz", "--output", tmp_path, "--steps", 7, "--classifier", names[0], "--guide", names[1]]
    assert run("train", *given)[0] == 0
    assert (training[0][0].classifier, training[0][0].guide) == tuple(names)
    assert run("train", *given, "--guide", "cifar_resnet20")[2].startswith(
        "error: cifar_resnet20 comes without weights: name a file of them (cifar_resnet20=FILE).\n"
    )


def test_finetune_learns_and_repeats_itself(tmp_path, run):
    rng = np.random.default_rng(0)
    labels = np.arange(48) % 2  # dark pictures and light ones
    pictures = [rng.integers(0, 120, (32, 32, 3), np.uint8) + np.uint8(130 * label) for label in labels]
    data = tmp_path / "two.npz"
    write_packed(data, [encode_jpeg(picture, 90, None) for picture in pictures], labels, ["a"] * 48)
    torch.manual_seed(0)
    start = tmp_path / "start.safetensors"
    save_file(CifarResNet(8).state_dict(), start)
    outs = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for out in outs:
        arguments = [f"cifar_resnet8={start}", "--data", data, "--output", out, "--epochs", 4, "--batch", 16]
        code, text, errors = run("finetune", *arguments)
        assert (code, text, errors) == (0, f"fine-tuned on 48 pictures; wrote {out}\n", "")
    one, two = map(load_file, outs)
    assert all(torch.equal(one[name], two[name]) for name in one)
    target = load_target(f"cifar_resnet8={outs[0]}")
    found = load_pictures(data, target.prepare, 48)
    assert (target.model(found.images).argmax(dim=1) == found.labels).float().mean() >= 0.9
    assert run("finetune", *arguments)[2] == f"error: {out} exists; --overwrite replaces it.\n"
    code, _, errors = run("finetune", *arguments, "--overwrite", "--lr", 1e9)
    assert code == 1
    assert re.match(r"error: The loss is (nan|inf) at step \d; try a lower --lr than 1000000000.0.\n", errors)
    write_packed(data, [encode_jpeg(picture, 90, None) for picture in pictures], labels + 10, ["a"] * 48)
    assert run("finetune", *arguments, "--overwrite")[2] == "error: label 11: cifar_resnet8 knows 10 classes.\n"


def test_train_takes_a_recipe_by_its_name(tmp_path, run, training):
    from impure_fast.training.config import TrainConfig

    arguments = ["--data", tmp_path / "d.npz", "--output", tmp_path / "run", "--steps", 7, "--tensorboard"]
    assert run("train", *arguments, "--config", "impure_tiny_2")[0] == 0
    assert training[0][0] == TrainConfig.from_file("impure_tiny_2", steps=7, tensorboard=True)
    assert training[0][0].lr == 0.001
    code, _, errors = run("train", *arguments, "--config", "impure_tiny_9")
    assert code == 1 and "impure_tiny_9 is no file" in errors and "impure_tiny_1, impure_tiny_2" in errors


def test_train_plans_without_data_or_training(tmp_path, run, training, monkeypatch):
    from impure_fast.evaluation import targets

    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(targets, "efficientnet_lite", lambda version: torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)))
    recipe = tmp_path / "recipe.json"
    recipe.write_text('{"crop": 64, "guide_nodes": ["0"], "guide_weights": [1.0], "ema": 0.5}')
    arguments = ["--data", tmp_path / "no.npz", "--output", tmp_path / "run", "--config", recipe]
    code, text, errors = run("train", *arguments, "--plan", "--memory", "tight")
    assert (code, errors, training) == (0, "", [])
    rows = {cells[1].strip(): cells[2:-1] for line in text.splitlines() if len(cells := line.split("│")) > 3}
    assert rows["tight (this run)"][-1].strip() == "0.0"
    assert float(rows["all"][0]) > float(rows["default"][0]) > float(rows["tight (this run)"][0])
    assert "encoder block 3" in rows and "running average" in rows
    assert not (tmp_path / "run").exists()


def test_interrupted_training_tells_how_to_go_on(tmp_path, run, training, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, text, errors = run("train", "--data", "d.npz", "--output", tmp_path, "--steps", 8)
    assert (code, text) == (130, "")
    assert f"interrupted and saved in {tmp_path}; the same command goes on from there." in errors.replace("\n", "")
    assert "loss 0.5000, 3.00 images/s" in errors


def test_train_refuses(tmp_path, run, training):
    recipe = tmp_path / "recipe.json"
    for text, message in (
        ('{"crop": 100}', "crop=100: must be a multiple of the tile (64) of at most view=224."),
        ('{"speed": 1}', "Unknown training fields ['speed']; known are "),
        ("{", f"{recipe} holds no training config: "),
    ):
        recipe.write_text(text)
        code, _, errors = run("train", "--data", "d.npz", "--output", tmp_path, "--config", recipe)
        assert code == 1
        assert errors.startswith(f"error: {message}")


def test_demo_passes_its_options(tmp_path, run, monkeypatch):
    from impure_fast import demo

    calls = []
    monkeypatch.setattr(demo, "run", lambda **options: calls.append(options) or {"n": 3})
    monkeypatch.setattr(demo, "table", lambda results: f"table of {results['n']}")
    options = ("--json", tmp_path / "a.json", "--views", 3, "--data", "d.npz", "--attack-steps", 10)
    assert run("demo", *options, "--image-step", 90) == (0, "table of 3\n", "")
    del calls[0]["progress"]
    assert calls == [
        {
            "json_path": tmp_path / "a.json",
            "picture_path": Path("demo.png"),
            "model": "impure_tiny",
            "views": 3,
            "data": Path("d.npz"),
            "attack_steps": 10,
            "white_box": 0,
            "image_step": 90,
            "feature_step": None,
        }
    ]


def test_app_serves_what_it_was_given(run, weights, monkeypatch):
    from impure_fast import app

    calls = []

    def launch(model, host, port):
        calls.append((model.config.depth, host, port))
        return types.SimpleNamespace(block_thread=lambda: calls.append("waited")), "http://here"

    monkeypatch.setattr(app, "launch", launch)
    assert run("app", "--model", weights) == (0, "", "the page is at http://here; Ctrl-C ends it\n")
    assert run("app", "--model", weights, "--host", "0.0.0.0", "--port", 80)[0] == 0
    assert calls == [(1, "127.0.0.1", None), "waited", (1, "0.0.0.0", 80), "waited"]
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "gradio", None)
    message = 'error: The page needs the extra "app": pip install "impure-fast[app]".\n'
    assert run("app", "--model", weights) == (1, "", message)


def test_info_json(run):
    code, text, errors = run("info", "--json")
    assert (code, errors) == (0, "")
    report = json.loads(text)
    assert set(report) == {"versions", "devices", "operators", "gpu", "build"}
    assert set(report["versions"]) == {"impure_fast", "python", "torch", "triton", "timm", "numpy"}
    assert set(report["operators"]) == set(OPERATORS)
    for name, row in report["operators"].items():
        assert list(row) == ["reference", "cpp", "triton", "cuda"]
        for backend, cell in row.items():
            assert cell == {"can_run": not cell["reasons"], "reasons": can_run(name, backend)}
    assert report["operators"]["order"]["reference"]["can_run"]
    assert report["operators"]["order"]["cpp"]["reasons"] == ["There is no cpp implementation of it."]


def test_info_for_people(run):
    code, text, _ = run("info")
    assert code == 0
    for line in (
        f"torch {torch.__version__}",
        "cpp: There is no cpp implementation of it.",
        "Nothing has run on a GPU yet: CUDA and Triton kernels, CUDA graphs and fp8 are tested on the CPU alone.",
    ):
        assert line in text.splitlines()


def test_models(run):
    code, text, _ = run("models")
    assert code == 0
    row = next(line for line in text.splitlines() if "impure_base_patch16_224 " in line)
    assert row.replace("│", " ").split()[1:6] == ["115.79", "M", "16", "448", "px"]
    assert all(name in text for name in zoo.list_models())


def test_any_error_is_one_line(run):
    code, text, errors = run("purify", "nowhere.png", "-o", "nowhere-out", "--device", "cpu")
    assert (code, text) == (1, "purified 0, skipped 0, failed 1\n")
    assert errors == "error: nowhere.png does not exist.\n"


def python(code):
    root = os.path.dirname(os.path.dirname(os.path.dirname(cli.__file__)))
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_missing_extra_is_one_sentence(package):
    ended = python(f"import sys; sys.modules[{package!r}] = None; from impure_fast.cli import main; main()")
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", f"{cli.MISSING}\n")
    assert cli.MISSING == 'impure-fast needs the extra "cli": pip install "impure-fast[cli]".'


def test_serve_refuses_before_it_starts_anything(run, weights):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for arguments, message in (
            (("--model", "impure_huge"), "impure_huge is no shipped model and no file;"),
            (("--precision", "fp16"), "precision='fp16': on cpu choose one of fp32, bf16, int8."),
            (("--device", "cuda:99"), "--device cuda:99 cannot be used here: "),
            (("--classifier", "nowhere:net"), "nowhere:net: No module named 'nowhere'; wanted package.module:factory"),
            (("--timeout", 0), "timeout=0.0: wanted seconds."),
            (("--port", port), f"127.0.0.1:{port} cannot be listened at: Address already in use;"),
            (
                ("--metrics-port", port),
                f":{port} cannot be listened at: Address already in use; choose another --metrics",
            ),
            (("--metrics-port", 8000), "--port and --metrics-port are both 8000; they must differ."),
        ):
            code, text, errors = run("serve", "--model", weights, *arguments)
            assert (code, text, errors[: 7 + len(message)]) == (1, "", f"error: {message}")


def test_help_is_quick_and_loads_nothing_heavy():
    code = """
import sys
from impure_fast.cli import main
try:
    main(["--help"])
finally:
    print(*{"torch", "numpy", "PIL", "timm"} & set(sys.modules), file=sys.stderr)
"""
    ended = python(code)
    assert (ended.returncode, ended.stderr.strip()) == (0, "")
    for command in (
        *("purify", "serve", "demo", "app", "info", "models", "data", "convert", "export", "train"),
        *("finetune", "attack", "evaluate"),
    ):
        assert command in ended.stdout
