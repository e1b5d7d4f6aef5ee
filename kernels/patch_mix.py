"""Mix two images patch by patch: those of some shuffled places show the input, all others the purified image.

One program makes 1024 pixels of one channel plane, 8 a thread.  Of the two images each pixel is read from one only:
2 elements moved, and one flag a patch; no pixel-sized mask.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _pixels(shown_ptr, channels, height, width, PATCH: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr):
    """This program's image and channel; its runs of pixels within one patch: row, columns, which show the input."""
    runs = height * width // RUN
    blocks = tl.cdiv(runs, BLOCK // RUN)
    plane = tl.program_id(0) // blocks
    image, channel = (plane // channels).to(tl.int64), (plane % channels).to(tl.int64)
    run = (tl.program_id(0) % blocks * (BLOCK // RUN) + tl.arange(0, BLOCK // RUN))[:, None]
    y, x = run // (width // RUN), run % (width // RUN) * RUN
    flag = shown_ptr + image * (height // PATCH * (width // PATCH)) + y // PATCH * (width // PATCH) + x // PATCH
    return image, channel, y, x + tl.arange(0, RUN)[None, :], run < runs, tl.load(flag, run < runs, 0) != 0


@triton.jit
def _offset(stride, image, channel, y, x):
    return image * stride[0] + channel * stride[1] + y.to(tl.int64) * stride[2] + x.to(tl.int64) * stride[3]


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
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, channel, y, x, mask, shown = _pixels(shown_ptr, channels, height, width, PATCH, RUN, BLOCK)
    kept = tl.load(purified_ptr + _offset(purified_stride, image, channel, y, x), mask & ~shown, 0)
    put = tl.load(images_ptr + _offset(image_stride, image, channel, y, x), mask & shown, 0)
    out = mixed_ptr + (image * channels + channel) * height * width + y * width + x
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
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, channel, y, x, mask, shown = _pixels(shown_ptr, channels, height, width, PATCH, RUN, BLOCK)
    grad = tl.load(grad_ptr + _offset(grad_stride, image, channel, y, x), mask, 0)
    out = (image * channels + channel) * height * width + y * width + x
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
        run = math.gcd(patch, 16)
        grid = (n * channels * triton.cdiv(height * width // run, BLOCK // run),)
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
                RUN=run,
                BLOCK=BLOCK,
                num_warps=4,
                enable_fp_fusion=False,
            )
    return mixed


def backward(grad: Tensor, order: Tensor, start: int, stop: int, patch: int) -> tuple[Tensor, Tensor]:
    """grad: [N, C, H, W], any strides -> (d_purified, d_images), contiguous."""
    n, channels, height, width = grad.shape
    d_purified, d_images = grad.new_empty(grad.shape), grad.new_empty(grad.shape)
    if grad.numel():
        run = math.gcd(patch, 16)
        grid = (n * channels * triton.cdiv(height * width // run, BLOCK // run),)
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
                RUN=run,
                BLOCK=BLOCK,
                num_warps=4,
                enable_fp_fusion=False,
            )
    return d_purified, d_images
