"""Names -> models: presets with random weights, shipped weights, files and hub repositories."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from . import checkpoints
from .config import PRESETS, IMPureConfig
from .errors import CheckpointError, ConfigError, InputTypeError, MissingFileError
from .model import IMPure

DEFAULT_TAG = "standard"


def weights_folder() -> Path:
    """Where the wheel keeps its weights."""
    return Path(str(files("impure_fast"))) / "weights"


def shipped() -> dict[str, Path]:
    """{"preset.tag": file} of the weights in this installation."""
    return {path.stem: path for path in sorted(weights_folder().glob("*.safetensors"))}


def list_models(pretrained: bool = False) -> list[str]:
    """Preset names; with ``pretrained`` the shipped weights as "preset.tag"."""
    return list(shipped()) if pretrained else sorted(PRESETS)


def create_model(name: str, **overrides: Any) -> IMPure:
    """A preset with random weights, in training mode.  overrides: fields of IMPureConfig."""
    if name not in PRESETS:
        raise ConfigError(f"{name!r} is no preset; known are {sorted(PRESETS)}. load() takes weights.")
    return IMPure(IMPureConfig.from_dict(PRESETS[name].to_dict() | overrides))


@torch.inference_mode(False)  # an Engine must see changes of the weights
def load(name_or_path: str | Path) -> IMPure:
    """A model with weights: eval mode, fp32, CPU.

    name_or_path: a shipped name ("impure_tiny", "impure_tiny.standard"), a safetensors file with its config
    inside, a folder of ``save_pretrained``, the authors' ``.pth``, or a hub id ("owner/name").
    Raises MissingFileError or CheckpointError.  Only data is read, never code.
    """
    name, path = str(name_or_path), Path(name_or_path)
    known = shipped()
    tagged = name if "." in name else f"{name}.{DEFAULT_TAG}"
    if tagged in known:
        path = known[tagged]
    elif name in PRESETS:
        raise MissingFileError(f"No weights are shipped for {name}; shipped are {list(known)}. Give a file instead.")
    if path.suffix in (".pth", ".pt"):
        return load_official(path)
    if path.is_dir() or (not path.exists() and path.suffix != ".safetensors" and "/" in name):
        return IMPure.from_pretrained(name)
    if not path.exists():
        raise MissingFileError(f"{name} is no shipped model and no file; shipped are {list(known)}.")
    config, state = checkpoints.read_safetensors(path)
    if config is None:
        raise CheckpointError(f"{path} carries no config; use load_official(path, config=...) for foreign weights.")
    return IMPure.from_state(config, state, str(path))


@torch.inference_mode(False)
def load_official(
    path_or_state: str | Path | dict[str, Any], config: IMPureConfig | None = None, strict: bool = True
) -> IMPure:
    """The authors' weights: ``{model, optimizer, epoch, scaler, args}``, or a bare state dict.

    Position tables and noise schedule are computed anew, guide networks dropped.  config=None is inferred
    from shapes and stored options (``checkpoints.infer_config``).  strict=False loads what fits.
    The model's ``load_report`` lists dropped, missing and unexpected keys.  Raises CheckpointError.
    """
    if isinstance(path_or_state, dict):
        source = "the given state dict"
        options, state = checkpoints.split_official(path_or_state, source)
    elif isinstance(path_or_state, (str, Path)):
        source = str(path_or_state)
        if source.endswith(".safetensors"):
            stored, state = checkpoints.read_safetensors(source)
            config, options = config or stored, {}
        else:
            options, state = checkpoints.read_official(source)
    else:
        raise InputTypeError(f"load_official takes a path or a dict, not {type(path_or_state).__name__}.")
    model = IMPure(config or checkpoints.infer_config(state, options, source))
    model.load_report = checkpoints.load_state(model, state, source, strict=strict)
    return model.eval()
