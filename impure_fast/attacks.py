"""L-inf attacks on a model that takes images in [0, 1], by name and parameters: seeded, in batches, rounded to 8 bits.

``ATTACKS`` maps a name to a function of one batch, (model, x, y, eps, seed, **parameters) -> x'.  torchattacks and
pyautoattack do the work where they have the attack; own code is EOT-PGD (a margin loss, several starts) and what the
IMPure authors ran and no library has (``authors-*``, SPEC 7.1).  eps and step_size are in the images' units.
"""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InputError, needs_extra
from .images import write_npz
from .purify import PurifiedClassifier, expected_logits, to_bytes

KEPT_EVERY = 60.0  # seconds


def attack(
    name: str,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    seed: int,
    batch: int = 32,
    progress: Callable[[int, int], None] = lambda done, total: None,
    keep: Path | None = None,
    notes: list[str] | None = None,
    **parameters: Any,
) -> Tensor:
    """Attack images and round the result to 8 bits as an image file would.

    model: [N, 3, H, W] in [0, 1] -> logits; images: [N, 3, H, W]; labels: [N] int64; eps in the images' units.
    keep: a file (.npz) of this very call, which once a minute takes the batches that are done, the states of torch's
    generators and of purified classifiers, and ``notes``: a call that was killed goes on from there to the same
    result, and so does one of more images that begin with these.  progress: called with what the file held, then after
    each batch.
    Global generators and the modes (train, eval) of all modules are left as they were.
    Raises InputError for an unknown attack or parameter, MissingExtraError without the attack libraries.
    """
    function, notes = _named(name), [] if notes is None else notes
    images = images.contiguous()  # pyautoattack takes views of gradients, which follow the image's strides
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.random.fork_rng(), torch.enable_grad():  # of every GPU too: manual_seed reaches them all
            torch.manual_seed(seed)
            done = [_kept(keep, model, images, batch, notes)] if keep and keep.exists() else [images[:0]]
            kept, written = len(done[0]), time.monotonic()
            progress(kept, len(images))
            for at in range(kept, len(images), batch):
                x, y = images[at : at + batch], labels[at : at + batch]
                attacked = function(model.eval(), x, y, eps, seed, **parameters).detach()
                done.append(_rounded(attacked, x, eps))
                progress(sum(map(len, done)), len(images))
                if keep and len(x) == batch and time.monotonic() - written >= KEPT_EVERY:
                    _keep(keep, model, torch.cat(done), notes)
                    written = time.monotonic()
    except TypeError as error:
        if "keyword" not in str(error):  # of an unexpected or a missing one
            raise
        raise InputError(f"Attack {name!r} cannot run with parameters {sorted(parameters)}: {error}.") from error
    finally:
        for module, training in modes.items():
            module.training = training
    return torch.cat(done)


def _keep(path: Path, model: nn.Module, done: Tensor, notes: list[str]) -> None:
    arrays = {"images": to_bytes(done), "notes": np.array(notes, dtype=str), "cpu": torch.get_rng_state().numpy()}
    if done.is_cuda:
        arrays["cuda"] = torch.cuda.get_rng_state(done.device).numpy()
    arrays["used"] = np.array([pipeline.used for pipeline in _pipelines(model)], dtype=np.int64)
    write_npz(path, arrays)


def _kept(path: Path, model: nn.Module, images: Tensor, batch: int, notes: list[str]) -> Tensor:
    """What a file of ``_keep`` has of these images; everything stands where it stood."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        # Divided where it was divided: a GPU's quotients differ in the last bit.
        done = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).to(images) / 255
        if len(done) > len(images) and len(images) % batch:
            return images[:0]  # the last batch would be another
        torch.set_rng_state(torch.from_numpy(arrays["cpu"]))
        if images.is_cuda:
            torch.cuda.set_rng_state(torch.from_numpy(arrays["cuda"]), images.device)
        for pipeline, used in zip(_pipelines(model), arrays["used"].tolist(), strict=True):
            pipeline.used = used
    except (ValueError, KeyError, OSError, RuntimeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is no attack that can go on ({error}); delete it to begin anew.") from error
    notes += arrays["notes"].tolist()
    return done[: len(images)]


def _pipelines(model: nn.Module) -> list[PurifiedClassifier]:
    return [module for module in model.modules() if isinstance(module, PurifiedClassifier)]


def _rounded(z: Tensor, x: Tensor, eps: float) -> Tensor:
    """z at 8 bits; what lies in the ball round x stays in it."""
    levels, slack = (z * 255).round(), 1e-3
    low, high = (255 * (x - eps) - slack).ceil(), (255 * (x + eps) + slack).floor()
    inside = ((z - x).abs() <= eps + 1e-6) & (low <= high)
    return torch.where(inside, levels.clamp(low, high), levels) / 255


# What the IMPure authors run, with their parameters (SPEC 7.1), for ``parse``.
AUTHORS = (
    "fgsm",
    "authors-pgd,steps=10,step_size=4",
    "authors-mifgsm,steps=10,step_size=4",
    "authors-difgsm,decay=0.0,steps=10,step_size=4",
    "authors-difgsm,decay=1.0,steps=10,step_size=4",
    "apgd-ce,steps=10",
    "apgd-dlr,steps=10",
    "authors-cw2",
    "authors-deepfool2,step_size=4",
)


WORDS = ("loss", "starts", "version")  # the parameters that are no numbers


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """ "pgd,steps=10,step_size=4" -> ("pgd", {"steps": 10, "step_size": 4 / 255}): eps and step_size in 1/255.

    Values are JSON, or else words.  Raises InputError for an unknown attack or a part that is no parameter.
    """
    name, *parts = text.split(",")
    _named(name)
    parameters: dict[str, Any] = {}
    for part in parts:
        key, _, word = part.partition("=")
        try:
            value = json.loads(word)
        except ValueError:
            value = word
        if not word or isinstance(value, str) != (key in WORDS):
            raise InputError(f"{part!r} in {text!r} cannot be used; wanted NAME,KEY=VALUE,... as in {AUTHORS[1]}.")
        parameters[key] = value / 255 if key in ("eps", "step_size") else value
    return name, parameters


def _named(name: str) -> Callable[..., Tensor]:
    if name not in ATTACKS:
        raise InputError(f"There is no attack {name!r}; choose one of {', '.join(ATTACKS)}.")
    return ATTACKS[name]


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int,
    step_size: float,
    seed: int,
    batch: int = 20,
) -> Tensor:
    """PGD with a random start (torchattacks); arguments as in ``attack``."""
    return attack("pgd", model, images, labels, eps=eps, seed=seed, batch=batch, steps=steps, step_size=step_size)


def _library() -> Any:
    with needs_extra("Attacking", "attack"):
        import torchattacks
    return torchattacks


_THEIR_NAMES = {"step_size": "alpha", "eot": "eot_iter"}


class _Expected(nn.Module):
    """A random model's expectation over ``eot`` calls, whose graphs it holds at once."""

    def __init__(self, model: nn.Module, eot: int) -> None:
        super().__init__()
        self.model, self.eot = model, eot

    def forward(self, x: Tensor) -> Tensor:
        if self.eot == 1:
            return self.model(x)
        return expected_logits(torch.stack([self.model(x) for _ in range(self.eot)]))


def _square(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, seed: int, *, queries: int = 5000, eot: int = 1
) -> Tensor:
    """Square (torchattacks), each query the mean of ``eot`` calls.

    The library would give back the clean image wherever one call by chance is right; here the best point stays.
    """
    library = _library().Square(_Expected(model, eot).eval(), eps=eps, n_queries=queries, seed=seed)
    library.init_hyperparam(x)
    torch.manual_seed(seed)
    return library.attack_single_run(x, y)[1]


def _from_torchattacks(kind: str, bounded: bool = True, seeded: bool = False, **fixed: Any) -> Callable[..., Tensor]:
    """An attack of torchattacks; an unbounded one is cut to the ball afterwards, so that it can be scored at eps."""

    def run(model: nn.Module, x: Tensor, y: Tensor, eps: float, seed: int, **parameters: Any) -> Tensor:
        options = {_THEIR_NAMES.get(key, key): value for key, value in parameters.items()} | fixed
        options |= {"eps": eps} if bounded else {}
        options |= {"seed": seed} if seeded else {}
        attacked = getattr(_library(), kind)(model, **options)(x, y)
        return attacked if bounded else _project(attacked, x, eps)

    return run


def _autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    seed: int,
    *,
    version: str = "standard",
    steps: int = 100,
    queries: int = 5000,
    eot: int = 20,
) -> Tensor:
    """AutoAttack (pyautoattack).  The defaults are its own; fewer steps or queries are for trials.

    version "rand": APGD on the expectation over ``eot`` calls.  DLR wants three classes, its targeted form four.
    """
    with needs_extra("AutoAttack", "attack"):
        from pyautoattack import AutoAttack
    random = version == "rand"
    seen = _Expected(model, eot).eval() if random else model
    whole: Any = AutoAttack(seen, eps=eps, version=version, device=x.device, seed=seed)
    for part in (whole.apgd, whole.apgd_targeted, whole.fab):
        part.n_iter = steps
    for part in (whole.apgd, whole.apgd_targeted):  # as the library derives them from its own 100
        part.n_iter_2, part.n_iter_min, part.size_decr = (max(1, int(s * steps)) for s in (0.22, 0.06, 0.03))
    with torch.no_grad():
        others = model(x[:1]).shape[1] - 1
    if others < 3:
        whole.attacks_to_run = [name for name in whole.attacks_to_run if name != "apgd-t"]
    whole.apgd_targeted.n_target_classes = min(whole.apgd_targeted.n_target_classes, others)
    whole.fab.n_target_classes = min(whole.fab.n_target_classes, others)
    whole.square.n_queries = queries
    if not random:
        return whole.run_standard_evaluation(x, y, batch_size=len(x))[0]
    # The library keeps what fooled one single call and gives the clean image back for the rest; against a random
    # defence the point of the highest expected loss is the stronger answer.
    whole.apgd.eot_iter = 1
    ends = []
    for whole.apgd.loss in ("ce", "dlr") if others >= 2 else ("ce",):
        ends.append(whole.apgd.perturb(x, y, best_loss=True))
    return _strongest(model, ends, y, "margin", eot)


def _strongest(model: nn.Module, ends: list[Tensor], y: Tensor, loss: str, eot: int) -> Tensor:
    """Of several attacked versions of each image, the one whose expected loss is highest."""
    with torch.no_grad():
        reached = [torch.stack([LOSSES[loss](model(z), y) for _ in range(eot)]).mean(dim=0) for z in ends]
    which = torch.stack(reached).argmax(dim=0)  # [N]
    return torch.stack(ends)[which, torch.arange(len(y), device=y.device)]


def _project(z: Tensor, x: Tensor, eps: float) -> Tensor:
    return (x + (z - x).clamp(-eps, eps)).clamp(0, 1)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Largest other logit minus the true one, [N]: positive where the decision is wrong."""
    own = F.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(own, -torch.inf).amax(dim=1) - logits[own]


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": lambda logits, y: F.cross_entropy(logits, y, reduction="none"),
    "margin": margin,
}


def expected_gradient(model: nn.Module, z: Tensor, y: Tensor, loss: str = "ce", eot: int = 1) -> tuple[Tensor, Tensor]:
    """(mean loss [N], its gradient [N, 3, H, W]) over ``eot`` calls, in each of which a random model draws afresh."""
    total, gradient = torch.zeros(len(z), device=z.device), torch.zeros_like(z)
    for _ in range(eot):
        leaf = z.detach().requires_grad_()
        value = LOSSES[loss](model(leaf), y)
        if value.requires_grad:  # a detached defence gives none: the gradient stays zero, and the sanity set says so
            part = torch.autograd.grad(value.sum(), leaf, allow_unused=True)[0]
            gradient += 0 if part is None else part
        total += value.detach()
    return total / eot, gradient / eot


def sign_steps(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    steps: int,
    step_size: float,
    start: str = "random",
    first_at: str = "start",
    decay: float | None = None,
    diversity: bool = False,
    loss: str = "ce",
    eot: int = 1,
) -> Tensor:
    """Iterated sign steps in the ball.

    start: "random" (uniform in the ball) or "image"; first_at: where the first gradient is taken, the "start" or, as
    the authors do, the "image".  decay: momentum of gradients divided by their mean absolute value.
    diversity: through torchattacks' random resize and pad (0.9, probability 1/2).
    """
    d = torch.zeros_like(x)
    if start == "random":
        d = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1) - x
    z = x + d if first_at == "start" else x
    seen: Any = model
    if diversity:
        library = _library().DIFGSM(model, resize_rate=0.9, diversity_prob=0.5)
        seen = lambda images: model(library.input_diversity(images))  # noqa: E731
    momentum = torch.zeros_like(x)
    for _ in range(steps):
        _, direction = expected_gradient(seen, z, y, loss, eot)
        if decay is not None:
            # Where the gradient is all zero the libraries divide by zero; here the image stays.
            direction = direction / direction.abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-30)
            momentum = direction = direction + decay * momentum
        z = (x + (d + step_size * direction.sign()).clamp(-eps, eps)).clamp(0, 1)
        d = z - x
    return z


def _eot_pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    seed: int,
    *,
    steps: int,
    step_size: float,
    eot: int = 1,
    loss: str = "ce",
    starts: tuple[str, ...] = ("random", "image"),
) -> Tensor:
    """PGD on the expected loss from each start; an image keeps the end whose expected loss is highest."""
    starts = (starts,) if isinstance(starts, str) else tuple(starts)
    if not starts or not set(starts) <= {"random", "image"}:
        raise InputError(f"starts={starts}: choose from random, image.")
    if loss not in LOSSES:
        raise InputError(f"loss={loss!r}: choose one of {', '.join(LOSSES)}.")
    options: dict[str, Any] = dict(steps=steps, step_size=step_size, loss=loss, eot=eot)
    return _strongest(model, [sign_steps(model, x, y, eps, start=start, **options) for start in starts], y, loss, eot)


def _authors(**fixed: Any) -> Callable[..., Tensor]:
    """PGD, MI-FGSM or DI2-FGSM as the authors run it: a random start, but the first gradient at the image."""

    def run(model: nn.Module, x: Tensor, y: Tensor, eps: float, seed: int, **parameters: Any) -> Tensor:
        return sign_steps(model, x, y, eps, first_at="image", **parameters, **fixed)

    return run


def _authors_cw2(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    seed: int,
    *,
    searches: int = 5,
    steps: int = 50,
    step_size: float = 0.01,
    confidence: float = 40.0,
    constant: float = 0.1,
) -> Tensor:
    """Their CW with its slips (SPEC 7.1): constants summed over the batch, the unclipped image returned, so that the
    result may leave the ball; a constant halves or grows tenfold until it has seen both success and failure."""
    n = len(x)
    base = torch.atanh(0.999999 * (2 * x - 1))
    shift = torch.zeros_like(x)
    c = torch.full((n,), constant, device=x.device)
    ever, never = (torch.zeros(n, dtype=torch.bool, device=x.device) for _ in range(2))
    best, kept = torch.full((n,), torch.inf, device=x.device), x.clone()
    own = F.one_hot(y, model(x[:1]).shape[1])
    for _ in range(searches):
        shift = shift.detach().requires_grad_()
        optimiser = torch.optim.Adam([shift], lr=step_size)
        now = torch.zeros_like(ever)
        for _ in range(steps):
            v = (torch.tanh(shift + base) + 1) / 2
            logits = model(x + (v - x).clamp(-eps, eps))
            hinge = (confidence - margin(logits, y)).clamp_min(0)
            l2 = (v - x).square().sum(dim=(1, 2, 3))
            with torch.no_grad():
                fooled = (logits + confidence * own).argmax(dim=1) != y
                now |= fooled
                smaller = fooled & (l2 < best)
                kept[smaller], best[smaller] = v[smaller], l2[smaller]
            optimiser.zero_grad()
            (shift.grad,) = torch.autograd.grad(c.sum() * hinge.sum() + n * l2.sum(), shift)
            optimiser.step()
        c = torch.where(now & ~never, c / 2, torch.where(~now & ~ever, c * 10, c))
        ever, never = ever | now, never | ~now
        with torch.no_grad():
            v = (torch.tanh(shift + base) + 1) / 2
            shift = torch.atanh(2 * (x + (v - x).clamp(-eps, eps)) - 1) - base
    return kept


def _authors_deepfool2(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    seed: int,
    *,
    step_size: float,
    steps: int = 50,
    overshoot: float = 0.02,
    classes: int = 10,
) -> Tensor:
    """Their sign walk towards the nearest of the ten likeliest classes (SPEC 7.1); images already wrong stay."""
    with torch.no_grad():
        ranked = model(x).argsort(dim=1, descending=True)[:, :classes]  # [N, 10]
    first = ranked[:, 0]
    noise, z = torch.zeros_like(x), x.clone()
    active = first == y
    for _ in range(steps):
        if not (rows := active.nonzero()[:, 0]).numel():
            break
        leaf = z[rows].requires_grad_()
        logits = model(leaf)
        wrong = logits.argmax(dim=1) != first[rows]
        nearest = torch.full((len(rows),), torch.inf, device=x.device)
        direction = torch.zeros_like(leaf)
        for k in range(1, ranked.shape[1]):
            gap = (logits.gather(1, ranked[rows, k : k + 1]) - logits.gather(1, first[rows, None]))[:, 0]
            (w,) = torch.autograd.grad(gap.sum(), leaf, retain_graph=True)
            distance = (gap.detach().abs() + 1e-8) / (w.flatten(1).norm(dim=1) + 1e-8)
            closer = distance < nearest
            nearest[closer], direction[closer] = distance[closer], w[closer]
        step = (noise[rows] + (1 + overshoot) * step_size * direction.sign()).clamp(-eps, eps)
        moving = rows[~wrong]
        noise[moving] = step[~wrong]
        z[moving] = (x[moving] + noise[moving]).clamp(0, 1)
        active[rows[wrong]] = False
    return z


ATTACKS: dict[str, Callable[..., Tensor]] = {
    "fgsm": _from_torchattacks("FGSM"),
    "pgd": _from_torchattacks("PGD"),
    "mifgsm": _from_torchattacks("MIFGSM"),
    "difgsm": _from_torchattacks("DIFGSM", resize_rate=0.9, diversity_prob=0.5),
    "apgd-ce": _from_torchattacks("APGD", seeded=True, loss="ce"),
    "apgd-dlr": _from_torchattacks("APGD", seeded=True, loss="dlr"),
    "cw": _from_torchattacks("CW", bounded=False),
    "deepfool": _from_torchattacks("DeepFool", bounded=False),
    "square": _square,
    "autoattack": _autoattack,
    "eot-pgd": _eot_pgd,
    "authors-pgd": _authors(),
    "authors-mifgsm": _authors(decay=1.0),
    "authors-difgsm": _authors(diversity=True),
    "authors-cw2": _authors_cw2,
    "authors-deepfool2": _authors_deepfool2,
}
