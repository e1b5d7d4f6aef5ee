"""The one exception family: every error this package raises on purpose is an ``Error``.

A message says what was given, what is accepted and what to do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class Error(Exception):
    """Base of all errors raised by impure_fast."""


class InputError(Error, ValueError):
    """An image, label or option has a shape, range or value that cannot be used."""


class InputTypeError(Error, TypeError):
    """A tensor has a dtype, or an argument a type, that cannot be used."""


class ConfigError(Error, ValueError):
    """A configuration names an unknown field or a value that cannot be."""


class CheckpointError(Error, RuntimeError):
    """A file holds no usable weights for the network asked for."""


class MissingFileError(Error, FileNotFoundError):
    """A file, a folder or a named model does not exist."""


class ImageFileError(Error, OSError):
    """An image file cannot be read or written."""


class ImageTooLargeError(ImageFileError):
    """An image file unpacks to more pixels than are allowed, or than fit in memory."""


class BackendError(Error, RuntimeError):
    """A demanded backend cannot run here."""


class MissingExtraError(Error, ImportError):
    """A command needs an optional dependency that is not installed."""


@contextlib.contextmanager
def needs_extra(what: str, extra: str) -> Iterator[None]:
    """Around the imports of an extra: an ImportError becomes a MissingExtraError that says how to install it."""
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(f'{what} needs the extra "{extra}": pip install "impure-fast[{extra}]".') from error
