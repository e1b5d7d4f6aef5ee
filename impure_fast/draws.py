"""``Draws``: every random decision of one purification, made before the network runs.

Numbers are counter-based (``philox``): image i with stream s gets the same in every batch, order and device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import FIXED_ORDER_CHUNKS, NUM_STEPS, IMPureConfig
from .errors import InputError, InputTypeError
from .ops import noise
from .philox import (
    FEATURE_NOISE,
    FEATURE_STEP,
    IMAGE_NOISE,
    IMAGE_STEP,
    MIX_CHUNKS,
    MIX_ORDER,
    ORDER,
    POSITION,
    Seed,
    integers,
    philox,
    seed_or_fresh,
    uniform,
)


def stream_ids(streams: Tensor | Sequence[int] | None, n: int, device: torch.device | str | None) -> Tensor:
    if streams is None:
        return torch.arange(n, device=device)
    streams = torch.as_tensor(streams, device=device)
    if streams.is_floating_point() and len(streams):  # an empty list is one of floats
        raise InputTypeError(f"streams holds {streams.dtype}; wanted integers, one an image.")
    streams = streams.to(torch.int64)
    if streams.shape != (n,):
        raise InputError(f"streams has shape {tuple(streams.shape)}, but there are {n} images: give one number each.")
    return streams


def fixed_order(config: IMPureConfig, rows: int, cols: int, device: torch.device | str | None = None) -> Tensor:
    """The authors' lattice as a permutation [L]: chunk k holds class k, in raster order (SPEC 2.5)."""
    r = torch.arange(rows, device=device)[:, None]
    c = torch.arange(cols, device=device)[None, :]
    k = config.num_chunks
    if k not in FIXED_ORDER_CHUNKS:
        raise InputError(f"A fixed order exists only for K in {FIXED_ORDER_CHUNKS}, not for K={k}.")
    classes = 2 * (r % 2) + c % 2 if k == 4 else (c - r) % k
    if rows % 2 or cols % 2 if k == 4 else rows % k and cols % k:
        raise InputError(
            f"A {rows}x{cols} patch grid does not fall into {k} equal classes; pad it or use random order."
        )
    return classes.flatten().argsort(stable=True)


def grid_of(config: IMPureConfig, shape: Sequence[int]) -> tuple[int, int, int]:
    """(rows, columns, tokens a chunk) of images [N, C, H, W]; raises InputError where they cannot be cut."""
    p, k, side = config.patch_size, config.num_chunks, config.table_side
    if len(shape) != 4 or shape[1] != 3:
        raise InputError(f"images has shape {tuple(shape)}; wanted [N, 3, H, W].")
    height, width = shape[2:]
    if height % p or width % p or not height or not width:
        raise InputError(f"An image of {height}x{width} does not divide into patches of {p}; use model.purify.")
    rows, cols = height // p, width // p
    if rows > side or cols > side:
        raise InputError(f"An image of {height}x{width} is larger than the table of {side * p}; use model.purify.")
    if rows * cols % k:
        raise InputError(f"{rows}x{cols} patches cannot be cut into {k} equal chunks; use model.purify.")
    return rows, cols, rows * cols // k


@dataclass(frozen=True)
class Draws:
    """The random decisions for N images of L tokens in K chunks of M tokens; E is the decoder width.

    positions: [N, 2] int64, table cell (row, column) of each image's first patch.
    order: [N, L] int64, raster position of each shuffled token (gathers raster to shuffled).
    image_step: [N] int64; image_noise: [N, 3, H, W], or None unless image_mask is "noise".
    feature_step: [N, K] int64; feature_noise: [N, K, M, E] in shuffled order, or None.

    shape: of the images; table_side: cells a side of the position tables that positions lie in.

    Law: SPEC section 3.  Nothing here touches a global generator.
    """

    shape: tuple[int, int, int, int]
    table_side: int
    positions: Tensor
    order: Tensor
    image_step: Tensor
    feature_step: Tensor
    image_noise: Tensor | None
    feature_noise: Tensor | None

    @property
    def restore(self) -> Tensor:
        """[N, L] int64, the inverse of ``order`` (gathers shuffled to raster)."""
        return self.order.argsort(dim=1)

    @classmethod
    def sample(
        cls,
        config: IMPureConfig,
        shape: Sequence[int],
        seed: Seed | None,
        streams: Tensor | Sequence[int] | None = None,
        training: bool = False,
        device: torch.device | str | None = None,
    ) -> Draws:
        """Draws for images of ``shape`` [N, 3, H, W].

        seed: 64-bit key, or [N] int64, one an image; None takes fresh entropy from the operating system.
        streams: one integer an image (default 0..N-1); equal (seed, stream) gives equal draws.
        training: also draw table positions and steps; otherwise they are the centre and the config's.
        Raises InputError where the shape does not fit the config.
        """
        rows, cols, chunk = grid_of(config, shape)
        n, tokens, k = shape[0], rows * cols, config.num_chunks
        seed = seed_or_fresh(seed, (n,))
        ids = stream_ids(streams, n, device)
        device = ids.device  # that of given streams where no other is named
        if config.random_order:
            order = noise(ids, seed, ORDER, tokens, gaussian=False).argsort(dim=1, stable=True)
        else:
            order = fixed_order(config, rows, cols, device).expand(n, tokens)
        spare_rows, spare_cols = config.table_side - rows, config.table_side - cols
        if training:
            u = philox(seed, ids, POSITION, 2)
            spare = torch.tensor([spare_rows + 1, spare_cols + 1], device=device)
            positions = (u * spare) >> 32
            image_step = integers(seed, ids, IMAGE_STEP, 1, *config.image_step_range)[:, 0]
            feature_step = integers(seed, ids, FEATURE_STEP, k, *config.feature_step_range)
        else:
            centre = ((spare_rows + 1) // 2, (spare_cols + 1) // 2)
            positions = torch.stack([torch.full((n,), place, device=device) for place in centre], dim=1)
            image_step = torch.full((n,), config.image_step, device=device)
            feature_step = torch.full((n, k), config.feature_step, device=device)
        image_noise = feature_noise = None
        if config.image_mask == "noise":
            image_noise = noise(ids, seed, IMAGE_NOISE, math.prod(shape[1:])).view(*shape)
        if config.feature_mask == "noise":
            width = config.decoder_embed_dim
            feature_noise = noise(ids, seed, FEATURE_NOISE, tokens * width).view(n, k, chunk, width)
        noises = (image_noise, feature_noise)
        return cls(
            (n, shape[1], shape[2], shape[3]), config.table_side, positions, order, image_step, feature_step, *noises
        )

    @classmethod
    def from_tensors(
        cls,
        config: IMPureConfig,
        shape: Sequence[int],
        *,
        order: Tensor | None = None,
        positions: Tensor | None = None,
        image_step: Tensor | None = None,
        feature_step: Tensor | None = None,
        image_noise: Tensor | None = None,
        feature_noise: Tensor | None = None,
    ) -> Draws:
        """Given values, shapes as in the class; what an evaluation does not draw may be left out.

        Raises InputError naming the tensor where one is missing, has another shape or values that cannot be.
        """
        rows, cols, chunk = grid_of(config, shape)
        n, k, width = shape[0], config.num_chunks, config.decoder_embed_dim
        bare = dataclasses.replace(config, image_mask="mask", feature_mask="mask")
        base = cls.sample(bare, shape, 0, device=next((t.device for t in (order, image_noise) if t is not None), None))
        given = {
            "order": (order, (n, rows * cols), config.random_order),
            "positions": (positions, (n, 2), False),
            "image_step": (image_step, (n,), False),
            "feature_step": (feature_step, (n, k), False),
            "image_noise": (image_noise, tuple(shape), config.image_mask == "noise"),
            "feature_noise": (feature_noise, (n, k, chunk, width), config.feature_mask == "noise"),
        }
        for name, (tensor, wanted, required) in given.items():
            if tensor is None and required:
                raise InputError(f"{name} is missing: this config draws it, shape {wanted}.")
            if tensor is not None and tuple(tensor.shape) != wanted:
                raise InputError(f"{name} has shape {tuple(tensor.shape)}; images and config want {wanted}.")
        changes: dict[str, Any] = {name: t for name, (t, _, _) in given.items() if t is not None}
        if order is not None and (order.sort(dim=1).values != torch.arange(rows * cols, device=order.device)).any():
            raise InputError(f"order is no permutation of 0..{rows * cols - 1} for every image.")
        spare = [config.table_side - rows, config.table_side - cols]
        for name, most in (("positions", spare), ("image_step", NUM_STEPS - 1), ("feature_step", NUM_STEPS - 1)):
            if (t := changes.get(name)) is not None and ((t < 0) | (t > t.new_tensor(most))).any():
                low, high = (value.tolist() for value in t.aminmax(dim=0))
                raise InputError(f"{name} has values from {low} to {high}; images and config want 0 to {most}.")
        return dataclasses.replace(base, **changes)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Draws:
        tensors: dict[str, Any] = {
            f.name: function(value)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, shape=(len(tensors["order"]), *self.shape[1:]), **tensors)

    def to(self, device: torch.device | str) -> Draws:
        """The same draws on another device."""
        return self._map(lambda t: t.to(device))

    def slice(self, start: int, stop: int) -> Draws:
        """The draws of images start..stop-1."""
        return self._map(lambda t: t[start:stop])

    def take(self, index: Tensor) -> Draws:
        """The draws of the images at these places, [n] int64."""
        return self._map(lambda t: t[index])

    def check(self, config: IMPureConfig, shape: Sequence[int]) -> None:
        """Raise InputError unless these draws fit images of ``shape`` and ``config``."""
        rows, cols, chunk = grid_of(config, shape)
        want_noise = (config.image_mask == "noise", config.feature_mask == "noise")
        have_noise = (self.image_noise is not None, self.feature_noise is not None)
        if tuple(shape) != self.shape:
            raise InputError(f"Draws are for images {self.shape}, but the images have shape {tuple(shape)}.")
        features = (shape[0], config.num_chunks, chunk, config.decoder_embed_dim)
        if self.feature_step.shape[1] != config.num_chunks or (
            self.feature_noise is not None and tuple(self.feature_noise.shape) != features
        ):
            had = tuple(self.feature_step.shape if self.feature_noise is None else self.feature_noise.shape)
            raise InputError(f"Draws are of another config: feature draws have shape {had}, this one wants {features}.")
        if tuple(self.order.shape) != (shape[0], rows * cols):
            raise InputError(
                f"Draws are of another config: order has shape {tuple(self.order.shape)}, "
                f"this one wants {(shape[0], rows * cols)}."
            )
        if want_noise != have_noise:
            raise InputError(f"Draws are of another config: noises (image, feature) {have_noise}, wanted {want_noise}.")
        if self.table_side != config.table_side:
            raise InputError(
                f"Draws are of another config: for position tables of {self.table_side} cells a side, "
                f"this one has {config.table_side}."
            )


@dataclass(frozen=True)
class MixDraws:
    """How training mixes purified and input patches for one guide network (SPEC section 5).

    order: [N, L] int64, own permutation an image; chunks, index: shared by the batch.
    """

    order: Tensor
    chunks: int
    index: int

    @classmethod
    def sample(
        cls,
        tokens: int,
        n: int,
        seed: int,
        streams: Tensor | Sequence[int] | None = None,
        max_chunks: int = 4,
        guide: int = 0,
        device: torch.device | str | None = None,
    ) -> MixDraws:
        """chunks is uniform in 2..max_chunks, index in 0..chunks-1; both come from the seed alone."""
        ids = stream_ids(streams, n, device)
        order = uniform(seed, ids, MIX_ORDER | guide << 8, tokens).argsort(dim=1, stable=True)
        a, b = philox(seed, torch.zeros(1, dtype=torch.int64), MIX_CHUNKS | guide << 8, 2)[0].tolist()
        chunks = 2 + (a * (max_chunks - 1) >> 32)
        return cls(order, chunks, b * chunks >> 32)
