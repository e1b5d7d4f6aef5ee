"""Files in object stores, by pyarrow: "s3://bucket/name", "gs://bucket/name" and whatever else it opens.

Credentials, region and endpoint come from where the store's own tools have them (for S3 the variables AWS_*).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ..errors import ImageFileError, MissingFileError, needs_extra
from ..images import SUFFIXES

Place = Path | str  # of a file: a path, or the address of an object in a store


def place(text: str) -> Place:
    """A path, which "file://..." is too, or an address."""
    if text.startswith("file://"):
        return Path(url2pathname(urlsplit(text).path))
    return text if "://" in text else Path(text)


def find_in_store(address: str, recursive: bool) -> list[tuple[Place, Path]]:
    """``images.find_images`` of one address: (address, path relative to the given one) of every image, sorted.

    Raises MissingFileError, ImageFileError or MissingExtraError.
    """
    store, path = _store(address)
    from pyarrow import fs

    try:
        top = store.get_file_info(path)
        folder = top.type == fs.FileType.Directory
        inside = store.get_file_info(fs.FileSelector(path, recursive=recursive)) if folder else []
    except OSError as error:
        raise _failed(address, "listed", error) from error
    if top.type == fs.FileType.NotFound:
        raise MissingFileError(f"{address} does not exist.")
    if not folder:
        return [(address, Path(PurePosixPath(path).name))]
    found: list[tuple[Place, Path]] = []
    for info in inside:
        relative = PurePosixPath(info.path).relative_to(PurePosixPath(path))
        hidden = any(part.startswith(".") for part in relative.parts)
        if info.type == fs.FileType.File and relative.suffix.lower() in SUFFIXES and not hidden:
            found.append((f"{address.rstrip('/')}/{relative}", Path(relative)))
    if not found:
        hint = "" if recursive else " --recursive (recursive=True) looks into its sub-folders."
        raise ImageFileError(f"{address} holds no images ({' '.join(SUFFIXES)}).{hint}")
    return sorted(found)


def existing(places: Iterable[Place]) -> set[Place]:
    """Those at which there is something; the addresses among them are of one store."""
    given = list(places)
    addresses = [found for found in given if isinstance(found, str)]
    there: set[Place] = {found for found in given if isinstance(found, Path) and os.path.exists(found)}
    if not addresses:
        return there
    stores = [_store(address) for address in addresses]
    from pyarrow import fs

    try:
        infos = stores[0][0].get_file_info([path for _, path in stores])
    except OSError as error:
        raise _failed(addresses[0], "looked up", error) from error
    return there | {a for a, info in zip(addresses, infos, strict=True) if info.type != fs.FileType.NotFound}


def _store(address: str) -> tuple[Any, str]:
    """(pyarrow's file system, path in it) of an address, whose path is taken letter by letter."""
    scheme, _, rest = address.partition("://")
    host, _, path = rest.partition("/")
    store, root = _root(f"{scheme}://{host}/")
    return store, f"{root.rstrip('/')}/{path.rstrip('/')}"


@functools.lru_cache
def _root(address: str) -> tuple[Any, str]:
    with needs_extra("An object store", "serve"):
        from pyarrow import fs
    try:
        return fs.FileSystem.from_uri(address)
    except (OSError, ValueError) as error:
        raise ImageFileError(f"{address} is no address of a store that can be opened: {error}.") from error


def read(address: str) -> bytes:
    """Raises MissingFileError or ImageFileError."""
    store, path = _store(address)
    try:
        with store.open_input_stream(path) as stream:
            return stream.read()
    except FileNotFoundError as error:
        raise MissingFileError(f"{address} does not exist.") from error
    except OSError as error:
        raise _failed(address, "read", error) from error


def write(address: str, data: bytes) -> None:
    """A store shows an object once it is whole.  Raises ImageFileError."""
    store, path = _store(address)
    try:
        with store.open_output_stream(path) as stream:
            stream.write(data)
    except OSError as error:
        raise _failed(address, "written", error) from error


def _failed(address: str, what: str, error: OSError) -> ImageFileError:
    return ImageFileError(f"{address} cannot be {what}: {error}.")
