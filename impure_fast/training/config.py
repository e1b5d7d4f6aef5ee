"""``TrainConfig``: every field of a training run, its checks, and the shipped recipes by name."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ..config import PRESETS, IMPureConfig, check_types, from_fields
from ..errors import ConfigError
from ..memory import kept_by
from .losses import TRUNKS

# Beginnings of the names of the tensors that each half of the network owns (SPEC section 6).
FROZEN = {
    "encoder": ("cls_token", "patch_embed.", "blocks.", "norm."),
    "decoder": ("decoder_", "mask_token", "proj_"),
}

OPTIMIZERS = ("adamw", "adamw8bit")
RECIPES = Path(str(files("impure_fast"))) / "training" / "recipes"


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    model: preset name; network: fields of IMPureConfig in place of the preset's.
    steps, batch: optimiser steps and pictures a step.
    crop: side of a training picture; a larger one than the model's tile_size is cut into tiles, as in use.
    crops: ((crop, batch), ...) in place of both, one drawn for each step; () keeps to them.
    init: weights to begin from (a safetensors file); None begins from random ones.
    pairs: clean and adversarial views made before the first step, of side ``view``; the last ``held_out``
        pictures of the data are never used.  Pairs attacked elsewhere are the first so many of their folder.
    classifier: what is attacked, by a name of ``evaluation.targets.load_target``.  guide: the network whose features
        the loss compares; empty: the classifier.
    adversarial, noisy: shares of the inputs with a perturbation and with sign noise; the others are clean.  With
        neither, and no guide_nodes, this is pre-training.
    strength: a perturbation is scaled by a factor from this range.
    lr, warmup, cycles, weight_decay, clip: AdamW (0.9, 0.95), linear warm-up steps, then so many times cosine to 0;
        clip=0 leaves gradients as they are.
    optimizer: adamw, or adamw8bit (torchao) with moments of 8 bits.
    accumulate: parts that a process takes one after the other for one step; same result in less memory.
    precision: bf16 (autocast) or fp32.
    ema: decay of the weights' running average, which is then what the run gives; 0 gives the last weights.
    guide_nodes, guide_weights: nodes of the guide and the weights of their L1 terms.
    lpips, lpips_trunk: weight of LPIPS between purified and clean picture, beside or in place of the guide (no
        guide_nodes); alex, squeeze or vgg.
    attack_steps: of PGD through purifier and classifier before each step, whose result joins the batch (SPEC section
        6, ``adv_train``); attack_eps, attack_step_size in the pictures' units.
    freeze: "encoder" or "decoder", which then keeps its weights; the decoder with the side layers.
    mix_chunks: at most this many chunks in patch mixing (SPEC section 5); 0 shows the guide no input patches.
    learned_weights: weigh the terms by learned scales b (Kendall et al., arXiv 1705.07115, for L1 terms): term / b +
        log b, b beginning at 1; the fixed weights then only say where it begins.
    memory: what is kept for backward: all, default, tight or minimal; changes no result, and may change in a run.
    tensorboard: write output/tensorboard/ beside log.jsonl; may change in a run.
    workers: processes beside this one that prepare its batches; may change in a run.
    """

    model: str = "impure_tiny"
    network: dict[str, Any] = field(default_factory=dict)
    init: str | None = None
    steps: int = 8000
    batch: int = 2
    crop: int = 192
    view: int = 224
    pairs: int = 1700
    held_out: int = 0
    adversarial: float = 0.6
    noisy: float = 0.15
    lr: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.05
    clip: float = 1.0
    ema: float = 0.0
    pixel_weight: float = 1.0
    guide_nodes: tuple[str, ...] = ("blocks.1", "blocks.3", "blocks.6", "global_pool", "classifier")
    guide_weights: tuple[float, ...] = (0.05, 0.1, 0.3, 2.0, 0.5)
    mix_chunks: int = 4
    seed: int = 0
    save_every: int = 200
    memory: str = "default"
    accumulate: int = 1
    precision: str = "bf16"
    lpips: float = 0.0
    lpips_trunk: str = "vgg"
    attack_steps: int = 0
    attack_eps: float = 16 / 255
    attack_step_size: float = 4 / 255
    freeze: str = ""
    crops: tuple[tuple[int, int], ...] = ()
    classifier: str = "lite0"
    guide: str = ""
    strength: tuple[float, float] = (0.4, 1.1)
    cycles: int = 1
    optimizer: str = "adamw"
    learned_weights: bool = False
    tensorboard: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("steps", "save_every", "crop", "batch", "view", "pairs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1.")
        for name in ("seed", "workers", "clip", "held_out"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must not be negative.")
        network, tile = self.model_config, self.tile
        if self.crop % tile or self.crop > self.view:
            raise ConfigError(f"crop={self.crop}: must be a multiple of the tile ({tile}) of at most view={self.view}.")
        if tile % network.patch_size or (tile // network.patch_size) ** 2 % network.num_chunks:
            raise ConfigError(f"crop={self.crop}: must give patches of {network.patch_size}, in {network.num_chunks}s.")
        if len(self.guide_nodes) != len(self.guide_weights):
            raise ConfigError(f"guide_weights={self.guide_weights}: give one for each of guide_nodes.")
        if self.mix_chunks == 1 or self.mix_chunks < 0:
            raise ConfigError(f"mix_chunks={self.mix_chunks}: must be 0 or at least 2.")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema={self.ema}: must be in [0, 1).")
        if odd := [n for n in self.batches if self.accumulate < 1 or n % self.accumulate]:
            raise ConfigError(f"accumulate={self.accumulate}: must divide batch={odd[0]}.")
        if max(self.batches) > self.pairs:
            raise ConfigError(f"pairs={self.pairs}: must be at least the batch, {max(self.batches)}.")
        if self.cycles < 1:
            raise ConfigError(f"cycles={self.cycles}: must be at least 1.")
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"optimizer={self.optimizer!r}: must be {' or '.join(OPTIMIZERS)}.")
        if self.precision not in ("bf16", "fp32"):
            raise ConfigError(f"precision={self.precision!r}: must be bf16 or fp32.")
        if self.freeze not in ("", *FROZEN):
            raise ConfigError(f"freeze={self.freeze!r}: must be empty, {' or '.join(FROZEN)}.")
        if self.lpips_trunk not in TRUNKS:
            raise ConfigError(f"lpips_trunk={self.lpips_trunk!r}: must be one of {', '.join(TRUNKS)}.")
        kept_by(self.memory)
        for crop, batch in self.crops:
            replace(self, crop=crop, batch=batch, crops=())  # checks them

    @property
    def tile(self) -> int:
        """Side of what the network is given."""
        return min(self.model_config.tile_size, self.crop)

    @property
    def batches(self) -> list[int]:
        """Pictures a step: one number, or one for each of ``crops``."""
        return [batch for _, batch in self.crops] or [self.batch]

    def at(self, step: int) -> TrainConfig:
        """The config of one step: with one of ``crops`` as its crop and batch."""
        if not self.crops:
            return self
        index = int(np.random.default_rng([self.seed, 2 << 32, step]).integers(len(self.crops)))
        crop, batch = self.crops[index]
        return replace(self, crop=crop, batch=batch, crops=())

    @classmethod
    def from_file(cls, path: str | Path | None, **changes: Any) -> TrainConfig:
        """From a JSON file of fields (a run's config.json is one) or a shipped recipe's name, ``changes`` going before.

        Raises ConfigError naming file and field.
        """
        values: dict[str, Any] = {}
        if path is not None:
            shipped = {recipe.stem: recipe for recipe in RECIPES.glob("*.json")}
            try:
                values = dict(json.loads(shipped.get(str(path), Path(path)).read_text()))
            except OSError as error:
                raise ConfigError(
                    f"{path} is no file ({error}) and no recipe: {', '.join(sorted(shipped))}."
                ) from error
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{path} holds no training config: {error}.") from error
        return from_fields(cls, values | changes, "training fields")

    @property
    def model_config(self) -> IMPureConfig:
        if self.model not in PRESETS:
            raise ConfigError(f"model={self.model!r}: known presets are {sorted(PRESETS)}.")
        return IMPureConfig.from_dict(PRESETS[self.model].to_dict() | self.network)
