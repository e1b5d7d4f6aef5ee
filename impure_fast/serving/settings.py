"""``Settings``: everything that a service can be told.  Imports nothing heavy, so that ``--help`` can show defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import NUM_STEPS, check_types, from_fields
from ..errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """Of every replica of a service.  Raises ConfigError for values that cannot be.

    model, precision, device: as in ``Engine`` (model: a shipped name, a weights file or a hub id).
    image_step, feature_step: masking strength; None keeps the model's.  No request can change it.
    classifier: a name as in ``impure-fast evaluate``, for /classify.
    batch: pictures of one size that may go through together; batch_wait: seconds that one waits for the others.
    queue: requests held at once, being uploaded, waiting or in work; the next is answered 503.
    max_bytes: of an upload; max_pixels: of a picture.  Both bound the memory of a request.
    upload_timeout, timeout: seconds for the upload, and for the whole answer.
    """

    model: str = "impure_tiny"
    precision: str = "fp32"
    device: str = "cpu"
    image_step: int | None = None
    feature_step: int | None = None
    classifier: str | None = None
    batch: int = 8
    batch_wait: float = 0.01
    queue: int = 32
    max_bytes: int = 8 * 2**20
    max_pixels: int = 2**22
    upload_timeout: float = 10.0
    timeout: float = 60.0

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("batch", "queue", "max_bytes", "max_pixels"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name}={value!r}: wanted an integer of at least 1.")
        for name in ("batch_wait", "upload_timeout", "timeout"):
            value = getattr(self, name)
            if not value >= 0 or (value == 0 and name != "batch_wait"):
                raise ConfigError(f"{name}={value!r}: wanted seconds.")
        for name in ("image_step", "feature_step"):
            value = getattr(self, name)
            if value is not None and value not in range(NUM_STEPS):
                raise ConfigError(f"{name}={value!r}: wanted an integer from 0 to {NUM_STEPS - 1}, or none.")

    @classmethod
    def of(cls, given: dict[str, Any]) -> Settings:
        """From a mapping, such as ``args`` of a Ray Serve config file."""
        return from_fields(cls, given, "settings")
