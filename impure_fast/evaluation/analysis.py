"""What purification does to a perturbation: by its scale, by place, by the purifier's strength, and to the picture.

All of it on the oblivious attack of ``Evaluation.example`` and on the sanity set's number of pictures.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import IMPure
from . import scoring
from .defences import Defence

# ``run.Evaluation``, which imports this module.
Evaluation = Any

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
STEPS = (0, 50, 100, 200, 400, 600, 800)
MASKS = (("noise", "noise"), ("noise", "mask"), ("mask", "noise"), ("mask", "mask"))
PATCH = 16  # of baselines, which have none of their own
SIMILAR = 0.05  # share of the patches that counts as similar
PROBES = 4  # perturbed patches a picture


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB, values in [0, 1]; capped at 100 for equal images."""
    return float((-10 * (a - b).square().mean(dim=(1, 2, 3)).clamp_min(1e-10).log10()).mean())


def ssim(a: Tensor, b: Tensor) -> float | None:
    """Mean structural similarity (scikit-image, Gaussian window); None for pictures smaller than its window."""
    from skimage.metrics import structural_similarity

    if min(a.shape[2:]) < 11:
        return None
    options: dict[str, Any] = dict(channel_axis=0, data_range=1, gaussian_weights=True, use_sample_covariance=False)
    pairs = zip(a.cpu().numpy(), b.cpu().numpy(), strict=True)
    return float(np.mean([structural_similarity(x, y, sigma=1.5, **options) for x, y in pairs]))


def lpips_or_reason() -> Any:
    """The LPIPS network (AlexNet), or a sentence why there is none; its trunk comes from torchvision's cache."""
    try:
        import lpips
    except ImportError:
        return 'LPIPS was left out: pip install "impure-fast[perceptual]".'
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips calls torchvision by names that it has given up
            return lpips.LPIPS(net="alex", verbose=False).eval()
    except (OSError, RuntimeError) as error:
        return f"LPIPS was left out: torchvision's AlexNet weights cannot be fetched ({type(error).__name__})."


def run(evaluation: Evaluation) -> dict[str, Any]:
    """{"scale", "place", "quality": {defence: ...}, "strength": {purifier: ...}, "notes"}; each piece is kept."""
    n = min(evaluation.settings.rung("sanity")["images"], len(evaluation.images))
    clean, labels = evaluation.images[:n], evaluation.labels[:n]
    attacked = evaluation.attacked(evaluation.example(), evaluation.defences[0])[0][:n]
    parts = {"scale": _by_scale, "place": _by_place, "quality": _quality}
    lpips = lpips_or_reason()
    out: dict[str, Any] = {"images": n, "notes": [lpips] if isinstance(lpips, str) else []}
    for name, part in (*parts.items(), ("strength", _by_strength)):
        out[name] = {}
        for defence in evaluation.defences:
            wanted = isinstance(defence.purifier, IMPure) if name == "strength" else True
            if not wanted or defence.pad_resize or (name in ("place", "quality") and defence.name == "none"):
                continue
            evaluation.progress(f"{defence.name}: {name}", 0, 1)
            metric = None if isinstance(lpips, str) or name != "quality" else lpips

            def make(part: Any = part, defence: Defence = defence, metric: Any = metric) -> dict[str, Any]:
                more = {"lpips": metric} if part is _quality else {}
                return {"meta": part(evaluation, defence, clean, attacked, labels, **more)}

            key = evaluation.key("analysis", name, n, bool(metric), defence)
            out[name][defence.name] = evaluation.cached("analysis", key, make)["meta"]
    return out


def _accuracy(evaluation: Evaluation, defence: Defence, images: Tensor, labels: Tensor) -> float:
    """Mean over the run's draws, in percent."""
    s = evaluation.settings
    pipeline = defence.pipeline(evaluation.target, "random", evaluation.seed("score"))
    found = scoring.decide(pipeline, images, labels, evaluation.draws(defence), s.batch)
    return round(100 * float((found.decisions == labels.cpu()).double().mean()), 2)


def _purify(evaluation: Evaluation, defence: Defence, images: Tensor) -> Tensor:
    """With draws that depend on nothing but the picture's place."""
    pipeline = defence.pipeline(evaluation.target, "random", evaluation.seed("score"))
    with torch.no_grad():
        return torch.cat([pipeline.purify(part) for part in images.split(evaluation.settings.batch)])


def _by_scale(
    evaluation: Evaluation, defence: Defence, clean: Tensor, attacked: Tensor, labels: Tensor
) -> list[dict[str, float]]:
    """Accuracy where the perturbation is made smaller or larger: what scale of residue still fools the classifier."""
    return [
        {"scale": s, "accuracy": _accuracy(evaluation, defence, (clean + s * (attacked - clean)).clamp(0, 1), labels)}
        for s in SCALES
    ]


def _by_place(
    evaluation: Evaluation, defence: Defence, clean: Tensor, attacked: Tensor, labels: Tensor
) -> dict[str, float]:
    """Where the perturbation of one patch is found again after purification under the same draws.

    share: of the residue's squared values in the perturbed patch, in the patches of the same picture most like it
    (cosine of the clean pixels around their mean), and in the rest; density: the same a pixel, over the mean a pixel
    of the perturbation that went in.
    """
    p = evaluation.patch_of(defence)
    rows, cols = clean.shape[2] // p, clean.shape[3] // p
    patches = F.unfold(clean, p, stride=p).transpose(1, 2)  # [n, L, 3pp]
    patches = F.normalize(patches - patches.mean(dim=2, keepdim=True), dim=2)
    before = _purify(evaluation, defence, clean)
    similar = max(1, int(SIMILAR * rows * cols))
    energy = {"same": 0.0, "similar": 0.0, "rest": 0.0}
    went_in = 0.0
    places = torch.linspace(0, rows * cols - 1, min(PROBES, rows * cols) + 2).long()[1:-1].tolist()
    for place in places:
        window = np.s_[:, :, place // cols * p : (place // cols + 1) * p, place % cols * p : (place % cols + 1) * p]
        changed = clean.clone()
        changed[window] = attacked[window]
        residue = (_purify(evaluation, defence, changed) - before)[:, :, : rows * p, : cols * p]
        each = F.unfold(residue.square(), p, stride=p).sum(dim=1)  # [n, L]
        likeness = (patches * patches[:, place : place + 1]).sum(dim=2)
        likeness[:, place] = -torch.inf
        alike = likeness.topk(min(similar, rows * cols - 1), dim=1).indices
        same, near = float(each[:, place].sum()), float(each.gather(1, alike).sum())
        energy["same"] += same
        energy["similar"] += near
        energy["rest"] += float(each.sum()) - same - near
        went_in += float((changed - clean).square().sum())
    total = max(sum(energy.values()), 1e-12)
    counts = {"same": 1, "similar": similar, "rest": max(1, rows * cols - 1 - similar)}
    out: dict[str, float] = {"patch": p, "left": round(total / max(went_in, 1e-12), 4)}
    for name, value in energy.items():
        out[f"share_{name}"] = round(value / total, 4)
        out[f"density_{name}"] = round(value / counts[name] / max(went_in, 1e-12), 6)
    return out


def _quality(
    evaluation: Evaluation, defence: Defence, clean: Tensor, attacked: Tensor, labels: Tensor, lpips: Any
) -> dict[str, float | None]:
    """Distance from the clean picture after purifying it, and after purifying the attacked one."""
    out: dict[str, float | None] = {}
    for name, images in (("clean", clean), ("attacked", attacked)):
        purified = _purify(evaluation, defence, images)
        similarity = ssim(purified, clean)
        out[f"psnr_{name}"] = round(psnr(purified, clean), 2)
        out[f"ssim_{name}"] = None if similarity is None else round(similarity, 4)
        if lpips is not None:
            with torch.no_grad():
                out[f"lpips_{name}"] = round(float(lpips(2 * purified.cpu() - 1, 2 * clean.cpu() - 1).mean()), 4)
    return out


def _by_strength(
    evaluation: Evaluation, defence: Defence, clean: Tensor, attacked: Tensor, labels: Tensor
) -> list[dict[str, Any]]:
    """The trade-off: clean and attacked accuracy and PSNR by image step, feature step, and kind of each noise.

    K is the purifier's own, since other weights belong to another K: evaluate several purifiers to compare them.
    """
    base = defence.config
    variants: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    for name in ("image_step", "feature_step"):
        variants += [(name, {name: step}, {}) for step in sorted({*STEPS, base[name]})]
    for image, feature in MASKS:
        variants.append(("masks", {}, dict(image_mask=image, feature_mask=feature)))
    out = []
    for swept, steps, masks in variants:
        variant = defence.changed(defence.name, **masks)
        variant.options = defence.options | steps
        shown = {name: value for name, value in variant.config.items() if name != "random_order"}
        out.append(
            {
                "swept": swept,
                **shown,
                "clean": _accuracy(evaluation, variant, clean, labels),
                "attacked": _accuracy(evaluation, variant, attacked, labels),
                "psnr": round(psnr(_purify(evaluation, variant, clean), clean), 2),
            }
        )
    return out
