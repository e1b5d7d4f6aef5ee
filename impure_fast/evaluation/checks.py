"""The sanity set: what makes an evaluation worth believing, each check with the figure that fails it.

Before the attacks ``probe`` looks at the pipeline itself; afterwards ``compare`` looks at what the attacks left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
    with torch.no_grad():
        frozen = [F.normalize(defence.pipeline(target, "deterministic", seed)(x), dim=1) for _ in range(3)]
        fresh = [F.normalize(defence.pipeline(target, "random", seed + i)(x), dim=1) for i in range(3)]
        logits = defence.pipeline(target, "deterministic", seed)(x)
    drift = max(float((a - frozen[0]).norm(dim=1).max()) for a in frozen)
    spread = max(float((a - fresh[0]).norm(dim=1).max()) for a in fresh)
    found = [
        finding(
            "deterministic mode repeats itself",
            drift <= SAME,
            f"normalised logits of equal calls differ by {drift:.1e} (limit {SAME:.0e})",
        )
    ]
    probable = bool(logits.min() >= 0 and ((logits.sum(dim=1) - 1).abs() < 1e-5).all())
    found.append(finding("the output is logits", not probable, "probabilities" if probable else "not probabilities"))
    zero, wrong = _gradient(defence, target, x, y, seed, frozen=drift <= SAME)
    found += [zero, wrong]
    differentiable = zero["share"] < 1
    if differentiable:
        found.append(_along(defence, target, x, y, seed))
    return Profile(randomised=spread > SAME, differentiable=differentiable), found


def _gradient(
    defence: Defence, target: Target, x: Tensor, y: Tensor, seed: int, frozen: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Is there a gradient, and does it agree with central differences (draws frozen, nothing clamped)?"""
    pipeline = defence.pipeline(target, "deterministic", seed)
    pipeline.clamp = False  # the straight-through clamp differs from the derivative on purpose
    x = 0.05 + 0.9 * x  # room for the differences inside [0, 1]
    _, gradient = expected_gradient(pipeline, x, y, loss="margin")
    length = gradient.flatten(1).norm(dim=1)
    share = float((length == 0).double().mean())
    says = f"{100 * share:.0f} % of the images have an exactly zero gradient"
    zero = finding("there is a gradient", share == 0, says + (": not differentiable" if share == 1 else ""))
    zero["share"] = share
    name = "the gradient is the right one"
    if share == 1 or not frozen:
        return zero, finding(name, None, "there is none" if share == 1 else "the deterministic mode is none")
    direction = gradient / length.clamp_min(1e-30).view(-1, 1, 1, 1)
    errors = []
    with torch.no_grad():
        for h in LENGTHS:
            up, down = (margin(pipeline(x + sign * h * direction), y) for sign in (1, -1))
            errors.append(((up - down) / (2 * h) - length).abs() / length.clamp_min(1e-30))
    error = float(torch.stack(errors).amin(dim=0)[length > 0].median())
    says = f"relative error against central differences {error:.1e} (limit {GRADIENT_ERROR:.0e})"
    return zero, finding(name, error <= GRADIENT_ERROR, says)


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
    """What one attack left of one defence: the rule ``mean`` [n] and the loss [n] of each image."""

    job: Job
    mean: Tensor
    loss: Tensor

    @property
    def accuracy(self) -> float:
        return 100 * float(self.mean.mean())

    def less_than(self, other: Left) -> bool:
        """Whether this attack leaves less than the other, beyond chance, on the images of both."""
        n = min(len(self.mean), len(other.mean))
        return beats(self.mean[:n], other.mean[:n])

    def named(self) -> str:
        p = self.job.parameters
        extra = "".join(f" {key} {p[key]}" for key in ("steps", "eot", "loss") if key in p)
        return f"{self.job.level} {self.job.attack}{extra} at {self.job.eps:g}/255 ({self.accuracy:.1f} %)"


def compare(left: list[Left], profile: Profile) -> list[dict[str, Any]]:
    """Checks over all that the attacks of one defence left."""
    sanity = [a for a in left if a.job.level == "sanity"]
    return [*_unbounded(sanity), *_sweeps(sanity), *_weaker(left, profile)]


def _unbounded(sanity: list[Left]) -> list[dict[str, Any]]:
    found = []
    for a in sanity:
        if a.job.eps == UNBOUNDED:
            says = f"{a.accuracy:.1f} % left without a bound (limit 0)"
            if not (ok := float(a.mean.max()) == 0):
                says += ": gradients are masked, the attack is too weak, or labels come at random"
            found.append(finding("a ball without bound leaves nothing", ok, says))
    return found


def _sweeps(sanity: list[Left]) -> list[dict[str, Any]]:
    """More eps, steps or EOT must never help the defence; where the last step still hurts it, more are wanted."""
    found = []
    bounded = [a for a in sanity if a.job.eps != UNBOUNDED]
    for what, title in (("eps", "more eps"), ("steps", "more steps"), ("eot", "more EOT")):

        def value(a: Left, what: str = what) -> float:
            return a.job.eps if what == "eps" else a.job.parameters[what]

        def rest(a: Left, what: str = what) -> tuple[Any, ...]:
            fixed = {k: v for k, v in a.job.parameters.items() if k != what and k != "step_size"}
            return (None if what == "eps" else a.job.eps, *sorted((k, str(v)) for k, v in fixed.items()))

        groups: dict[tuple[Any, ...], list[Left]] = {}
        for a in bounded:
            if a.job.parameters["steps"] > 1:
                groups.setdefault(rest(a), []).append(a)
        line = max(groups.values(), key=len, default=[])
        line.sort(key=value)
        if len({value(a) for a in line}) < 2:
            continue
        pairs = list(zip(line, line[1:], strict=False))
        risen = [f"{b.named()} leaves more than {a.named()}" for a, b in pairs if a.less_than(b)]
        says = "; ".join(risen) or ", ".join(f"{value(a):g}: {a.accuracy:.1f} %" for a in line)
        found.append(finding(f"{title} never helps the defence", not risen, says))
        if what == "eps":
            losses = [float(a.loss.mean()) for a in line]
            rises = all(b > 0.95 * a for a, b in zip(losses, losses[1:], strict=False))
            found.append(finding("the loss rises with eps", rises, ", ".join(f"{v:.2f}" for v in losses)))
        elif line[-1].less_than(line[-2]):
            found.append(finding(f"{title} is not needed", False, f"still falling: {says}", warning=True))
    return found


def _weaker(left: list[Left], profile: Profile) -> list[dict[str, Any]]:
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
    one = [a for a in left if a.job.level == "sanity" and a.job.parameters["steps"] == 1]
    for a in one:
        many = [b for b in left if b.job.level == "sanity" and b.job.eps == a.job.eps and b is not a]
        better = [b.named() for b in many if b.job.parameters["steps"] >= 10 and a.less_than(b)]
        says = f"one step leaves {a.accuracy:.1f} %" + (f" and beats {', '.join(better)}" if better else "")
        found.append(finding("one step does not beat many", not better, says))
    return found
