"""Purify a video frame by frame, in order and in bounded memory.

python examples/video.py OUT.webp [IN.gif]     without IN: a window that moves over a photograph

Pillow reads and writes the frames here (GIF, animated WebP and PNG); ``Engine.stream`` takes any iterable of
[3, H, W] tensors, so a camera or a decoder of yours fits in its place.
"""

import sys
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageSequence
from skimage import data
from torch import Tensor

import impure_fast as imp


def read(path: str) -> Iterator[Tensor]:
    """Frames of a file, one at a time: uint8 [3, H, W]."""
    with Image.open(path) as file:
        for frame in ImageSequence.Iterator(file):
            yield torch.from_numpy(np.array(frame.convert("RGB"))).permute(2, 0, 1)


def moving_window() -> Iterator[Tensor]:
    """Sixteen frames of a photograph that moves to the left."""
    photograph = torch.from_numpy(data.coffee()).permute(2, 0, 1)
    for left in range(0, 128, 8):
        yield photograph[:, 100:228, left : left + 192]


frames = read(sys.argv[2]) if sys.argv[2:] else moving_window()
engine = imp.Engine(imp.load("impure_tiny"))
purified = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in engine.stream(frames, seed=0)]
purified[0].save(sys.argv[1], save_all=True, append_images=purified[1:], lossless=True)
stats = engine.stats()
print(f"{stats['images']} frames, {stats['images_per_second']:.1f} a second, p99 {stats['p99_ms']:.0f} ms")
