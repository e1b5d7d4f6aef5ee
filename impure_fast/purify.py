"""From a picture of any size to the network's inputs and back: checks, padding, tiles, micro-batches.

Also ``PurifiedClassifier``, a purifier in front of a classifier.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from .config import IMPureConfig
from .draws import Draws, stream_ids
from .errors import InputError, InputTypeError
from .philox import Seed, seed_or_fresh

# Bytes of activations that one network call may take by default.  On a CPU no tensor then passes 32 MiB, from where on
# the allocator maps fresh pages at every call.
TILE_MEMORY = 64 * 2**20
DEVICE_TILE_MEMORY = 16 * TILE_MEMORY
BAND_TILES = 1024  # tiles held at once


# (tiles [T, 3, h, w] in [0, 1], their draws) -> purified tiles, unclamped
Network = Callable[[Tensor, Draws], Tensor]
# (config, tiles, seed, streams [T]) -> the same, drawing by itself
Drawing = Callable[[IMPureConfig, Tensor, Seed, Tensor], Tensor]


def to_float(images: NDArray[np.uint8]) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().div_(255)


def to_bytes(images: Tensor) -> NDArray[np.uint8]:
    """[N, 3, H, W] in [0, 1] -> uint8 [N, H, W, 3], rounded half to even."""
    return (images.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def check_images(images: Tensor, clamp: bool, check: bool) -> None:
    if not isinstance(images, Tensor):
        raise InputTypeError(f"images is a {type(images).__name__}; wanted a torch.Tensor (torch.from_numpy helps).")
    if images.ndim not in (3, 4) or images.shape[-3] != 3:
        raise InputError(f"images has shape {tuple(images.shape)}; wanted [N, 3, H, W] or [3, H, W] (RGB).")
    if 0 in images.shape[-2:]:
        raise InputError(f"images has shape {tuple(images.shape)}: height and width must not be 0.")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise InputTypeError(f"images has dtype {images.dtype}; wanted torch.uint8 or a float type in [0, 1].")
    if images.dtype == torch.uint8 and not clamp:
        raise InputError("clamp=False needs float images: uint8 cannot hold values outside 0..255.")
    if check and images.is_floating_point() and images.numel():
        low, high = (float(v) for v in images.detach().aminmax())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # also catches NaN
            raise InputError(
                f"images has values from {low:g} to {high:g}; wanted [0, 1]. Normalised twice, or 0..255 as float? "
                "check=False skips this test."
            )


def _tile_sides(config: IMPureConfig, height: int, width: int) -> tuple[int, int]:
    """Sides of the tiles: the picture's own, rounded up to patches, or tile_size where it is larger."""
    p, k, limit = config.patch_size, config.num_chunks, config.tile_size // config.patch_size
    rows, cols = min(math.ceil(height / p), limit), min(math.ceil(width / p), limit)
    # The smallest growth that gives K equal chunks (and, in a fixed order, equal classes).
    side = {2: 2, 3: 3, 4: 2}.get(k, 1)
    fits = [
        (r * c, r, c)
        for r in range(rows, limit + 1)
        for c in range(cols, limit + 1)
        if r * c % k == 0 and (config.random_order or (r % side == 0 and c % side == 0))
    ]
    _, rows, cols = min(fits)  # never empty: the config has K divide the largest
    return rows * p, cols * p


def _pad(images: Tensor, bottom: int, right: int) -> Tensor:
    """Reflect at the lower and right edge; replicate along a side that is too small to reflect."""
    for amounts, size in (((0, 0, 0, bottom), images.shape[2]), ((0, right, 0, 0), images.shape[3])):
        if any(amounts):
            images = F.pad(images, amounts, mode="reflect" if max(amounts) < size else "replicate")
    return images


def _ramp(tile: int, stride: int, like: Tensor) -> Tensor:
    """One axis of the window: rises over the overlap, flat in the middle, falls again; never 0."""
    distance = torch.arange(tile, device=like.device, dtype=like.dtype) + 0.5
    return (torch.minimum(distance, tile - distance) / max(tile - stride, 1)).clamp(max=1)


@dataclass(frozen=True)
class Tiling:
    """How pictures of one size are cut: tile sides, distances, tiles a side, padding (pixels)."""

    tile: tuple[int, int]
    stride: tuple[int, int]
    count: tuple[int, int]
    padding: tuple[int, int]  # bottom, right

    @classmethod
    def of(cls, config: IMPureConfig, height: int, width: int) -> Tiling:
        tile = _tile_sides(config, height, width)
        stride = (min(config.tile_stride, tile[0]), min(config.tile_stride, tile[1]))
        count = tuple(
            1 + max(0, math.ceil((size - t) / step))
            for size, t, step in zip((height, width), tile, stride, strict=True)
        )
        padding = tuple(
            t + (n - 1) * step - size for size, t, step, n in zip((height, width), tile, stride, count, strict=True)
        )
        return cls(tile, stride, (count[0], count[1]), (padding[0], padding[1]))


def over_tiles(
    images: Tensor, tiling: Tiling, function: Callable[[Tensor, Tensor, Tensor], Tensor], band_tiles: int | None
) -> Tensor:
    """Apply ``function`` to overlapping tiles and blend the results under a window.

    images: [N, 3, H, W] float.  function(tiles [T, 3, h, w], image [T], place [T]) -> [T, 3, h, w]; place counts a
    picture's tiles in raster order.  The identity gives the images back (1e-6).
    band_tiles: rows of tiles are taken together until they hold so many, which bounds memory; None takes all.
    """
    n, _, height, width = images.shape
    (th, tw), (down, right), (rows, cols) = tiling.tile, tiling.stride, tiling.count
    padded = _pad(images, *tiling.padding)
    window = _ramp(th, down, images)[:, None] * _ramp(tw, right, images)  # [h, w]
    total, weight = torch.zeros_like(padded), torch.zeros_like(padded[:1, :1])
    band = rows if band_tiles is None else max(1, band_tiles // (n * cols))
    for first in range(0, rows, band):
        own = min(band, rows - first)
        strip = slice(first * down, (first + own - 1) * down + th)
        shape, count = padded[:, :, strip].shape[2:], own * cols
        columns = F.unfold(padded[:, :, strip], (th, tw), stride=tiling.stride)  # [N, 3*h*w, count]
        tiles = columns.transpose(1, 2).reshape(n * count, 3, th, tw)
        image = torch.arange(n, device=images.device).repeat_interleave(count)
        place = torch.arange(first * cols, first * cols + count, device=images.device).repeat(n)
        done = function(tiles, image, place)
        if rows * cols == 1:
            return done[:, :, :height, :width]
        columns = (done * window).reshape(n, count, -1).transpose(1, 2)
        total[:, :, strip] += F.fold(columns, shape, (th, tw), stride=tiling.stride)
        ones = window.reshape(1, -1, 1).expand(1, -1, count)
        weight[:, :, strip] += F.fold(ones, shape, (th, tw), stride=tiling.stride)
    return total.div_(weight)[:, :, :height, :width]


def default_max_batch(config: IMPureConfig, height: int, width: int, memory: int = TILE_MEMORY) -> int:
    """Tiles a call so that activations stay near ``memory``; an estimate from the widest tensors."""
    tokens = (height // config.patch_size) * (width // config.patch_size)
    encoder = 2 * tokens * config.embed_dim * (config.mlp_ratio + 6)  # both passes at once
    decoder = config.num_chunks * tokens * config.decoder_embed_dim * (config.mlp_ratio + 6)
    return max(1, int(memory // (4 * (encoder + decoder))))


def even_batch(most: int) -> int:
    """The largest of 1, 2, 3, 4, 6, 8, 12, 16, ... up to ``most``: the batches that a GPU's graphs are captured for."""
    power = 1 << most.bit_length() - 1
    return power + power // 2 if power + power // 2 <= most else power


def with_steps(
    config: IMPureConfig, image_step: int | None, feature_step: int | None, draws: Draws | None
) -> IMPureConfig:
    """``config.with_steps`` for a call that may bring draws, which hold their steps; both raise InputError."""
    if draws is not None and (image_step is not None or feature_step is not None):
        raise InputError(
            f"image_step={image_step}, feature_step={feature_step}: the draws given hold their own steps; leave these "
            "out, or give seed and streams in place of draws."
        )
    return config.with_steps(image_step, feature_step)


def purify_images(
    network: Network,
    config: IMPureConfig,
    dtype: torch.dtype,
    images: Tensor,
    *,
    seed: Seed | None,
    streams: Tensor | Sequence[int] | None,
    draws: Draws | None,
    clamp: bool,
    max_batch: int | None,
    check: bool,
    drawing: Drawing | None = None,
) -> Tensor:
    """The body of ``IMPure.purify``, for any network; dtype: of the tiles it takes.

    drawing: takes the place of drawing and network where no draws are given.
    """
    check_images(images, clamp, check)
    if images.ndim == 3:
        options: dict[str, Any] = dict(seed=seed, streams=streams, draws=draws)
        options |= dict(clamp=clamp, max_batch=max_batch, check=False, drawing=drawing)
        return purify_images(network, config, dtype, images[None], **options)[0]
    n = len(images)
    if n == 0:
        return images.clone()
    if max_batch is not None and max_batch < 1:
        raise InputError(f"max_batch={max_batch}: must be at least 1 tile.")
    ids = stream_ids(streams, n, images.device if streams is None else "cpu")
    if streams is not None and (int(ids.min()) < 0 or int(ids.max()) >= 2**32):
        raise InputError(f"streams must be {n} integers in [0, 2**32), one an image; got {ids.tolist()[:8]}.")
    ids = ids.to(images.device)
    key = seed_or_fresh(seed)
    tiling = Tiling.of(config, *images.shape[2:])
    (height, width), count = tiling.tile, math.prod(tiling.count)
    memory = TILE_MEMORY if images.device.type == "cpu" else DEVICE_TILE_MEMORY
    size = default_max_batch(config, height, width, memory)
    size = max_batch or (size if drawing is None else even_batch(size))
    if draws is not None:
        draws.check(config, (n * count, 3, height, width))

    def draw_and_run(config: IMPureConfig, part: Tensor, key: Seed, streams: Tensor) -> Tensor:
        return network(part, Draws.sample(config, part.shape, key, streams, device=part.device))

    def reconstruct(tiles: Tensor, image: Tensor, place: Tensor) -> Tensor:
        parts = []
        for part, i, j in zip(tiles.split(size), image.split(size), place.split(size), strict=True):
            if draws is None:
                # A tile's stream: the image's in the low word, its place in the picture in the high one.
                parts.append((drawing or draw_and_run)(config, part, key, ids[i] + (j << 32)))
            else:
                parts.append(network(part, draws.take(i * count + j)))
        return torch.cat(parts)

    # Without a gradient to the image nobody needs the graph, though the weights would ask for one.
    with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
        x = images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)
        result = over_tiles(x, tiling, reconstruct, BAND_TILES)
        if clamp:
            result = result.clamp(0, 1)
        if images.dtype == torch.uint8:
            result = (result * 255).round()  # half to even
        return result.to(images.dtype)


class _PassThroughClamp(torch.autograd.Function):
    """Clamp to [0, 1] whose gradient is the identity, so that saturation does not hide the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def expected_logits(logits: Tensor) -> Tensor:
    """[K, N, C] of K calls -> [N, C]: logarithm of the mean probability; any attack becomes one on the expectation."""
    return logits.log_softmax(dim=2).logsumexp(dim=0) - math.log(len(logits))


class PurifiedClassifier(nn.Module):
    """A purifier in front of a classifier: images in [0, 1] -> logits.

    classifier: any module from normalised images to logits; purifier: an ``IMPure``, or an ``Engine`` (no gradient).
    mean, std: the classifier's normalisation, three numbers each, applied here and nowhere else.
    size: side (or (height, width)) to resize purified images to, bilinear with antialias; None keeps them.
    mode: "random" draws afresh at every call (from ``seed`` if given: the n-th image since
        construction has stream n); "deterministic" uses one seed (``seed`` or 0) and stream 0 for every
        image, so that the logits depend on the image alone.
    samples: purifications whose logits are averaged.
    clamp: True, False or "straight-through" (default): how the purified image is cut to [0, 1]; the
        default cuts the value and passes the gradient.
    image_step, feature_step: masking strength, as in ``IMPure.purify``.

    Differentiable in images that require gradients; without those the purifier's weights get no gradient either, the
    classifier's do.  Owns the parameters of both networks; purifies alike in train and eval mode.
    Raises InputError for options that cannot be.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        classifier: nn.Module,
        purifier: Any,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        size: int | tuple[int, int] | None = None,
        mode: str = "random",
        seed: int | None = None,
        samples: int = 1,
        clamp: bool | str = "straight-through",
        image_step: int | None = None,
        feature_step: int | None = None,
    ) -> None:
        super().__init__()
        if mode not in ("random", "deterministic"):
            raise InputError(f'mode={mode!r}: wanted "random" or "deterministic".')
        if clamp not in (True, False, "straight-through"):
            raise InputError(f'clamp={clamp!r}: wanted True, False or "straight-through".')
        if samples < 1:
            raise InputError(f"samples={samples}: wanted at least 1.")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise InputError(f"mean={tuple(mean)}, std={tuple(std)}: wanted three channels each, std positive.")
        self.classifier, self.purifier = classifier, purifier
        self.size = (size, size) if isinstance(size, int) else size
        self.mode, self.samples, self.clamp = mode, samples, clamp
        self.seed = 0 if mode == "deterministic" and seed is None else seed
        self.steps = {"image_step": image_step, "feature_step": feature_step}
        self.used = 0  # streams handed out; an attack that goes on sets it
        self.register_buffer("mean", torch.tensor(list(map(float, mean))).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(map(float, std))).view(3, 1, 1), persistent=False)

    def purify(self, images: Tensor, sample: int = 0) -> Tensor:
        """The purified images that the classifier sees.  images: [N, 3, H, W] in [0, 1]."""
        n = len(images)
        if self.mode == "deterministic":
            streams = torch.full((n,), sample)
        else:
            streams = (torch.arange(n) + self.used) % 2**32
            self.used += n
        purify: Any = self.purifier.purify
        purified = purify(images, seed=self.seed, streams=streams, clamp=self.clamp is True, **self.steps)
        return _PassThroughClamp.apply(purified) if self.clamp == "straight-through" else purified

    def forward(self, images: Tensor) -> Tensor:
        """images: [N, 3, H, W] float in [0, 1] -> logits [N, classes]."""
        if images.ndim != 4 or not images.is_floating_point():
            raise InputError(f"images: {images.dtype} {tuple(images.shape)}; wanted float [N, 3, H, W] in [0, 1].")
        logits = [self.classify(self.purify(images, sample)) for sample in range(self.samples)]
        return torch.stack(logits).mean(dim=0)

    def classify(self, images: Tensor) -> Tensor:
        """Logits of purified images: resize, normalise, classify."""
        if self.size is not None and tuple(images.shape[2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        return self.classifier((images.to(self.mean.dtype) - self.mean) / self.std)
