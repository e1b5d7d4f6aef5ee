"""Images to shuffled patch rows, clean and noised, in one pass over the pixels.

One program makes a tile of whole patches, one channel after the other: about 1024 pixels a channel, 8 a thread, noise
from registers (philox) or memory.  Moves the image once in and, per pass, its size once out.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import philox

IMAGE_NOISE = tl.constexpr(3)  # the purpose in the counter of ``Draws``
_TILE = 1024


@triton.jit
def _corner(order_ptr, order_stride, image, token, tokens, cols, PATCH: tl.constexpr):
    """Pixel row and column of the first pixel of each token's patch."""
    place = tl.load(order_ptr + image * order_stride[0] + token.to(tl.int64) * order_stride[1], token < tokens, 0)
    place = place.to(tl.int32)
    return place // cols * PATCH, place % cols * PATCH


@triton.jit
def _offset(stride, image, channel, y, x):
    return image * stride[0] + channel * stride[1] + y.to(tl.int64) * stride[2] + x.to(tl.int64) * stride[3]


@triton.jit(do_not_specialize=["seed", "images"])
def _forward(
    images_ptr,
    order_ptr,
    signal_ptr,
    level_ptr,
    noise_ptr,
    streams_ptr,
    rows_ptr,
    image_stride,
    order_stride,
    noise_stride,
    mean,
    factor,
    unit,
    seed,
    images,
    tokens,
    height,
    width,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    TOKENS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    blocks = tl.cdiv(tokens, TOKENS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)
    top, left = _corner(order_ptr, order_stride, image, token, tokens, width // PATCH, PATCH)
    pixel = tl.arange(0, PIXELS)
    y, x = top[:, None] + pixel // PATCH, left[:, None] + pixel % PATCH
    mask = (token < tokens)[:, None] & (pixel < PATCH * PATCH)
    row = (image * tokens + token)[:, None] * (CHANNELS * PATCH * PATCH) + pixel
    if signal_ptr is not None:
        signal, level = tl.load(signal_ptr + image), tl.load(level_ptr + image)
        noised_ptr = rows_ptr + images.to(tl.int64) * tokens * (CHANNELS * PATCH * PATCH)
    for c in tl.static_range(CHANNELS):
        value = tl.load(images_ptr + _offset(image_stride, image, c, y, x), mask, 0).to(tl.float32)
        value = (value * unit - mean[c]) * factor[c]
        out = row + c * PATCH * PATCH
        tl.store(rows_ptr + out, value.to(rows_ptr.dtype.element_ty), mask)
        if signal_ptr is not None:
            if noise_ptr is not None:
                noise = tl.load(noise_ptr + _offset(noise_stride, image, c, y, x), mask, 0).to(tl.float32)
            elif PATCH % 4 == 0:  # four neighbours, all of one patch row, share a counter
                quad = 4 * tl.arange(0, PIXELS // 4)
                first = (c * height + top[:, None] + quad // PATCH) * width + left[:, None] + quad % PATCH
                noise = philox.normals(seed, tl.load(streams_ptr + image), first // 4, IMAGE_NOISE)
            else:
                noise = philox.normal(seed, tl.load(streams_ptr + image), (c * height + y) * width + x, IMAGE_NOISE)
            noised = signal * value + level * noise
            tl.store(noised_ptr + out, noised.to(rows_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["images"])
def _backward(
    grad_ptr,
    order_ptr,
    signal_ptr,
    d_images_ptr,
    grad_stride,
    order_stride,
    factor,
    images,
    tokens,
    height,
    width,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    TOKENS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    blocks = tl.cdiv(tokens, TOKENS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)
    top, left = _corner(order_ptr, order_stride, image, token, tokens, width // PATCH, PATCH)
    pixel = tl.arange(0, PIXELS)
    y, x = top[:, None] + pixel // PATCH, left[:, None] + pixel % PATCH
    mask = (token < tokens)[:, None] & (pixel < PATCH * PATCH)
    row = image * grad_stride[0] + token.to(tl.int64)[:, None] * grad_stride[1] + pixel.to(tl.int64) * grad_stride[2]
    for c in tl.static_range(CHANNELS):
        source = grad_ptr + row + c * PATCH * PATCH * grad_stride[2]
        grad = tl.load(source, mask, 0).to(tl.float32)
        if signal_ptr is not None:
            noised = tl.load(source + images.to(tl.int64) * grad_stride[0], mask, 0).to(tl.float32)
            grad += tl.load(signal_ptr + image) * noised
        out = d_images_ptr + ((image * CHANNELS + c) * height + y) * width + x
        tl.store(out, (grad * factor[c]).to(d_images_ptr.dtype.element_ty), mask)


def _tile(n: int, tokens: int, patch: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid, and tile sizes of whole patches."""
    pixels = triton.next_power_of_2(patch * patch)
    block = max(1, min(_TILE // pixels, triton.next_power_of_2(tokens)))
    sizes = {"PATCH": patch, "TOKENS": block, "PIXELS": pixels, "num_warps": max(1, min(8, block * pixels // 256))}
    return (n * triton.cdiv(tokens, block),), sizes


def forward(
    images: Tensor,
    order: Tensor,
    patch: int,
    mean: list[float],
    std: list[float],
    signal: Tensor | None,
    level: Tensor | None,
    noise: Tensor | None,
    seed: int | None,
    streams: Tensor | None,
) -> Tensor:
    """images: [N, C, H, W] -> rows [N, L, C*p*p], or with signal [2N, L, C*p*p]; see ``impure_fast.ops.patch_mask``."""
    n, channels, height, width = images.shape
    tokens = order.shape[1]
    integer = images.dtype == torch.uint8
    shape = (n if signal is None else 2 * n, tokens, channels * patch * patch)
    rows = images.new_empty(shape, dtype=torch.float32 if integer else images.dtype)
    if rows.numel():
        grid, sizes = _tile(n, tokens, patch)
        with torch.cuda.device_of(images):
            _forward[grid](
                images,
                order,
                None if signal is None else signal.contiguous(),
                None if level is None else level.contiguous(),
                noise,
                None if streams is None else streams.contiguous(),
                rows,
                images.stride(),
                order.stride(),
                (0, 0, 0, 0) if noise is None else noise.stride(),
                tuple(mean),
                tuple(1 / s for s in std),
                1 / 255 if integer else 1.0,
                seed or 0,
                n,
                tokens,
                height,
                width,
                CHANNELS=channels,
                enable_fp_fusion=False,
                **sizes,
            )
    return rows


def backward(
    grad: Tensor, order: Tensor, shape: tuple[int, ...], patch: int, std: list[float], signal: Tensor | None
) -> Tensor:
    """grad of the rows -> grad of the images, [N, C, H, W] contiguous in grad's dtype."""
    n, channels, height, width = shape
    d_images = grad.new_empty(shape)
    if d_images.numel():
        grid, sizes = _tile(n, order.shape[1], patch)
        with torch.cuda.device_of(grad):
            _backward[grid](
                grad,
                order,
                None if signal is None else signal.contiguous(),
                d_images,
                grad.stride(),
                order.stride(),
                tuple(1 / s for s in std),
                n,
                order.shape[1],
                height,
                width,
                CHANNELS=channels,
                enable_fp_fusion=False,
                **sizes,
            )
    return d_images
