"""The sanity set: what makes an evaluation worth believing, each check with the figure that fails it.

Before the attacks ``probe`` looks at the pipeline itself; afterwards ``compare`` looks at what the attacks left.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks import expected_gradient, margin
from .defences import Defence
from .scoring import beats
from .suites import UNBOUNDED, Job, Profile
from .targets import Target

PROBED = 8  # pictures that the probe takes
LENGTHS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # of the central differences, L2: rounding at one end, kinks at the other
GRADIENT_ERROR = 1e-2
SAME = 1e-4  # largest difference of normalised logits that counts as the same
ALONG = 0.9  # share of images whose loss rises more along the gradient's sign than along a random one


def finding(check: str, ok: bool | None, says: str, warning: bool = False) -> dict[str, Any]:
    """One check's result; ok None: it could not be asked."""
    status = "not run" if ok is None else "passed" if ok else "warning" if warning else "failed"
    return {"check": check, "status": status, "says": says}


def probe(
    defence: Defence, target: Target, images: Tensor, labels: Tensor, seed: int
) -> tuple[Profile, list[dict[str, Any]]]:
    """What kind of defence this is, found by calling it.  images: [n, 3, S, S] in [0, 1]."""
    x, y = images[:PROBED], labels[:PROBED]

    def spread(mode: str, seeds: tuple[int, ...]) -> float:
        """Largest distance of the normalised logits from those of the first seed."""
        with torch.no_grad():
            first, *others = (F.normalize(defence.pipeline(target, mode, s)(x), dim=1) for s in seeds)
        return max(float((other - first).norm(dim=1).max()) for other in others)

    drift = spread("deterministic", (seed, seed, seed))
    says = f"normalised logits of equal calls differ by {drift:.1e} (limit {SAME:.0e})"
    found = [finding("deterministic mode repeats itself", drift <= SAME, says)]
    pipeline = defence.pipeline(target, "deterministic", seed)
    with torch.no_grad():
        logits = pipeline(x)
    probable = bool(logits.min() >= 0 and ((logits.sum(dim=1) - 1).abs() < 1e-5).all())
    found.append(finding("the output is logits", not probable, "probabilities" if probable else "not probabilities"))

    pipeline.clamp = False  # the straight-through clamp differs from the derivative on purpose
    inner = 0.05 + 0.9 * x  # room for the differences inside [0, 1]
    _, gradient = expected_gradient(pipeline, inner, y, loss="margin")
    length = gradient.flatten(1).norm(dim=1)
    share = float((length == 0).double().mean())
    differentiable = share < 1
    says = f"{100 * share:.0f} % of the images have an exactly zero gradient"
    found.append(finding("there is a gradient", share == 0, says + ("" if differentiable else ": not differentiable")))

    name = "the gradient is the right one"
    if differentiable and drift <= SAME:
        unit = length.clamp_min(1e-30)
        direction = gradient / unit.view(-1, 1, 1, 1)
        errors = []
        with torch.no_grad():
            for h in LENGTHS:
                errors.append((_slope(pipeline, inner, y, h * direction) / h - length).abs() / unit)
        error = float(torch.stack(errors).amin(dim=0)[length > 0].median())
        says = f"relative error against central differences {error:.1e} (limit {GRADIENT_ERROR:.0e})"
        found.append(finding(name, error <= GRADIENT_ERROR, says))
        found.append(_cut(pipeline, target, inner, y, gradient))
    else:
        found.append(finding(name, None, "the deterministic mode is none" if differentiable else "there is none"))
    if differentiable:
        found.append(_along(defence, target, x, y, seed))
    return Profile(spread("random", (seed, seed + 1, seed + 2)) > SAME, differentiable, share), found


def _cut(pipeline: nn.Module, target: Target, x: Tensor, y: Tensor, gradient: Tensor) -> dict[str, Any]:
    """Whether the pixels that have no gradient have no effect: moved as the bare classifier's gradient says."""
    dead = gradient == 0
    _, hint = expected_gradient(target.model, x, y, loss="margin")
    direction = F.normalize((hint * dead).flatten(1), dim=1).view_as(x)
    with torch.no_grad():
        slopes = [_slope(pipeline, x, y, h * direction) / h for h in LENGTHS]
    unit = gradient.flatten(1).norm(dim=1).clamp_min(1e-30)
    share = float((torch.stack(slopes).abs().amin(dim=0) / unit).max())
    says = (
        f"{100 * float(dead.double().mean()):.1f} % of the values have none, and along them the loss rises {share:.1e} "
        f"times as steeply as along the gradient (limit {GRADIENT_ERROR:.0e})"
    )
    return finding("no pixel is cut from the gradient", share <= GRADIENT_ERROR, says)


def _slope(pipeline: nn.Module, x: Tensor, y: Tensor, step: Tensor) -> Tensor:
    """Central difference of the margin [n] over one step."""
    up, down = (margin(pipeline(x + sign * step), y) for sign in (1, -1))
    return (up - down) / 2


def _along(defence: Defence, target: Target, x: Tensor, y: Tensor, seed: int, size: float = 1 / 255) -> dict[str, Any]:
    pipeline = defence.pipeline(target, "deterministic", seed)
    _, gradient = expected_gradient(pipeline, x, y, loss="margin")
    generator = torch.Generator().manual_seed(seed)
    random = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
    with torch.no_grad():
        along, aside = (margin(pipeline((x + size * s).clamp(0, 1)), y) for s in (gradient.sign(), random))
    share = float((along > aside).double().mean())
    says = f"in {100 * share:.0f} % of the images the loss rises more along the gradient (limit {100 * ALONG:.0f} %)"
    return finding("the gradient points uphill", share >= ALONG, says)


@dataclass
class Left:
    """What one attack left of one defence: decisions [N, n], each rule's values [n], the loss [n], and its row."""

    job: Job
    decisions: Tensor
    values: dict[str, Tensor]
    loss: Tensor
    row: dict[str, Any] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        return 100 * float(self.values["mean"].mean())

    def less_than(self, other: Left) -> bool:
        """Whether this attack leaves less than the other, beyond chance, on the images of both."""
        n = min(len(self.loss), len(other.loss))
        return beats(self.values["mean"][:n], other.values["mean"][:n])

    def named(self) -> str:
        p = self.job.parameters
        extra = "".join(f" {key} {p[key]}" for key in ("steps", "eot", "loss") if key in p)
        return f"{self.job.level} {self.job.attack}{extra} at {self.job.eps:g}/255 ({self.accuracy:.1f} %)"


def compare(left: list[Left], profile: Profile, bare: bool = False) -> list[dict[str, Any]]:
    """Checks over all that the attacks of one defence left; bare: of none."""
    sanity = [a for a in left if a.job.level == "sanity"]
    found = []
    for a in (a for a in sanity if a.job.eps == UNBOUNDED):
        says = f"{a.accuracy:.1f} % left without a bound (limit 0)"
        if not (ok := float(a.values["mean"].max()) == 0):
            says += ": gradients are masked, the attack is too weak, or labels come at random"
        found.append(finding("a ball without bound leaves nothing", ok, says))
    found += [*_sweeps([a for a in sanity if a.job.eps != UNBOUNDED]), *_weaker(left, sanity, profile)]
    if bare:
        name = "the attack breaks the bare classifier"
        oblivious = [a for a in left if a.job.level == "T0" and a.job.attack == "pgd"]
        if oblivious:
            last = max(oblivious, key=lambda a: a.job.eps)
            found.append(finding(name, last.accuracy <= 1, f"{last.named()} (limit 1 %)"))
        else:
            found.append(finding(name, None, "T0 was left out"))
    return found


def _sweeps(bounded: list[Left]) -> list[dict[str, Any]]:
    """More eps, steps or EOT must never help the defence; where the last step still hurts it, more are wanted."""
    found = []
    for what in ("eps", "steps", "eot"):
        groups: dict[tuple[Any, ...], list[tuple[float, Left]]] = {}  # by all else
        for a in bounded:
            setting = {"eps": a.job.eps, "steps": a.job.parameters["steps"], "eot": a.job.parameters["eot"]}
            value = setting.pop(what)
            if a.job.parameters["steps"] > 1:
                groups.setdefault(tuple(setting.values()), []).append((value, a))
        longest: list[tuple[float, Left]] = max(groups.values(), key=len, default=[])
        line = sorted(longest, key=lambda pair: pair[0])
        if len(line) < 2:
            continue
        steps = [(a, b) for (_, a), (_, b) in zip(line, line[1:], strict=False)]
        risen = [f"{b.named()} leaves more than {a.named()}" for a, b in steps if a.less_than(b)]
        says = "; ".join(risen) or ", ".join(f"{value:g}: {a.accuracy:.1f} %" for value, a in line)
        title = "more EOT" if what == "eot" else f"more {what}"
        found.append(finding(f"{title} never helps the defence", not risen, says))
        if what == "eps":
            losses = [float(a.loss.mean()) for _, a in line]
            rises = all(b > 0.95 * a for a, b in zip(losses, losses[1:], strict=False))
            found.append(finding("the loss rises with eps", rises, ", ".join(f"{v:.2f}" for v in losses)))
        elif steps[-1][1].less_than(steps[-1][0]):
            found.append(finding(f"{title} is not needed", False, f"still falling: {says}", warning=True))
    return found


def _weaker(left: list[Left], sanity: list[Left], profile: Profile) -> list[dict[str, Any]]:
    """Attacks that know less, or do less, must not leave less than the white box at the same eps."""
    level = "T2" if not profile.differentiable else "T4" if profile.randomised else "T3"
    found = []
    strong = [a for a in left if a.job.level == level]
    for eps in sorted({a.job.eps for a in strong}):
        best = min((a for a in strong if a.job.eps == eps), key=lambda a: a.accuracy)
        weak = [a for a in left if a.job.level in ("T0", "T1", "T2", "T5") and a.job.level != level]
        better = [a.named() for a in weak if a.job.eps <= eps and a.less_than(best)]
        says = f"{', '.join(better) or 'none'} beats {best.named()}"
        found.append(finding(f"no weaker attack beats {level}", not better, says))
    for one in (a for a in sanity if a.job.parameters["steps"] == 1):
        many = [b for b in sanity if b.job.eps == one.job.eps and b.job.parameters["steps"] >= 10]
        better = [b.named() for b in many if one.less_than(b)]
        says = f"one step leaves {one.accuracy:.1f} %" + (f" and beats {', '.join(better)}" if better else "")
        found.append(finding("one step does not beat many", not better, says))
    return found
