"""The page: what its functions compute, what a client gets from it, and what a person sees in a browser."""

import dataclasses
import io
import os
import re
import shutil
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

from impure_fast import app, load
from impure_fast.demo import PHOTOGRAPHS, SEED, photograph_files
from impure_fast.errors import ConfigError, ImageFileError, InputError
from impure_fast.purify import to_float
from impure_fast.zoo import create_model

from .conftest import global_generator_untouched, random_images


@pytest.fixture(scope="module")
def model():
    """A network of one block each, K = 4."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_model("impure_tiny", depth=1, decoder_depth=1, out_indices=(0,)).eval()


@pytest.fixture(scope="module")
def trial(model):
    return app.Trial(model)


@pytest.fixture
def photo(tmp_path):
    """photo(name, mode, size, **options of PIL's save) -> the file of half a black, half a white picture."""

    def make(name="photo.png", mode="RGB", size=(300, 400), **options):
        image = Image.new("L", size)
        image.paste(255, (0, 0, size[0], size[1] // 2))  # the upper half
        image.convert(mode).save(tmp_path / name, **options)
        return tmp_path / name

    return make


def turned():
    """EXIF data by which a picture that stands on its head is shown upright."""
    exif = Image.Exif()
    exif[0x0112] = 3
    return exif


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "photo.png, 300 x 400: its middle square, at the classifier's 224 pixels."),
        ({"mode": "L"}, "photo.png, 300 x 400: its middle square, at the classifier's 224 pixels."),
        ({"mode": "RGBA"}, "Its transparency was dropped."),
        ({"size": (3, 2)}, "It is smaller than that and was enlarged, which the classifier may not forgive."),
        ({"size": (2, 3000)}, "It is smaller than that and was enlarged, which the classifier may not forgive."),
        (
            {"name": "a.webp", "save_all": True, "append_images": [Image.new("L", (300, 400))]},
            "a.webp is animated; only its first frame is used.",
        ),
    ],
    ids=["plain", "grey", "transparent", "tiny", "narrow", "animated"],
)
def test_odd_photographs_are_opened_with_a_word(trial, photo, arguments, sentence):
    clean, notes = trial.open(photo(**arguments))
    assert notes[-1] == sentence
    assert clean.shape == (1, 3, 224, 224)
    assert clean[:, :, :50].min() > 0.98 and clean[:, :, -50:].max() < 0.02


def test_photographs_are_turned_by_their_exif_tag(trial, photo):
    clean, _ = trial.open(photo("a.jpg", exif=turned()))
    assert clean[:, :, -50:].min() > 0.98 and clean[:, :, :50].max() < 0.02


def test_files_that_are_no_photographs_get_a_sentence(trial, photo, tmp_path, monkeypatch):
    (tmp_path / "note.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    whole = photo("whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for name, sentence in (
        ("note.png", "note.png is not an image of a known kind"),
        ("empty.png", "empty.png is empty (0 bytes)."),
        ("whole.jpg", "whole.jpg unpacks to more than 100 pixels"),
    ):
        with pytest.raises(ImageFileError, match="^" + re.escape(sentence)):
            trial.open(tmp_path / name)
    monkeypatch.undo()
    with pytest.raises(ImageFileError, match=r"^half\.jpg is damaged: "):
        trial.open(tmp_path / "half.jpg")


def test_the_attack_keeps_its_bound_and_changes_the_label(trial):
    clean, _ = trial.open(photograph_files()[0])
    with global_generator_untouched():
        adversarial = trial.attack(clean, 8, 3)
    assert 6 / 255 < (adversarial - clean).abs().max() <= 8.5 / 255
    before, after = trial.confidences(clean), trial.confidences(adversarial)
    assert len(before) == 3 and list(before.values()) == sorted(before.values(), reverse=True)
    assert next(iter(before)) != next(iter(after))


def test_the_sliders_reach_the_purifier_and_draws_stay(trial, model):
    image = random_images(1, 3, 224, 224)
    given = dict(image_step=100, feature_step=200)
    purified = trial.purify(image, **given, chunks=4)
    wanted = model.purify(image, seed=SEED, **given)
    assert (purified - wanted).abs().max() < 0.1  # the engine may take bf16
    assert torch.equal(purified, trial.purify(image, **given, chunks=4))
    for change in ({"image_step": 300}, {"feature_step": 10}, {"chunks": 8}):
        assert (trial.purify(image, **{**given, "chunks": 4, **change}) - purified).abs().max() > 0.01


def test_k_is_offered_where_it_divides_a_tile(model):
    assert app.possible_chunks(model.config) == [2, 4, 8, 16]  # 16 x 16 patches
    assert app.possible_chunks(dataclasses.replace(model.config, tile_size=48, tile_stride=32)) == [
        2,
        3,
        4,
        6,
        8,
        9,
        12,
        16,
    ]
    with pytest.raises(ConfigError, match=r"gives 256 patches, no multiple of K=3\."):
        app.with_chunks(model, 3)


def test_another_k_keeps_the_weights_and_what_alike_chunks_give(model):
    assert app.with_chunks(model, 4) is model
    token = torch.randn(1, 96, generator=torch.Generator().manual_seed(0))
    wanted = model.head_tokens(token.repeat(4, 1))[0, 0]
    for chunks in (2, 8, 16):
        other = app.with_chunks(model, chunks)
        assert other.config.num_chunks == chunks
        torch.testing.assert_close(other.head_tokens(token.repeat(chunks, 1)), wanted.expand(1, chunks, -1))
        assert torch.equal(other.decoder_pred.weight, model.decoder_pred.weight)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """served(model) -> address of a page that ends with the test."""
    gradio = pytest.importorskip("gradio", reason="the extra app is not installed")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    yield lambda model: app.launch(model)[1]
    gradio.close_all(verbose=False)


def test_a_client_gets_pictures_labels_and_sentences(served, model, photo, tmp_path):
    client = pytest.importorskip("gradio_client")
    address = served(model)
    session = client.Client(address, verbose=False, analytics_enabled=False)
    with pytest.raises(client.exceptions.AppError, match=r"^Drop a photograph first\.$"):
        session.predict(8, 2, api_name="/attack")

    note, picture, word, *others = session.predict(client.handle_file(photo()), api_name="/open")
    assert note == "photo.png, 300 x 400: its middle square, at the classifier's 224 pixels."
    assert len(word["confidences"]) == 3 and not any(others)
    clean = np.asarray(Image.open(picture)).astype(int)

    attacked = session.predict(8, 2, api_name="/attack")
    adversarial = np.asarray(Image.open(attacked[0])).astype(int)
    assert 0 < np.abs(adversarial - clean).max() <= 8  # lossless on its way
    assert not any(attacked[3:])
    picture, word, change = session.predict(90, 90, 8, api_name="/purify")
    wanted = app.with_chunks(model, 8).purify(
        to_float(adversarial[None].astype(np.uint8)), seed=SEED, image_step=90, feature_step=90
    )
    got = to_float(np.asarray(Image.open(picture))[None])
    assert (got - wanted).abs().max() < 0.1
    middle = to_float(np.asarray(Image.open(change))[None])
    torch.testing.assert_close(
        middle, ((got - to_float(clean[None].astype(np.uint8))) * 10 + 0.5).clamp(0, 1), atol=0.03, rtol=0
    )

    (tmp_path / "note.png").write_text("no picture")
    note, *others = session.predict(client.handle_file(tmp_path / "note.png"), api_name="/open")
    assert note == "note.png is not an image of a known kind (PNG, JPEG, WEBP, GIF, BMP)."
    assert not any(others)

    port = urlsplit(address).port
    with pytest.raises(InputError, match=rf"^127\.0\.0\.1, port {port}: taken or not allowed; choose others\.$"):
        app.launch(model, port=port)


@pytest.fixture
def tab(tmp_path):
    """A tab of a headless Chromium in which scripts may not fail and nothing outside this machine is asked for."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium on the PATH (Debian: apt install chromium)")
    asked, failed = set(), []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1200, "height": 1000})
        tab.set_default_timeout(300_000)  # a busy machine
        tab.on("request", lambda request: asked.add(urlsplit(request.url).hostname))
        tab.on("pageerror", lambda error: failed.append(str(error)))
        yield tab
        browser.close()
    assert (asked - {None}, failed) == ({"127.0.0.1"}, [])  # None: data within the page


@pytest.mark.slow
def test_a_person_attacks_and_purifies_in_a_browser(served, tab, tmp_path):
    """With the shipped weights.  IMPURE_FAST_SCREENSHOT names a file for a picture of the page."""
    from playwright.sync_api import expect
    from timm.data import ImageNetInfo

    expect.set_options(timeout=300_000)
    coffee = next(path for path in photograph_files() if path.name == "coffee.png")
    right = {ImageNetInfo().index_to_description(i).split(",")[0] for i in PHOTOGRAPHS[coffee.name]}

    note = tab.locator("#note textarea, #note input")

    def word(name):
        return tab.locator(f"#label-{name} h2")

    def press(button):
        tab.get_by_role("button", name=button, exact=True).click()

    tab.goto(served(load("impure_tiny")))
    press("Attack")
    expect(tab.get_by_text(app.WELCOME).last).to_be_visible()
    tab.locator("input[type=file]").set_input_files(coffee)
    assert word("clean").inner_text() in right
    expect(note).to_have_value("coffee.png, 600 x 400: its middle square, at the classifier's 224 pixels.")
    assert word("adversarial").count() == word("purified").count() == 0

    press("Attack")
    assert word("adversarial").inner_text() not in right
    assert word("purified").count() == 0
    press("Purify")
    assert word("purified").inner_text() in right

    if target := os.environ.get("IMPURE_FAST_SCREENSHOT"):
        image = Image.open(io.BytesIO(tab.screenshot(full_page=True))).convert("RGB")
        image.quantize(128).save(target, optimize=True)

    picture = tab.locator("#label-purified").locator("xpath=preceding-sibling::*[1]//img")
    for change in (
        lambda: tab.get_by_label("8", exact=True).check(),
        lambda: tab.get_by_label("range slider for image step").click(position={"x": 100, "y": 5}),
    ):
        before = picture.get_attribute("src")
        change()
        expect(picture).not_to_have_attribute("src", before)
    tab.get_by_role("button", name="Clear", exact=True).click()
    expect(note).to_have_value(app.WELCOME)
    assert word("clean").count() == word("adversarial").count() == word("purified").count() == 0
    (tmp_path / "note.png").write_text("no picture")
    tab.locator("input[type=file]").set_input_files(tmp_path / "note.png")
    expect(note).to_have_value(re.compile(r"^note\.png is not an image of a known kind"))
    assert word("clean").count() == 0
