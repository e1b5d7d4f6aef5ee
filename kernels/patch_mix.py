"""Mix two images patch by patch: those of some shuffled places show the input, all others the purified image.

One program makes 1024 pixels of one channel plane, 8 a thread.  Of the two images each pixel is read from one only:
2 elements moved, and one flag a patch; no pixel-sized mask.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _place(shown_ptr, channels, height, width, PATCH: tl.constexpr, BLOCK: tl.constexpr):
    """This program's image, channel, pixels (flat, row, column), which of them exist, and which show the input."""
    pixels = height * width
    blocks = tl.cdiv(pixels, BLOCK)
    plane = tl.program_id(0) // blocks
    image, channel = (plane // channels).to(tl.int64), (plane % channels).to(tl.int64)
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    y, x = pixel // width, pixel % width
    cols = width // PATCH
    flag = shown_ptr + image * (height // PATCH * cols) + y // PATCH * cols + x // PATCH
    mask = pixel < pixels
    return image, channel, pixel, y, x, mask, tl.load(flag, mask, 0) != 0


@triton.jit
def _load(ptr, stride, image, channel, y, x, mask):
    offset = image * stride[0] + channel * stride[1] + y.to(tl.int64) * stride[2] + x.to(tl.int64) * stride[3]
    return tl.load(ptr + offset, mask, 0)


@triton.jit
def _forward(
    purified_ptr,
    images_ptr,
    shown_ptr,
    mixed_ptr,
    purified_stride,
    image_stride,
    channels,
    height,
    width,
    PATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, channel, pixel, y, x, mask, shown = _place(shown_ptr, channels, height, width, PATCH, BLOCK)
    kept = _load(purified_ptr, purified_stride, image, channel, y, x, mask & ~shown)
    put = _load(images_ptr, image_stride, image, channel, y, x, mask & shown)
    out = mixed_ptr + (image * channels + channel) * height * width + pixel
    tl.store(out, tl.where(shown, put, kept), mask)


@triton.jit
def _backward(
    grad_ptr,
    shown_ptr,
    d_purified_ptr,
    d_images_ptr,
    grad_stride,
    channels,
    height,
    width,
    PATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, channel, pixel, y, x, mask, shown = _place(shown_ptr, channels, height, width, PATCH, BLOCK)
    grad = _load(grad_ptr, grad_stride, image, channel, y, x, mask)
    out = (image * channels + channel) * height * width + pixel
    tl.store(d_purified_ptr + out, tl.where(shown, 0.0, grad), mask)
    tl.store(d_images_ptr + out, tl.where(shown, grad, 0.0), mask)


def _shown(order: Tensor, start: int, stop: int) -> Tensor:
    """[N, L] uint8 in raster order: 1 where the input is shown."""
    return order.new_zeros(order.shape, dtype=torch.uint8).scatter_(1, order[:, start:stop], 1)


def forward(purified: Tensor, images: Tensor, order: Tensor, start: int, stop: int, patch: int) -> Tensor:
    """purified, images: [N, C, H, W], any strides -> mixed, contiguous."""
    n, channels, height, width = images.shape
    mixed = purified.new_empty(purified.shape)
    if mixed.numel():
        grid = (n * channels * triton.cdiv(height * width, BLOCK),)
        with torch.cuda.device_of(images):
            _forward[grid](
                purified,
                images,
                _shown(order, start, stop),
                mixed,
                purified.stride(),
                images.stride(),
                channels,
                height,
                width,
                PATCH=patch,
                BLOCK=BLOCK,
                num_warps=4,
            )
    return mixed


def backward(grad: Tensor, order: Tensor, start: int, stop: int, patch: int) -> tuple[Tensor, Tensor]:
    """grad: [N, C, H, W], any strides -> (d_purified, d_images), contiguous."""
    n, channels, height, width = grad.shape
    d_purified, d_images = grad.new_empty(grad.shape), grad.new_empty(grad.shape)
    if grad.numel():
        grid = (n * channels * triton.cdiv(height * width, BLOCK),)
        with torch.cuda.device_of(grad):
            _backward[grid](
                grad,
                _shown(order, start, stop),
                d_purified,
                d_images,
                grad.stride(),
                channels,
                height,
                width,
                PATCH=patch,
                BLOCK=BLOCK,
                num_warps=4,
            )
    return d_purified, d_images
