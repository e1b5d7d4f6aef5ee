"""The operators of the network, one file each: contract and plain-PyTorch reference."""

from .patch_assemble import patch_assemble
from .patch_mix import patch_mix
from .reconstruction_attention import reconstruction_attention

__all__ = ["patch_assemble", "patch_mix", "reconstruction_attention"]
