"""A classifier of your own behind the purifier: a head for five photographs on the features of EfficientNet-Lite0.

python examples/own_classifier.py
impure-fast evaluate --classifier own_classifier:factory --data pictures.npz     # from this folder

All that the purifier asks of a classifier is its normalisation; the evaluation wants it inside, images in [0, 1].
These features guided the training of impure_tiny: on others expect less.
"""

import numpy as np
import torch
import torch.nn.functional as F
from skimage import data
from torch import Tensor, nn

import impure_fast as imp
from impure_fast.attacks import pgd
from impure_fast.classifiers import LITE0_MEAN, LITE0_STD, Normalised, efficientnet_lite
from impure_fast.images import random_view
from impure_fast.purify import to_float

SIDE = 128


def views(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """``count`` random views of each photograph, [5 * count, 3, 128, 128] in [0, 1], and which it is, [5 * count]."""
    photographs = (data.chelsea(), data.coffee(), data.rocket(), data.stereo_motorcycle()[0], data.astronaut())
    rng = np.random.default_rng(seed)
    images = np.stack([random_view(photograph, SIDE, rng) for photograph in photographs for _ in range(count)])
    return to_float(images), torch.arange(len(photographs)).repeat_interleave(count)


def factory() -> Normalised:
    """The classifier, its head trained on the spot: images in [0, 1] -> logits [N, 5]."""
    body = efficientnet_lite(0)  # frozen
    body.reset_classifier(0)
    head = nn.Linear(body.num_features, 5)
    classifier = Normalised(nn.Sequential(body, head), LITE0_MEAN, LITE0_STD).eval()
    images, labels = views(8, seed=0)
    with torch.no_grad():
        features = body((images - classifier.mean) / classifier.std)
    optimiser = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(100):
        optimiser.zero_grad()
        F.cross_entropy(head(features), labels).backward()
        optimiser.step()
    classifier.side = SIDE  # to which the evaluation scales its pictures
    return classifier


if __name__ == "__main__":
    classifier = factory()
    purifier = imp.load("impure_tiny")
    pipeline = imp.PurifiedClassifier(classifier.network, purifier, mean=LITE0_MEAN, std=LITE0_STD).eval()
    images, labels = views(2, seed=1)
    attacked = pgd(classifier, images, labels, eps=4 / 255, steps=5, step_size=2 / 255, seed=0)
    for name, x in (("clean", images), ("attacked, 4/255", attacked)):
        with torch.no_grad():
            right = [(model(x).argmax(dim=1) == labels).float().mean() for model in (classifier, pipeline)]
        print(f"{name:16} bare {100 * right[0]:5.1f} %   purified {100 * right[1]:5.1f} %")
