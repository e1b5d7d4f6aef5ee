"""What purification does to a perturbation: by its scale, by place, by the purifier's strength, and to the picture.

All of it on the oblivious attack of ``Evaluation.example`` and on the sanity set's number of pictures.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import IMPure
from . import scoring
from .defences import Defence

PARTS = ("scale", "place", "quality", "strength")
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
    """The LPIPS network (AlexNet), or a sentence why there is none.  Nothing is fetched: its trunk must lie in
    torchvision's cache."""
    try:
        import lpips
        from torchvision.models import AlexNet_Weights
    except ImportError:
        return 'LPIPS was left out: pip install "impure-fast[perceptual]".'
    trunk = Path(AlexNet_Weights.IMAGENET1K_V1.url).name
    if not (Path(torch.hub.get_dir()) / "checkpoints" / trunk).exists():
        return f"LPIPS was left out: torchvision's {trunk} is not in the folder checkpoints of torch.hub.get_dir()."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision by names that it has given up
        return lpips.LPIPS(net="alex", verbose=False).eval()


class Analysis:
    """The analyses of one ``run.Evaluation``, a method each: defence -> figures."""

    def __init__(self, evaluation: Any) -> None:
        self.evaluation = evaluation
        attacked = evaluation.attacked(evaluation.example(), evaluation.defences[0])[0]
        n = min(evaluation.settings.rung("sanity")["images"], len(attacked))
        self.clean, self.labels, self.attacked = evaluation.images[:n], evaluation.labels[:n], attacked[:n]
        self.lpips = lpips_or_reason()

    def run(self) -> dict[str, Any]:
        """{"images", "notes", "scale", "place", "quality": {defence: ...}, "strength": {purifier: ...}}."""
        out: dict[str, Any] = {name: {} for name in PARTS}
        for name, defence, piece in self.pieces():
            self.evaluation.progress(f"{defence}: {name}", 0, 1)
            out[name][defence] = piece()["meta"]
        notes = [self.lpips] if isinstance(self.lpips, str) else []
        return {"images": len(self.clean), "notes": notes, **out}

    def pieces(self) -> list[tuple[str, str, Callable[[], dict[str, Any]]]]:
        """(part, defence, what makes it or takes it from the folder) of every part that says something."""
        e, s = self.evaluation, self.evaluation.settings
        example, n = asdict(e.example()), len(self.clean)
        found: list[tuple[str, str, Callable[[], dict[str, Any]]]] = []
        for name in PARTS:
            for d in e.defences:
                useful = {"scale": True, "strength": isinstance(d.purifier, IMPure)}.get(name, d.name != "none")
                if useful and not d.pad_resize:
                    measured = name == "quality" and not isinstance(self.lpips, str)  # by LPIPS too
                    parts = ("analysis", name, n, measured, example, e.ids, s.seed, s.draws, s.batch, e.identity(d))
                    make = partial(lambda name, d: {"meta": getattr(self, name)(d)}, name, d)
                    found.append((name, d.name, partial(e.cached, "analysis", parts, make)))
        return found

    def _accuracy(self, defence: Defence, images: Tensor) -> float:
        """Mean over the run's draws, in percent."""
        e = self.evaluation
        pipeline = defence.pipeline(e.target, "random", e.seed("score"))
        decisions, _ = scoring.decide(pipeline, images, self.labels, e.draws(defence), e.settings.batch)
        return round(100 * float((decisions == self.labels.cpu()).double().mean()), 2)

    def _purify(self, defence: Defence, images: Tensor) -> Tensor:
        """With draws that depend on nothing but the picture's place."""
        e = self.evaluation
        pipeline = defence.pipeline(e.target, "random", e.seed("score"))
        with torch.no_grad():
            return torch.cat([pipeline.purify(part) for part in images.split(e.settings.batch)])

    def scale(self, defence: Defence) -> list[dict[str, float]]:
        """Accuracy where the perturbation is made smaller or larger: what scale of it still fools the classifier."""
        change = self.attacked - self.clean
        return [
            {"scale": s, "accuracy": self._accuracy(defence, (self.clean + s * change).clamp(0, 1))} for s in SCALES
        ]

    def place(self, defence: Defence) -> dict[str, float]:
        """Where the perturbation of one patch is found again after purification under the same draws.

        share: of the residue's squared values in the perturbed patch, in the patches of the same picture most like it
        (cosine of the clean pixels around their mean), and in the rest; density: the same a pixel, over the mean a
        pixel of the perturbation that went in.
        """
        clean, purifier = self.clean, defence.purifier
        own = purifier.config.patch_size if isinstance(purifier, IMPure) else PATCH
        p = min(own, clean.shape[-1] // 2)
        rows, cols = clean.shape[2] // p, clean.shape[3] // p
        patches = F.unfold(clean, p, stride=p).transpose(1, 2)  # [n, L, 3pp]
        patches = F.normalize(patches - patches.mean(dim=2, keepdim=True), dim=2)
        before = self._purify(defence, clean)
        similar = max(1, int(SIMILAR * rows * cols))
        energy = {"same": 0.0, "similar": 0.0, "rest": 0.0}
        went_in = 0.0
        places = torch.linspace(0, rows * cols - 1, min(PROBES, rows * cols) + 2).long()[1:-1].tolist()
        for place in places:
            top, left = place // cols * p, place % cols * p
            window = np.s_[:, :, top : top + p, left : left + p]
            changed = clean.clone()
            changed[window] = self.attacked[window]
            residue = (self._purify(defence, changed) - before)[:, :, : rows * p, : cols * p]
            each = F.unfold(residue.square(), p, stride=p).sum(dim=1)  # [n, L]
            likeness = (patches * patches[:, place : place + 1]).sum(dim=2)
            likeness[:, place] = -torch.inf
            alike = likeness.topk(min(similar, rows * cols - 1), dim=1).indices
            same, near = float(each[:, place].sum()), float(each.gather(1, alike).sum())
            energy["same"] += same
            energy["similar"] += near
            energy["rest"] += float(each.sum()) - same - near
            went_in += float((changed - clean).square().sum())
        total, went_in = max(sum(energy.values()), 1e-12), max(went_in, 1e-12)
        counts = {"same": 1, "similar": similar, "rest": max(1, rows * cols - 1 - similar)}
        out: dict[str, float] = {"patch": p, "left": round(total / went_in, 4)}
        for name, value in energy.items():
            out[f"share_{name}"] = round(value / total, 4)
            out[f"density_{name}"] = round(value / counts[name] / went_in, 6)
        return out

    def quality(self, defence: Defence) -> dict[str, float | None]:
        """Distance from the clean picture after purifying it, and after purifying the attacked one."""
        out: dict[str, float | None] = {}
        for name, images in (("clean", self.clean), ("attacked", self.attacked)):
            purified = self._purify(defence, images)
            similarity = ssim(purified, self.clean)
            out[f"psnr_{name}"] = round(psnr(purified, self.clean), 2)
            out[f"ssim_{name}"] = None if similarity is None else round(similarity, 4)
            if not isinstance(self.lpips, str):
                with torch.no_grad():
                    distance = self.lpips(2 * purified.cpu() - 1, 2 * self.clean.cpu() - 1)
                out[f"lpips_{name}"] = round(float(distance.mean()), 4)
        return out

    def strength(self, defence: Defence) -> list[dict[str, Any]]:
        """The trade-off: clean and attacked accuracy and PSNR by image step, feature step, and kind of each noise.

        K is the purifier's own, since other weights belong to another K: evaluate several purifiers to compare them.
        """
        variants: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        for name in ("image_step", "feature_step"):
            variants += [(name, {name: step}, {}) for step in sorted({*STEPS, defence.config[name]})]
        variants += [("masks", {}, dict(image_mask=image, feature_mask=feature)) for image, feature in MASKS]
        out = []
        for swept, steps, masks in variants:
            variant = defence.changed(defence.name, **masks)
            variant.options = defence.options | steps
            shown = {name: value for name, value in variant.config.items() if name != "random_order"}
            figures = {
                "clean": self._accuracy(variant, self.clean),
                "attacked": self._accuracy(variant, self.attacked),
                "psnr": round(psnr(self._purify(variant, self.clean), self.clean), 2),
            }
            out.append({"swept": swept, **shown, **figures})
        return out
