"""The IMPure network (arXiv 2311.15339).

image + draws -> mask (clean and noised rows, shuffled) -> encode each chunk alone -> hide chunk i in replica i
-> decode all K replicas -> keep the hidden chunks -> assemble the image.

``reconstruct`` does this on the operators, without what cannot change the result.  Under the backend "reference"
it does so in plain PyTorch and in the authors' order of operations (``reconstruct_literally``): the oracle.

Letters: N images, L tokens, K chunks of M tokens, D encoder width, E decoder width, p patch side.
Encoder batches are image-major (n*K + k); the oracle's decoder batches are replica-major (i*N + n).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence, Set
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoints
from .config import NUM_STEPS, IMPureConfig
from .draws import Draws, grid_of
from .errors import ConfigError, InputTypeError
from .memory import ALL, State, Step, again, run_steps
from .ops import patch_assemble, patch_mask, reconstruction_attention
from .ops._dispatch import wished
from .ops.patch_assemble import unpatchify, unshuffle
from .ops.patch_mask import gather_tokens, per_channel
from .ops.reconstruction_attention import replica_rows
from .purify import purify_images, with_steps

Note = Callable[[str, Tensor], Tensor]


def _ignore_tables(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    checkpoints.drop_tables(state, prefix)  # a named function, so that models can be pickled


def _as_it_is(x: Tensor) -> Tensor:
    return x


class Attention(nn.Module):
    """Multi-head self-attention; qkv rows are split as (3, heads, head width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def project(self, x: Tensor, hides: int = 0) -> tuple[Tensor, ...]:
        """Queries, keys and values of x [B, T, W]: one tensor [B, T, 3W], or two where only hidden rows ask.

        hides: K, of x [N*K, L + 1, W] the rows of chunk i ask in replica i -> [N*K, M, W], [N*K, L + 1, 2W].
        """
        if not hides:
            return (self.qkv(x),)
        w, weight, bias = x.shape[2], self.qkv.weight, self.qkv.bias
        return F.linear(hidden_rows(x, hides), weight[:w], bias[:w]), F.linear(x, weight[w:], bias[w:])

    def attend(self, projected: Sequence[Tensor], chunks: int = 0) -> Tensor:
        """Attention before its projection: what ``project`` gives -> [B, T, W].

        chunks: K, the rows being the packed ones [N, 2L + K, W] of all replicas -> [N*K, L + 1, W].
        """
        if len(projected) == 1:
            q, k, v = projected[0].unflatten(2, (3, self.heads, -1)).unbind(2)
        else:
            q = projected[0].unflatten(2, (self.heads, -1))
            k, v = projected[1].unflatten(2, (2, self.heads, -1)).unbind(2)
        out = reconstruction_attention(q, k, v, chunks=chunks).flatten(-2)
        return out.flatten(0, 1) if chunks else out


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)


class Block(nn.Module):
    """Pre-norm transformer block without dropout or layer scale."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(
        self, x: Tensor, kept: Set[str] = ALL, chunks: int = 0, hides: int = 0, enter: Callable[..., Tensor] = _as_it_is
    ) -> Tensor:
        """x: [B, T, W] -> [B, T, W].

        kept: what is stored for the backward pass (``memory``).
        enter: makes the block's input of x, and may be computed again with it.
        chunks: K, x being the packed rows [N, 2L + K, W] of all replicas -> [N*K, L + 1, W].
        hides: K, only the hidden rows go on -> [N*K, M, W].
        """

        def rows(x: Tensor) -> Tensor:
            if chunks:
                x = x[:, replica_rows((x.shape[1] - chunks) // 2, chunks, x.device)].flatten(0, 1)
            return hidden_rows(x, hides) if hides else x

        def normed(x: Tensor) -> State:
            x = enter(x)
            return x, self.norm1(x)

        def attend(x: Tensor, *projected: Tensor) -> State:
            attended = self.attn.attend(projected, chunks)
            return x, hidden_rows(attended, hides) if chunks and hides else attended

        steps: tuple[Step, ...] = (
            normed,
            lambda x, normed: (x, *self.attn.project(normed, 0 if chunks else hides)),
            attend,
            lambda x, attended: (rows(x) + self.attn.proj(attended),),
            lambda x: (x, self.norm2(x)),
            lambda x, normed: (x, self.mlp.fc1(normed)),
            lambda x, inner: (x, F.gelu(inner)),
            lambda x, inner: (x + self.mlp.fc2(inner),),
        )
        return run_steps(steps, kept, x)[0]


class PatchEmbed(nn.Module):
    """Non-overlapping patches of the image as rows: [N, 3, H, W] -> [N, L, D], raster order."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def sincos_table(width: int, side: int) -> Tensor:
    """Position table [1, 1 + side*side, width]: a zero row, then cells in raster order (SPEC 2.3).

    A cell holds sin and cos of its column, then sin and cos of its row; all arithmetic in float32.
    """
    quarter = width // 4
    frequency = 1 / 10000 ** (torch.arange(quarter, dtype=torch.float32) / quarter)
    angle = torch.arange(side, dtype=torch.float32)[:, None] * frequency
    line = torch.cat((angle.sin(), angle.cos()), dim=1)  # [side, width / 2]
    cells = torch.cat((line.repeat(side, 1), line.repeat_interleave(side, dim=0)), dim=1)
    return torch.cat((torch.zeros(1, width), cells))[None]


def noise_schedule() -> tuple[Tensor, Tensor]:
    """(a, b), each [1000]: share of the signal and of the noise at every step (SPEC 2.7).

    Roots in double: those of float32 differ in their last bit between processors.
    """
    kept = (1 - torch.linspace(0.0001, 0.02, NUM_STEPS)).cumprod(0)
    signal = kept.double().sqrt().float()
    return signal, (1 - signal.double().square()).sqrt().float()


def table_cells(config: IMPureConfig, positions: Tensor, rows: int, cols: int) -> Tensor:
    """Cells of the position tables that a grid covers, raster order: positions [N, 2] -> [N, L] int64 (SPEC 2.4)."""
    device, side = positions.device, config.table_side
    raster = torch.arange(rows, device=device)[:, None] * side + torch.arange(cols, device=device)
    return positions[:, :1] * side + positions[:, 1:] + raster.flatten()


def other_chunks(k: int, device: torch.device) -> Tensor:
    """[K, K-1] int64: row i holds every chunk but i."""
    others = torch.arange(k - 1, device=device).expand(k, -1)
    return others + (others >= torch.arange(k, device=device)[:, None])


def hidden_rows(x: Tensor, chunks: int) -> Tensor:
    """The rows of chunk i in replica i.  x: [N*K, 1 + L, E] -> [N*K, M, E]."""
    own = x[:, 1:].unflatten(0, (-1, chunks)).unflatten(2, (chunks, -1))  # [N, K, K, M, E]
    return own.diagonal(dim1=1, dim2=2).movedim(-1, 1).flatten(0, 1)


class IMPure(nn.Module):
    """The purifier.  State dict in the authors' names; tables and schedule are computed, never loaded.

    config: IMPureConfig; random weights by the authors' initialisation.
    load_report: what loading did with the keys of the file; None for random weights.
    kept: what is stored for a backward pass, the rest is computed again (``memory.kept_by("tight")``); no part of the
        weights, changes no result, and nothing where no gradient is wanted.
    """

    pos_embed: Tensor  # [1, 1 + T*T, D]
    decoder_pos_embed: Tensor  # [1, 1 + T*T, E]
    sqrt_alphas_cumprod: Tensor  # [1000]
    sqrt_one_minus_alphas_cumprod: Tensor  # [1000]

    def __init__(self, config: IMPureConfig) -> None:
        super().__init__()
        if not isinstance(config, IMPureConfig):
            raise ConfigError(f"IMPure wants an IMPureConfig, got {type(config).__name__}; create_model takes names.")
        self.config = c = config
        self.load_report: checkpoints.LoadReport | None = None
        self.kept: Set[str] = ALL
        d, e, k, values = c.embed_dim, c.decoder_embed_dim, c.num_chunks, 3 * c.patch_size**2
        self.cls_token = nn.Parameter(torch.empty(1, 1, d))
        self.proj_weights = nn.Parameter(torch.ones(len(c.out_indices) + 1, 1, 1, 1))
        self.mask_token = nn.Parameter(torch.empty(1, 1, e))
        self.patch_embed = PatchEmbed(c.patch_size, d)
        self.blocks = nn.ModuleList(Block(d, c.num_heads, c.mlp_ratio, c.norm_eps) for _ in range(c.depth))
        self.norm = nn.LayerNorm(d, eps=c.norm_eps)
        self.proj_layers = nn.ModuleList(nn.Linear(d, d) for _ in c.out_indices)
        self.decoder_head_embed = nn.Linear((k - 1) * d, e)
        self.decoder_embed = nn.Linear(d, e)
        self.decoder_embed_norm = nn.LayerNorm(e, eps=c.norm_eps)
        self.decoder_blocks: Any = nn.ModuleList(
            Block(e, c.decoder_num_heads, c.mlp_ratio, c.norm_eps) for _ in range(c.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(e, eps=c.norm_eps)
        self.decoder_pred = nn.Linear(e, values)
        self.decoder_rb1 = nn.Conv2d(3, 3, 3, 1, 1)

        signal, noise = noise_schedule()
        for name, value in (
            ("pos_embed", sincos_table(d, c.table_side)),
            ("decoder_pos_embed", sincos_table(e, c.table_side)),
            ("sqrt_alphas_cumprod", signal),
            ("sqrt_one_minus_alphas_cumprod", noise),
        ):
            self.register_buffer(name, value, persistent=False)
        self.register_load_state_dict_pre_hook(_ignore_tables)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.config.embed_dim, -1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def normalise(self, images: Tensor) -> Tensor:
        """[0, 1] units -> the network's."""
        return (images - per_channel(self.config.mean, images)) / per_channel(self.config.std, images)

    def unnormalise(self, x: Tensor) -> Tensor:
        """The inverse; nothing is clamped."""
        return x * per_channel(self.config.std, x) + per_channel(self.config.mean, x)

    def add_noise(self, x: Tensor, step: Tensor, noise: Tensor) -> Tensor:
        """a[step] * x + b[step] * noise; step has x's leading axes."""
        shape = step.shape + (1,) * (x.ndim - step.ndim)
        a = self.sqrt_alphas_cumprod[step].view(shape)
        b = self.sqrt_one_minus_alphas_cumprod[step].view(shape)
        return a * x + b * noise.to(x.dtype)

    def encode(
        self, tokens: Tensor, note: Note, embed: Callable[[Tensor], Tensor] = _as_it_is
    ) -> tuple[Tensor, Tensor]:
        """Encode every chunk on its own.  tokens: [N*K, M, D] -> its class token [N*K, D], features [N*K, M, E].

        embed: makes the tokens of what is given in their place.
        """
        head = self.cls_token + self.pos_embed[:, :1]

        def enter(tokens: Tensor) -> Tensor:
            tokens = embed(tokens)
            return torch.cat((head.expand(tokens.shape[0], -1, -1), tokens), dim=1)  # [N*K, 1 + M, D]

        x, outputs, layers = tokens, [], []
        for b, block in enumerate(self.blocks):
            x = block(x, self.kept, enter=_as_it_is if b else enter)
            if b == 0:
                note("enc_block0", x)
            if b in self.config.out_indices:
                outputs.append(x)
                layers.append(self.proj_layers[self.config.out_indices.index(b)])

        def mix(*outputs: Tensor) -> State:
            sides = [layer(y) for layer, y in zip(layers, outputs, strict=False)]
            weights = self.proj_weights.softmax(dim=0).view(-1)
            mixed = sum(w * y for w, y in zip(weights, [*sides, outputs[-1]], strict=True))
            latent = self.norm(mixed)
            return mixed, latent, self.decoder_embed_norm(self.decoder_embed(latent[:, 1:]))

        mixed, latent, features = again(mix, *outputs, x, kept="sides" in self.kept)
        note("enc_mix", mixed)
        note("latent", latent)
        return latent[:, 0].contiguous(), features  # backward would keep a view's whole tensor

    def hide(self, clean: Tensor, noised: Tensor | None, draws: Draws) -> Tensor:
        """What chunk i becomes in replica i.  clean, noised: [N, K, M, E] -> [N, K, M, E] (SPEC 2.8)."""
        if self.config.feature_mask == "noise":
            assert draws.feature_noise is not None
            return self.add_noise(clean if noised is None else noised, draws.feature_step, draws.feature_noise)
        return self.mask_token.to(clean.dtype).expand(clean.shape) if noised is None else noised

    def decode(self, clean: Tensor, hidden: Tensor, heads: Tensor, draws: Draws, cells: Tensor, note: Note) -> Tensor:
        """Rebuild every chunk from the others.  clean, hidden: [N, K, M, E]; heads: [N, K, E].

        -> decoded tokens [N, L, E] in raster order, each from the replica that hid it.
        """
        n, k, m, e = clean.shape
        replica_hides = torch.eye(k, dtype=torch.bool, device=clean.device).view(k, 1, k, 1, 1)
        x = torch.where(replica_hides, hidden, clean).reshape(k * n, k * m, e)  # [K*N, L, E], shuffled
        restore = draws.restore
        position = self.decoder_pos_embed[0, 1:][cells]  # [N, L, E], raster
        x = gather_tokens(x, restore.repeat(k, 1)) + position.repeat(k, 1, 1)
        head = note("head", heads.transpose(0, 1).reshape(k * n, 1, e))
        x = note("dec_in", torch.cat((head, x), dim=1))  # [K*N, 1 + L, E]
        for b, block in enumerate(self.decoder_blocks):
            x = block(x, self.kept)
            if b == 0:
                note("dec_block0", x)
        x = self.decoder_norm(note("dec_out", x)[:, 1:]).view(k, n, k * m, e)
        source = restore // m  # [N, L]: the chunk, hence the replica, of each raster token
        return note("assembled", x.gather(0, source.view(1, n, k * m, 1).expand(1, -1, -1, e))[0])

    def reconstruct(self, images: Tensor, draws: Draws, keep: Container[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """The network as a pure function of images and draws (SPEC section 2).

        images: [N, 3, H, W] in [0, 1], sides fitting the config (``Draws.sample`` checks them).
        keep: names of checkpoints to return (SPEC section 9), for instance ("latent", "dec_out"); other than of the
            draws, "shuffled" and "pred_raw", they exist under the backend "reference" alone.
        Returns the prediction in normalised units ([N, 3, H, W]; [N, L, 3pp] without pixel_conv) and the checkpoints.
        """
        if not images.is_floating_point():
            raise InputTypeError(
                f"images has dtype {images.dtype}; wanted floats in [0, 1] (model.purify takes uint8)."
            )
        draws.check(self.config, images.shape)
        kept: dict[str, Tensor] = {}

        def note(name: str, x: Tensor) -> Tensor:
            if name in keep:
                kept[name] = x
            return x

        rows, cols, _ = grid_of(self.config, images.shape)
        cells = note("index_pos", table_cells(self.config, draws.positions, rows, cols))
        note("ids_shuffle", draws.order)
        if "ids_restore" in keep:
            note("ids_restore", draws.restore)
        walk = self.reconstruct_literally if wished() == "reference" else self.reconstruct_shuffled
        return note("pred_raw", walk(images, draws, cells, rows, cols, note)), kept

    def reconstruct_shuffled(
        self, images: Tensor, draws: Draws, cells: Tensor, rows: int, cols: int, note: Note
    ) -> Tensor:
        """``reconstruct`` on the operators: shuffled order end to end, both passes in one encoder call, the first
        decoder block on the rows that differ, the last on the hidden ones.  cells: [N, L], raster.
        """
        c, n, k = self.config, images.shape[0], self.config.num_chunks
        order, step, m = draws.order, draws.image_step, rows * cols // self.config.num_chunks
        cells = cells.gather(1, order)
        passes, signal, level = 1, None, None
        if c.image_mask == "noise":
            passes, signal, level = 2, self.sqrt_alphas_cumprod[step], self.sqrt_one_minus_alphas_cumprod[step]
        x = patch_mask(
            images, order, c.patch_size, c.mean, c.std, signal=signal, level=level, noise=draws.image_noise
        )  # [passes*N, L, 3pp]

        def embed(x: Tensor) -> Tensor:
            x = F.linear(x, self.patch_embed.proj.weight.flatten(1), self.patch_embed.proj.bias)
            x = x.view(passes, n, k * m, c.embed_dim) + self.pos_embed[0, 1:][cells]
            note("shuffled", x[0].view(n * k, m, c.embed_dim))
            return x.view(-1, m, c.embed_dim)

        heads, features = self.encode(x, lambda name, x: x, embed)
        features = features.view(passes, n, k, m, c.decoder_embed_dim)
        hidden = self.hide(features[0], features[1] if passes == 2 else None, draws)

        position = self.decoder_pos_embed[0, 1:][cells]
        packed = torch.cat(
            (
                features[0].flatten(1, 2) + position,
                hidden.flatten(1, 2) + position,
                again(self.head_tokens, heads[: n * k], kept="sides" in self.kept),
            ),
            dim=1,
        )  # [N, 2L + K, E]: what the replicas are made of
        x, last = packed, len(self.decoder_blocks) - 1
        for b, block in enumerate(self.decoder_blocks):  # only the hidden rows are used after the last one
            x = block(x, self.kept, chunks=k if b == 0 else 0, hides=k if b == last else 0)
        patches = again(lambda x: self.decoder_pred(self.decoder_norm(x)), x, kept="sides" in self.kept)
        patches = patches.view(n, k * m, 3 * c.patch_size**2)  # shuffled
        if not c.pixel_conv:
            return unshuffle(patches, order)
        return patch_assemble(patches, order, rows, cols, self.decoder_rb1.weight, self.decoder_rb1.bias)

    def reconstruct_literally(
        self, images: Tensor, draws: Draws, cells: Tensor, rows: int, cols: int, note: Note
    ) -> Tensor:
        """``reconstruct`` as the authors compute it, every checkpoint named as in SPEC section 9."""
        c, n, k = self.config, images.shape[0], self.config.num_chunks
        m = rows * cols // k

        def embed(x: Tensor, name: str) -> Tensor:
            tokens = note(name, self.patch_embed(x) + self.pos_embed[0, 1:][cells])
            return gather_tokens(tokens, draws.order).view(n * k, m, c.embed_dim)

        x = self.normalise(images)
        tokens = note("shuffled", embed(x, "embedded"))
        heads, features = self.encode(tokens, note)
        clean = features.view(n, k, m, c.decoder_embed_dim)

        noised = None
        if c.image_mask == "noise":
            assert draws.image_noise is not None
            noised_image = note("noised_image", self.add_noise(x, draws.image_step, draws.image_noise))
            tokens = embed(noised_image, "embedded_noise")
            _, features = self.encode(tokens, lambda name, x: note("noise_latent", x) if name == "latent" else x)
            noised = features.view(n, k, m, c.decoder_embed_dim)

        decoded = self.decode(clean, self.hide(clean, noised, draws), self.head_tokens(heads), draws, cells, note)
        prediction = note("patches", self.decoder_pred(decoded))  # [N, L, 3pp]
        return self.decoder_rb1(unpatchify(prediction, rows, cols)) if c.pixel_conv else prediction

    def head_tokens(self, heads: Tensor) -> Tensor:
        """Every replica's head, made of the other chunks' class tokens.  [N*K, D] -> [N, K, E]."""
        k = self.config.num_chunks
        heads = heads.view(-1, k, heads.shape[1])[:, other_chunks(k, heads.device)].flatten(2)  # [N, K, (K-1)*D]
        return self.decoder_head_embed(heads) + self.decoder_pos_embed[:, :1]

    def to_image(self, prediction: Tensor, rows: int, cols: int) -> Tensor:
        """A prediction of ``reconstruct`` as images [N, 3, rows*p, cols*p] in [0, 1] units, unclamped."""
        return self.unnormalise(prediction if self.config.pixel_conv else unpatchify(prediction, rows, cols))

    def forward(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """Purified images, unclamped.  images: [N, 3, H, W] in [0, 1]; draws=None takes fresh ones
        (training draws in training mode)."""
        if draws is None:
            draws = Draws.sample(self.config, images.shape, None, training=self.training, device=images.device)
        rows, cols, _ = grid_of(self.config, images.shape)
        return self.to_image(self.reconstruct(images, draws)[0], rows, cols)

    def purify(
        self,
        images: Tensor,
        *,
        seed: int | None = None,
        streams: Tensor | Sequence[int] | None = None,
        draws: Draws | None = None,
        clamp: bool = True,
        max_batch: int | None = None,
        image_step: int | None = None,
        feature_step: int | None = None,
        check: bool = True,
    ) -> Tensor:
        """Purify pictures of any size.

        images: [N, 3, H, W] or [3, H, W]; uint8, or float in [0, 1]; same shape and dtype come back.
        seed: key of all randomness; None takes fresh entropy from the operating system.
        streams: one integer in [0, 2**32) an image (default 0..N-1): equal (seed, stream) gives equal
            draws whatever the batch.
        draws: given ``Draws`` for the padded images or tiles, in place of seed, streams and steps.
        clamp: cut the result to [0, 1].
        max_batch: tiles a network call; bounds its memory (default well under 1 GiB), changes rounding (1e-5) alone.
            About 50 bytes a pixel of the picture come on top, and 60 a pixel of the up to 1024 tiles held at once.
        image_step, feature_step: masking strength in 0..999, in place of the config's; larger hides more.
        check: refuse images outside [0, 1] (costs a synchronisation on a GPU).

        Differentiable in float images that require gradients; independent of train or eval mode.
        Raises InputError, InputTypeError or ConfigError.
        """
        config = with_steps(self.config, image_step, feature_step, draws)
        dtype = self.cls_token.dtype
        options: dict[str, Any] = dict(seed=seed, streams=streams, draws=draws)
        options |= dict(clamp=clamp, max_batch=max_batch, check=check)
        return purify_images(self, config, dtype, images, **options)

    def save_pretrained(self, folder: str, card: str | None = None) -> None:
        """Write ``model.safetensors`` (config inside), ``config.json`` and, if given, a model card."""
        checkpoints.save_folder(folder, self.state_dict(), self.config, card)

    @classmethod
    def from_pretrained(cls, name_or_folder: str, **hub_options: Any) -> IMPure:
        """Load a folder of ``save_pretrained``, or a Hugging Face hub id (needs the extra ``hub``).

        Strict: missing or unexpected weights raise CheckpointError.  hub_options: revision, token, cache_dir, ...
        """
        config, state = checkpoints.read_folder(name_or_folder, **hub_options)
        return cls.from_state(config, state, name_or_folder)

    def push_to_hub(self, repo_id: str, card: str | None = None, **hub_options: Any) -> None:
        """Upload what ``save_pretrained`` writes (needs the extra ``hub``)."""
        checkpoints.push_folder(repo_id, self.state_dict(), self.config, card, **hub_options)

    @classmethod
    def from_state(cls, config: IMPureConfig, state: dict[str, Tensor], source: str, strict: bool = True) -> IMPure:
        """A model in eval mode, fp32, from a state dict; ``source`` names the weights in messages."""
        model = cls(config)
        model.load_report = checkpoints.load_state(model, state, source, strict=strict)
        return model.eval()
