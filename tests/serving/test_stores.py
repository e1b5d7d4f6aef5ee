"""Files in object stores; a folder stands for the store, so that no network is needed."""

import sys

import pytest
from PIL import Image

from impure_fast.errors import ImageFileError, MissingExtraError, MissingFileError
from impure_fast.serving import stores
from impure_fast.serving.cluster import connect

from ..conftest import files, picture

fs = pytest.importorskip("pyarrow.fs", reason="the extra serve is not installed")


@pytest.fixture(autouse=True)
def bucket(tmp_path, monkeypatch):
    """tmp_path / "store" is what store:// shows."""
    (tmp_path / "store").mkdir()
    found = fs.SubTreeFileSystem(str(tmp_path / "store"), fs.LocalFileSystem())
    monkeypatch.setattr(stores, "_root", lambda address: (found, address.removeprefix("store://")))
    return tmp_path / "store" / "bucket"


def test_a_store_gives_and_takes_what_a_folder_does(tmp_path, bucket, photos, purify):
    for name in ("a.png", "b.jpg", "sub/c.webp", ".hidden.png", "sub/.d/e.png", "notes.txt"):
        (bucket / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (bucket / "in" / name).write_bytes((photos / name).read_bytes() if (photos / name).exists() else b"other")
    for name in ("out", "out/sub"):  # stores have no folders; the one that stands for them does
        (bucket / name).mkdir()
    (bucket / "in" / "z.png").write_bytes(b"no picture")
    assert purify(photos, "-o", tmp_path / "local", "--recursive")[0] == 0

    code, text, errors = purify("store://bucket/in", "-o", "store://bucket/out/", "--recursive")
    assert (code, text[:33]) == (1, "purified 3, skipped 0, failed 1; ")
    assert errors == "error: store://bucket/in/z.png is not an image of a known kind (PNG, JPEG, WEBP, GIF, BMP).\n"
    assert files(bucket / "out") == files(tmp_path / "local") == ["a.png", "b.png", "sub/c.png"]
    for name in files(bucket / "out"):
        assert (bucket / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()

    (bucket / "out" / "b.png").unlink()
    assert purify("store://bucket/in", "-o", "store://bucket/out")[1].startswith("purified 1, skipped 1 ")
    assert purify("store://bucket/in/a.png", "-o", tmp_path / "one.png")[0] == 0
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "local" / "a.png").read_bytes()


def test_a_jpeg_in_a_store_drops_alpha_with_a_warning(bucket, purify):
    picture(bucket / "a.png", channels=4)
    (bucket / "out").mkdir()
    code, _, errors = purify("store://bucket/a.png", "-o", "store://bucket/out", "--format", "jpg")
    assert code == 0
    assert errors == "warning: store://bucket/out/a.jpg: a JPEG holds no transparency, so it was dropped.\n"
    assert Image.open(bucket / "out" / "a.jpg").format == "JPEG"


def test_earlier_results_and_inputs_in_a_store_are_left_alone(bucket, purify):
    picture(bucket / "a.png")
    (bucket / "out").mkdir()
    for expected in ("purified 1, skipped 0", "purified 0, skipped 1"):
        assert purify("store://bucket", "-o", "store://bucket/out", "--recursive")[1].startswith(expected)
    before = (bucket / "a.png").read_bytes()
    code, _, errors = purify("store://bucket/a.png", "-o", "store://bucket", "--overwrite")
    assert code == 1
    assert "its result would overwrite the input store://bucket/a.png" in errors
    assert (bucket / "a.png").read_bytes() == before


def test_what_a_store_cannot_give_is_named(bucket, purify):
    bucket.mkdir()
    with pytest.raises(MissingFileError, match=r"store://bucket/none does not exist\."):
        stores.find_in_store("store://bucket/none", False)
    with pytest.raises(ImageFileError, match=r"store://bucket holds no images .* --recursive"):
        stores.find_in_store("store://bucket", False)
    with pytest.raises(MissingFileError, match=r"store://bucket/a\.png does not exist\."):
        stores.read("store://bucket/a.png")
    with pytest.raises(ImageFileError, match=r"store://bucket/none/a\.png cannot be written: "):
        stores.write("store://bucket/none/a.png", b"x")
    picture(bucket / "a.png")
    code, _, errors = purify("store://bucket/a.png", "-o", "store://bucket/b.png")
    assert (code, errors) == (1, "error: store://bucket/b.png is one image; in an object store, name a folder.\n")


def test_unknown_kinds_of_store_and_a_missing_extra_are_named(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(ImageFileError, match=r"^what://bucket/ is no address of a store that can be opened: "):
        stores.read("what://bucket/a.png")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    stores._root.cache_clear()
    with pytest.raises(MissingExtraError, match=r'needs the extra "serve": pip install "impure-fast\[serve\]"'):
        stores.read("what://bucket/a.png")


def test_file_addresses_are_paths(tmp_path):
    assert stores.place(f"file://{tmp_path}/a%20b.png") == tmp_path / "a b.png"
    assert stores.place("a/b.png").name == "b.png"
    assert stores.place("s3://bucket/a b.png") == "s3://bucket/a b.png"


def test_ray_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r'Ray needs the extra "serve": pip install "impure-fast\[serve\]"'):
        connect("auto")
