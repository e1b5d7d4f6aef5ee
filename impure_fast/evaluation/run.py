"""The evaluation itself: every attack of a suite on every defence, scored, checked and reported; it can be resumed.

attack (suites.Job) -> images -> defence -> decisions (scoring.py) -> row -> results.json, report.html, report.md
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import zoo
from ..attacks import attack
from ..errors import InputError, needs_extra
from ..images import write_npz
from ..integrations.torchattacks import Attackable
from ..model import IMPure
from ..purify import to_bytes, to_float
from . import checks, report, scoring
from .analysis import Analysis
from .defences import Defence, baseline
from .suites import Job, Profile, Settings, jobs, purifier_name
from .targets import digest, load_pictures, load_target

Progress = Callable[[str, int, int], None]
SHOWN = 4  # pictures in the report
NOT_DIFFERENTIABLE = "not differentiable"


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


class Evaluation:
    """One run in one folder.  What was computed lies in ``attacks/``, ``scores/`` and ``analysis/`` under a hash of
    all that it depends on, so a run that was killed goes on, and a larger one takes over what fits."""

    def __init__(self, settings: Settings, folder: str | Path, progress: Progress) -> None:
        self.settings, self.folder = settings, Path(folder)
        s = settings
        self.rank, self.world = _processes()
        self.progress: Progress = progress if self.rank == 0 else lambda what, done, total: None
        own = s.device == "cuda" and self.world > 1
        self.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if own else s.device
        self.target = load_target(s.classifier).to(self.device)
        self.surrogates = {target.name: target.to(self.device) for target in map(load_target, s.surrogates)}
        if len(self.surrogates) < len(s.surrogates):
            raise InputError(f"Two surrogates have one name: {', '.join(s.surrogates)}.")
        self.pictures = load_pictures(s.data, self.target.prepare, s.images)
        self.images = self.pictures.images.to(self.device)
        self.labels = self.pictures.labels.to(self.device)
        with torch.no_grad():
            logits = torch.cat([self.target.model(part) for part in self.images.split(s.batch)])
        if (most := int(self.labels.max())) >= logits.shape[1]:
            raise InputError(f"{s.data} has labels up to {most}, but {s.classifier} knows {logits.shape[1]} classes.")
        self.right = (logits.argmax(dim=1) == self.labels).cpu()  # [n] bool
        if not self.right.any():
            raise InputError(
                f"{s.classifier} gets none of {len(self.labels)} pictures of {s.data} right: are the labels its own?"
            )
        self.classes = logits.shape[1]
        # What every cached piece depends on beside its own parts.
        self.ids = {
            "classifier": digest(self.target.model),
            "target": f"{self.target.name} {self.target.side} {self.target.pad} {self.target.enlarge}",
            "version": str(versions().get("impure-fast")),
            "data": digest(torch.from_numpy(self.pictures.clean), self.pictures.labels),
        }
        self.defences = self._defences()
        self.randomised: dict[str, bool] = {}  # by defence, as probed
        self.hashes = {d.name: digest(d.purifier) for d in self.defences}

    def _defences(self) -> list[Defence]:
        s = self.settings
        options = {"image_step": s.image_step, "feature_step": s.feature_step}
        found = [baseline(name) for name in s.baselines]
        found += [Defence(purifier_name(name), zoo.load(name).to(self.device), options) for name in s.purifiers]
        if len({d.name for d in found}) < len(found):
            raise InputError(f"Two purifiers have one name: {', '.join(d.name for d in found)}.")
        if s.suite == "paper":
            # The authors evaluate in a fixed order and with pad-and-resize; both are switched on and off.
            fixed = [d for d in found if d.config.get("num_chunks") in (2, 3, 4)]
            found += [d.changed(f"{d.name}, fixed order", random_order=False) for d in fixed]
            found = [v for d in found for v in (d, d.changed(f"{d.name} + pad-and-resize", pad_resize=True))]
        return found

    def seed(self, purpose: str) -> int:
        """Attack and scoring never share draws."""
        return int(_key(self.settings.seed, purpose)[:8], 16)

    def draws(self, defence: Defence, mode: str = "random") -> int:
        """How often an image is classified: once where every draw is the same."""
        return self.settings.draws if mode == "random" and self.randomised.get(defence.name, True) else 1

    # --- cached pieces -------------------------------------------------------------------------------------------

    def cached(self, kind: str, parts: tuple[Any, ...], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Arrays and, under "meta", a JSON value: from the folder, or made and kept there."""
        path = self.folder / kind / f"{_key(*parts)}.npz"
        if not path.exists():
            arrays = make()
            arrays["meta"] = np.array(json.dumps(arrays.get("meta", {})))
            write_npz(path, arrays, np.savez_compressed)
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        return found | {"meta": json.loads(str(found["meta"]))}

    def _made(self, job: Job | None) -> tuple[Any, ...]:
        """What an attack depends on beside the clean pictures, the target and the defence."""
        if job is None:
            return ()
        other: Any = None
        if job.knows == "given" and self.pictures.adversarial is not None:
            other = torch.from_numpy(self.pictures.adversarial)
        elif job.knows.startswith("surrogate:"):
            other = self.surrogates[job.knows.removeprefix("surrogate:")].model
        return asdict(job), None if other is None else digest(other)

    def identity(self, defence: Defence) -> tuple[Any, ...]:
        """What a figure of a defence depends on."""
        whole = defence.purifier.config.to_dict() if isinstance(defence.purifier, IMPure) else {}
        return defence.name, self.hashes[defence.name], defence.config, whole, defence.pad_resize

    def attacked(self, job: Job, defence: Defence) -> tuple[Tensor, dict[str, Any]]:
        """(adversarial images [n, 3, S, S] on the 8-bit grid, meta).  Kept where all defences share them."""
        if job.knows == "given":
            assert self.pictures.adversarial is not None
            return to_float(self.pictures.adversarial[: job.images]).to(self.images), {"seconds": None, "flags": []}
        if not job.shared:
            return self._attack(job, defence)

        def make() -> dict[str, Any]:
            images, meta = self._attack(job, defence)
            return {"images": to_bytes(images), "meta": meta}

        s = self.settings
        found = self.cached("attacks", (self._made(job), self.ids, s.seed, s.batch), make)
        return to_float(found["images"]).to(self.images), found["meta"]

    def _attack(self, job: Job, defence: Defence) -> tuple[Tensor, dict[str, Any]]:
        n = self.count(job)
        result = self.images[:n].clone()
        chosen = self.right[:n].nonzero()[:, 0] if job.only_right else torch.arange(n)
        title = f"{job.knows if job.shared else defence.name}: {job.level} {job.attack}"
        s, began, seen = self.settings, time.perf_counter(), list[int]()

        def progress(done: int, total: int) -> None:
            seen.append(done)
            self.progress(title, done, total)

        options: dict[str, Any] = dict(eps=job.eps / 255, seed=self.seed("attack"), batch=s.batch, progress=progress)
        options |= dict(job.parameters, keep=self._part(job, defence))
        with _warnings() as flags:
            options["notes"] = flags
            if len(chosen):
                model = self.attackable(job, defence)
                result[chosen] = attack(job.attack, model, result[chosen], self.labels[:n][chosen], **options)
        fresh = len(chosen) - seen[0] if seen else 0
        seconds = round((time.perf_counter() - began) / fresh, 4) if fresh else None
        return result, {"seconds": seconds, "flags": flags}

    def _part(self, job: Job, defence: Defence) -> Path:
        """Of an attack that is not done, whatever its number of images."""
        s, own = self.settings, None if job.shared else self.identity(defence)
        parts = (self._made(replace(job, images=0)), self.ids, s.seed, s.batch, s.device, own)
        return self.folder / "attacks" / f"{_key(*parts)}.part.npz"

    def count(self, job: Job) -> int:
        """Images of an attack."""
        return min(job.images, len(self.images))

    def attackable(self, job: Job, defence: Defence) -> nn.Module:
        """The model that the attack sees."""
        if job.knows == "classifier":
            return self.target.model
        if job.knows.startswith("surrogate:"):
            from torchvision.transforms.v2 import Resize

            surrogate = self.surrogates[job.knows.removeprefix("surrogate:")]
            side = surrogate.side
            return nn.Sequential(Resize((side, side)), surrogate.model) if side else surrogate.model
        # The frozen draws are those that are scored: the attacker knows them.
        seed = self.seed("score" if job.knows == "frozen" else "attack")
        pipeline = defence.pipeline(self.target, job.mode, seed)
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
            decisions, loss = scoring.decide(pipeline, images, self.labels[:n], draws, s.batch)
            farthest = float((images - self.images[:n]).abs().max() * 255)
            meta |= {"farthest": round(farthest, 3), "device": s.device, "versions": versions()}
            return {"decisions": decisions.numpy(), "loss": loss.numpy(), "meta": meta}

        parts = (self._made(job), n, mode, draws, self.ids, s.seed, s.batch, self.identity(defence))
        found = self.cached("scores", parts, make)
        if job is not None:
            self._part(job, defence).unlink(missing_ok=True)
        return found

    # --- rows ----------------------------------------------------------------------------------------------------

    def base(self, job: Job, defence: Defence) -> dict[str, Any]:
        """What every row carries of its circumstances, and the clean accuracy under the same rules."""
        s, n = self.settings, self.count(job)
        clean = torch.from_numpy(self.scored(None, defence, n, job.mode)["decisions"])
        return {
            "suite": s.suite,
            "level": job.level,
            "defence": defence.name,
            "norm": "Linf",
            "eps": job.eps,
            "mode": job.mode,
            "draws": len(clean),
            "images": n,
            "chosen": f"the first {n} labelled pictures of {Path(s.data).name}",
            "clean": self._figures(scoring.per_image(clean, self.labels[:n])),
            "classifier": {"name": self.target.name, "hash": self.ids["classifier"]},
            "purifier": {"hash": self.hashes[defence.name], "pad_resize": defence.pad_resize, **defence.config},
            "data": self.ids["data"],
            "seeds": {"run": s.seed, "attack": self.seed("attack"), "score": self.seed("score")},
            "dtype": "float32",
            "rounded": True,
            "verdict": "measured",
            "flags": [],
        }

    def _figures(self, values: dict[str, Tensor]) -> dict[str, Any]:
        right = self.right[: len(values["mean"])]
        return {"all": scoring.figures(values), "right": scoring.figures(values, right)}

    def left(self, job: Job, defence: Defence) -> checks.Left:
        """What one attack leaves of one defence, with its row."""
        n = self.count(job)
        found = self.scored(job, defence, n, job.mode)
        decisions = torch.from_numpy(found["decisions"])
        values = scoring.per_image(decisions, self.labels[:n])
        loss, meta = torch.from_numpy(found["loss"]), found["meta"]
        row = self.base(job, defence) | {
            **job.described(),
            "adversarial": self._figures(values),
            "mean_loss": round(float(loss.mean()), 4),
            "farthest": meta["farthest"],
            "seconds_per_image": meta["seconds"],
            "device": meta["device"],
            "versions": meta["versions"],
            "flags": list(meta["flags"]),
        }
        if meta["farthest"] > job.eps + 0.01:
            row["flags"].append(f"{report.OUTSIDE}: {meta['farthest']:g}/255")
        return checks.Left(job, decisions, values, loss, row)

    def strongest(self, group: list[checks.Left], defence: Defence) -> dict[str, Any]:
        """The row of an attacker who takes, for each image, the best of a level's attacks."""
        job, row = group[0].job, group[0].row
        values = self._best(group)
        return self.base(job, defence) | {
            "attack": "strongest per image",
            "knows": job.knows,
            "attacked": "all",
            "of": [f"{a.row['attack']}, {a.row['loss']}" for a in group],
            "adversarial": self._figures(values),
            "flags": list(dict.fromkeys(flag for a in group for flag in a.row["flags"])),
            **{name: row[name] for name in ("device", "versions")},
        }

    def _best(self, group: Sequence[checks.Left]) -> dict[str, Tensor]:
        labels = self.labels[: group[0].decisions.shape[1]]
        return scoring.per_image(scoring.strongest([a.decisions for a in group], labels), labels)

    def run(self) -> dict[str, Any]:
        """Everything; returns the results and writes the three files of the report.

        With several processes each fills its share of the folder, and the first one reports; the others return {}.
        """
        s = self.settings
        with needs_extra("The report", "evaluate"):  # now rather than after hours of attacks
            import_module("matplotlib"), import_module("skimage")
        plan = [(defence, *self.planned(defence)) for defence in self.defences]
        if self.world > 1:
            self._share(plan)
            if self.rank:
                return {}
        rows: list[dict[str, Any]] = []
        found: list[dict[str, Any]] = []
        for defence, profile, todo, probed in plan:
            own, checked = self.against(defence, profile, todo)
            rows += own
            found += [{"defence": defence.name, **check} for check in probed + checked]
        results = {
            "settings": s.told(),
            "classifier": {"name": self.target.name, "hash": self.ids["classifier"], "side": self.target.side},
            "data": {"name": Path(s.data).name, "hash": self.ids["data"], "images": len(self.images)},
            "right": {"n": int(self.right.sum()), "of": len(self.right)},
            "rows": rows,
            "checks": found,
            "paired": self.paired(plan),
            "analysis": Analysis(self).run() if s.analysis else {},
        }
        report.write(self.folder, results, self.shown())
        return results

    def planned(self, defence: Defence) -> tuple[Profile, list[Job], list[dict[str, Any]]]:
        """(what kind of defence it is, the suite's attacks on it, the findings of its probe)."""
        profile, found = checks.probe(defence, self.target, self.images, self.labels, self.seed("probe"))
        self.randomised[defence.name] = profile.randomised
        todo = jobs(self.settings, profile, defended=defence.name != "none")
        if self.classes < 3:
            todo = [job for job in todo if job.attack != "apgd-dlr"]  # which compares three logits
        if self.pictures.adversarial is not None:
            given = np.abs(self.pictures.adversarial.astype(int) - self.pictures.clean).max()
            todo.insert(0, Job("T0", "given", float(given), "given", len(self.images)))
        return profile, todo, found

    def _share(self, plan: list[tuple[Defence, Profile, list[Job], list[dict[str, Any]]]]) -> None:
        """Each process fills its part of the folder; attacks that several defences share come first."""
        shared = {
            _key(self._made(job)): partial(self.attacked, job, d)
            for d, _, todo, _ in plan
            for job in todo
            if job.shared
        }
        own: list[Callable[[], Any]] = [
            partial(self.left, job, d) for d, profile, todo, _ in plan for job in todo if profile.allows(job)
        ]
        own += [piece for _, _, piece in Analysis(self).pieces()] if self.settings.analysis else []
        for pieces in (list(shared.values()), own):
            for piece in pieces[self.rank :: self.world]:
                piece()
            dist.barrier()

    def against(self, defence: Defence, profile: Profile, todo: list[Job]) -> tuple[list[Any], list[Any]]:
        """(rows, checks) of the attacks on one defence."""
        rows: list[dict[str, Any]] = []
        measured: list[checks.Left] = []
        for place, job in enumerate(todo):
            self.progress(f"{defence.name}: attacks", place, len(todo))
            if profile.allows(job):
                measured.append(self.left(job, defence))
                rows.append(measured[-1].row)
                if profile.flat and job.knows in ("frozen", "fresh"):
                    rows[-1]["flags"].append(f"{100 * profile.flat:.0f} % of the probed gradients are exactly zero")
            else:
                nothing = {"adversarial": None, "verdict": NOT_DIFFERENTIABLE}
                rows.append(self.base(job, defence) | job.described() | nothing)
        self.progress(f"{defence.name}: attacks", len(todo), len(todo))
        groups: dict[tuple[str, float], list[checks.Left]] = {}
        for a in measured:
            if a.job.level in ("T2", "T3", "T4"):
                groups.setdefault((a.job.level, a.job.eps), []).append(a)
        rows += [self.strongest(group, defence) for group in groups.values() if len(group) > 1]
        ladder = self.settings.suite == "ladder"
        return rows, checks.compare(measured, profile, bare=defence.name == "none") if ladder else []

    def paired(self, plan: Sequence[tuple[Defence, Profile, list[Job], Any]]) -> list[dict[str, Any]]:
        """What each later purifier gains on an earlier one: the same images, for each the strongest attack of a level.

        Levels and attacks that only one of the two can be asked are left out.
        """
        known = set(map(purifier_name, self.settings.purifiers))
        found = []
        for (a, pa, jobs_a, _), (b, pb, jobs_b, _) in combinations([p for p in plan if p[0].name in known], 2):
            groups: dict[tuple[str, float], list[Job]] = {}
            for job in jobs_a:
                if job in jobs_b and job.level != "sanity" and pa.allows(job) and pb.allows(job):
                    groups.setdefault((job.level, job.eps), []).append(job)
            for (level, eps), group in groups.items():
                left = [self._best([self.left(job, d) for job in group])["mean"] for d in (a, b)]
                gain = scoring.difference(*left)
                row = dict(level=level, eps=eps, attacks=len(group), images=len(left[0]), gain=gain)
                found.append({"from": a.name, "to": b.name, **row})
        return found

    def shown(self) -> dict[str, Any]:
        """Pictures of the report, uint8 [k, S, S, 3]: clean, attacked, and purified by each defence."""
        job = self.example()
        attacked = self.attacked(job, self.defences[0])[0][:SHOWN]
        pictures = {"clean": to_bytes(self.images[:SHOWN]), f"{job.attack} {job.eps:g}/255": to_bytes(attacked)}
        with torch.no_grad():
            for defence in self.defences:
                if defence.name != "none" and not defence.pad_resize:
                    pipeline = defence.pipeline(self.target, "random", self.seed("score"))
                    pictures[defence.name] = to_bytes(pipeline.purify(attacked))
        return pictures

    def example(self) -> Job:
        """The oblivious PGD that analyses and pictures are made of: PGD-20 at the largest eps of the run."""
        s = self.settings
        eps = max(s.eps or (4,))
        return Job("T0", "pgd", eps, "classifier", s.rung("T0")["images"], dict(steps=20, step_size=eps / 4 / 255))


def evaluate(
    settings: Settings, folder: str | Path, progress: Progress = lambda what, done, total: None
) -> dict[str, Any]:
    """Run or go on with an evaluation in ``folder``; returns what results.json holds.

    progress: called with (what, done, total).  Raises subclasses of ``impure_fast.Error``.
    """
    return Evaluation(settings, folder, progress).run()


def _processes() -> tuple[int, int]:
    """(rank, number of processes) as ``accelerate launch`` or torchrun set them."""
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=30))  # one may attack for hours when another is done
    return dist.get_rank(), dist.get_world_size()


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
