"""The network as the engine runs it: weights folded and packed once, nothing computed that can be kept.

Tiles and draws -> purified tiles, in the order of ``IMPure.reconstruct_shuffled``.  Folded in: the side projections'
softmax weights, the patch embedding's bias into its positions, the un-normalisation into the pixel convolution.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..draws import Draws, grid_of
from ..model import Block, IMPure, hidden_rows, other_chunks, table_cells
from ..ops import normalise_rows, patch_assemble, patch_mask, reconstruction_attention
from ..ops.reconstruction_attention import replica_rows
from .products import Product

# (weight [out, in], bias [out], dtype of the result) -> product; both weights in fp32.
Pack = Callable[[Tensor, Tensor, torch.dtype], Product]


def _add(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a + b, straight into a part of a tensor; torch.compile knows no such ``out`` but fuses the copy."""
    if torch.compiler.is_compiling():
        out.copy_(a + b)
    else:
        torch.add(a, b, out=out)


class Norm:
    """Layer norm, its result in the type that a product takes; eps: in place of the module's."""

    def __init__(self, norm: nn.LayerNorm, eps: float | None = None) -> None:
        self.weight, self.bias = norm.weight, norm.bias
        self.eps = norm.eps if eps is None else eps

    def __call__(self, x: Tensor, into: Product | None = None) -> Tensor:
        """into: the product that reads the result; None keeps x's dtype."""
        form: dict[str, Any] = {} if into is None else dict(scale=into.scale, zero=into.zero, dtype=into.takes)
        return normalise_rows(x, self.weight, self.bias, self.eps, **form)


class FoldedBlock:
    """One transformer block.  last: its queries are the hidden rows alone (the last decoder block)."""

    def __init__(
        self, block: Block, pack: Pack, dtype: torch.dtype, attention: torch.dtype, last: bool = False
    ) -> None:
        self.heads = block.attn.heads
        self.norm1, self.norm2 = Norm(block.norm1), Norm(block.norm2)
        qkv, width = block.attn.qkv, block.attn.proj.in_features
        self.query = pack(qkv.weight[:width], qkv.bias[:width], attention) if last else None
        cut = width if last else 0
        self.packed = pack(qkv.weight[cut:], qkv.bias[cut:], attention)
        self.proj = pack(block.attn.proj.weight, block.attn.proj.bias, dtype)
        self.fc1 = pack(block.mlp.fc1.weight, block.mlp.fc1.bias, dtype)
        self.fc2 = pack(block.mlp.fc2.weight, block.mlp.fc2.bias, dtype)

    def __call__(self, x: Tensor, chunks: int = 0, residual: Tensor | None = None) -> Tensor:
        """x: [B, T, W] -> [B, T, W], or residual's shape.

        residual: the rows that attention is added to, where they are not x: with ``chunks`` (x being the packed rows
            of all replicas) the replicas' rows, and in the last block the hidden ones alone.
        """
        y = self.norm1(x, self.packed)
        residual = x if residual is None else residual
        if self.query is None:
            q, k, v = self.packed(y).unflatten(-1, (3, self.heads, -1)).unbind(2)
        else:
            q = self.query(self.norm1(residual, self.query)).unflatten(-1, (self.heads, -1))
            k, v = self.packed(y).unflatten(-1, (2, self.heads, -1)).unbind(2)
        attended = reconstruction_attention(q, k, v, chunks=chunks).flatten(-2)
        if chunks:
            attended = attended.flatten(0, 1)
            if attended.shape != residual.shape:  # a decoder of one block
                attended = hidden_rows(attended, chunks)
        x = self.proj(attended, residual=residual)
        return self.fc2(self.fc1(self.norm2(x, self.fc1), gelu=True, into=self.fc2), residual=x)


class Folded:
    """``source`` for inference: (tiles, draws) -> purified tiles, unclamped.

    pack: makes the products; dtype: of activations between them; attention: of queries, keys and values.
    Takes float32 tiles [N, 3, H, W] in [0, 1] on ``device``, gives float32.
    """

    @torch.no_grad()
    def __init__(
        self, source: IMPure, pack: Pack, dtype: torch.dtype, attention: torch.dtype, device: torch.device
    ) -> None:
        c = self.config = source.config
        model: Any = copy.deepcopy(source).to(device, torch.float32)
        self.dtype, self.device = dtype, device
        embed = model.patch_embed.proj
        self.embed = pack(embed.weight.flatten(1), torch.zeros_like(embed.bias), dtype)
        self.positions = (model.pos_embed[0, 1:] + embed.bias).to(dtype)  # [T*T, D]
        self.class_token = (model.cls_token + model.pos_embed[:, :1])[0, 0].to(dtype)
        self.blocks = [FoldedBlock(block, pack, dtype, attention) for block in model.blocks]
        # norm(sum_m s_m y_m; eps) = norm(sum_m s_m / s y_m; eps / s^2), s being the weight of the last block's output.
        *weights, last = model.proj_weights.float().softmax(dim=0).flatten().tolist()
        self.sides = {}
        for b, weight in zip(sorted(c.out_indices), weights, strict=True):
            side = model.proj_layers[c.out_indices.index(b)]
            self.sides[b] = pack(side.weight * (weight / last), side.bias * (weight / last), dtype)
        self.norm = Norm(model.norm, model.norm.eps / last**2)
        self.decoder_embed = pack(model.decoder_embed.weight, model.decoder_embed.bias, dtype)
        self.decoder_embed_norm = Norm(model.decoder_embed_norm)
        self.head_embed = pack(model.decoder_head_embed.weight, model.decoder_head_embed.bias, dtype)
        self.decoder_positions = model.decoder_pos_embed[0, 1:].to(dtype)  # [T*T, E]
        final = len(model.decoder_blocks) - 1
        self.decoder_blocks = [
            FoldedBlock(block, pack, dtype, attention, last=0 < b == final)
            for b, block in enumerate(model.decoder_blocks)
        ]
        self.decoder_norm = Norm(model.decoder_norm)
        self.pred = pack(model.decoder_pred.weight, model.decoder_pred.bias, torch.float32)
        self.mask_token = model.mask_token.to(dtype)
        self.signal, self.level = model.sqrt_alphas_cumprod, model.sqrt_one_minus_alphas_cumprod
        mean, std = (torch.tensor(x, device=device) for x in (c.mean, c.std))
        if c.pixel_conv:
            self.kernel = model.decoder_rb1.weight * std.view(3, 1, 1, 1)
            self.kernel_bias = model.decoder_rb1.bias * std + mean
        self.run: Callable[[Tensor, Draws], Tensor] = self.forward

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        return self.run(images, draws)

    def compile(self) -> None:
        """Let torch.compile fuse what lies between products and operators, at the first call."""
        self.run = torch.compile(self.forward)

    def forward(self, images: Tensor, draws: Draws) -> Tensor:
        c, n, k = self.config, len(images), self.config.num_chunks
        rows, cols, m = grid_of(c, images.shape)
        cells = table_cells(c, draws.positions, rows, cols).gather(1, draws.order)  # [N, L]
        heads, clean, noised = self.encode(images, draws, cells, m)
        position = self.decoder_positions[cells].view(n, k, m, -1)
        packed = clean.new_empty(n, 2 * k * m + k, c.decoder_embed_dim)  # what the replicas are made of
        grids = packed[:, : 2 * k * m].view(n, 2, k, m, -1)
        _add(clean, position, grids[:, 0])
        self.hide(clean if noised is None else noised, noised is not None, position, draws, out=grids[:, 1])
        packed[:, 2 * k * m :] = self.head_embed(heads[:, other_chunks(k, images.device)].flatten(2))
        x = packed[:, replica_rows(k * m, k, images.device)].flatten(0, 1)  # [N*K, 1 + L, E]
        for b, block in enumerate(self.decoder_blocks):
            residual = x if b < len(self.decoder_blocks) - 1 else hidden_rows(x, k)
            x = block(x if b else packed, 0 if b else k, residual)
        # In fp32: bf16 would cut a picture's brighter half to 128 levels.
        patches = self.pred(self.decoder_norm(x, self.pred)).view(n, k * m, -1).float()  # shuffled
        if c.pixel_conv:
            return patch_assemble(patches, draws.order, rows, cols, self.kernel, self.kernel_bias)
        return patch_assemble(patches, draws.order, rows, cols, mean=c.mean, std=c.std)

    def encode(self, images: Tensor, draws: Draws, cells: Tensor, m: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """-> class tokens [N, K, D] of the clean chunks, features [N, K, M, E] of the clean and the noised ones."""
        c, n, k, step = self.config, len(images), self.config.num_chunks, draws.image_step
        passes, signal, level = 1, None, None
        if c.image_mask == "noise":
            passes, signal, level = 2, self.signal[step], self.level[step]
        noise = draws.image_noise
        x = patch_mask(images, draws.order, c.patch_size, c.mean, c.std, signal=signal, level=level, noise=noise)
        tokens = self.embed(x.to(self.dtype)).view(passes, n, k, m, -1)
        x = tokens.new_empty(passes, n, k, 1 + m, c.embed_dim)
        x[..., 0, :] = self.class_token
        _add(tokens, self.positions[cells].view(n, k, m, -1), x[..., 1:, :])
        x, mixed = x.flatten(0, 2), None
        for b, block in enumerate(self.blocks):
            x = block(x)
            if b in self.sides:
                mixed = self.sides[b](x, residual=mixed)
        latent = self.norm(x if mixed is None else mixed.add_(x))
        features = self.decoder_embed_norm(self.decoder_embed(latent)).view(passes, n, k, 1 + m, -1)[..., 1:, :]
        heads = latent.view(passes, n, k, 1 + m, -1)[0, :, :, 0]
        return heads, features[0], features[1] if passes == 2 else None

    def hide(self, shown: Tensor, noised: bool, position: Tensor, draws: Draws, out: Tensor) -> None:
        """Write what replaces each chunk in its replica, position added.  shown, position, out: [N, K, M, E]."""
        if self.config.feature_mask == "noise":
            assert draws.feature_noise is not None
            step = draws.feature_step[:, :, None, None]
            signal, level = self.signal[step], self.level[step]  # [N, K, 1, 1]
            _add(shown * signal.to(shown.dtype) + level * draws.feature_noise, position, out)
        else:
            _add(shown if noised else self.mask_token, position, out)
