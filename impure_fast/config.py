"""``IMPureConfig``: every number that fixes an IMPure network, and the table of named presets.

The fields carry the field's usual names; ``from_official`` reads the option names of the authors' release.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from .errors import ConfigError

T = TypeVar("T")
NUM_STEPS = 1000  # length of the noise schedule
MASKS = ("noise", "mask")
FIXED_ORDER_CHUNKS = (2, 3, 4)  # chunk counts for which the authors define a fixed lattice

# The authors' option names (left) for our fields (right), where they differ.
_OFFICIAL = {
    "img_size": "image_size",
    "chunks": "num_chunks",
    "img_mask": "image_mask",
    "random_mask": "random_order",
    "use_conv": "pixel_conv",
}
# The authors' options that belong to their losses and scripts, not to the network.
_OFFICIAL_IGNORED = {"mask_chunks", "norm_pix_loss", "autoweight_loss", "in_chans"}


def check_types(config: Any) -> None:
    """Make tuples of the lists that JSON gives, and raise ConfigError unless every field has its declared type.

    config: a dataclass, frozen or not.  An int passes for a float.
    """
    kinds = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = _as_tuple(getattr(config, field.name))
        object.__setattr__(config, field.name, value)
        if not _fits(value, kinds[field.name]):
            raise ConfigError(f"{field.name}={value!r}: must be {field.type}.")


def from_fields(cls: type[T], values: dict[str, Any], what: str) -> T:
    """A dataclass of these fields; unknown ones raise ConfigError naming them.  what: what the message calls them."""
    known = sorted(get_type_hints(cls))
    if unknown := sorted(set(values) - set(known)):
        raise ConfigError(f"Unknown {what} {unknown}; known are {known}.")
    return cls(**values)


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list | tuple) else value


def _fits(value: Any, kind: Any) -> bool:
    inner = get_args(kind)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(isinstance(key, inner[0]) for key in value)
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        items = inner[:1] * len(value) if inner[-1] is ... else inner
        return len(items) == len(value) and all(map(_fits, value, items))
    if inner:  # a union
        return any(_fits(value, one) for one in inner)
    return isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)


@dataclass(frozen=True)
class IMPureConfig:
    """Shape and law of one IMPure network (defaults: the authors' released ViT-B/16).

    image_size: half the side of the position table, in pixels; images up to twice this side fit.
    patch_size: patch side in pixels.
    embed_dim, depth, num_heads: encoder width, blocks, heads.
    decoder_embed_dim, decoder_depth, decoder_num_heads: the same for the decoder.
    mlp_ratio: hidden width of each block's MLP over its width.
    num_chunks: K, the parts an image's patches are cut into; every part is rebuilt from the others.
    out_indices: encoder blocks whose outputs are mixed into the latents.
    image_mask, feature_mask: "noise" (released) or "mask": how the hidden chunk is disguised.
    image_step, feature_step: noise steps in 0..999 of a purification; larger hides more.
    image_step_range, feature_step_range: half-open ranges of the steps drawn in training.
    random_order: permute the patches at random; False takes the authors' fixed lattice (K = 2, 3, 4).
    pixel_conv: 3x3 convolution over the assembled image.
    norm_eps: epsilon of every layer norm.
    mean, std: normalisation of RGB images in [0, 1].
    tile_size, tile_stride: larger pictures are purified in overlapping tiles (pixels).

    Raises ConfigError, naming field and value, where the numbers do not fit together.
    Source: SPEC sections 1, 2 and 4 of the released network; arXiv 2311.15339.
    """

    image_size: int = 224
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    mlp_ratio: float = 4.0
    num_chunks: int = 4
    out_indices: tuple[int, ...] = (0, 2, 4, 6, 8)
    image_mask: str = "noise"
    feature_mask: str = "noise"
    image_step: int = 400
    feature_step: int = 600
    image_step_range: tuple[int, int] = (200, 600)
    feature_step_range: tuple[int, int] = (200, 1000)
    random_order: bool = True
    pixel_conv: bool = True
    norm_eps: float = 1e-6
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    tile_size: int = 448
    tile_stride: int = 336

    def __post_init__(self) -> None:
        check_types(self)
        self._check()

    def _check(self) -> None:
        def need(ok: bool, field: str, wanted: str) -> None:
            if not ok:
                raise ConfigError(f"{field}={getattr(self, field)!r}: {wanted}.")

        for name in ("image_size", "patch_size", "embed_dim", "num_heads", "decoder_embed_dim", "decoder_num_heads"):
            need(getattr(self, name) > 0, name, "must be a positive integer")
        for name in ("depth", "decoder_depth"):
            need(getattr(self, name) > 0, name, "must be at least one block")
        for width, heads in (("embed_dim", "num_heads"), ("decoder_embed_dim", "decoder_num_heads")):
            w = getattr(self, width)
            need(w % 4 == 0, width, "must be a multiple of 4 (sin-cos positions)")
            need(w % getattr(self, heads) == 0, heads, f"must divide {width}={w}")
        need(self.image_size % self.patch_size == 0, "patch_size", f"must divide image_size={self.image_size}")
        narrow = min(self.embed_dim, self.decoder_embed_dim)
        need(1 <= narrow * self.mlp_ratio < math.inf, "mlp_ratio", f"must give each MLP a hidden unit (width {narrow})")
        need(0 <= self.norm_eps < math.inf, "norm_eps", "must be a number of at least 0")
        need(self.num_chunks >= 2, "num_chunks", "must be an integer of at least 2")
        need(
            len(set(self.out_indices)) == len(self.out_indices) and all(0 <= i < self.depth for i in self.out_indices),
            "out_indices",
            f"must be distinct blocks in 0..{self.depth - 1} (depth={self.depth})",
        )
        for name in ("image_mask", "feature_mask"):
            need(getattr(self, name) in MASKS, name, 'must be "noise" or "mask"')
        for name in ("image_step", "feature_step"):
            need(0 <= getattr(self, name) < NUM_STEPS, name, f"must be an integer step in 0..{NUM_STEPS - 1}")
        for name in ("image_step_range", "feature_step_range"):
            pair = getattr(self, name)
            ok = 0 <= pair[0] < pair[1] <= NUM_STEPS
            need(ok, name, f"must be a half-open range of steps inside 0..{NUM_STEPS}")
        need(
            self.random_order or self.num_chunks in FIXED_ORDER_CHUNKS,
            "num_chunks",
            f"a fixed order exists only for {FIXED_ORDER_CHUNKS}; use random_order=True",
        )
        need(min(self.std) > 0, "std", "must hold three positive channels")
        need(
            self.tile_size % self.patch_size == 0 and 0 < self.tile_size <= 2 * self.image_size,
            "tile_size",
            f"must be a multiple of patch_size={self.patch_size} of at most {2 * self.image_size} (twice image_size)",
        )
        tokens = (self.tile_size // self.patch_size) ** 2
        need(tokens % self.num_chunks == 0, "tile_size", f"gives {tokens} patches, no multiple of K={self.num_chunks}")
        need(0 < self.tile_stride <= self.tile_size, "tile_stride", f"must be in 1..{self.tile_size} (tile_size)")

    @property
    def table_side(self) -> int:
        """Side of the position tables in cells."""
        return 2 * self.image_size // self.patch_size

    def with_steps(self, image_step: int | None, feature_step: int | None) -> IMPureConfig:
        """The same config with other masking strengths; None keeps its own."""
        changes: dict[str, Any] = dict(image_step=image_step, feature_step=feature_step)
        return dataclasses.replace(self, **{name: step for name, step in changes.items() if step is not None})

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary; ``from_dict`` gives an equal config."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> IMPureConfig:
        """Config from a dictionary; unknown fields raise ConfigError naming them."""
        return from_fields(cls, values, "config fields")

    @classmethod
    def from_official(cls, options: dict[str, Any]) -> IMPureConfig:
        """Config from the option names of the authors' release (``chunks``, ``img_mask``, ...).

        ``tile_size`` becomes the largest square that the position table covers and K divides.
        ``pre_norm=False`` is refused: no released script uses it and its output is in mixed units.
        """
        if options.get("pre_norm", True) is not True:
            raise ConfigError("pre_norm=False: only networks with input normalisation are supported.")
        if options.get("in_chans", 3) != 3:
            raise ConfigError(f"in_chans={options['in_chans']!r}: only networks of RGB images are supported.")
        known = {field.name for field in dataclasses.fields(cls)}
        values = {_OFFICIAL.get(key, key): value for key, value in options.items()}
        values = {key: value for key, value in values.items() if key in known and key not in _OFFICIAL_IGNORED}
        if "tile_size" not in values:
            defaults = {field.name: field.default for field in dataclasses.fields(cls)}
            patch, side, chunks = (values.get(k, defaults[k]) for k in ("patch_size", "image_size", "num_chunks"))
            cells = next((g for g in range(2 * side // patch, 0, -1) if g * g % chunks == 0), 1)
            values["tile_size"] = cells * patch
            values["tile_stride"] = max(1, cells * 3 // 4) * patch
        return cls.from_dict(values)


_BASE = IMPureConfig()

# 4-pixel patches in 64-pixel tiles: a context small enough for a CPU, for pictures of any size.
_TINY = IMPureConfig(
    image_size=64,
    patch_size=4,
    embed_dim=96,
    depth=4,
    num_heads=3,
    decoder_embed_dim=64,
    decoder_depth=2,
    decoder_num_heads=2,
    out_indices=(0, 1, 2),
    image_step=120,
    feature_step=180,
    image_step_range=(32, 260),
    feature_step_range=(40, 320),
    tile_size=64,
    tile_stride=32,
)

# Pictures of 32 pixels in one tile.
_TINY_CIFAR10 = dataclasses.replace(_TINY, image_size=32, image_step=60, feature_step=80, tile_size=32, tile_stride=16)

PRESETS: dict[str, IMPureConfig] = {
    "impure_base_patch16_224": _BASE,
    "impure_base_patch16_224_dec384": dataclasses.replace(_BASE, decoder_embed_dim=384, decoder_num_heads=12),
    "impure_tiny": _TINY,
    "impure_tiny_cifar10": _TINY_CIFAR10,
}
