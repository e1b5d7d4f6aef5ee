"""Every kind of image file: what is read, what is refused and how, and that writing is all or nothing."""

import contextlib
import errno
import os
import warnings

import numpy as np
import pytest
from PIL import Image

from impure_fast.errors import ImageFileError, ImageTooLargeError, InputError, MissingFileError
from impure_fast.images import (
    decode_image,
    encode_image,
    encode_jpeg,
    find_images,
    jpeg_bytes,
    random_view,
    read_image,
    write_atomically,
    write_image,
    write_packed,
)

AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
needs_permissions = pytest.mark.skipif(AS_ROOT, reason="the superuser may read and write everything")


def pixels(height=12, width=16, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8).squeeze()


def smooth(height=16, width=24):
    """A gradient, which JPEG keeps within a few levels."""
    rows, cols = np.mgrid[:height, :width]
    return np.stack((rows * 8, cols * 8, rows + cols), axis=2).astype(np.uint8)


def saved(path, image, **options):
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def test_rgb_and_grey(tmp_path):
    rgb, grey = pixels(), pixels(channels=1)
    picture = read_image(saved(tmp_path / "a.png", rgb))
    assert np.array_equal(picture.rgb, rgb)
    assert (picture.alpha, picture.warning) == (None, None)
    assert picture.rgb.flags.writeable
    assert np.array_equal(read_image(saved(tmp_path / "b.png", grey)).rgb, np.stack([grey] * 3, axis=2))
    assert read_image(saved(tmp_path / "c.png", Image.new("1", (5, 4), 1))).rgb.min() == 255


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    picture = read_image(saved(tmp_path / "a.png", values))
    assert picture.rgb[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]
    assert picture.rgb.shape == (1, 6, 3)


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [1, 2]], dtype=np.uint8), "L").convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    wanted = [[[10, 20, 30], [40, 50, 60]], [[40, 50, 60], [70, 80, 90]]]
    plain = read_image(saved(tmp_path / "a.png", image))
    assert (plain.rgb.tolist(), plain.alpha) == (wanted, None)
    keyed = read_image(saved(tmp_path / "b.png", image, transparency=bytes([255, 0, 100])))
    assert (keyed.rgb.tolist(), keyed.alpha.tolist()) == (wanted, [[255, 0], [0, 100]])


@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_is_kept_aside_and_put_back(tmp_path, channels):
    values = pixels(channels=channels)
    picture = read_image(saved(tmp_path / "a.png", values))
    assert np.array_equal(picture.alpha, values[..., -1])
    assert np.array_equal(picture.rgb, np.broadcast_to(values[..., :-1], picture.rgb.shape))
    for name in ("b.png", "b.webp"):
        assert write_image(tmp_path / name, picture.rgb, picture.alpha) is None
        again = read_image(tmp_path / name)
        assert np.array_equal(again.rgb, picture.rgb)
        assert np.array_equal(again.alpha, picture.alpha)


def test_jpeg_says_that_it_drops_alpha(tmp_path):
    path = tmp_path / "a.jpg"
    assert write_image(path, smooth(), np.zeros((16, 24), np.uint8)) == (
        f"{path}: a JPEG holds no transparency, so it was dropped."
    )
    assert np.abs(read_image(path).rgb.astype(int) - smooth()).max() < 16  # not blended with the zero alpha


def test_cmyk(tmp_path):
    path = saved(tmp_path / "a.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)))
    red = read_image(path).rgb[4, 4]
    assert red[0] > 240
    assert red[1:].max() < 15


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, orientation):
    stored, exif = pixels(4, 6), Image.Exif()
    exif[0x0112] = orientation
    turns = [None, np.fliplr, lambda x: np.rot90(x, 2), np.flipud, lambda x: x.transpose(1, 0, 2)]
    turns += [lambda x: np.rot90(x, -1), lambda x: np.rot90(x, 2).transpose(1, 0, 2), np.rot90]
    turn = turns[orientation - 1]
    picture = read_image(saved(tmp_path / "a.png", stored, exif=exif))
    assert np.array_equal(picture.rgb, turn(stored) if turn else stored)


def test_odd_metadata_is_no_damage(tmp_path):
    rgb = smooth()
    path = saved(tmp_path / "a.jpg", rgb, dpi=(72, 72), exif=b"Exif\0\0no tiff", quality=95)
    assert np.abs(read_image(path).rgb.astype(int) - rgb).max() < 16


def test_colour_profile_of_rgb_is_put_back(tmp_path):
    for name, mode in (("a.png", "RGB"), ("b.jpg", "RGB"), ("c.webp", "RGBA")):
        path = saved(tmp_path / name, Image.new(mode, (4, 4)), icc_profile=b"a profile")
        picture = read_image(path)
        assert picture.profile == b"a profile"
        write_image(tmp_path / f"out-{name}", picture.rgb, picture.alpha, picture.profile)
        with Image.open(tmp_path / f"out-{name}") as file:
            assert file.info["icc_profile"] == b"a profile"
    assert read_image(saved(tmp_path / "d.png", Image.new("L", (4, 4)), icc_profile=b"grey")).profile is None


def test_the_transparent_grey_of_16_bits_is_kept_aside(tmp_path):
    values = np.array([[0, 257, 65535]], dtype=np.uint16)
    assert read_image(saved(tmp_path / "a.png", values, transparency=257)).alpha.tolist() == [[255, 0, 255]]


@pytest.mark.parametrize("suffix", ["png", "webp", "gif"])
def test_animation_gives_its_first_frame_and_a_warning(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    path = saved(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:], **options)
    picture = read_image(path)
    assert picture.warning == f"{path} is animated; only its first frame is used."
    assert picture.rgb[0, 0].tolist() == [255, 0, 0]


def test_second_picture_of_a_camera_file_is_no_animation(tmp_path):
    preview = Image.fromarray(smooth())
    path = saved(tmp_path / "a.jpg", smooth(), format="MPO", save_all=True, append_images=[preview])
    assert Image.open(path).format == "MPO"
    assert read_image(path).warning is None


def test_empty_file(tmp_path):
    path = tmp_path / "a.png"
    path.touch()
    with pytest.raises(ImageFileError) as caught:
        read_image(path)
    assert str(caught.value) == f"{path} is empty (0 bytes)."


def test_not_an_image(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("no picture")
    with pytest.raises(ImageFileError) as caught:
        read_image(path)
    assert str(caught.value) == f"{path} is not an image of a known kind (PNG, JPEG, WEBP, GIF, BMP)."


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp"])
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_truncated(tmp_path, suffix, share):
    path = saved(tmp_path / f"a.{suffix}", pixels(64, 64))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageFileError) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path} is ")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp"])
def test_damage_anywhere_never_escapes_as_another_error(tmp_path, suffix):
    path = saved(tmp_path / f"a.{suffix}", pixels(16, 16))
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(data)
        for place in rng.integers(0, len(data), 4):
            broken[place] = rng.integers(256)
        path.write_bytes(broken)
        with contextlib.suppress(ImageFileError):
            read_image(path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("limit", [150, 60])  # Pillow warns above its limit, and raises above twice the limit
def test_decompression_bomb(tmp_path, monkeypatch, limit):
    path = saved(tmp_path / "a.png", pixels(12, 16))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ImageFileError) as caught:
        read_image(path)
    assert str(caught.value) == (
        f"{path} unpacks to more than {limit} pixels, the limit that keeps a small file from filling the memory "
        "(PIL.Image.MAX_IMAGE_PIXELS). Scale it down first."
    )


def test_bytes_are_read_and_written_as_files_are(tmp_path):
    for name, channels in (("a.png", 4), ("a.webp", 4), ("a.jpg", 3), ("b.jpg", 4)):
        values = pixels(channels=channels)
        rgb, alpha = values[:, :, :3], values[:, :, 3] if channels == 4 else None
        data, warning = encode_image(tmp_path / name, rgb, alpha)
        assert warning == write_image(tmp_path / name, rgb, alpha)
        assert data == (tmp_path / name).read_bytes()
        ours, theirs = decode_image(data, "it"), read_image(tmp_path / name)
        assert np.array_equal(ours.rgb, theirs.rgb)
        assert np.array_equal(ours.alpha, theirs.alpha) if ours.alpha is not None else theirs.alpha is None
    for bad, message in ((b"", "it is empty"), (b"text", "it is not an image"), (data[:200], "it is damaged")):
        with pytest.raises(ImageFileError, match=message):
            decode_image(bad, "it")
    with pytest.raises(ImageFileError, match=r"it is not an image of a known kind \(PNG, WEBP\)"):
        decode_image(data, "it", ("PNG", "WEBP"))


def test_own_limit_of_pixels():
    data, _ = encode_image("a.png", pixels(12, 16))
    assert decode_image(data, "it", max_pixels=192).rgb.shape == (12, 16, 3)
    with pytest.raises(ImageTooLargeError, match=r"^it unpacks to 16 x 12 pixels; the limit is 191\. Scale it down"):
        decode_image(data, "it", max_pixels=191)
    with pytest.raises(InputError, match="max_pixels=1,000,000,000: Pillow opens at most"):
        decode_image(data, "it", max_pixels=10**9)


def test_own_limit_may_lie_above_pillows(monkeypatch):
    data, _ = encode_image("a.png", pixels(12, 16))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode_image(data, "it", max_pixels=200).rgb.shape == (12, 16, 3)
    with pytest.raises(InputError, match=r"max_pixels=201: Pillow opens at most 200 pixels, twice PIL\.Image\.MAX"):
        decode_image(data, "it", max_pixels=201)


def test_decoding_in_threads_leaves_the_filters_of_warnings_alone(monkeypatch):
    data, _ = encode_image("a.png", pixels(12, 16))
    with monkeypatch.context() as patch:  # pytest itself calls it, at a test's end
        patch.setattr(warnings, "catch_warnings", None)  # which would change them for all threads
        assert decode_image(data, "it").rgb.shape == (12, 16, 3)


def test_a_picture_beyond_the_memory_is_named(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", pixels())
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(ImageTooLargeError, match=r"a\.png does not fit in memory"):
        read_image(path)


def test_a_sub_folder_that_cannot_be_listed_does_not_hide_the_others(tmp_path, monkeypatch):
    for name in ("a.png", "locked/b.png", "open/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        saved(tmp_path / name, pixels())
    real = os.scandir

    def scandir(place):
        if os.path.basename(place) == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(place))
        return real(place)

    monkeypatch.setattr(os, "scandir", scandir)
    problems = []
    found = find_images([tmp_path], recursive=True, problems=problems)
    assert [relative.as_posix() for _, relative in found] == ["a.png", "open/c.png"]
    assert len(problems) == 1 and "locked cannot be listed: Permission denied." in problems[0]
    with pytest.raises(ImageFileError, match="locked cannot be listed"):
        find_images([tmp_path], recursive=True)


def test_missing_file(tmp_path):
    with pytest.raises(MissingFileError, match=r"a\.png does not exist\."):
        read_image(tmp_path / "a.png")


def test_folder_in_place_of_a_file(tmp_path):
    with pytest.raises(ImageFileError, match="cannot be read: Is a directory"):
        read_image(tmp_path)


@needs_permissions
def test_unreadable_file(tmp_path):
    path = saved(tmp_path / "a.png", pixels())
    path.chmod(0)
    with pytest.raises(ImageFileError) as caught:
        read_image(path)
    assert str(caught.value) == f"{path} cannot be read: Permission denied."


def test_find_images(tmp_path):
    for name in ("b.PNG", "a.jpeg", "note.txt", ".hidden.png", "sub/c.webp", ".cache/d.png", "sub/deep/e.jpg"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    folder = tmp_path / "in"
    assert [str(rel) for _, rel in find_images([folder])] == ["a.jpeg", "b.PNG"]
    everything = find_images([folder], recursive=True)
    assert [rel.as_posix() for _, rel in everything] == ["a.jpeg", "b.PNG", "sub/c.webp", "sub/deep/e.jpg"]
    assert all(file == folder / rel for file, rel in everything)
    named = find_images([folder / "note.txt", str(folder / "a.jpeg")])  # given by name: reading will tell
    assert [rel.name for _, rel in named] == ["a.jpeg", "note.txt"]


def test_find_images_refuses_what_is_not_there(tmp_path):
    with pytest.raises(ImageFileError) as caught:
        find_images([tmp_path])
    assert str(caught.value) == (
        f"{tmp_path} holds no images (.png .jpg .jpeg .webp). --recursive (recursive=True) looks into its sub-folders."
    )
    with pytest.raises(MissingFileError, match="nowhere does not exist"):
        find_images([tmp_path / "nowhere"])


@pytest.mark.parametrize("suffix", [".png", ".webp", ".PNG"])
def test_lossless_formats_keep_every_pixel(tmp_path, suffix):
    path = tmp_path / "new" / f"a{suffix}"
    assert write_image(path, pixels()) is None
    assert np.array_equal(read_image(path).rgb, pixels())
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_jpeg_keeps_full_size_chroma(tmp_path):
    write_image(tmp_path / "a.jpg", smooth())
    with Image.open(tmp_path / "a.jpg") as image:
        assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3


def test_unknown_suffix(tmp_path):
    with pytest.raises(ImageFileError, match=r"a\.tif has no suffix of a format that is written \(\.png \.jpg"):
        write_image(tmp_path / "a.tif", pixels())


def test_sides_too_long_for_the_format(tmp_path):
    with pytest.raises(ImageFileError, match=r"a\.webp cannot be written: .*16383"):
        write_image(tmp_path / "a.webp", np.zeros((1, 17000, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there_before", [False, True])
def test_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, there_before):
    path = tmp_path / "a.png"
    if there_before:
        write_image(path, pixels(seed=1))

    def save(image, name, **options):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(ImageFileError) as caught:
        write_image(path, pixels())
    assert str(caught.value) == f"{path} cannot be written: No space left on device."
    assert os.listdir(tmp_path) == (["a.png"] if there_before else [])
    if there_before:
        assert np.array_equal(read_image(path).rgb, pixels(seed=1))


def test_interruption_leaves_nothing_half_written(tmp_path):
    def write(temporary):
        with open(temporary, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a.png", write)
    assert os.listdir(tmp_path) == []


def test_file_in_the_way_of_a_folder(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(ImageFileError, match=r"b\.png cannot be written: (File exists|Not a directory)"):
        write_image(tmp_path / "a" / "b.png", pixels())


@needs_permissions
def test_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ImageFileError) as caught:
        write_image(tmp_path / "a.png", pixels())
    assert str(caught.value) == f"{tmp_path / 'a.png'} cannot be written: Permission denied."


def test_written_files_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_image(tmp_path / "a.png", pixels())
    finally:
        os.umask(old)
    assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o640


def test_only_upright_rgb_jpegs_are_packed_as_they_are(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = saved(tmp_path / "a.jpg", smooth(), quality=60)
    turned = saved(tmp_path / "b.jpg", smooth(), exif=exif)
    grey = saved(tmp_path / "c.jpg", smooth()[:, :, 0])
    png = saved(tmp_path / "d.png", smooth())
    assert jpeg_bytes(plain, 92) == plain.read_bytes()
    assert jpeg_bytes(png, 92) == encode_jpeg(smooth(), 92)
    for path, shape in ((turned, (24, 16, 3)), (grey, (16, 24, 3)), (png, (16, 24, 3))):
        (tmp_path / "again.jpg").write_bytes(jpeg_bytes(path, 92))
        with Image.open(tmp_path / "again.jpg") as image:
            assert np.asarray(image).shape == shape
    (tmp_path / "again.jpg").write_bytes(jpeg_bytes(plain, 92, max_side=12))
    assert read_image(tmp_path / "again.jpg").rgb.shape == (8, 12, 3)


def test_damaged_jpeg_is_not_packed(tmp_path):
    path = saved(tmp_path / "a.jpg", pixels(64, 64))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ImageFileError, match="truncated"):
        jpeg_bytes(path, 92)


def test_packed_file_is_shuffled_and_repeatable(tmp_path):
    jpegs = [encode_jpeg(smooth(8 + i, 8), 90) for i in range(10)]
    names = [f"{i}.jpg" for i in range(10)]
    for name in ("a.npz", "b.npz"):
        write_packed(tmp_path / name, jpegs, range(10), names)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        labels, offsets, data = file["labels"], file["offsets"], file["jpeg"]
        assert file["names"].tolist() == [names[i] for i in labels]
    assert sorted(labels) == list(range(10)) != labels.tolist()
    assert [data[a:b].tobytes() for a, b in zip(offsets, offsets[1:], strict=False)] == [jpegs[i] for i in labels]


def test_a_view_of_a_picture_that_has_its_size_keeps_the_pixels():
    rng = np.random.default_rng(0)
    picture = rng.integers(256, size=(32, 32, 3), dtype=np.uint8)
    views = [random_view(picture, 32, rng) for _ in range(8)]
    ways = {any(np.array_equal(view, way) for way in (picture, picture[:, ::-1])) for view in views}
    assert ways == {True}
    assert not any(np.array_equal(random_view(picture, 31, rng)[:, :31], picture[:31, :31]) for _ in range(8))
