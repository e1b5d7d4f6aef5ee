"""The operators of the network, one file each: contract, plain-PyTorch reference, and who else can run it."""

from .noise import noise
from .normalise_rows import normalise_rows
from .order import order
from .patch_assemble import patch_assemble
from .patch_mask import patch_mask
from .patch_mix import patch_mix
from .reconstruction_attention import reconstruction_attention

__all__ = [
    "noise",
    "normalise_rows",
    "order",
    "patch_assemble",
    "patch_mask",
    "patch_mix",
    "reconstruction_attention",
]
