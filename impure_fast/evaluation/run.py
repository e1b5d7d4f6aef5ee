"""The evaluation itself: every attack of a suite on every defence, scored, checked and reported; it can be resumed.

attack (suites.Job) -> images -> defence -> decisions (scoring.py) -> row -> results.json, report.html, report.md
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import zoo
from ..attacks import attack
from ..errors import InputError
from ..images import write_atomically
from ..integrations.torchattacks import Attackable
from ..model import IMPure
from ..purify import to_bytes, to_float
from . import analysis, checks, report, scoring
from .defences import Defence, baseline
from .suites import Job, Settings, jobs
from .targets import Target, digest, load_pictures, load_target

Progress = Callable[[str, int, int], None]
SHOWN = 4  # pictures in the report
NOT_DIFFERENTIABLE = "not differentiable"


def _silent(what: str, done: int, total: int) -> None:
    pass


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


class Evaluation:
    """One run in one folder.  What was computed lies in ``attacks/``, ``scores/`` and ``analysis/`` under a hash of
    all that it depends on, so a run that was killed goes on, and a larger one takes over what fits."""

    def __init__(self, settings: Settings, folder: str | Path, progress: Progress = _silent) -> None:
        self.settings, self.folder, self.progress = settings, Path(folder), progress
        s = settings
        self.target = load_target(s.classifier, s.classifier_weights)
        self.target.model.to(s.device)
        self.surrogates = {target.name: target for target in map(load_target, s.surrogates)}
        self.pictures = load_pictures(s.data, self.target.prepare, s.images)
        self.images = self.pictures.images.to(s.device)
        self.labels = self.pictures.labels.to(s.device)
        with torch.no_grad():
            logits = torch.cat([self.target.model(part) for part in self.images.split(s.batch)])
        if int(self.labels.max()) >= logits.shape[1]:
            most = int(self.labels.max())
            raise InputError(f"{s.data} has labels up to {most}, but {s.classifier} knows {logits.shape[1]} classes.")
        self.right = (logits.argmax(dim=1) == self.labels).cpu()  # [n] bool
        self.ids = {
            "classifier": digest(self.target.model),
            "data": digest(torch.from_numpy(self.pictures.clean), self.pictures.labels),
        }
        self.defences = self._defences()
        self.randomised: dict[str, bool] = {}  # by defence, as probed
        self.hashes = {d.name: digest(d.purifier) for d in self.defences}

    def _defences(self) -> list[Defence]:
        s = self.settings
        options = {"image_step": s.image_step, "feature_step": s.feature_step}
        own = [Defence(Path(name).name, zoo.load(name).to(s.device), options) for name in s.purifiers]
        found = [baseline(name) for name in s.baselines] + own
        if len({d.name for d in found}) < len(found):
            raise InputError(f"Two purifiers have one name: {', '.join(d.name for d in found)}.")
        if s.suite == "paper":
            # The authors evaluate in a fixed order and with pad-and-resize; both are switched on and off.
            fixed = [
                d.changed(f"{d.name}, fixed order", random_order=False)
                for d in found
                if d.config.get("num_chunks") in (2, 3, 4)
            ]
            found = [v for d in (*found, *fixed) for v in (d, d.changed(f"{d.name} + pad-and-resize", pad_resize=True))]
        return found

    def seed(self, purpose: str) -> int:
        """Attack and scoring never share draws."""
        return int(_key(self.settings.seed, purpose)[:8], 16)

    def draws(self, defence: Defence, mode: str = "random") -> int:
        """How often an image is classified: once where every draw is the same."""
        return self.settings.draws if mode == "random" and self.randomised.get(defence.name, True) else 1

    # --- cached pieces -------------------------------------------------------------------------------------------

    def cached(self, kind: str, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Arrays and, under "meta", a JSON value: from the folder, or made and kept there."""
        path = self.folder / kind / f"{key}.npz"
        if not path.exists():
            arrays = make()
            arrays["meta"] = np.array(json.dumps(arrays.get("meta", {})))

            def write(temporary: str) -> None:
                with open(temporary, "wb") as file:
                    np.savez_compressed(file, **arrays)

            write_atomically(path, write)
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        return found | {"meta": json.loads(str(found["meta"]))}

    def _made(self, job: Job | None) -> tuple[Any, ...]:
        """What an attack depends on beside the pictures, the target and the defence."""
        if job is None:
            return ()
        surrogate = self.surrogates.get(job.knows.removeprefix("surrogate:"))
        return asdict(job), digest(surrogate.model) if surrogate else None

    def _identity(self, defence: Defence) -> tuple[Any, ...]:
        return defence.name, self.hashes[defence.name], defence.config, defence.pad_resize

    def key(self, kind: str, what: str, n: int, extra: bool, defence: Defence) -> str:
        """Of an analysis."""
        s = self.settings
        example = asdict(self.example())
        return _key(kind, what, n, extra, example, self.ids, s.seed, s.draws, s.batch, self._identity(defence))

    def attacked(self, job: Job, defence: Defence) -> tuple[Tensor, dict[str, Any]]:
        """(adversarial images [n, 3, S, S] on the 8-bit grid, meta).  Kept where all defences share them."""
        if job.knows == "given":
            assert self.pictures.adversarial is not None
            return to_float(self.pictures.adversarial[: job.images]).to(self.images), {"seconds": None, "flags": []}
        if job.knows != "classifier" and not job.knows.startswith("surrogate:"):
            return self._attack(job, defence)

        def make() -> dict[str, Any]:
            images, meta = self._attack(job, defence)
            return {"images": to_bytes(images), "meta": meta}

        found = self.cached("attacks", _key(self._made(job), self.ids, self.settings.seed, self.settings.batch), make)
        return to_float(found["images"]).to(self.images), found["meta"]

    def _attack(self, job: Job, defence: Defence) -> tuple[Tensor, dict[str, Any]]:
        s, n = self.settings, min(job.images, len(self.images))
        result = self.images[:n].clone()
        chosen = self.right[:n].nonzero()[:, 0] if job.only_right else torch.arange(n)
        title = f"{defence.name}: {job.level} {job.attack}"
        if job.knows == "classifier" or job.knows.startswith("surrogate:"):
            title = f"{job.knows}: {job.attack}"
        began = time.perf_counter()
        options: dict[str, Any] = dict(eps=job.eps / 255, seed=self.seed("attack"), batch=s.batch)
        with _warnings() as flags:
            if len(chosen):
                result[chosen] = attack(
                    job.attack,
                    self.attackable(job, defence),
                    result[chosen],
                    self.labels[:n][chosen],
                    progress=lambda done, total: self.progress(title, done, total),
                    **options,
                    **job.parameters,
                )
        seconds = (time.perf_counter() - began) / max(1, len(chosen))
        return result, {"seconds": round(seconds, 4), "flags": flags}

    def attackable(self, job: Job, defence: Defence) -> nn.Module:
        """The model that the attack sees."""
        if job.knows == "classifier":
            return self.target.model
        if job.knows.startswith("surrogate:"):
            surrogate = self.surrogates[job.knows.removeprefix("surrogate:")]
            return _AtOwnSide(surrogate).to(self.settings.device)
        mode = "deterministic" if job.knows == "frozen" else "random"
        # The frozen draws are those that are scored: the attacker knows them.
        seed = self.seed("score" if job.knows == "frozen" else "attack")
        pipeline = defence.pipeline(self.target, mode, seed)
        return Attackable(pipeline, gradient="identity" if job.knows == "identity" else "exact")

    def scored(self, job: Job | None, defence: Defence, n: int, mode: str) -> dict[str, Any]:
        """decisions [N, n], loss [n] and meta of one attack, or of the clean images (job None)."""
        s = self.settings
        draws = self.draws(defence, mode)

        def make() -> dict[str, Any]:
            images, meta = self.images[:n], dict[str, Any](seconds=None, flags=[])
            if job is not None:
                images, meta = self.attacked(job, defence)
            pipeline = defence.pipeline(self.target, mode, self.seed("score"))
            outcome = scoring.decide(pipeline, images, self.labels[:n], draws, s.batch)
            farthest = float((images - self.images[:n]).abs().max() * 255)
            meta |= {"farthest": round(farthest, 3), "device": s.device, "versions": versions()}
            return {"decisions": outcome.decisions.numpy(), "loss": outcome.loss.numpy(), "meta": meta}

        key = _key(self._made(job), n, mode, draws, self.ids, s.seed, s.batch, self._identity(defence))
        return self.cached("scores", key, make)

    # --- rows ----------------------------------------------------------------------------------------------------

    def base(self, defence: Defence, level: str, eps: float, mode: str, n: int) -> dict[str, Any]:
        """What every row carries of its circumstances, and the clean accuracy under the same rules."""
        s = self.settings
        clean = self.scored(None, defence, n, mode)
        return {
            "suite": s.suite,
            "level": level,
            "defence": defence.name,
            "norm": "Linf",
            "eps": eps,
            "mode": mode,
            "draws": len(clean["decisions"]),
            "images": n,
            "chosen": f"the first {n} labelled pictures of {Path(s.data).name}",
            "clean": self._figures(torch.from_numpy(clean["decisions"])),
            "classifier": {"name": self.target.name, "hash": self.ids["classifier"]},
            "purifier": {"hash": self.hashes[defence.name], "pad_resize": defence.pad_resize, **defence.config},
            "data": self.ids["data"],
            "seeds": {"run": s.seed, "attack": self.seed("attack"), "score": self.seed("score")},
            "dtype": "float32",
            "rounded": True,
            "verdict": "measured",
            "flags": [],
        }

    def _figures(self, decisions: Tensor, values: dict[str, Tensor] | None = None) -> dict[str, Any]:
        n = decisions.shape[1]
        values = values or scoring.per_image(decisions, self.labels[:n].cpu())
        return {"all": scoring.figures(values), "right": scoring.figures(values, self.right[:n])}

    def row(self, job: Job, defence: Defence) -> tuple[dict[str, Any], checks.Left]:
        """One attack on one defence."""
        n = min(job.images, len(self.images))
        found = self.scored(job, defence, n, job.mode)
        decisions, loss = torch.from_numpy(found["decisions"]), torch.from_numpy(found["loss"])
        values = scoring.per_image(decisions, self.labels[:n].cpu())
        meta = found["meta"]
        row = self.base(defence, job.level, job.eps, job.mode, n) | {
            **described(job),
            "adversarial": self._figures(decisions, values),
            "mean_loss": round(float(loss.mean()), 4),
            "farthest": meta["farthest"],
            "seconds_per_image": meta["seconds"],
            "device": meta["device"],
            "versions": meta["versions"],
            "flags": list(meta["flags"]),
        }
        if meta["farthest"] > job.eps + 0.01:
            row["flags"].append(f"leaves the ball: {meta['farthest']:g}/255")
        return row, checks.Left(job, values["mean"], loss)

    def strongest(self, group: list[tuple[dict[str, Any], checks.Left]], defence: Defence) -> dict[str, Any]:
        """The row of an attacker who takes, for each image, the best of a level's attacks."""
        job, n = group[0][1].job, group[0][0]["images"]
        found = [torch.from_numpy(self.scored(a.job, defence, n, a.job.mode)["decisions"]) for _, a in group]
        each = [scoring.per_image(d, self.labels[:n].cpu()) for d in found]
        values = {rule: torch.stack([v[rule] for v in each]).amin(dim=0) for rule in scoring.RULES}
        return self.base(defence, job.level, job.eps, job.mode, n) | {
            "attack": "strongest per image",
            "knows": job.knows,
            "attacked": "all",
            "of": [f"{row['attack']}, {row['loss']}" for row, _ in group],
            "adversarial": self._figures(found[0], values),
            **{name: group[0][0][name] for name in ("device", "versions")},
        }

    def run(self) -> dict[str, Any]:
        """Everything; returns the results and writes the three files of the report."""
        s = self.settings
        rows: list[dict[str, Any]] = []
        found: list[dict[str, Any]] = []
        for defence in self.defences:
            own, checked = self.against(defence)
            rows += own
            found += [{"defence": defence.name, **check} for check in checked]
        results = {
            "settings": asdict(s),
            "classifier": {"name": self.target.name, "hash": self.ids["classifier"], "side": self.target.side},
            "data": {"name": Path(s.data).name, "hash": self.ids["data"], "images": len(self.images)},
            "right": {"n": int(self.right.sum()), "of": len(self.right)},
            "rows": rows,
            "checks": found,
            "analysis": analysis.run(self) if s.analysis else {},
        }
        report.write(self.folder, results, self.shown())
        return results

    def against(self, defence: Defence) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """(rows, checks) of the whole suite on one defence."""
        s = self.settings
        profile, found = checks.probe(defence, self.target, self.images, self.labels, self.seed("probe"))
        self.randomised[defence.name] = profile.randomised
        todo = jobs(s, profile, defended=defence.name != "none")
        if self.pictures.adversarial is not None:
            given = np.abs(self.pictures.adversarial.astype(int) - self.pictures.clean).max()
            todo.insert(0, Job("T0", "given", float(given), "given", len(self.images)))
        rows: list[dict[str, Any]] = []
        measured: list[tuple[dict[str, Any], checks.Left]] = []
        for place, job in enumerate(todo):
            self.progress(f"{defence.name}: attacks", place, len(todo))
            if job.knows in ("frozen", "fresh") and job.attack != "square" and not profile.differentiable:
                n = min(job.images, len(self.images))
                row = self.base(defence, job.level, job.eps, job.mode, n) | described(job)
                rows.append(row | {"adversarial": None, "verdict": NOT_DIFFERENTIABLE})
            else:
                measured.append(self.row(job, defence))
                rows.append(measured[-1][0])
        self.progress(f"{defence.name}: attacks", len(todo), len(todo))
        groups: dict[tuple[str, float], list[tuple[dict[str, Any], checks.Left]]] = {}
        for pair in measured:
            if pair[0]["level"] in ("T2", "T3", "T4"):
                groups.setdefault((pair[0]["level"], pair[0]["eps"]), []).append(pair)
        rows += [self.strongest(group, defence) for group in groups.values() if len(group) > 1]
        if s.suite == "ladder":
            left = [rest for _, rest in measured]
            found += checks.compare(left, profile)
            if defence.name == "none":
                found.append(_strong_enough(left))
        return rows, found

    def shown(self) -> dict[str, Any]:
        """Pictures of the report, uint8 [k, S, S, 3]: clean, attacked, and purified by each defence."""
        job = self.example()
        attacked, _ = self.attacked(job, self.defences[0])
        attacked = attacked[:SHOWN]
        pictures = {"clean": to_bytes(self.images[:SHOWN]), f"{job.attack} {job.eps:g}/255": to_bytes(attacked)}
        with torch.no_grad():
            for defence in self.defences:
                if defence.name != "none" and not defence.pad_resize:
                    pipeline = defence.pipeline(self.target, "random", self.seed("score"))
                    pictures[defence.name] = to_bytes(pipeline.purify(attacked))
        return pictures

    def patch_of(self, defence: Defence) -> int:
        """Side of the patches in which residue is looked for: the purifier's own, or analysis.PATCH."""
        own = defence.purifier.config.patch_size if isinstance(defence.purifier, IMPure) else analysis.PATCH
        return min(own, self.images.shape[-1] // 2)

    def example(self) -> Job:
        """The oblivious PGD that analyses and pictures are made of: PGD-20 at the largest eps of the run."""
        s = self.settings
        eps = max(s.eps or (4,))
        return Job("T0", "pgd", eps, "classifier", s.rung("T0")["images"], dict(steps=20, step_size=eps / 4 / 255))


def evaluate(settings: Settings, folder: str | Path, progress: Progress = _silent) -> dict[str, Any]:
    """Run or go on with an evaluation in ``folder``; returns what results.json holds.

    progress: called with (what, done, total).  Raises subclasses of ``impure_fast.Error``.
    """
    return Evaluation(settings, folder, progress).run()


def described(job: Job) -> dict[str, Any]:
    """An attack in a row's words; step in 1/255."""
    p = job.parameters
    return {
        "attack": job.attack,
        "knows": job.knows,
        "loss": p.get("loss", "dlr" if "dlr" in job.attack else "margin" if job.attack == "square" else "ce"),
        "step": round(p["step_size"] * 255, 4) if "step_size" in p else None,
        "steps": p.get("steps", p.get("queries")),
        "restarts": 2 if job.attack == "eot-pgd" and "starts" not in p else 1,
        "eot": p.get("eot", 1),
        "parameters": p,
        "attacked": "rightly classified" if job.only_right else "all",
    }


def _strong_enough(left: list[checks.Left]) -> dict[str, Any]:
    bare = [a for a in left if a.job.level == "T0" and a.job.attack == "pgd"]
    name = "the attack breaks the bare classifier"
    if not bare:
        return checks.finding(name, None, "T0 was left out")
    last = max(bare, key=lambda a: a.job.eps)
    return checks.finding(name, last.accuracy <= 1, f"{last.named()} (limit 1 %)")


class _AtOwnSide(nn.Module):
    """A surrogate that takes the target's pictures, resized to its own side."""

    def __init__(self, surrogate: Target) -> None:
        super().__init__()
        self.model, self.side = surrogate.model, surrogate.side

    def forward(self, images: Tensor) -> Tensor:
        if self.side and images.shape[-1] != self.side:
            images = F.interpolate(images, (self.side, self.side), mode="bilinear", antialias=True)
        return self.model(images)


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    """What AutoAttack warns of within the block."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("auto-attack")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def versions() -> dict[str, str]:
    """Of all that a figure depends on."""
    found = {"python": platform.python_version()}
    for name in ("impure-fast", "torch", "torchvision", "timm", "torchattacks", "pyautoattack"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
