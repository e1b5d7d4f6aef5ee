"""What the engine's precisions cost: decisions on purified attacks, paired with fp32's, and PSNR against fp32.

    python -m benchmarks.precision --data nips17-dev.npz --json benchmarks/results/precision-cpu.json

PGD on EfficientNet-Lite0 as in `impure-fast demo`; every precision purifies the same pictures with the same draws.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torch import Tensor

from impure_fast import Engine, load
from impure_fast.attacks import pgd
from impure_fast.classifiers import LITE0_MEAN, LITE0_STD, Normalised, efficientnet_lite
from impure_fast.demo import EPS, SEED, decide, packed_views, photograph_views
from impure_fast.engine.engine import PRECISIONS
from impure_fast.errors import Error
from impure_fast.evaluation.analysis import psnr
from impure_fast.images import write_text

from .runner import available, machine, positive


def measure(data: str | None, count: int, model: str, device: str, attack_steps: int) -> list[dict[str, Any]]:
    """One row an attack strength and precision.  count: pictures, 0 for all of ``data``."""
    purifier = load(model)
    classifier = Normalised(efficientnet_lite(0), LITE0_MEAN, LITE0_STD).eval()
    views = packed_views(data) if data else photograph_views(classifier, count or 40)
    views = views.take(range(count or len(views.right)))
    labels = torch.tensor([right[0] for right in views.right])
    attacked = {"clean": views.images}
    for eps in EPS:
        options: dict[str, Any] = dict(eps=eps / 255, steps=attack_steps, step_size=eps / 4 / 255, seed=SEED)
        attacked[str(eps)] = pgd(classifier, views.images, labels, **options)

    def right(images: Tensor) -> Tensor:
        decisions = decide(classifier, images).argmax(dim=1).tolist()
        return torch.tensor([d in classes for d, classes in zip(decisions, views.right, strict=True)])

    rows = []
    for name, images in attacked.items():
        truth, base = None, None
        for precision in PRECISIONS[device]:
            engine = Engine(purifier, precision=precision, device=device)
            purified = torch.cat([engine.purify(part, seed=SEED, streams=ids) for part, ids in _parts(images)])
            hits = right(purified)
            truth, base = (purified, hits) if base is None else (truth, base)
            row = {"model": model, "attack": name, "precision": precision, "n": len(hits)}
            row["accuracy"] = round(100 * float(hits.float().mean()), 2)
            row["points_to_fp32"] = round(100 * float(hits.float().mean() - base.float().mean()), 2)
            row["only_fp32_right"], row["only_this_right"] = int((base & ~hits).sum()), int((~base & hits).sum())
            row["psnr_to_fp32"] = None if truth is purified else round(psnr(purified, truth), 2)
            row |= {"attack_steps": attack_steps, "machine": machine(device), "date": time.strftime("%Y-%m-%d")}
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def _parts(images: Tensor, size: int = 20) -> Any:
    return zip(images.split(size), torch.arange(len(images)).split(size), strict=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="packed ImageNet pictures; without: views of scikit-image's photographs")
    parser.add_argument("--count", type=int, default=0, help="pictures; 0 takes all of --data, or 40 views")
    parser.add_argument("--model", default="impure_tiny")
    parser.add_argument("--device", type=available, default="cpu", help="cpu or cuda")
    parser.add_argument("--attack-steps", type=positive, default=10)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    try:
        rows = measure(options.data, options.count, options.model, options.device, options.attack_steps)
    except (Error, OSError) as error:
        parser.exit(2, f"{error}\n")
    if options.json:
        write_text(options.json, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
