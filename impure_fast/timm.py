"""IMPure's presets in timm's registry: ``import impure_fast.timm`` registers them, nothing else.

    timm.create_model("impure_tiny", pretrained=True)             # shipped weights, offline
    timm.create_model("impure_tiny", depth=6, out_indices=(0, 3)) # keyword arguments are IMPureConfig's fields

``pretrained=True`` takes the config stored with the weights, as ``impure_fast.load`` does; only data is read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg

from . import checkpoints, zoo
from .config import PRESETS, IMPureConfig
from .errors import ConfigError, MissingFileError
from .model import IMPure


def _cfg(name: str, file: Path | None = None) -> dict[str, Any]:
    """timm's description of a preset, with the file of its weights if there is one."""
    config = PRESETS[name]
    cfg: dict[str, Any] = {
        "input_size": (3, config.image_size, config.image_size),
        "mean": config.mean,
        "std": config.std,
        "num_classes": 0,
        "classifier": None,
        "first_conv": None,  # with a name timm would reshape the first convolution to other channel counts
        "paper_ids": "arXiv:2311.15339",
    }
    return cfg if file is None else {**cfg, "file": str(file), "license": "apache-2.0"}


def _all_cfgs() -> dict[str, Any]:
    """One entry a shipped weight ("preset.tag", the default tag first), one bare entry for the other presets."""
    files = zoo.shipped()
    cfgs: dict[str, Any] = {}
    for name in PRESETS:
        tagged = [key for key in files if key.rpartition(".")[0] == name]
        tagged.sort(key=lambda key: (not key.endswith(f".{zoo.DEFAULT_TAG}"), key))
        cfgs |= {key: _cfg(name, files[key]) for key in tagged} or {name: _cfg(name)}
    return cfgs


default_cfgs = generate_default_cfgs(_all_cfgs())  # ``register_model`` looks for this name


def _read(name: str, source: Any, cache_dir: str | Path | None) -> tuple[IMPureConfig | None, dict[str, Any], str]:
    """(stored config, state dict, its name in messages) of what a timm cfg points to."""
    if source.state_dict:
        where = "the given state dict"
        return None, checkpoints.split_official(source.state_dict, where)[1], where
    if source.file:
        if Path(source.file).suffix == ".safetensors":
            return *checkpoints.read_safetensors(source.file), str(source.file)
        return None, checkpoints.read_official(source.file)[1], str(source.file)
    if source.hf_hub_id:
        return *checkpoints.read_folder(source.hf_hub_id, cache_dir=cache_dir), source.hf_hub_id
    raise MissingFileError(
        f"No weights are shipped for {name}; shipped are {list(zoo.shipped())}. "
        "Take pretrained=False, or give pretrained_cfg_overlay=dict(file=...)."
    )


def _create(name: str, pretrained: bool, **kwargs: Any) -> IMPure:
    """What timm calls: its own arguments in ``kwargs`` go to its builder, the rest are config fields."""
    if kwargs.pop("features_only", False):
        raise ConfigError(f"features_only=True: {name} gives images, not features; it is not supported.")
    own = {key: kwargs.pop(key, None) for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")}
    config = PRESETS[name]
    state = None
    if pretrained:
        source = resolve_pretrained_cfg(name, own["pretrained_cfg"], own["pretrained_cfg_overlay"])
        stored, state, where = _read(name, source, own["cache_dir"])
        config = stored or config

    def build(num_classes: int = 0, in_chans: int = 3, global_pool: str = "", **fields: Any) -> IMPure:
        if num_classes or in_chans != 3 or global_pool:
            given = {"num_classes": num_classes, "in_chans": in_chans, "global_pool": global_pool}
            raise ConfigError(f"{name} maps RGB images to RGB images; it cannot take {given}.")
        return IMPure(IMPureConfig.from_dict({**config.to_dict(), **fields}))

    model = build_model_with_cfg(build, name, pretrained=False, **own, **kwargs)
    if state is not None:
        model.load_report = checkpoints.load_state(model, state, where)
    return model


def _register(name: str) -> Callable[..., IMPure]:
    def create(pretrained: bool = False, **kwargs: Any) -> IMPure:
        return _create(name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"The preset {name}; keyword arguments are fields of IMPureConfig."
    return register_model(create)


for _name in PRESETS:
    globals()[_name] = _register(_name)
