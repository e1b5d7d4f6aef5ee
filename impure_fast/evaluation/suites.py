"""What is run: the settings of an evaluation, and for each suite the attacks that it makes of them."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..attacks import AUTHORS, parse
from ..config import check_types, from_fields
from ..errors import ConfigError
from .defences import BASELINES

SUITES = ("ladder", "paper", "standard")
LEVELS = ("T0", "T1", "T2", "T3", "T4", "T5", "sanity")
UNBOUNDED = 255.0
# The step in use with PGD-200 + EOT-20: 0.007 at 8/255, in proportion at other eps.
STEP = 0.007 / 8


def purifier_name(text: str) -> str:
    """A purifier in tables.  Training calls every file model.safetensors, so there the folder tells."""
    path = Path(text)
    return path.parent.name if path.name == "model.safetensors" and path.parent.name else path.name


@dataclass(frozen=True)
class Settings:
    """One evaluation; the defaults are the full protocol.

    classifier: a name of ``targets.load_target``.  data: as ``targets.load_pictures``.
    purifiers: names or files for ``zoo.load``; baselines: names of ``defences.BASELINES``.
    surrogates: classifiers whose attacks are transferred (T1); none leaves the level out.
    eps: in 1/255; () takes the suite's own.  images: the first so many pictures.
    steps, eot, queries: of the white-box attacks and of Square.  draws: N of the scoring of random defences.
    sanity_images: pictures of the sanity set.  levels: of the ladder.
    rungs: {level: {"images", "steps", "eot", "queries"}} in place of the above for one level; "attacks": only the first
        so many of the ladder's at that level.
    analysis: also run the analyses.  image_step, feature_step: masking strength in place of the purifiers' own.
    """

    data: str = ""
    suite: str = "ladder"
    classifier: str = "lite0"
    purifiers: tuple[str, ...] = ("impure_tiny",)
    baselines: tuple[str, ...] = tuple(BASELINES)
    surrogates: tuple[str, ...] = ()
    levels: tuple[str, ...] = LEVELS
    eps: tuple[float, ...] = ()
    images: int = 512
    steps: int = 200
    eot: int = 20
    queries: int = 5000
    draws: int = 10
    sanity_images: int = 64
    rungs: dict[str, dict[str, int]] = field(default_factory=dict)
    analysis: bool = True
    image_step: int | None = None
    feature_step: int | None = None
    batch: int = 32
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_types(self)

        def need(ok: bool, name: str, wanted: str) -> None:
            if not ok:
                raise ConfigError(f"{name}={getattr(self, name)!r}: {wanted}.")

        need(bool(self.data), "data", "name a folder, a shard or a packed npz")
        need(self.suite in SUITES, "suite", f"choose one of {', '.join(SUITES)}")
        need(set(self.baselines) <= set(BASELINES), "baselines", f"choose from {', '.join(BASELINES)}")
        need(set(self.levels) <= set(LEVELS), "levels", f"choose from {', '.join(LEVELS)}")
        need(bool(self.purifiers or self.baselines), "purifiers", "there is nothing to evaluate")
        need(all(0 < e <= 255 for e in self.eps), "eps", "give numbers in (0, 255], in units of 1/255")
        for name in ("images", "steps", "eot", "queries", "draws", "sanity_images", "batch"):
            need(getattr(self, name) >= 1, name, "must be at least 1")
        known = {"images", "steps", "eot", "queries", "attacks"}
        ok = set(self.rungs) <= set(LEVELS) and all(
            isinstance(rung, dict) and set(rung) <= known and all(isinstance(n, int) and n > 0 for n in rung.values())
            for rung in self.rungs.values()
        )
        need(ok, "rungs", f"maps levels ({', '.join(LEVELS)}) to numbers of at least 1: {', '.join(sorted(known))}")

    @classmethod
    def from_file(cls, path: str | Path | None, quick: bool = False, **changes: Any) -> Settings:
        """QUICK if asked for, then a JSON file of fields, then ``changes``: the later go before the earlier."""
        values: dict[str, Any] = {}
        if path is not None:
            try:
                values = dict(json.loads(Path(path).read_text()))
            except (OSError, ValueError, TypeError) as error:
                raise ConfigError(f"{path} holds no settings of an evaluation: {error}.") from error
        values = (QUICK if quick else {}) | values | changes
        return from_fields(cls, values, "settings")

    def told(self) -> dict[str, Any]:
        """For a report: every field, files by their names, so that it says nothing of the machine."""

        def short(text: str) -> str:
            return "=".join(Path(part).name for part in text.split("="))

        lists = dict(purifiers=tuple(map(purifier_name, self.purifiers)), surrogates=tuple(map(short, self.surrogates)))
        return asdict(self) | dict(data=short(self.data), classifier=short(self.classifier)) | lists

    def rung(self, level: str) -> dict[str, int]:
        """images, steps, eot, queries and number of attacks of one level."""
        own = dict(attacks=sys.maxsize, images=self.images, steps=self.steps, eot=self.eot, queries=self.queries)
        if level == "sanity":
            own["images"] = min(self.images, self.sanity_images)
        return own | self.rungs.get(level, {})


# Every level and check once over, for minutes on a CPU with pictures of 32 pixels; T0 keeps its 20 steps.
QUICK: dict[str, Any] = dict(images=64, steps=10, eot=2, queries=100, draws=5, sanity_images=8)
QUICK["rungs"] = {"T2": {"images": 16}, "T3": {"images": 32}, "T4": {"images": 16}, "T5": {"images": 16}}


# Of the attacks that are neither told their loss nor use the cross-entropy.
LOSSES = {"apgd-dlr": "dlr", "autoattack": "ce, dlr", "deepfool": "logits", "authors-deepfool2": "logits"}
LOSSES |= dict.fromkeys(("square", "cw", "authors-cw2"), "margin")


@dataclass(frozen=True)
class Job:
    """One attack.

    knows: what it may differentiate: "classifier"; "surrogate:NAME"; "identity" (the pipeline forward, the identity
        backward); "frozen" (the deterministic pipeline); "fresh" (the random one); "given" (made beforehand).
    eps: in 1/255; parameters: of ``attacks.attack``; images: the first so many.
    only_right: attack only images that the bare classifier gets right; the others are scored as they are.
    """

    level: str
    attack: str
    eps: float
    knows: str
    images: int
    parameters: dict[str, Any] = field(default_factory=dict)
    only_right: bool = False

    @property
    def mode(self) -> str:
        """How the pipeline draws when this attack is scored."""
        return "deterministic" if self.knows == "frozen" else "random"

    @property
    def shared(self) -> bool:
        """Whether it is the same attack for every defence."""
        return self.knows == "classifier" or self.knows.startswith("surrogate:")

    def described(self) -> dict[str, Any]:
        """In a row's words; step in 1/255."""
        p = self.parameters
        return {
            "attack": self.attack,
            "knows": self.knows,
            "loss": p.get("loss", LOSSES.get(self.attack, "ce")),
            "step": round(p["step_size"] * 255, 4) if "step_size" in p else None,
            "steps": p.get("steps", p.get("queries")),
            "restarts": 2 if self.attack == "eot-pgd" and "starts" not in p else 1,
            "eot": p.get("eot", 1),
            "parameters": p,
            "attacked": "rightly classified" if self.only_right else "all",
        }


@dataclass(frozen=True)
class Profile:
    """What ``checks.probe`` found of a defence, which decides what can be run against it.

    flat: share of the probed images whose gradient is exactly zero.
    """

    randomised: bool
    differentiable: bool
    flat: float = 0.0

    def allows(self, job: Job) -> bool:
        """False where the attack needs a gradient that is not there."""
        return self.differentiable or job.knows not in ("frozen", "fresh") or job.attack == "square"


def jobs(settings: Settings, profile: Profile, defended: bool) -> list[Job]:
    """The attacks of the suite on one defence; defended: False for the bare classifier."""
    if settings.suite == "paper":
        return [job for eps in settings.eps or (4, 8, 16) for job in _paper(settings, eps)]
    if settings.suite == "standard":
        steps = 100 if settings.steps == Settings.steps else settings.steps  # AutoAttack's own, or what was asked for
        options = dict(version="standard", queries=settings.queries, steps=steps)
        return [Job("AA", "autoattack", e, "frozen", settings.images, options) for e in settings.eps or (4,)]
    found = [job for eps in settings.eps or (4,) for job in _ladder(settings, profile, defended, eps)]
    if "sanity" in settings.levels:
        found += _sanity(settings, profile, (settings.eps or (4,))[0])
    return [job for place, job in enumerate(found) if job not in found[:place]]  # half of one eps may be another


def _ladder(settings: Settings, profile: Profile, defended: bool, eps: float) -> list[Job]:
    found: list[Job] = []

    def add(level: str, attack: str, knows: str, eps: float = eps, **parameters: Any) -> None:
        rung, asked = settings.rung(level), sum(job.level == level for job in found)
        if level in settings.levels and asked < rung["attacks"]:
            found.append(Job(level, attack, eps, knows, rung["images"], parameters))

    for size in (eps / 2, eps):
        add("T0", "pgd", "classifier", size, steps=20, step_size=size / 4 / 255)
    for name in settings.surrogates:
        for attack in ("mifgsm", "difgsm"):
            add("T1", attack, f"surrogate:{name.partition('=')[0]}", steps=100, step_size=eps / 10 / 255, decay=1.0)
    for level, knows in (("T2", "identity"), ("T3", "frozen"), ("T4", "fresh")):
        rung = settings.rung(level)
        if (level == "T2" and not defended) or (level == "T4" and not profile.randomised):
            continue  # without a defence T2 is T3; without draws T4 is
        eot = 1 if level == "T3" or not profile.randomised else rung["eot"]
        for loss in ("ce", "margin"):
            add(level, "eot-pgd", knows, steps=rung["steps"], step_size=eps * STEP, eot=eot, loss=loss)
        steps = min(100, rung["steps"])
        if level == "T3":
            add(level, "apgd-ce", knows, steps=steps)
            add(level, "apgd-dlr", knows, steps=steps)
        if level == "T4":
            add(level, "autoattack", knows, version="rand", steps=steps, eot=eot)
    rung = settings.rung("T5")
    add("T5", "square", "fresh", queries=rung["queries"], eot=rung["eot"] if profile.randomised else 1)
    return found


def white_box(profile: Profile) -> str:
    """The strongest knowledge that an attack on this defence can use."""
    return "identity" if not profile.differentiable else "fresh" if profile.randomised else "frozen"


def _sanity(settings: Settings, profile: Profile, eps: float) -> list[Job]:
    """The sweeps of the sanity set: eps, steps, EOT, one step, and a ball without bound."""
    rung, knows = settings.rung("sanity"), white_box(profile)
    eot, steps = rung["eot"] if profile.randomised else 1, rung["steps"]
    few = max(2, steps // 4)
    sweep: list[tuple[float, int, int]] = [(size, few, eot) for size in (2.0, 4.0, 8.0, 16.0, 32.0)]
    sweep += [(eps, count, eot) for count in (max(2, steps // 20), few, steps)]
    sweep += [(eps, few, count) for count in (1, max(1, eot // 4), eot)]
    sweep += [(UNBOUNDED, steps, eot)]
    options: list[tuple[float, dict[str, Any]]] = []
    for size, count, copies in dict.fromkeys(sweep):
        most = max(16 / 255, 2 / count) if size == UNBOUNDED else 16 / 255  # few steps must cross the range too
        step = min(size * STEP * max(1, 50 / count), size / 255, most)
        options.append((size, dict(steps=count, step_size=step, eot=copies)))
    options.append((eps, dict(steps=1, step_size=eps / 255, eot=eot, starts=("image",))))
    return [Job("sanity", "eot-pgd", size, knows, rung["images"], parameters) for size, parameters in options]


# Beside those of the authors' nine that differ from today's libraries (SPEC 7.2).
STANDARD = (
    "pgd,steps=10,step_size=4",
    "mifgsm,steps=10,step_size=4",
    "difgsm,decay=0.0,steps=10,step_size=4",
    "difgsm,decay=1.0,steps=10,step_size=4",
    "cw",
    "deepfool",
)


def _paper(settings: Settings, eps: float) -> list[Job]:
    found = []
    for level, attacks in (("authors", AUTHORS), ("standard", STANDARD)):
        for name, parameters in map(parse, attacks):
            found.append(Job(level, name, eps, "classifier", settings.images, parameters, only_right=True))
    return found
