"""The authors' network (GitHub NoWindButRain/IMPure) as a rival, from a checkout of theirs; their code is not here.

Their class, unchanged, with our weights, called as their programs call it: eval mode, no gradients,
``model(images)[1]`` (the loss is part of the call), under autocast where half precision is asked for.  timm's blocks
are those installed.  Their import wants webdataset, which the network does not use: an empty module stands in for it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from impure_fast import Draws, IMPure
from impure_fast.errors import MissingFileError

from .registry import weights

MODULE = "recon_model.MAE.RCMMFFDMAE"
NAMES = {512: "rcmmff_idmae_vit_base_patch16_dec512d8b", 384: "rcmmff_idmae_vit_base_patch16_dec384d8b"}
TABLES = {"pos_embed", "decoder_pos_embed", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"}


def check(checkout: str | Path) -> None:
    """Raise MissingFileError unless ``checkout`` holds their network."""
    if not (Path(checkout) / (MODULE.replace(".", "/") + ".py")).is_file():
        raise MissingFileError(f"{checkout} is no checkout of the authors' repository: {MODULE} is not in it.")


def load(checkout: str | Path, model: IMPure) -> nn.Module:
    """Their network of ``model``'s shape, weights, dtype and device: images -> (loss, prediction, losses).

    Raises MissingFileError where ``checkout`` holds no such network.
    """
    check(checkout)
    stand_in = sys.modules.setdefault("webdataset", ModuleType("webdataset"))
    with mock.patch.object(sys, "path", [str(Path(checkout).resolve()), *sys.path]):
        module = import_module(MODULE)
    if stand_in.__spec__ is None:
        del sys.modules["webdataset"]
    c = model.config
    options = dict(use_conv=c.pixel_conv, pre_norm=True, chunks=c.num_chunks, random_mask=c.random_order)
    options |= dict(feature_mask=c.feature_mask, img_mask=c.image_mask)
    theirs = getattr(module, NAMES[c.decoder_embed_dim])(**options)
    missing, unexpected = theirs.load_state_dict(model.state_dict(), strict=False)
    assert set(missing) <= TABLES and not unexpected, f"their weights are not ours: {missing}, {unexpected}"
    return theirs.to(model.cls_token).eval()


@contextlib.contextmanager
def drawn(draws: Draws) -> Iterator[None]:
    """Within the block their network draws ``draws`` (evaluation, released masks), for a comparison."""
    assert draws.image_noise is not None and draws.feature_noise is not None
    noises = iter([draws.image_noise, *draws.feature_noise.unbind(1)])
    ranks = draws.restore.float()  # uniforms whose argsort is the order
    with (
        mock.patch.object(torch, "rand", return_value=ranks),
        mock.patch.object(torch, "randn_like", lambda x: next(noises).to(x.dtype)),
    ):
        yield


class Authors:
    """Provider of the released network: images [N, 3, H, W] -> prediction in the network's units."""

    def __init__(self, checkout: str, preset: str) -> None:
        check(checkout)
        self.checkout, self.preset = checkout, preset
        self.models: dict[tuple[torch.dtype, str], Any] = {}

    @property
    def note(self) -> str:
        """What a row must tell of the surroundings."""
        timm, layers = import_module("timm"), import_module("timm.layers")
        return f"timm {timm.__version__}, fused attention {bool(layers.use_fused_attn())}"

    def __call__(self, images: Tensor) -> Tensor:
        half = images.dtype in (torch.bfloat16, torch.float16)
        with torch.no_grad(), torch.autocast(images.device.type, images.dtype, enabled=half):
            return self._model(images)(images.float() if half else images)[1].to(images.dtype)

    def check(self, images: Tensor) -> Tensor:
        """The same with our draws in place of theirs."""
        ours = weights(self.preset, images.dtype, str(images.device))
        with drawn(Draws.sample(ours.config, images.shape, 0, device=images.device)):
            return self(images)

    def _model(self, images: Tensor) -> Any:
        """Their network with our weights; fp32 under autocast, as they hold it."""
        dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        key = (dtype, str(images.device))
        if key not in self.models:
            self.models = {key: load(self.checkout, weights(self.preset, *key))}
        return self.models[key]
