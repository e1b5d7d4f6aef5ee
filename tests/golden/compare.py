"""Compare an implementation of IMPure with golden vectors made by the authors' released class.

A vector is an npz without pickles: config, weights, images, explicit draws, and the checkpoints, losses and
gradients that the release gave for them (SPEC section 9).  ``compare`` returns one ``Row`` a comparison.

model_factory(config, state) -> obj, where
    obj.reconstruct(images, draws) -> {name: tensor}; "pred_raw" and "purified" must be there, others may be;
    obj.losses(images, draws, clean=, guides=, guide_weights=) -> {name: scalar}, "total" differentiable;
    obj.named_parameters() yields the released names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ABS = 1e-5  # checkpoints, fp32, absolute (all reference values are below 10 in size)
ABS_TABLES = 2e-5  # the same when the implementation makes its own tables and schedule (in any precision)
ABS64 = 1e-9  # the same against fp64 references when run in fp64
ABS_SAMPLE = 2e-5  # seeded vector with wide layers (samples)
GRAD = 2e-5  # gradients, relative to the reference tensor's largest entry
LOSS = 1e-5  # losses, relative to max(1, |reference|)
LOSS64 = 1e-9
SAMPLES = 512
MUST = ("pred_raw", "purified")
TABLES = ("pos_embed", "decoder_pos_embed", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")


@dataclass(frozen=True)
class Row:
    """One comparison; NaN errors fail."""

    what: str
    error: float
    tolerance: float

    @property
    def failed(self) -> bool:
        return not self.error <= self.tolerance

    def __str__(self) -> str:
        return f"{self.what}: error {self.error:.2e}, tolerance {self.tolerance:.1e}"


@dataclass
class Vector:
    """The content of one npz, as CPU tensors."""

    config: dict[str, Any]
    images: Tensor | None
    clean: Tensor | None
    guides: list[Guide] | None
    state: dict[str, Tensor] = field(default_factory=dict)
    draw: dict[str, Tensor] = field(default_factory=dict)
    out: dict[str, Tensor] = field(default_factory=dict)
    out64: dict[str, Tensor] = field(default_factory=dict)
    loss: dict[str, Tensor] = field(default_factory=dict)
    grad: dict[str, Tensor] = field(default_factory=dict)
    sample: dict[str, Tensor] = field(default_factory=dict)
    sum: dict[str, Tensor] = field(default_factory=dict)


class Guide:
    """The small frozen guide of the loss vectors: normalise, conv3x3+relu, strided conv3x3+relu, mean, linear+relu."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        w = {name: value.to(x) for name, value in self.weights.items()}
        mean = x.new_tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
        std = x.new_tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
        a = F.relu(F.conv2d((x - mean) / std, w["conv1.weight"], w["conv1.bias"], 1, 1))
        b = F.relu(F.conv2d(a, w["conv2.weight"], w["conv2.bias"], 2, 1))
        c = F.relu(F.linear(b.mean((2, 3)), w["fc.weight"], w["fc.bias"]))
        return {"a": a, "b": b, "c": c}


def sincos_table(width: int, side: int) -> Tensor:
    """[1, 1 + side*side, width] float32: zero row, then per cell [sin x, cos x, sin y, cos y], row-major cells."""
    quarter = width // 4
    exponent = np.arange(quarter, dtype=np.float32) / np.float32(quarter)
    frequency = (np.float32(1) / np.float32(10000) ** exponent).astype(np.float32)
    angle = np.outer(np.arange(side, dtype=np.float32), frequency)
    line = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    cells = np.concatenate([np.tile(line, (side, 1)), np.repeat(line, side, axis=0)], axis=1)
    return torch.from_numpy(np.concatenate([np.zeros((1, width)), cells])[None].astype(np.float32))


def _generate(seed: int, stream: int, kind: str, shape: list[int], mean: float = 0.0, std: float = 1.0) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64([seed, stream]))
    if kind == "random":
        return generator.random(tuple(shape), dtype=np.float32)
    z = generator.standard_normal(tuple(shape), dtype=np.float32)
    return z if (mean, std) == (0.0, 1.0) else np.float32(mean) + np.float32(std) * z


def _add_seeded(vector: Vector, npz: Any) -> None:
    """Weights, image and draws that the file holds only as seeds, checked against its fingerprints."""
    config, seeds = vector.config, vector.config["seeds"]
    weights = {
        name: _generate(seeds["seed"], i, "standard_normal", shape, mean, std)
        for i, (name, shape, mean, std) in enumerate(seeds["weights"])
    }
    others = {"image": _generate(seeds["seed"], *seeds["image"])}
    others |= {name: _generate(seeds["seed"], *how) for name, how in seeds["draws"].items()}
    made = others | weights
    prints = zip(npz["fingerprint/names"], npz["fingerprint/first4"], npz["fingerprint/sum"], strict=True)
    for name, first, total in prints:
        values = made[str(name)]
        starts_alike = np.allclose(np.resize(values.reshape(-1)[:4], 4), first, rtol=0, atol=1e-7)
        if not (starts_alike and abs(values.sum(dtype=np.float64) - total) < 1e-3):
            raise RuntimeError(f"This numpy makes other values for {name}; the seeded vector cannot be used.")
    side = 2 * config["img_size"] // config["patch_size"]
    vector.state = {name: torch.from_numpy(value) for name, value in weights.items()}
    for name, width in (("pos_embed", config["embed_dim"]), ("decoder_pos_embed", config["decoder_embed_dim"])):
        vector.state[name] = sincos_table(width, side)
        if abs(vector.state[name].double().sum().item() - npz[f"table_sum/{name}"][0]) > 1e-2:
            raise RuntimeError(f"Table {name} differs from the reference table.")
    vector.images = torch.from_numpy(others.pop("image"))
    vector.draw |= {name: torch.from_numpy(value) for name, value in others.items()}


def load(path: Path) -> Vector:
    """Read one vector."""
    npz = np.load(path, allow_pickle=False)
    parts: dict[str, dict[str, Tensor]] = {}
    for key in npz.files:
        head, _, name = key.partition("/")
        if name and head not in ("fingerprint", "table_sum"):
            parts.setdefault(head, {})[name] = torch.from_numpy(npz[key])
    guides = {
        int(m.group(1)): Guide(parts.pop(head)) for head in list(parts) if (m := re.fullmatch(r"guide(\d+)", head))
    }
    single = {name: torch.from_numpy(npz[name]) if name in npz.files else None for name in ("image", "clean")}
    vector = Vector(
        config=json.loads(str(npz["config"])),
        images=single["image"],
        clean=single["clean"],
        guides=[guides[g] for g in sorted(guides)] or None,
        **parts,
    )
    if vector.config.get("seeds"):
        _add_seeded(vector, npz)
    return vector


def _cast(tensors: dict[str, Tensor], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Fresh copies, floating tensors in ``dtype``."""
    return {k: v.to(device, dtype if v.is_floating_point() else v.dtype, copy=True) for k, v in tensors.items()}


def _sample_positions(count: int) -> Tensor:
    return torch.from_numpy(np.floor((np.arange(SAMPLES) + 0.5) * count / SAMPLES).astype(np.int64))


def compare_outputs(
    vector: Vector, got: dict[str, Tensor], wide: bool, scale: float = 1.0, drop_tables: bool = False
) -> list[Row]:
    """Rows of every checkpoint in ``got`` that the vector knows."""
    rows = [Row(f"{name} (missing)", float("inf"), 0.0) for name in MUST if name not in got]
    for name, tensor in got.items():
        value = tensor.detach().cpu()
        if name in vector.out or (wide and name in vector.out64):
            reference = vector.out64[name] if name in vector.out64 else vector.out[name]
            tolerance = ABS_TABLES if drop_tables else ABS64 if wide and name in vector.out64 else ABS
            if value.shape != reference.shape:
                rows.append(Row(f"{name} {tuple(value.shape)} != {tuple(reference.shape)}", float("inf"), tolerance))
            elif not reference.is_floating_point():
                rows.append(Row(f"{name} (count of differences)", float((value.long() != reference.long()).sum()), 0.0))
            else:
                rows.append(Row(name, float((value.double() - reference.double()).abs().max()), tolerance * scale))
        elif name in vector.sample:
            value = value.double().reshape(-1)
            tolerance = (ABS_TABLES if drop_tables else ABS64 if wide else ABS_SAMPLE) * scale
            picked = value[_sample_positions(value.numel())]
            rows.append(Row(f"{name} (samples)", float((picked - vector.sample[name]).abs().max()), tolerance))
            s1, s2, s3 = (float(s) for s in vector.sum[name])
            error = max(abs(float(value.sum()) - s1), abs(float(value.abs().sum()) - s2)) / s2
            rows.append(Row(f"{name} (sums)", error + abs(float((value * value).sum()) - s3) / s3, tolerance))
    return rows


def compare_losses(
    vector: Vector,
    model: Any,
    images: Tensor,
    loss: dict[str, Tensor],
    wide: bool,
    scale: float = 1.0,
    drop_tables: bool = False,
) -> list[Row]:
    """Rows of every loss and, where the vector holds them, of the gradients of the total."""
    rows = []
    tolerance = (LOSS64 if wide and not drop_tables else LOSS) * scale
    for name, wanted in vector.loss.items():
        reference = float(wanted)
        if name not in loss:
            rows.append(Row(f"loss {name} (missing)", float("inf"), 0.0))
        else:
            error = abs(float(loss[name].detach()) - reference) / max(1.0, abs(reference))
            rows.append(Row(f"loss {name}", error, tolerance))
    if not vector.grad:
        return rows
    parameters = {"image": images, **dict(model.named_parameters())}
    names = [name for name in vector.grad if name in parameters]
    rows += [Row(f"grad {n} (no such parameter)", float("inf"), 0.0) for n in vector.grad if n not in parameters]
    grads = torch.autograd.grad(loss["total"], [parameters[name] for name in names])
    for name, grad in zip(names, grads, strict=True):
        reference = vector.grad[name].double()
        error = (grad.detach().cpu().double() - reference).abs().max() / reference.abs().max()
        rows.append(Row(f"grad {name}", float(error), GRAD * scale))
    return rows


def compare(
    path: Path,
    model_factory: Callable[[dict[str, Any], dict[str, Tensor]], Any],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    scale: float = 1.0,
    drop_tables: bool = False,
) -> list[Row]:
    """Every comparison of one vector.  ``scale`` widens every tolerance (GPU runs); ``drop_tables`` hands over
    the state without tables and schedule, as the released loaders do, so that the implementation makes its own."""
    vector = load(path)
    wide = dtype == torch.float64
    state = {k: v for k, v in vector.state.items() if not (drop_tables and k in TABLES)}
    options = {"wide": wide, "scale": scale, "drop_tables": drop_tables}

    model = model_factory(dict(vector.config), _cast(state, dtype, device))
    with torch.no_grad():
        got = model.reconstruct(vector.images.to(device, dtype, copy=True), _cast(vector.draw, dtype, device))
    rows = compare_outputs(vector, got, **options)

    if vector.loss:
        model = model_factory(dict(vector.config), _cast(state, dtype, device))
        images = vector.images.to(device, dtype, copy=True).requires_grad_()
        given: dict[str, Any] = {}
        if vector.clean is not None:
            given["clean"] = vector.clean.to(device, dtype)
        if vector.guides:
            given |= {"guides": vector.guides, "guide_weights": vector.config["guide_weights"]}
        loss = model.losses(images, _cast(vector.draw, dtype, device), **given)
        rows += compare_losses(vector, model, images, loss, **options)
    return rows
