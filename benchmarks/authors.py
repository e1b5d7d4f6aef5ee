"""The authors' network as a provider, from a checkout of their repository; none of their code is here.

Theirs is called as their programs call it: eval mode, no gradients, ``model(images)[1]`` (the loss is part of the
call), under autocast where half precision is asked for.  Before it is timed its draws are replaced by ours and its
result is compared with the reference under equal weights.

What is put in place of the parts that do not import beside today's torch and timm, or are not installed:
``dataset.transforms`` (names only; the network never calls them).  timm's ``Block`` and ``PatchEmbed`` are those
installed; timm's version and whether its attention is fused stand in the row.
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
from torch import Tensor

from impure_fast import Draws
from impure_fast.errors import MissingFileError

from .registry import weights

MODULE = "recon_model.MAE.RCMMFFDMAE"


class Authors:
    """Provider of the released network: images [N, 3, H, W] -> prediction in the network's units."""

    def __init__(self, checkout: str, preset: str) -> None:
        if not (Path(checkout) / (MODULE.replace(".", "/") + ".py")).is_file():
            raise MissingFileError(f"{checkout} is no checkout of the authors' repository: {MODULE} is not in it.")
        self.preset, self.models, self.module = preset, {}, _import(checkout)  # type: ignore[var-annotated]

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
        draws = Draws.sample(ours.config, images.shape, 0, device=images.device)
        assert draws.image_noise is not None and draws.feature_noise is not None
        noises = iter([draws.image_noise, *draws.feature_noise.unbind(1)])
        ranks = draws.restore.float()  # uniforms whose argsort is the order
        with (
            mock.patch.object(torch, "rand", return_value=ranks),
            mock.patch.object(torch, "randn_like", lambda x: next(noises).to(x.dtype)),
        ):
            return self(images)

    def _model(self, images: Tensor) -> Any:
        """Their network with our weights; fp32 under autocast, as they hold it."""
        dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        key = (dtype, str(images.device))
        if key not in self.models:
            options = dict(use_conv=True, pre_norm=True, chunks=4, feature_mask="noise", img_mask="noise")
            model = getattr(self.module, "rcmmff_idmae_vit_base_patch16_dec512d8b")(**options)  # noqa: B009
            state = weights(self.preset, dtype, str(images.device)).state_dict()
            missing, unexpected = model.load_state_dict(state, strict=False)
            tables = {"pos_embed", "decoder_pos_embed", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"}
            assert set(missing) <= tables and not unexpected, f"their weights are not ours: {missing}, {unexpected}"
            self.models = {key: model.to(images.device, dtype).eval()}
        return self.models[key]


def _import(checkout: str) -> ModuleType:
    with _stubs(), mock.patch.object(sys, "path", [str(Path(checkout).resolve()), *sys.path]):
        return import_module(MODULE)


@contextlib.contextmanager
def _stubs() -> Iterator[None]:
    transforms = ModuleType("dataset.transforms")
    for name in ("RandomCrop", "Pad", "RandomApply", "Compose", "Resize"):
        setattr(transforms, name, object)
    with mock.patch.dict(sys.modules, {"dataset": ModuleType("dataset"), "dataset.transforms": transforms}):
        yield
