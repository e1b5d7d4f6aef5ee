"""Put patch pixels back into an image: unpatchify, then the optional 3x3 convolution over the whole image.

Values of a patch are ordered (row, column, channel), channel fastest (SPEC 2.9).
"""

import torch.nn.functional as F
from torch import Tensor


def unpatchify(patches: Tensor, rows: int, cols: int) -> Tensor:
    """patches: [N, rows*cols, p*p*C] in raster order, C = 3 -> [N, C, rows*p, cols*p]."""
    n, _, values = patches.shape
    p = round((values / 3) ** 0.5)
    return patches.view(n, rows, cols, p, p, 3).permute(0, 5, 1, 3, 2, 4).reshape(n, 3, rows * p, cols * p)


def patchify(images: Tensor, patch: int) -> Tensor:
    """The inverse: [N, C, H, W] -> [N, L, p*p*C] in raster order."""
    n, c, height, width = images.shape
    grid = images.view(n, c, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, patch * patch * c)


def patch_assemble(patches: Tensor, rows: int, cols: int, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """patches: [N, L, p*p*3] raster; weight: [3, 3, 3, 3] and bias [3], or None -> image [N, 3, H, W]."""
    image = unpatchify(patches, rows, cols)
    return image if weight is None else F.conv2d(image, weight, bias, padding=1)
