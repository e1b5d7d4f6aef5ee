"""Shuffled patch pixels to an image: unshuffle, unpatchify, 3x3 convolution, un-normalise, clamp, round; one pass.

One program makes a tile [4, B] of channels (three and a pad) by pixels, 4 (backward 2) a thread.  It walks the nine
taps; each is a gather of three neighbouring values of one patch, from L1 but for the first use.  Moves 1 element in
and 1 out.  Backward: the same walk recomputes the image where the clamp asks for it, writes the gradient behind the
convolution and the program's part of the weights' gradient; a second kernel walks the taps back to the patches.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD_BLOCK = 512
# One warp: backward sums 84 numbers over the block, and there that needs no barrier.
BACKWARD_BLOCK = 64


@triton.jit
def _pixels(rows, cols, PATCH: tl.constexpr, BLOCK: tl.constexpr):
    """This program's image; its channels [4, 1]; its pixels, flat, row, column, and which exist, [1, BLOCK]."""
    height, width = rows * PATCH, cols * PATCH
    blocks = tl.cdiv(height * width, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    return image, tl.arange(0, 4)[:, None], pixel, pixel // width, pixel % width, pixel < height * width


@triton.jit
def _inside(y, x, rows, cols, PATCH: tl.constexpr):
    return (y >= 0) & (y < rows * PATCH) & (x >= 0) & (x < cols * PATCH)


@triton.jit
def _values(restore_ptr, stride, image, y, x, mask, rows, cols, PATCH: tl.constexpr):
    """Offsets in the patches of the first channel of pixels (y, x)."""
    token = tl.load(restore_ptr + image * rows * cols + y // PATCH * cols + x // PATCH, mask, 0)
    value = (y % PATCH * PATCH + x % PATCH) * 3
    return image * stride[0] + token.to(tl.int64) * stride[1] + value.to(tl.int64) * stride[2]


@triton.jit
def _three(numbers, channel):
    return tl.where(channel == 0, numbers[0], tl.where(channel == 1, numbers[1], numbers[2]))


@triton.jit
def _convolve(
    patches_ptr, restore_ptr, weight_ptr, bias_ptr, stride, image, channel, y, x, mask, rows, cols, PATCH: tl.constexpr
):
    """The assembled and, if there is a weight, convolved pixels: [4, BLOCK] fp32."""
    if weight_ptr is None:
        offset = _values(restore_ptr, stride, image, y, x, mask, rows, cols, PATCH) + channel * stride[2]
        result = tl.load(patches_ptr + offset, mask & (channel < 3), 0).to(tl.float32)
    else:
        result = tl.load(bias_ptr + channel, channel < 3, 0).to(tl.float32) + tl.zeros(mask.shape, tl.float32)
        for tap_row in range(3):
            for tap_col in tl.static_range(3):
                ty, tx = y + (tap_row - 1), x + (tap_col - 1)
                seen = mask & _inside(ty, tx, rows, cols, PATCH)
                source = patches_ptr + _values(restore_ptr, stride, image, ty, tx, seen, rows, cols, PATCH)
                for c in tl.static_range(3):
                    value = tl.load(source + c * stride[2], seen, 0).to(tl.float32)
                    tap = weight_ptr + (channel * 3 + c) * 9 + tap_row * 3 + tap_col
                    result = tl.fma(value, tl.load(tap, channel < 3, 0).to(tl.float32), result)
    return result


@triton.jit
def _forward(
    patches_ptr,
    restore_ptr,
    weight_ptr,
    bias_ptr,
    image_ptr,
    stride,
    mean,
    std,
    rows,
    cols,
    PATCH: tl.constexpr,
    CLAMP: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, channel, pixel, y, x, mask = _pixels(rows, cols, PATCH, BLOCK)
    value = _convolve(
        patches_ptr, restore_ptr, weight_ptr, bias_ptr, stride, image, channel, y, x, mask, rows, cols, PATCH
    )
    value = value * _three(std, channel) + _three(mean, channel)
    if CLAMP:  # not minimum and maximum: those would hide a NaN
        value = tl.where(value < 0.0, 0.0, tl.where(value > 1.0, 1.0, value))
    if ROUND:  # added to 2**23, a small number loses its fraction, half to even
        value = (value * 255.0 + 8388608.0) - 8388608.0
    out = image_ptr + (image * 3 + channel) * rows * cols * (PATCH * PATCH) + pixel
    tl.store(out, value.to(image_ptr.dtype.element_ty), mask & (channel < 3))


@triton.jit
def _backward_image(
    grad_ptr,
    patches_ptr,
    restore_ptr,
    weight_ptr,
    bias_ptr,
    inner_ptr,
    parts_ptr,
    grad_stride,
    stride,
    mean,
    std,
    rows,
    cols,
    PATCH: tl.constexpr,
    CLAMP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient behind the convolution, fp32, and this program's part of the weight's and the bias's."""
    image, channel, pixel, y, x, mask = _pixels(rows, cols, PATCH, BLOCK)
    offset = channel * grad_stride[1] + y.to(tl.int64) * grad_stride[2] + x.to(tl.int64) * grad_stride[3]
    grad = tl.load(grad_ptr + image * grad_stride[0] + offset, mask & (channel < 3), 0).to(tl.float32)
    grad *= _three(std, channel)
    if CLAMP:  # as torch.clamp with two bounds: nothing passes at the bounds themselves
        clamped = _convolve(
            patches_ptr, restore_ptr, weight_ptr, bias_ptr, stride, image, channel, y, x, mask, rows, cols, PATCH
        )
        clamped = clamped * _three(std, channel) + _three(mean, channel)
        grad = tl.where((clamped > 0.0) & (clamped < 1.0), grad, 0.0)
    tl.store(inner_ptr + (image * 3 + channel) * rows * cols * (PATCH * PATCH) + pixel, grad, mask & (channel < 3))
    if weight_ptr is not None:
        part = parts_ptr + tl.program_id(0).to(tl.int64) * 84 + tl.arange(0, 4)
        tl.store(part + 81, tl.sum(grad, 1), tl.arange(0, 4) < 3)
        part += tl.arange(0, 4) * 26
        for tap in range(9):
            ty, tx = y + (tap // 3 - 1), x + (tap % 3 - 1)
            seen = mask & _inside(ty, tx, rows, cols, PATCH)
            source = patches_ptr + _values(restore_ptr, stride, image, ty, tx, seen, rows, cols, PATCH)
            for c in tl.static_range(3):
                value = tl.load(source + c * stride[2], seen, 0).to(tl.float32)
                tl.store(part + (c * 9 + tap), tl.sum(value * grad, 1), tl.arange(0, 4) < 3)


@triton.jit
def _backward_patches(
    inner_ptr,
    restore_ptr,
    weight_ptr,
    d_patches_ptr,
    stride,
    rows,
    cols,
    PATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, channel, pixel, y, x, mask = _pixels(rows, cols, PATCH, BLOCK)
    plane = rows * cols * (PATCH * PATCH)
    source = inner_ptr + image * 3 * plane + pixel
    if weight_ptr is None:
        grad = tl.load(source + channel.to(tl.int64) * plane, mask & (channel < 3), 0)
    else:
        grad = tl.zeros((4, BLOCK), tl.float32)
        for tap_row in range(3):
            for tap_col in tl.static_range(3):
                # The output pixel that saw this one through the tap lies on the tap's other side.
                dy, dx = 1 - tap_row, 1 - tap_col
                seen = mask & _inside(y + dy, x + dx, rows, cols, PATCH)
                for c in tl.static_range(3):
                    value = tl.load(source + (c * plane + dy * cols * PATCH + dx), seen, 0)
                    tap = weight_ptr + (c * 3 + channel) * 9 + tap_row * 3 + tap_col
                    grad = tl.fma(value, tl.load(tap, channel < 3, 0).to(tl.float32), grad)
    out = d_patches_ptr + _values(restore_ptr, stride, image, y, x, mask, rows, cols, PATCH) + channel
    tl.store(out, grad.to(d_patches_ptr.dtype.element_ty), mask & (channel < 3))


def _restore(order: Tensor) -> Tensor:
    """[N, L] int32, the inverse permutation."""
    tokens = torch.arange(order.shape[1], dtype=torch.int32, device=order.device)
    return tokens.new_empty(order.shape).scatter_(1, order, tokens.expand(order.shape))


def _patch(patches: Tensor) -> int:
    return round((patches.shape[2] / 3) ** 0.5)


def forward(
    patches: Tensor,
    order: Tensor,
    rows: int,
    cols: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: list[float] | None,
    std: list[float] | None,
    clamp: bool,
    to_uint8: bool,
) -> Tensor:
    """patches: [N, L, p*p*3] -> image [N, 3, rows*p, cols*p]; see ``impure_fast.ops.patch_assemble``."""
    n, p = patches.shape[0], _patch(patches)
    shape = (n, 3, rows * p, cols * p)
    image = patches.new_empty(shape, dtype=torch.uint8 if to_uint8 else patches.dtype)
    if image.numel():
        with torch.cuda.device_of(patches):
            _forward[(n * triton.cdiv(rows * cols * p * p, FORWARD_BLOCK),)](
                patches,
                _restore(order),
                None if weight is None else weight.contiguous(),
                None if bias is None else bias.contiguous(),
                image,
                patches.stride(),
                tuple(mean or (0.0, 0.0, 0.0)),
                tuple(std or (1.0, 1.0, 1.0)),
                rows,
                cols,
                PATCH=p,
                CLAMP=clamp or to_uint8,
                ROUND=to_uint8,
                BLOCK=FORWARD_BLOCK,
                num_warps=4,
                enable_fp_fusion=False,
            )
    return image


def backward(
    grad: Tensor,
    patches: Tensor,
    order: Tensor,
    rows: int,
    cols: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: list[float] | None,
    std: list[float] | None,
    clamp: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad: [N, 3, H, W] -> (d_patches, d_weight, d_bias); the last two are empty where there is no weight."""
    n, p = patches.shape[0], _patch(patches)
    d_patches = patches.new_empty(patches.shape)
    programs = n * triton.cdiv(rows * cols * p * p, BACKWARD_BLOCK)
    parts = grad.new_empty((0 if weight is None else programs, 84), dtype=torch.float32)
    if d_patches.numel():
        inner = torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
        restore = _restore(order)
        if weight is not None and bias is not None:
            weight, bias = weight.contiguous(), bias.contiguous()
        with torch.cuda.device_of(patches):
            _backward_image[(programs,)](
                grad,
                patches,
                restore,
                weight,
                bias,
                inner,
                parts,
                grad.stride(),
                patches.stride(),
                tuple(mean or (0.0, 0.0, 0.0)),
                tuple(std or (1.0, 1.0, 1.0)),
                rows,
                cols,
                PATCH=p,
                CLAMP=clamp,
                BLOCK=BACKWARD_BLOCK,
                num_warps=1,
                enable_fp_fusion=False,
            )
            _backward_patches[(n * triton.cdiv(rows * cols * p * p, FORWARD_BLOCK),)](
                inner,
                restore,
                weight,
                d_patches,
                d_patches.stride(),
                rows,
                cols,
                PATCH=p,
                BLOCK=FORWARD_BLOCK,
                num_warps=4,
                enable_fp_fusion=False,
            )
    if weight is None or bias is None:
        return d_patches, grad.new_empty(0), grad.new_empty(0)
    total = parts.sum(0)
    return d_patches, total[:81].view(3, 3, 3, 3).to(weight.dtype), total[81:].to(bias.dtype)
