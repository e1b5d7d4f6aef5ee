"""Weights on disk <-> (config, state dict): safetensors with the config inside, and the authors' ``.pth``.

Only data is ever read: ``.pth`` files go through torch's restricted unpickler, plain Namespaces allowed.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import IMPureConfig
from .errors import CheckpointError, ConfigError, MissingFileError, needs_extra
from .images import write_atomically, write_text

# Computed by every model, so never stored or loaded (SPEC 2.3, 2.7).
_TABLES = ("pos_embed", "decoder_pos_embed", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
_GUIDES = "hgds."  # frozen guide networks that the authors' training attaches

WEIGHTS_FILE, CONFIG_FILE, CARD_FILE = "model.safetensors", "config.json", "README.md"


@dataclass(frozen=True)
class LoadReport:
    """What a load did with the keys of a checkpoint."""

    dropped: tuple[str, ...]  # tables and guide networks: never needed
    missing: tuple[str, ...]  # of the model, not in the file
    unexpected: tuple[str, ...]  # in the file, not of the model


def drop_tables(state: dict[str, Tensor], prefix: str = "") -> list[str]:
    """Remove computed tables and guide networks from ``state`` in place; returns their names."""
    names = [prefix + name for name in _TABLES]
    dropped = [key for key in state if key in names or key.startswith(prefix + _GUIDES)]
    for key in dropped:
        del state[key]
    return dropped


def _shorten(keys: list[str] | tuple[str, ...]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def load_state(model: nn.Module, state: dict[str, Tensor], source: str, strict: bool = True) -> LoadReport:
    """Copy ``state`` into ``model``.  Raises CheckpointError naming ``source`` and the keys at fault."""
    state = dict(state)
    dropped = drop_tables(state)
    own = model.state_dict()
    missing = tuple(key for key in own if key not in state)
    unexpected = tuple(key for key in state if key not in own)
    wrong = [key for key in own if key in state and own[key].shape != state[key].shape]
    if wrong:
        shapes = f"{tuple(state[wrong[0]].shape)}, wanted {tuple(own[wrong[0]].shape)}"
        raise CheckpointError(f"{source}: {_shorten(wrong)}: shape {shapes}. These weights are of another config.")
    if strict and (missing or unexpected):
        what = [f"{name} {_shorten(keys)}" for name, keys in (("misses", missing), ("has extra", unexpected)) if keys]
        raise CheckpointError(f"{source} {' and '.join(what)}. strict=False loads what fits.")
    bad = [key for key, value in state.items() if key in own and not torch.isfinite(value.float()).all()]
    if bad:
        raise CheckpointError(f"{source}: {_shorten(bad)} holds NaN or infinite weights.")
    model.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False)
    return LoadReport(tuple(dropped), missing, unexpected)


def save_safetensors(
    path: str | Path, state: dict[str, Tensor], config: IMPureConfig, dtype: torch.dtype | None = None
) -> None:
    """Write weights with the config in the file's metadata; ``dtype`` converts floating tensors."""
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in state.items()}
    metadata = {"format": "pt", "config": json.dumps(config.to_dict())}
    try:
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}.") from error


def read_safetensors(path: str | Path) -> tuple[IMPureConfig | None, dict[str, Tensor]]:
    """(config or None where the file carries none, state dict)."""
    _need_file(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            config = (file.metadata() or {}).get("config")
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no readable safetensors file: {error}.") from error
    return (None if config is None else _parse_config(config, path)), state


def _parse_config(text: str, source: str | Path) -> IMPureConfig:
    try:
        return IMPureConfig.from_dict(json.loads(text))
    except (ValueError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"{source}: the stored config cannot be used: {error}") from error


def _need_file(path: str | Path) -> None:
    if not Path(path).is_file():
        raise MissingFileError(f"{path} does not exist or is no file.")


def read_official(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(options, state dict) of a ``.pth`` of the authors' release, or of a bare state dict.

    Weights only: a file that needs to run code raises CheckpointError.
    """
    _need_file(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged or foreign files
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path} holds no plain weights (code in it is never run): {reason[0][:200]}") from error
    return split_official(content, str(path))


def split_official(content: Any, source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The options (may be empty) and the state dict of an already loaded checkpoint."""
    options: dict[str, Any] = {}
    if isinstance(content, dict) and "average" in content:
        raise CheckpointError(f"{source} is the state of a training run; its weights are {WEIGHTS_FILE} beside it.")
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        args = content.get("args")
        args = vars(args) if isinstance(args, argparse.Namespace) else args
        options = dict(args) if isinstance(args, dict) else {}
        content = content["model"]
    entries = content.items() if isinstance(content, dict) else ()
    if not entries or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in entries):
        raise CheckpointError(f"{source} is no checkpoint: wanted a state dict, or a dict with one under 'model'.")
    return options, {key.removeprefix("module."): value for key, value in entries}


# Head counts, steps and masks leave no trace in shapes; the authors' programs fix them so.
_HEAD_WIDTH, _DECODER_HEAD_WIDTH = 64, 32


def infer_config(state: dict[str, Tensor], options: dict[str, Any], source: str) -> IMPureConfig:
    """Config of an official state dict from its shapes; ``options`` (the stored args) settle what shapes cannot.

    Side outputs: their count is known, their places are the released ones (every second block).
    Head widths are the released 64 and 32 unless the width is no multiple of them (then one head).
    """
    try:
        d, _, p, _ = state["patch_embed.proj.weight"].shape
        e = state["decoder_embed.weight"].shape[0]
        head_inputs = state["decoder_head_embed.weight"].shape[1]
        hidden, decoder_hidden = (state[f"{name}.0.mlp.fc1.weight"].shape[0] for name in ("blocks", "decoder_blocks"))
        sides = state["proj_weights"].shape[0] - 1
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{source} is no IMPure checkpoint: {error} is missing or of another shape.") from error

    def blocks(prefix: str) -> int:
        found = [int(m.group(1)) for key in state if (m := re.match(rf"{prefix}\.(\d+)\.", key))]
        return max(found, default=-1) + 1

    def heads(width: int, each: int) -> int:
        return width // each if width % each == 0 else 1

    ratio = max(hidden / d, decoder_hidden / e)
    if int(d * ratio) < hidden or int(e * ratio) < decoder_hidden:  # the quotient was rounded down
        ratio = math.nextafter(ratio, math.inf)

    known: dict[str, Any] = {
        "patch_size": p,
        "embed_dim": d,
        "depth": blocks("blocks"),
        "num_heads": heads(d, _HEAD_WIDTH),
        "decoder_embed_dim": e,
        "decoder_depth": blocks("decoder_blocks"),
        "decoder_num_heads": heads(e, _DECODER_HEAD_WIDTH),
        "mlp_ratio": ratio,
        "chunks": head_inputs // d + 1,
        "out_indices": tuple(range(0, 2 * sides, 2)),
        "random_mask": True,  # the evaluation script's fixed order is an option, not a weight
    }
    if "pos_embed" in state:
        known["img_size"] = (round((state["pos_embed"].shape[1] - 1) ** 0.5) * p) // 2
        # Without the schedule's tables neither mask is "noise" (SPEC 2.1).
        if _TABLES[2] not in state:
            known |= {"img_mask": "mask", "feature_mask": "mask"}
    else:
        known["img_size"] = 14 * p  # the released 224 pixels in patches of 16
    stated = ("img_mask", "feature_mask", "img_size", "num_heads", "decoder_num_heads", "out_indices", "use_conv")
    known |= {key: options[key] for key in stated if options.get(key) is not None}
    try:
        return IMPureConfig.from_official(known)
    except ConfigError as error:
        raise CheckpointError(f"{source}: no config fits its shapes ({error}); pass config=.") from error


def save_folder(folder: str | Path, state: dict[str, Tensor], config: IMPureConfig, card: str | None) -> None:
    """The three files of ``save_pretrained``."""
    folder = Path(folder)
    save_safetensors(folder / WEIGHTS_FILE, state, config)
    write_text(folder / CONFIG_FILE, json.dumps(config.to_dict(), indent=2) + "\n")
    if card is not None:
        write_text(folder / CARD_FILE, card)


def read_folder(name_or_folder: str | Path, **hub_options: Any) -> tuple[IMPureConfig, dict[str, Tensor]]:
    """Config and weights of a local folder or a Hugging Face hub repository."""
    if Path(name_or_folder).is_dir():
        path = Path(name_or_folder) / WEIGHTS_FILE
    else:
        path = _download(str(name_or_folder), WEIGHTS_FILE, **hub_options)
    config, state = read_safetensors(path)
    if config is None:
        beside = path.parent / CONFIG_FILE
        if not beside.is_file():
            raise CheckpointError(f"{path} carries no config and no {CONFIG_FILE} lies beside it.")
        config = _parse_config(beside.read_text(), beside)
    return config, state


def _hub() -> Any:
    with needs_extra("A hub name", "hub"):
        import huggingface_hub
    return huggingface_hub


def _download(repo_id: str, file: str, **hub_options: Any) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise MissingFileError(f"{repo_id} is neither a folder nor a hub id (owner/name).")
    hub = _hub()
    try:
        return Path(hub.hf_hub_download(repo_id, file, **hub_options))
    except Exception as error:  # network, authorisation and cache errors of many kinds
        raise MissingFileError(f"{file} of the hub repository {repo_id} cannot be had: {error}") from error


def push_folder(
    repo_id: str, state: dict[str, Tensor], config: IMPureConfig, card: str | None, **hub_options: Any
) -> None:
    """Upload what ``save_folder`` writes."""
    hub = _hub()
    with tempfile.TemporaryDirectory() as folder:
        save_folder(folder, state, config, card)
        api = hub.HfApi(token=hub_options.pop("token", None))
        api.create_repo(repo_id, exist_ok=True, private=hub_options.pop("private", None))
        api.upload_folder(repo_id=repo_id, folder_path=folder, **hub_options)
