"""Attack a purified classifier with torchattacks and with ART, without and with knowledge of the purifier.

python examples/attack_libraries.py --views 5 --steps 10 --eot 2     (minutes on a CPU)

All three attacks are PGD at 4/255; what they leave is scored without and with the purifier, under fresh draws.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
import torchattacks
from art.attacks.evasion import ProjectedGradientDescentPyTorch
from art.estimators.classification import PyTorchClassifier

import impure_fast as imp
from impure_fast.classifiers import LITE0_MEAN, LITE0_STD, Normalised, efficientnet_lite
from impure_fast.demo import photograph_views
from impure_fast.integrations.art import ARTPurifier
from impure_fast.integrations.torchattacks import Attackable

parser = argparse.ArgumentParser()
parser.add_argument("--views", type=int, default=5, help="of five photographs")
parser.add_argument("--side", type=int, default=224, help="of a picture, in pixels")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--eot", type=int, default=2, help="draws that a gradient step averages")
options = parser.parse_args()

network, purifier = efficientnet_lite(0), imp.load("impure_tiny")
bare = Normalised(network, LITE0_MEAN, LITE0_STD).eval()  # images in [0, 1] -> logits, as torchattacks wants them
pipeline = imp.PurifiedClassifier(network, purifier, mean=LITE0_MEAN, std=LITE0_STD).eval()
views = photograph_views(bare, options.views)
images = F.interpolate(views.images, options.side, mode="bilinear", antialias=True)
labels = torch.tensor([right[0] for right in views.right])
eps, step = 4 / 255, 1 / 255

# The adapter adds nothing but eval mode and the expectation over draws; gradients run through the purifier.
knowing = Attackable(pipeline, eot=options.eot)

# ART normalises after its preprocessors, so mean and std belong in ``preprocessing`` alone.
mean, std = (np.array(x, np.float32).reshape(3, 1, 1) for x in (LITE0_MEAN, LITE0_STD))
estimator = PyTorchClassifier(
    network,
    torch.nn.CrossEntropyLoss(),
    input_shape=tuple(images.shape[1:]),
    nb_classes=1000,
    clip_values=(0, 1),
    preprocessing=(mean, std),
    preprocessing_defences=ARTPurifier(purifier, device_type="cpu"),
    device_type="cpu",
)
art_pgd = ProjectedGradientDescentPyTorch(estimator, eps=eps, eps_step=step, max_iter=options.steps, verbose=False)

attacked = {
    "none": images,
    "torchattacks, knows the classifier": torchattacks.PGD(bare, eps, step, options.steps)(images, labels),
    "torchattacks, knows the purifier too": torchattacks.PGD(knowing, eps, step, options.steps)(images, labels),
    "ART, knows the purifier too": torch.from_numpy(art_pgd.generate(images.numpy(), labels.numpy())),
}
for name, x in attacked.items():
    with torch.no_grad():
        scores = [views.accuracy(model(x).argmax(dim=1)) for model in (bare, pipeline)]
    print(f"{name:40} bare {scores[0]:5.1f} %   purified {scores[1]:5.1f} %")
