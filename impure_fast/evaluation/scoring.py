"""From a pipeline's decisions to figures: mean, worst of N and majority of K draws, 95 % intervals, paired tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RULES = ("mean", "worst", "majority")
Z = 1.959963984540054  # of a 95 % interval


def decide(pipeline: nn.Module, images: Tensor, labels: Tensor, draws: int, batch: int) -> tuple[Tensor, Tensor]:
    """Classify each image ``draws`` times: decisions [N draws, n images] int64, and the cross-entropy [n], mean over
    the draws.  A random pipeline goes on drawing, so no draw serves twice."""
    decisions, losses = [], []
    with torch.no_grad():
        for _ in range(draws):
            logits = torch.cat([pipeline(part) for part in images.split(batch)]).float()
            decisions.append(logits.argmax(dim=1))
            losses.append(F.cross_entropy(logits, labels, reduction="none"))
    return torch.stack(decisions).cpu(), torch.stack(losses).mean(dim=0).cpu()


def per_image(decisions: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What each rule says of each image, [n] in [0, 1]: share of right draws; all right; true label outvotes all.

    Majority takes the first K draws, K the largest odd number of at most N; a tie loses.
    """
    right = decisions == labels.cpu()
    odd = len(right) - (len(right) + 1) % 2
    votes = torch.zeros(right.shape[1], int(max(decisions.max(), labels.max())) + 1)
    votes.scatter_add_(1, decisions[:odd].T, torch.ones(right.shape[1], odd))
    own = votes.gather(1, labels.cpu()[:, None])
    rivals = votes.scatter(1, labels.cpu()[:, None], -1).amax(dim=1)
    return {
        "mean": right.double().mean(dim=0),
        "worst": right.all(dim=0).double(),
        "majority": (own[:, 0] > rivals).double(),
    }


def strongest(decisions: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Several attacks' decisions [N, n] -> those of the attack that leaves least of each image [N, n].

    Each half of the draws is shown by the attack that the other half chooses: a draw that chose would look worse than
    it is.  A single draw chooses for itself, as it does for a deterministic pipeline.
    """
    stacked = torch.stack(list(decisions))  # [attacks, N, n]
    right = (stacked == labels.cpu()).double()
    n, places = stacked.shape[1], torch.arange(stacked.shape[2])
    half = n // 2
    pairs = [(slice(half, n), slice(half)), (slice(half), slice(half, n))] if half else [(slice(n), slice(n))]
    shown = [stacked[right[:, chooses].mean(dim=1).argmin(dim=0), :, places].T[shows] for chooses, shows in pairs]
    return torch.cat(shown)


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a share seen on n images.

    For a mean over draws n stays the number of images, since draws of one image are one sample; a mean of values in
    [0, 1] varies no more than a share does, so the interval is then too wide rather than too narrow.
    """
    if n == 0:
        return 0.0, 1.0
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def figures(values: dict[str, Tensor], among: Tensor | None = None) -> dict[str, Any]:
    """{rule: {"value", "low", "high"}} in percent, and n; among: [n] bool, the images that count."""
    out: dict[str, Any] = {}
    for rule, value in values.items():
        chosen = value if among is None else value[among]
        out["n"] = len(chosen)
        share = float(chosen.mean()) if len(chosen) else math.nan
        low, high = wilson(0.0 if math.isnan(share) else share, len(chosen))
        out[rule] = {name: round(100 * v, 2) for name, v in (("value", share), ("low", low), ("high", high))}
    return out


def beats(a: Tensor, b: Tensor, level: float = 0.05) -> bool:
    """Whether attack a leaves less than attack b on the same images: one-sided sign test.  a, b: [n] in [0, 1]."""
    wins, losses = int((a < b).sum()), int((a > b).sum())
    n = wins + losses
    return n > 0 and sum(math.comb(n, k) for k in range(wins, n + 1)) / 2**n < level


def difference(a: Tensor, b: Tensor) -> dict[str, float]:
    """{"value", "low", "high"}: mean of b - a over the same images in points, with its normal 95 % interval, which is
    no narrower than what no difference among so many leaves open (Wilson's for 0 of n), and stays within 100."""
    d, n = 100 * (b - a).double(), len(b)
    mean, half = float(d.mean()), Z * float(d.std()) / math.sqrt(n) if n > 1 else math.inf
    half = max(half, 100 * Z**2 / (n + Z**2))
    found = {"value": mean, "low": max(-100.0, mean - half), "high": min(100.0, mean + half)}
    return {name: round(v, 2) for name, v in found.items()}
