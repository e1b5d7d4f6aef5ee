"""Defences under test: the purifier in its variants, and baselines from PIL, torchvision and scikit-image.

All have the purifier's ``purify(images, seed=, streams=, ...)``, so ``PurifiedClassifier`` takes any of them.
"""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn

from ..draws import stream_ids
from ..errors import InputError, needs_extra
from ..model import IMPure
from ..philox import seed_or_fresh, uniform
from ..purify import PurifiedClassifier, to_bytes, to_float
from .targets import Target

# Counter word of the baselines' draws, beside those of philox.py.
RESIZE_PAD = 100


def _by_picture(function: Callable[[Image.Image], Image.Image]) -> Callable[[Tensor], Tensor]:
    """A function of 8-bit pictures as one of images in [0, 1]; no gradient passes."""

    def run(images: Tensor) -> Tensor:
        done = [np.asarray(function(Image.fromarray(image))) for image in to_bytes(images)]
        return to_float(np.stack(done)).to(images.device)

    return run


def _recompressed(picture: Image.Image, quality: int = 75) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def blur(images: Tensor, sigma: float = 1.0) -> Tensor:
    """Gaussian blur."""
    from torchvision.transforms.functional import gaussian_blur

    return gaussian_blur(images, [7, 7], [sigma, sigma])


def total_variation(images: Tensor, weight: float = 0.1) -> Tensor:
    """Chambolle's total variation denoising (scikit-image); no gradient passes."""
    with needs_extra('The baseline "tv"', "evaluate"):
        from skimage.restoration import denoise_tv_chambolle
    arrays = images.detach().cpu().numpy()
    done = [denoise_tv_chambolle(array, weight=weight, channel_axis=0) for array in arrays]
    return torch.from_numpy(np.stack(done)).to(images)


jpeg = _by_picture(_recompressed)
bits = _by_picture(lambda picture: Image.fromarray(np.asarray(picture) & 0xF0 | np.asarray(picture) >> 4))
median = _by_picture(lambda picture: picture.filter(ImageFilter.MedianFilter(3)))


def resize_pad(images: Tensor, u: Tensor) -> Tensor:
    """Random resize and zero padding (Xie et al., 2018): sides of 310/331 to 1 of the picture's, at a random place.

    u: [N, 3] uniforms in [0, 1): size, top, left.  Xie's canvas is larger than the picture; here it is the same, so
    that every classifier takes it.
    """
    side = images.shape[-1]
    least = -(-side * 310 // 331)
    done = []
    for image, (size, top, left) in zip(images, u.tolist(), strict=True):
        s = least + int(size * (side - least))
        spare = side - s + 1
        t, b = int(top * spare), int(left * spare)
        small = F.interpolate(image[None], (s, s), mode="bilinear")
        done.append(F.pad(small, [b, side - s - b, t, side - s - t]))
    return torch.cat(done)


class Baseline(nn.Module):
    """A function of images and uniforms [N, 3] in the purifier's place."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def purify(
        self,
        images: Tensor,
        *,
        seed: int | None = None,
        streams: Tensor | Sequence[int] | None = None,
        clamp: bool = True,
        **steps: Any,
    ) -> Tensor:
        """images: [N, 3, H, W] in [0, 1]; seed and streams as in ``IMPure.purify``."""
        u = uniform(seed_or_fresh(seed), stream_ids(streams, len(images), "cpu"), RESIZE_PAD, 3)
        images = self.function(images, u)
        return images.clamp(0, 1) if clamp else images


BASELINES: dict[str, Callable[[], Baseline]] = {
    "none": lambda: Baseline(lambda images, u: images),
    "jpeg75": lambda: Baseline(lambda images, u: jpeg(images)),
    "bits4": lambda: Baseline(lambda images, u: bits(images)),
    "blur1": lambda: Baseline(lambda images, u: blur(images)),
    "median3": lambda: Baseline(lambda images, u: median(images)),
    "tv0.1": lambda: Baseline(lambda images, u: total_variation(images)),
    "resize-pad": lambda: Baseline(resize_pad),
}


class Padded(nn.Module):
    """A purifier of pictures padded with black, right and bottom, to ``side``, and cropped back (SPEC 7)."""

    def __init__(self, purifier: nn.Module, side: int) -> None:
        super().__init__()
        self.purifier, self.side = purifier, side

    def purify(self, images: Tensor, **options: Any) -> Tensor:
        """As the purifier's own."""
        height, width = images.shape[2:]
        purify: Any = self.purifier.purify
        purified = purify(F.pad(images, [0, self.side - width, 0, self.side - height]), **options)
        return purified[:, :, :height, :width]


@dataclasses.dataclass
class Defence:
    """A named purifier or baseline in front of a target.  options: ``image_step``, ``feature_step``."""

    name: str
    purifier: nn.Module
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    pad_resize: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """Masking of an IMPure network, for the rows; {} for a baseline."""
        if not isinstance(self.purifier, IMPure):
            return {}
        c = dataclasses.replace(self.purifier.config, **{k: v for k, v in self.options.items() if v is not None})
        names = ("num_chunks", "image_mask", "feature_mask", "image_step", "feature_step", "random_order")
        return {name: getattr(c, name) for name in names}

    def pipeline(self, target: Target, mode: str, seed: int) -> PurifiedClassifier:
        """Defence and classifier, images in [0, 1] -> logits; mode: "random" or "deterministic"."""
        purifier: nn.Module = Padded(self.purifier, target.pad) if target.pad and self.config else self.purifier
        model = target.model
        if self.pad_resize:
            from torchvision.transforms.v2 import Lambda

            model = nn.Sequential(Lambda(target.pad_and_resize), model)
        unit: dict[str, Any] = dict(mean=(0, 0, 0), std=(1, 1, 1))
        pipeline = PurifiedClassifier(model, purifier, mode=mode, seed=seed, **unit, **self.options)
        return pipeline.to(target.device).eval()

    def changed(self, name: str, pad_resize: bool | None = None, **fields: Any) -> Defence:
        """This defence with other fields of the purifier's config (the weights are shared) or pad-and-resize."""
        purifier = self.purifier
        if fields:
            assert isinstance(purifier, IMPure)
            config = dataclasses.replace(purifier.config, **fields)
            purifier = copy.copy(purifier)
            purifier.config = config
        pad_resize = self.pad_resize if pad_resize is None else pad_resize
        return dataclasses.replace(self, name=name, purifier=purifier, pad_resize=pad_resize)


def baseline(name: str) -> Defence:
    """A baseline by name; raises InputError for an unknown one."""
    if name not in BASELINES:
        raise InputError(f"There is no baseline {name!r}; choose from {', '.join(BASELINES)}.")
    return Defence(name, BASELINES[name]())
