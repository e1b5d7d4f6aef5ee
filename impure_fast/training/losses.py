"""Losses of IMPure (SPEC section 5): pixel L1 in normalised units, guided feature L1 on mixed patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..draws import MixDraws
from ..errors import MissingFileError, needs_extra
from ..model import IMPure
from ..ops import patch_mix
from ..ops.patch_assemble import patchify

Guide = Callable[[Tensor], Mapping[str, Tensor]]


def _normalise_rows(x: Tensor) -> Tensor:
    return (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, keepdim=True) + 1e-6).sqrt()


def pixel_loss(
    model: IMPure, prediction: Tensor, images: Tensor, clean: Tensor | None = None, normalise_target: bool = False
) -> Tensor:
    """mean |prediction - target| over every pixel, in normalised units.

    prediction: from ``model.reconstruct``; images, clean: [N, 3, H, W] in [0, 1].  The target is ``clean``,
    or the input itself in pre-training; only the latter is changed by ``normalise_target``.
    """
    target = model.normalise(images if clean is None else clean)
    if not model.config.pixel_conv:
        target = patchify(target, model.config.patch_size)
    if normalise_target and clean is None:
        target = _normalise_rows(target)
    return (prediction - target).abs().mean()


def guided_loss(
    model: IMPure,
    prediction: Tensor,
    images: Tensor,
    clean: Tensor,
    guides: Sequence[Guide],
    weights: Sequence[Sequence[float]],
    mixing: Sequence[MixDraws] | None,
    normalise_target: bool = False,
) -> dict[str, Tensor]:
    """{"hgd0_loss": ..., ...}: weighted L1 between guide features of the mixed and of the clean image.

    guides: frozen networks, image in [0, 1] -> ordered features; weights: one number a guide and output;
    mixing: one MixDraws a guide, or None to show the guides the purified image alone.  Needs pixel_conv.
    """
    purified = model.unnormalise(prediction)
    if normalise_target:  # the authors blend with the row-normalised input when that option is on
        images = model.unnormalise(_normalise_rows(model.normalise(images)))
    terms: dict[str, Tensor] = {}
    for g, guide in enumerate(guides):
        shown = purified if mixing is None else patch_mix(purified, images, mixing[g], model.config.patch_size)
        with torch.no_grad():
            wanted = guide(clean)
        for o, (name, feature) in enumerate(guide(shown).items()):
            term = weights[g][o] * (feature - wanted[name]).abs().mean() / len(guides)
            key = f"hgd{o}_loss"
            terms[key] = terms[key] + term if key in terms else term
    return terms


# LPIPS's trunks are torchvision's ImageNet weights, which its package does not hold.
TRUNKS = {"alex": "AlexNet_Weights", "squeeze": "SqueezeNet1_1_Weights", "vgg": "VGG16_Weights"}


def lpips_network(trunk: str, random: bool = False) -> nn.Module:
    """LPIPS (arXiv 1801.03924), frozen: call it with two images [N, 3, H, W] in [0, 1] and ``normalize=True``.

    trunk: alex, squeeze or vgg; random: with random weights, for tests.
    Raises MissingExtraError without the package, MissingFileError where the trunk's weights cannot be fetched.
    """
    with needs_extra("LPIPS", "perceptual"):
        import lpips
        from torchvision.models import get_weight
    try:
        with torch.random.fork_rng(devices=[]):
            network = lpips.LPIPS(net=trunk, pnet_rand=random, verbose=False)
    except OSError as error:
        file = Path(get_weight(f"{TRUNKS[trunk]}.IMAGENET1K_V1").url).name
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise MissingFileError(
            f"LPIPS's trunk {trunk} could not be fetched ({error}); put torchvision's {file} into {folder}."
        ) from error
    return network.eval().requires_grad_(False)
