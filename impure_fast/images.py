"""Image files <-> uint8 arrays: finding, reading, writing and packing, whatever kind of picture a folder holds.

H, W: height and width.  A file is written under a temporary name in its folder and renamed: whole or absent.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import secrets
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePath
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from .errors import ImageFileError, ImageTooLargeError, InputError, MissingFileError

Pixels = NDArray[np.uint8]

_JPEG: dict[str, Any] = {"format": "JPEG", "quality": 95, "subsampling": 0}
_SAVE: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": {"format": "WEBP", "lossless": True, "exact": True},  # exact: colours under transparent pixels too
}
SUFFIXES = tuple(_SAVE)
_READABLE = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # by content; the suffix of a file given by name is not asked
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright
_TURNS = {  # what makes the others upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Picture:
    """What ``read_image`` found in a file."""

    rgb: Pixels  # [H, W, 3], upright
    alpha: Pixels | None  # [H, W], to be put back on writing
    profile: bytes | None  # ICC profile of a file whose pixels are RGB, to be put back too
    warning: str | None  # a sentence about what was left out


def find_images(
    paths: Iterable[str | Path], recursive: bool = False, problems: list[str] | None = None
) -> list[tuple[Path, Path]]:
    """Sorted (file, path relative to the given folder) of every image; a file given by name counts as it is.

    A folder gives its files with one of SUFFIXES, in any case, and with ``recursive`` those of its sub-folders;
    hidden ones are left out.  problems: takes a sentence for each sub-folder that cannot be listed; None raises.
    Raises MissingFileError, or ImageFileError for a folder without images or one that cannot be listed.
    """
    found: set[tuple[Path, Path]] = set()
    for path in map(Path, paths):
        if os.path.isdir(path):
            inside = _inside(path, recursive, problems)
            if not inside:
                hint = "" if recursive else " --recursive (recursive=True) looks into its sub-folders."
                raise ImageFileError(f"{path} holds no images ({' '.join(SUFFIXES)}).{hint}")
            found.update((file, file.relative_to(path)) for file in inside)
        elif os.path.exists(path):
            found.add((path, Path(path.name)))
        else:
            raise MissingFileError(f"{path} does not exist.")
    return sorted(found)


def _inside(folder: Path, recursive: bool, problems: list[str] | None) -> list[Path]:
    def fail(error: OSError) -> None:
        sentence = f"{error.filename} cannot be listed: {error.strerror}."
        if problems is None or Path(error.filename) == folder:
            raise ImageFileError(sentence) from error
        problems.append(sentence)

    found = []
    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        found += [Path(place, n) for n in names if Path(n).suffix.lower() in SUFFIXES and not n.startswith(".")]
    return found


def read_image(path: str | Path) -> Picture:
    """The picture as a person sees it: first frame, turned by its EXIF tag, 8 bits, RGB.

    Raises ImageFileError or MissingFileError naming the file.
    """
    return _picture(Path(path), str(path), _READABLE, None)


def decode_image(
    data: bytes, name: str, formats: tuple[str, ...] = _READABLE, max_pixels: int | None = None
) -> Picture:
    """``read_image`` of a file's content; errors call it ``name``.

    formats: Pillow's names of those to take; max_pixels: what the picture may unpack to, None for Pillow's own limit.
    Raises ImageFileError; ImageTooLargeError beyond the limit, before anything is unpacked; InputError for a limit
    that Pillow does not let through.
    """
    check_max_pixels(max_pixels)
    return _picture(io.BytesIO(data), name, formats, max_pixels)


def check_max_pixels(max_pixels: int | None) -> None:
    """Raise InputError for more pixels than Pillow opens whatever it is told."""
    if max_pixels is not None and Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        raise InputError(
            f"max_pixels={max_pixels:,}: Pillow opens at most {2 * Image.MAX_IMAGE_PIXELS:,} pixels, twice "
            "PIL.Image.MAX_IMAGE_PIXELS; raise that, or take fewer."
        )


def _picture(source: Path | io.BytesIO, name: str, formats: tuple[str, ...], max_pixels: int | None) -> Picture:
    image, animated = _load(source, name, formats, max_pixels)
    warning = f"{name} is animated; only its first frame is used." if animated else None
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it
        values = np.asarray(image).astype(np.uint32)
        grey = ((values + 128) // 257).astype(np.uint8)  # 65535 -> 255, rounded
        hidden = image.info.get("transparency")  # the one grey that is
        alpha = None if hidden is None else np.where(values == hidden, 0, 255).astype(np.uint8)
        return Picture(np.repeat(grey[:, :, None], 3, axis=2), alpha, None, warning)
    # A profile of other channels, CMYK or grey, would not fit what is written.
    profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA", "P") else None
    if image.has_transparency_data:  # an alpha channel, a palette with alpha or one transparent colour
        rgba = np.asarray(image.convert("RGBA"))
        return Picture(np.ascontiguousarray(rgba[:, :, :3]), np.ascontiguousarray(rgba[:, :, 3]), profile, warning)
    return Picture(np.array(image.convert("RGB")), None, profile, warning)


def _load(
    source: Path | io.BytesIO, name: str, formats: tuple[str, ...], max_pixels: int | None
) -> tuple[Image.Image, bool]:
    """The decoded first frame, upright, and whether there are others."""
    try:
        with Image.open(source, formats=formats) as file:
            if max_pixels is not None and file.width * file.height > max_pixels:
                raise ImageTooLargeError(
                    f"{name} unpacks to {file.width} x {file.height} pixels; the limit is {max_pixels:,}. "
                    "Scale it down first."
                )
            if max_pixels is None and file.width * file.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError  # of which Pillow only warns, up to twice the limit
            # Cameras store a preview as a second picture (MPO); that is no animation.
            animated = getattr(file, "is_animated", False) and file.format != "MPO"
            file.load()
            turn = _turn(file)
            return file.copy() if turn is None else file.transpose(turn), animated
    except ImageTooLargeError:
        raise
    except FileNotFoundError as error:
        raise MissingFileError(f"{name} does not exist.") from error
    except UnidentifiedImageError as error:
        size = os.path.getsize(source) if isinstance(source, Path) else source.getbuffer().nbytes
        if size == 0:
            raise ImageFileError(f"{name} is empty (0 bytes).") from error
        raise ImageFileError(f"{name} is not an image of a known kind ({', '.join(formats)}).") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageTooLargeError(
            f"{name} unpacks to more than {Image.MAX_IMAGE_PIXELS:,} pixels, the limit that keeps a small file from "
            "filling the memory (PIL.Image.MAX_IMAGE_PIXELS). Scale it down first."
        ) from error
    except MemoryError as error:
        raise ImageTooLargeError(f"{name} does not fit in memory. Scale it down first.") from error
    except OSError as error:
        if error.errno is not None:
            raise ImageFileError(f"{name} cannot be read: {error.strerror}.") from error
        raise ImageFileError(f"{name} is damaged: {error}.") from error
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise ImageFileError(f"{name} is damaged: {error}.") from error


def _turn(file: Image.Image) -> Image.Transpose | None:
    """What makes the picture upright by its EXIF tag; None where it is, or the tag cannot be read."""
    try:
        return _TURNS.get(file.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow raises many kinds for odd metadata
        return None


def decode(data: bytes) -> Pixels:
    """The picture that a file's bytes hold, [H, W, 3], as a data set's reader sees it: its EXIF tag is not asked."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def write_image(path: str | Path, rgb: Pixels, alpha: Pixels | None = None, profile: bytes | None = None) -> str | None:
    """Write by suffix: PNG, WebP (lossless) or JPEG (quality 95, chroma at full size), making the folder if missing.

    rgb: [H, W, 3]; alpha: [H, W], which a JPEG cannot hold: then a sentence saying so is returned; profile: ICC.
    Raises ImageFileError; a file already there stays as it was until the new one is whole.
    """
    path = Path(path)
    image, options, warning = _to_save(path, rgb, alpha, profile)
    try:
        write_atomically(path, lambda temporary: image.save(temporary, **options))
    except (OSError, ValueError) as error:  # ValueError: sides too long for the format
        _cannot_write(path, error)
    return warning


def encode_image(
    name: str | Path, rgb: Pixels, alpha: Pixels | None = None, profile: bytes | None = None
) -> tuple[bytes, str | None]:
    """The bytes of the file that ``write_image`` would write under this name, and what it returns."""
    image, options, warning = _to_save(name, rgb, alpha, profile)
    buffer = io.BytesIO()
    try:
        image.save(buffer, **options)
    except (OSError, ValueError) as error:
        _cannot_write(name, error)
    return buffer.getvalue(), warning


def _to_save(
    name: str | Path, rgb: Pixels, alpha: Pixels | None, profile: bytes | None
) -> tuple[Image.Image, dict[str, Any], str | None]:
    """The image, how to save it, and a sentence about what its format cannot hold."""
    form = _SAVE.get(PurePath(name).suffix.lower())
    if form is None:
        raise ImageFileError(f"{name} has no suffix of a format that is written ({' '.join(SUFFIXES)}).")
    options = {**form, "icc_profile": profile}
    if alpha is None:
        return Image.fromarray(rgb), options, None
    if form is _JPEG:
        return Image.fromarray(rgb), options, f"{name}: a JPEG holds no transparency, so it was dropped."
    return Image.fromarray(np.dstack((rgb, alpha))), options, None


def _cannot_write(path: str | Path, error: Exception) -> NoReturn:
    raise ImageFileError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}.") from error


def write_atomically(path: str | Path, write: Callable[[str], object]) -> None:
    """Call ``write(temporary path)`` in the same folder, then rename: ``path`` is whole or absent.

    Makes the folder if missing.  The temporary name keeps the suffix and goes away whatever happens.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".impure-fast-{secrets.token_hex(8)}{path.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask allows; some writers make private files
        write(str(temporary))
        temporary.chmod(mode)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """A text file, whole or absent."""
    write_atomically(path, lambda temporary: Path(temporary).write_text(text))


def write_npz(path: str | Path, arrays: dict[str, Any], write: Callable[..., None] = np.savez) -> None:
    """An npz, whole or absent.  write: np.savez or np.savez_compressed."""

    def to_file(temporary: str) -> None:
        with open(temporary, "wb") as file:  # given a name, numpy would append ".npz"
            write(file, **arrays)

    write_atomically(path, to_file)


def encode_jpeg(rgb: Pixels, quality: int, max_side: int | None = None) -> bytes:
    """rgb: [H, W, 3] -> a JPEG with full-size chroma, scaled down where a side is longer than ``max_side``."""
    image = Image.fromarray(rgb)
    if max_side is not None:
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def encode_png(rgb: Pixels) -> bytes:
    """rgb: [H, W, 3] -> a PNG, which decodes to exactly these values."""
    Image.fromarray(rgb).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def jpeg_bytes(path: str | Path, quality: int, max_side: int | None = None) -> bytes:
    """The file itself if it is an upright RGB JPEG that fits, otherwise its picture as ``encode_jpeg`` writes it.

    Transparency is dropped.  Raises what ``read_image`` raises.
    """
    picture = read_image(path)  # also of a file that is kept as it is: a damaged one must not get through
    with Image.open(path) as file:
        fits = max_side is None or max(file.size) <= max_side
        keep = file.format == "JPEG" and file.mode == "RGB" and _turn(file) is None and fits
    return Path(path).read_bytes() if keep else encode_jpeg(picture.rgb, quality, max_side)


def write_packed(path: str | Path, jpegs: Sequence[bytes], labels: Sequence[int], names: Sequence[str]) -> None:
    """The packed npz that ``PackedImages`` reads: jpeg, offsets, labels; and names.

    Order is shuffled with a fixed seed, so that a prefix is a random subset; equal input gives equal bytes.
    """
    order = np.random.default_rng(0).permutation(len(jpegs))
    arrays: dict[str, Any] = {
        "jpeg": np.frombuffer(b"".join(jpegs[i] for i in order), np.uint8),
        "offsets": np.cumsum([0, *(len(jpegs[i]) for i in order)], dtype=np.int64),
        "labels": np.asarray(labels, np.int64)[order],
        "names": np.asarray(names)[order],
    }
    try:
        write_npz(path, arrays)
    except OSError as error:
        _cannot_write(Path(path), error)


@dataclass(frozen=True)
class Labelled:
    """A picture of a data set that is read when it is asked for.

    rgb: gives uint8 [H, W, 3]; file: the bytes that it is stored as; adversarial: as rgb, where it comes attacked.
    """

    name: str
    label: int
    rgb: Callable[[], Pixels]
    file: Callable[[], bytes]
    adversarial: Callable[[], Pixels] | None = None


class PackedImages:
    """Read access to what ``write_packed`` writes: ``len``, ``images[i]`` -> uint8 [H, W, 3], ``labels`` [n] int64.

    jpeg: all JPEG files one after another; offsets: n + 1 places in it; labels: -1 where unknown.
    Nothing in the file is pickled.  Raises MissingFileError or InputError.
    """

    def __init__(self, path: str | Path) -> None:
        if not Path(path).is_file():
            raise MissingFileError(f"{path} does not exist; `impure-fast data` packs a folder of images.")
        try:
            with np.load(path, allow_pickle=False) as file:
                self._jpeg, self._offsets, self.labels = file["jpeg"], file["offsets"], file["labels"].astype(np.int64)
        except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} is no packed image file (jpeg, offsets, labels): {error}") from error

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Pixels:
        return decode(self.jpeg(i))

    def digest(self) -> str:
        """Sixteen hex digits over all pictures."""
        return hashlib.sha256(self._jpeg.tobytes()).hexdigest()[:16]

    def jpeg(self, i: int) -> bytes:
        """The file of picture i."""
        return self._jpeg[self._offsets[i] : self._offsets[i + 1]].tobytes()


def shards_of(folder: Path) -> list[Path]:
    """The WebDataset shards of a folder, sorted; a hidden one is the remainder of a killed run."""
    return sorted(folder.glob("[!.]*.tar"))


def read_shard(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {"adv": ..., "clean": ..., "cls": ...}) of each sample of a WebDataset shard: the parts of its files' names
    between the first dots, and what they hold.

    Raises MissingFileError, or InputError where it is no whole tar.
    """
    try:
        with tarfile.open(path) as archive:
            for key, members in groupby(archive, lambda member: _key(member.name)):
                parts = {}
                for member in members:
                    if file := archive.extractfile(member):
                        parts[member.name[len(key) + 1 :].partition(".")[0]] = file.read()
                yield key, parts
    except FileNotFoundError as error:
        raise MissingFileError(f"{path} does not exist.") from error
    except tarfile.TarError as error:
        raise InputError(f"{path} is no shard (tar), or is damaged: {error}.") from error


def _key(name: str) -> str:
    """ "a.b/c.adv.png" -> "a.b/c"."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def random_view(image: Pixels, side: int, rng: np.random.Generator) -> Pixels:
    """A random square crop of 70 to 100 % of the short side, scaled to ``side`` (bicubic), mirrored at random.

    A picture whose short side is ``side`` already keeps its pixels.
    """
    height, width = image.shape[:2]
    crop = int(min(height, width) * (rng.uniform(0.7, 1.0) if min(height, width) != side else 1))
    top, left = rng.integers(height - crop + 1), rng.integers(width - crop + 1)
    view = Image.fromarray(image[top : top + crop, left : left + crop]).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(view)[:, :: -1 if rng.random() < 0.5 else 1]
