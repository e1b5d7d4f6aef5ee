"""A purifier in front of a timm classifier, on a photograph.

python examples/timm_classifier.py             EfficientNet-Lite0, whose weights come with a Python package
python examples/timm_classifier.py resnet50    any other name of timm; it fetches the weights
"""

import sys

import timm
import torch
from skimage import data
from timm.data import ImageNetInfo

import impure_fast as imp
from impure_fast.classifiers import efficientnet_lite

classifier = timm.create_model(sys.argv[1], pretrained=True).eval() if sys.argv[1:] else efficientnet_lite(0)
cfg = classifier.pretrained_cfg
model = imp.PurifiedClassifier(classifier, imp.load("impure_tiny"), mean=cfg["mean"], std=cfg["std"])
image = torch.from_numpy(data.chelsea()[:224, 75:299]).permute(2, 0, 1)[None] / 255  # [1, 3, 224, 224] in [0, 1]
with torch.no_grad():
    for name, logits in (("as it is", model.classify(image)), ("purified", model(image))):
        confidence, index = logits.softmax(dim=1).max(dim=1)
        print(f"{name}: {ImageNetInfo().index_to_description(int(index))}, {100 * float(confidence):.0f} %")
