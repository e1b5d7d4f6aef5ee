"""The demonstration: photographs, a real ImageNet classifier, an attack on it, and the purifier in front.

The attacker knows the classifier and not the purifier (a transfer attack): this shows that the purifier
works, never that a system is safe.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from . import __version__, zoo
from .attacks import pgd
from .classifiers import LITE0_MEAN, LITE0_SIZE, LITE0_STD, Normalised, efficientnet_lite
from .engine import Engine
from .errors import InputError, needs_extra
from .evaluation.analysis import psnr
from .evaluation.defences import blur, jpeg
from .images import PackedImages, random_view, write_atomically, write_text
from .model import IMPure
from .ops._dispatch import last_backends
from .purify import PurifiedClassifier, to_bytes, to_float

EPS = (4, 8)  # in 1/255
WHITE_BOX_EPS = (2, 4)
SEED = 0
BATCH = 20

# Photographs in scikit-image's wheel, with the ImageNet classes that name them rightly.
PHOTOGRAPHS = {
    "chelsea.png": (281, 282, 285),  # tabby, tiger cat, Egyptian cat
    "coffee.png": (967, 504),  # espresso, coffee mug
    "camera.png": (872,),  # tripod
    "motorcycle_left.png": (665, 670),  # moped, motor scooter
    "rocket.jpg": (657, 744),  # missile, projectile
}
NOTICE = "This attacker does not know the purifier; one who does, and differentiates through it, wins."


@dataclass
class Views:
    """Pictures to attack: [N, 3, S, S] in [0, 1], and for each the classes that count as right."""

    images: Tensor
    right: list[tuple[int, ...]]
    names: list[str]

    def take(self, which: Sequence[int]) -> Views:
        """The views at these places."""
        return Views(self.images[which], [self.right[i] for i in which], [self.names[i] for i in which])

    def accuracy(self, decisions: Tensor) -> float:
        """Percent of the decisions that are among the right classes."""
        hits = [d in right for d, right in zip(decisions.tolist(), self.right, strict=True)]
        return 100 * sum(hits) / len(hits)


def decide(classifier: nn.Module, images: Tensor) -> Tensor:
    """Logits [N, classes], batch by batch and without gradients."""
    with torch.no_grad():
        return torch.cat([classifier(part) for part in images.split(BATCH)])


def photograph_files() -> list[Path]:
    """The files of PHOTOGRAPHS.  Raises MissingExtraError."""
    with needs_extra("The demo's photographs", "demo"):
        return [Path(str(files("skimage"))) / "data" / name for name in PHOTOGRAPHS]


def photograph_views(classifier: nn.Module, count: int, seed: int = SEED) -> Views:
    """``count`` random views of PHOTOGRAPHS in equal shares: crop, scale, flip; only views that the classifier
    names rightly.  What purification does to a view has no say."""
    images, right, names = [], [], []
    share = -(-count // len(PHOTOGRAPHS))
    for i, (path, classes) in enumerate(zip(photograph_files(), PHOTOGRAPHS.values(), strict=True)):
        photograph = np.asarray(Image.open(path).convert("RGB"))
        rng = np.random.default_rng([seed, i])
        found = 0
        while found < share:
            views = to_float(np.stack([random_view(photograph, LITE0_SIZE, rng) for _ in range(share)]))
            for view, decision in zip(views, decide(classifier, views).argmax(dim=1).tolist(), strict=True):
                if decision in classes and found < share:
                    images.append(view)
                    right.append(classes)
                    names.append(path.stem)
                    found += 1
    return Views(torch.stack(images)[:count], right[:count], names[:count])


def packed_views(path: str | Path) -> Views:
    """Every labelled picture of a packed file, scaled to 224 x 224 (bicubic), right or wrong.

    Raises MissingFileError or InputError.
    """
    packed = PackedImages(path)
    which = [i for i in range(len(packed)) if packed.labels[i] >= 0]
    if not which:
        raise InputError(f"{path} holds no labelled picture; `impure-fast data` labels those in class folders.")
    size = (LITE0_SIZE, LITE0_SIZE)
    arrays = [np.asarray(Image.fromarray(packed[i]).resize(size, Image.Resampling.BICUBIC)) for i in which]
    return Views(to_float(np.stack(arrays)), [(int(packed.labels[i]),) for i in which], [str(i) for i in which])


def run(
    json_path: str | Path | None = None,
    picture_path: str | Path | None = "demo.png",
    model: str = "impure_tiny",
    views: int = 40,
    data: str | Path | None = None,
    attack_steps: int = 20,
    white_box: int = 0,
    image_step: int | None = None,
    feature_step: int | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Attack, purify, classify; returns the figures (accuracies in percent) and writes them and the picture.

    views: how many views of scikit-image's photographs; data: a packed file to use in their place, whole.
    attack_steps: PGD steps (torchattacks; step 2/255 at 8/255 and 1/255 at 4/255).
    white_box: how many of the pictures (no more than there are) are also attacked by somebody who knows the purifier:
        the same PGD with exact gradients through purifier and classifier, fresh draws at every step and again when
        scored (slow).
    psnr is that of purified against clean, unattacked pictures.  Raises MissingExtraError, MissingFileError or
    InputError.
    """
    if picture_path:
        with needs_extra("The demo's picture", "demo"):  # now rather than after the attacks
            import_module("matplotlib"), import_module("timm")
    purifier = zoo.load(model)
    classifier = Normalised(efficientnet_lite(0), LITE0_MEAN, LITE0_STD).eval()
    chosen = packed_views(data) if data else photograph_views(classifier, views)
    clean_logits = decide(classifier, chosen.images)
    # The attack moves away from the true label; of several right names, from the one the classifier chose.
    labels = torch.tensor(
        [
            d if d in right else right[0]
            for d, right in zip(clean_logits.argmax(dim=1).tolist(), chosen.right, strict=True)
        ]
    )
    attacked = {"clean": chosen.images}
    for eps in EPS:
        progress(f"attacking {len(labels)} pictures: PGD-{attack_steps}, {eps}/255")
        options: dict[str, Any] = dict(eps=eps / 255, steps=attack_steps, step_size=eps / 4 / 255, seed=SEED)
        attacked[str(eps)] = pgd(classifier, chosen.images, labels, **options)

    progress("purifying")
    engine = Engine(purifier, precision="fp32")
    masking: dict[str, Any] = dict(image_step=image_step, feature_step=feature_step)
    engine.warmup()
    began = time.perf_counter()
    purified = {name: engine.purify(images, seed=SEED, **masking) for name, images in attacked.items()}
    rate = len(labels) * len(attacked) / (time.perf_counter() - began)

    def accuracies(defence: Callable[[str], Tensor]) -> dict[str, float]:
        logits = {name: decide(classifier, defence(name)) for name in attacked}
        return {name: round(chosen.accuracy(x.argmax(dim=1)), 2) for name, x in logits.items()}

    none, ours = accuracies(attacked.__getitem__), accuracies(purified.__getitem__)
    # Evenly spread, so that every photograph has its share.
    white_box = min(white_box, len(labels))
    known = [i * len(labels) // white_box for i in range(white_box)]
    results = {
        "n": len(labels),
        "classifier": "tf_efficientnet_lite0",
        "attack": f"PGD-{attack_steps}",
        "pictures": Path(data).stem if data else "scikit-image",
        "model": model,
        "image_step": purifier.config.image_step if image_step is None else image_step,
        "feature_step": purifier.config.feature_step if feature_step is None else feature_step,
        "clean": none["clean"],
        "attacked": {name: none[name] for name in map(str, EPS)},
        "purified_clean": ours["clean"],
        "purified": {name: ours[name] for name in map(str, EPS)},
        "baselines": {
            "jpeg75": accuracies(lambda name: jpeg(attacked[name])),
            "blur": accuracies(lambda name: blur(attacked[name])),
        },
        "white_box": knowing(classifier, purifier, chosen.take(known), labels[known], attack_steps, masking, progress),
        "psnr": round(psnr(purified["clean"], chosen.images), 2),
        "images_per_second": round(rate, 2),
        "precision": engine.precision,
        "backend": last_backends()["reconstruction_attention"],
        "seed": SEED,
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": processor_name(), "threads": torch.get_num_threads()},
        "versions": {
            "impure_fast": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "timm", "torchattacks")},
        },
    }
    if json_path:
        write_text(json_path, json.dumps(results, indent=2) + "\n")
    if picture_path:
        first = [chosen.names.index(name) for name in dict.fromkeys(chosen.names)][: len(PHOTOGRAPHS)]
        draw(picture_path, classifier, chosen.take(first), attacked["8"][first], purified["8"][first])
    return results


def knowing(
    classifier: Normalised,
    purifier: IMPure,
    views: Views,
    labels: Tensor,
    steps: int,
    masking: dict[str, Any],
    progress: Callable[[str], None],
) -> dict[str, float]:
    """Accuracy in percent against PGD through purifier and classifier, by eps in 1/255; {} without views."""
    if not views.right:
        return {}
    unit: dict[str, Any] = dict(mean=LITE0_MEAN, std=LITE0_STD)
    pipeline = PurifiedClassifier(classifier.network, purifier, seed=SEED + 1, **unit, **masking).eval()
    accuracy: dict[str, float] = {"n": len(labels)}
    for eps in WHITE_BOX_EPS:
        progress(f"attacking {len(labels)} pictures through the purifier: PGD-{steps}, {eps}/255")
        options: dict[str, Any] = dict(eps=eps / 255, steps=steps, step_size=eps / 4 / 255, seed=SEED, batch=4)
        attacked = pgd(pipeline, views.images, labels, **options)
        accuracy[str(eps)] = round(views.accuracy(decide(pipeline, attacked).argmax(dim=1)), 2)
    return accuracy


def processor_name() -> str:
    """The processor's model name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def difference(images: Tensor, clean: Tensor) -> Tensor:
    """The difference, ten times, around middle grey."""
    return ((images - clean) * 10 + 0.5).clamp(0, 1)


def draw(path: str | Path, classifier: nn.Module, views: Views, adversarial: Tensor, purified: Tensor) -> None:
    """One row a picture: clean | adversarial | purified | perturbation x 10, the classifier's word under each."""
    from matplotlib.figure import Figure
    from timm.data import ImageNetInfo

    names, clean = ImageNetInfo(), views.images
    columns: Sequence[tuple[str, Tensor]] = (
        ("clean", clean),
        ("adversarial, PGD at 8/255", adversarial),
        ("purified", purified),
        ("perturbation x 10", difference(adversarial, clean)),
    )
    figure = Figure(figsize=(9.6, 2.7 * len(clean)), layout="constrained")
    axes = figure.subplots(len(clean), len(columns), squeeze=False)
    for c, (title, images) in enumerate(columns):
        confidences, decisions = decide(classifier, images).softmax(dim=1).max(dim=1)
        for r, image in enumerate(to_bytes(images)):
            axis = axes[r][c]
            axis.imshow(image)
            axis.set_xticks([])
            axis.set_yticks([])
            if r == 0:
                axis.set_title(title, fontsize=11)
            if title != columns[-1][0]:
                label = names.index_to_description(int(decisions[r])).split(",")[0]
                colour = "#1a7f37" if int(decisions[r]) in views.right[r] else "#cf222e"
                axis.set_xlabel(f"{label}  {100 * float(confidences[r]):.0f} %", color=colour, fontsize=11)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=80, format="png"))


def table(results: dict[str, Any]) -> Any:
    """The figures as a rich table."""
    from rich.table import Table

    title = f"{results['n']} pictures ({results['pictures']}), {results['classifier']}, {results['attack']}"
    if known := results["white_box"]:
        note = ", ".join(f"{known[str(eps)]:.0f} % at {eps}/255" for eps in WHITE_BOX_EPS)
        knowing = f"An attacker who knows the purifier ({known['n']} pictures) leaves {note}."
    else:
        knowing = NOTICE
    caption = (
        f"accuracy in %; PSNR purified/clean {results['psnr']:.1f} dB; {results['images_per_second']:.1f} images/s "
        f"({results['backend']}, {results['machine']['threads']} threads).\n{knowing}"
    )
    out = Table(title=title, caption=caption, caption_justify="left")
    out.add_column("defence")
    for name in ("clean", *(f"attacked {eps}/255" for eps in EPS)):
        out.add_column(name, justify="right")
    rows = {
        "none": {"clean": results["clean"], **results["attacked"]},
        "JPEG, quality 75": results["baselines"]["jpeg75"],
        "Gaussian blur, sigma 1": results["baselines"]["blur"],
        results["model"]: {"clean": results["purified_clean"], **results["purified"]},
    }
    for name, row in rows.items():
        out.add_row(name, *(f"{row[key]:.1f}" for key in ("clean", *map(str, EPS))))
    return out
