"""Mix purified and input patches before a guide network (SPEC section 5).

About 1/c of the patches (shuffled positions e_r .. e_{r+1}-1 of edges e = round(linspace(0, L-1, c+1)))
show the input, all others the purified image.
"""

import torch
from torch import Tensor

from ..draws import MixDraws


def mix_mask(draws: MixDraws, rows: int, cols: int, patch: int) -> Tensor:
    """1 where the purified pixel is shown, 0 where the input is: float32 [N, 1, rows*p, cols*p]."""
    n, tokens = draws.order.shape
    edges = torch.linspace(0, tokens - 1, draws.chunks + 1).round().long().tolist()
    shuffled = torch.ones(n, tokens, device=draws.order.device)
    shuffled[:, edges[draws.index] : edges[draws.index + 1]] = 0
    raster = torch.empty_like(shuffled).scatter_(1, draws.order, shuffled)
    return raster.view(n, 1, rows, cols).repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def patch_mix(purified: Tensor, images: Tensor, draws: MixDraws, patch: int) -> Tensor:
    """purified, images: [N, C, H, W] -> mixed [N, C, H, W]; gradients reach both."""
    rows, cols = images.shape[2] // patch, images.shape[3] // patch
    mask = mix_mask(draws, rows, cols, patch)
    return images * (1 - mask) + purified * mask
