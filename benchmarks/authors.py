"""The authors' code (GitHub NoWindButRain/IMPure) as a rival: their class, unchanged, with our weights.

Their import fails without webdataset, which their network does not need: an empty module stands in for it.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from impure_fast import Draws, IMPure
from impure_fast.errors import MissingFileError

NAMES = {512: "rcmmff_idmae_vit_base_patch16_dec512d8b", 384: "rcmmff_idmae_vit_base_patch16_dec384d8b"}


def load(folder: str | Path, model: IMPure) -> nn.Module:
    """Their network of ``model``'s shape and weights, eval mode: images [N, 3, H, W] -> (loss, prediction, losses).

    folder: a checkout of their repository.  Raises MissingFileError where it is none.
    """
    if not (Path(folder) / "recon_model" / "MAE" / "RCMMFFDMAE.py").exists():
        raise MissingFileError(f"{folder} is no checkout of NoWindButRain/IMPure (recon_model/MAE/RCMMFFDMAE.py).")
    stand_in = sys.modules.setdefault("webdataset", ModuleType("webdataset"))
    with mock.patch.object(sys, "path", [str(folder), *sys.path]):
        module: Any = importlib.import_module("recon_model.MAE.RCMMFFDMAE")
    if stand_in.__spec__ is None:
        del sys.modules["webdataset"]
    c = model.config
    options = dict(use_conv=True, pre_norm=True, chunks=c.num_chunks)
    theirs = getattr(module, NAMES[c.decoder_embed_dim])(
        feature_mask=c.feature_mask, img_mask=c.image_mask, random_mask=c.random_order, **options
    )
    missing, unexpected = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and all("pos_embed" in name or "alphas" in name for name in missing), (missing, unexpected)
    return theirs.eval()


@contextlib.contextmanager
def drawn(draws: Draws) -> Iterator[None]:
    """Within the block their network's draws are ``draws`` (evaluation, released masks), for a comparison."""
    assert draws.image_noise is not None and draws.feature_noise is not None
    uniforms = draws.restore.float() / draws.order.shape[1]
    noises = iter((draws.image_noise, *draws.feature_noise.unbind(1)))

    def like(x: Tensor, **_: Any) -> Tensor:
        noise = next(noises)
        assert noise.shape == x.shape, (noise.shape, x.shape)
        return noise.to(x.dtype)

    with mock.patch.object(torch, "rand", return_value=uniforms), mock.patch.object(torch, "randn_like", like):
        yield
