"""What is measured: every operator and network is declared here once, and all else derives from it.

A problem is an operator on one shape: its tensors and their law, its options, its floor in bytes and operations.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from impure_fast import Draws, IMPure, backend, create_model
from impure_fast.draws import grid_of
from impure_fast.errors import InputError
from impure_fast.model import table_cells
from impure_fast.ops._lib import OPERATORS
from impure_fast.ops.patch_mix import shown
from impure_fast.philox import IMAGE_NOISE

# Arguments of a reference that no problem sets; one called dtype is that of the first tensor.
REST: dict[str, dict[str, Any]] = {
    "patch_mask": {"seed": None, "streams": None},
    "patch_assemble": {"clamp": False, "to_uint8": False},
    "normalise_rows": {"scale": 1.0, "zero": 0},
}
DTYPES = ("float32", "bfloat16", "float16", "float64")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# How a tensor is filled, in shape, dtype and generator.  Never zeros: they are faster than data.
LAWS = {
    "normal": "torch.randn({shape}, generator=generator).to(dtype)",
    "image": "torch.rand({shape}, generator=generator).to(dtype)",
    "uniform": "torch.rand({shape}, generator=generator)",  # float32 whatever the problem's dtype
    "ties": "torch.rand({shape}, generator=generator).mul(256).floor().div(256)",
    "order": "torch.rand({shape}, generator=generator).argsort(dim=1)",
    "counters": "torch.randint(-(2**63), 2**63 - 1, {shape}, generator=generator)",
}


@dataclass(frozen=True)
class Problem:
    """One operator on one shape.

    tensors: {"name": (shape, law)}; several names share one packed tensor, unbound along axis 2.
    gradients: names of the tensors that a backward pass reaches.
    options: the operator's other arguments, by name.
    flops: of a forward pass without what can be shared or left out; NaN: to be counted.
    unread: entries of the inputs, in the problem's dtype, on which the result does not depend.
    tolerance: error beside twice the reference's own, in units of the dtype's eps times the size of the truth.
    small: for tests and memory checkers; left out of a run unless asked for.  large: too much for a CPU's one thread.
    """

    op: str
    shape: str
    tensors: Mapping[str, tuple[tuple[int, ...], str]]
    options: Mapping[str, Any]
    flops: float
    unread: int = 0
    tolerance: float = 4.0
    gradients: tuple[str, ...] = ()
    small: bool = False
    large: bool = False
    preset: str = field(default="", repr=False)  # of a network; "" for an operator

    @property
    def name(self) -> str:
        """The problem as a file name."""
        return "_".join((self.op, *self.shape.split())).replace("=", "")

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Names of the dtypes that it comes in."""
        return DTYPES if any("dtype" in LAWS[law] for _, law in self.tensors.values()) else DTYPES[:1]

    @property
    def names(self) -> list[str]:
        """Of the tensors, in the order of ``make``."""
        return " ".join(self.tensors).split()

    def make(self, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, ...]:
        """Fresh inputs; float tensors of law "normal" and "image" in ``dtype``."""
        scope = {"torch": torch, "generator": torch.Generator().manual_seed(seed), "dtype": dtype}
        made: list[Tensor] = []
        for names, (shape, law) in self.tensors.items():
            x = eval(LAWS[law].format(shape=shape), scope).to(device)
            made += x.unbind(2) if " " in names else [x]
        return tuple(made)

    def refill(self, inputs: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
        """Other numbers in the memory of ``make``'s inputs."""
        for x, y in zip(inputs, self.make(inputs[0].dtype, str(inputs[0].device), seed), strict=True):
            x.copy_(y)
        return inputs

    def leaves(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """The inputs as the start of a new graph."""
        pairs = zip(self.names, inputs, strict=True)
        return [x.detach().requires_grad_(name in self.gradients) for name, x in pairs]

    def reference(self, *inputs: Tensor) -> Any:
        """The oracle: plain PyTorch, or the network in the authors' order of operations."""
        if self.preset:
            return network(self.preset, "reference")(*inputs)
        return first(OPERATORS[self.op].reference(*self.arguments(inputs)), self.op)

    def arguments(self, inputs: tuple[Tensor, ...]) -> list[Any]:
        """Inputs and options in the order of the operator's reference."""
        values = {**dict(zip(self.names, inputs, strict=True)), **self.options, **REST.get(self.op, {})}
        values["dtype"] = inputs[0].dtype
        return [values[name] for name in inspect.signature(OPERATORS[self.op].reference).parameters]

    def work(self, inputs: tuple[Tensor, ...], out: list[Tensor]) -> tuple[float, float]:
        """(bytes, operations) no implementation can do without: every input, weight and output once."""
        tensors, flops = [*inputs, *out], self.flops
        if self.preset:
            tensors += list(weights(self.preset, inputs[0].dtype, str(inputs[0].device)).parameters())
            flops = network_flops(self.preset, inputs[0].shape)
        size = sum(x.numel() * x.element_size() for x in tensors)
        return float(size - self.unread * inputs[0].element_size()), flops


def first(out: Any, op: str) -> Any:
    """An operator's result without attention's log-sum-exp."""
    return out[0] if op == "reconstruction_attention" else out


_made: dict[tuple[str, torch.dtype, str], IMPure] = {}


def weights(preset: str, dtype: torch.dtype, device: str) -> IMPure:
    """The network of a preset; its random weights are the same whatever dtype and device."""
    key = (preset, dtype, device)
    if key not in _made:
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = create_model(preset).eval().to(device, dtype)
        if len(_made) >= 3:  # a ViT-B is 0.5 GB
            _made.clear()
        _made[key] = model
    return _made[key]


def reconstruct(model: IMPure, images: Tensor, draws: Draws) -> Tensor:
    """The network: images -> prediction in its units."""
    return model.reconstruct(images, draws)[0]


def network(preset: str, name: str, run: Callable[..., Tensor] = reconstruct) -> Callable[[Tensor], Tensor]:
    """``run`` on a backend, as a function of the images alone; the draws are the fastest that there are for all."""

    def call(images: Tensor) -> Tensor:
        model = weights(preset, images.dtype, str(images.device))
        draws = Draws.sample(model.config, images.shape, 0, device=images.device)
        with backend(name):
            return run(model, images, draws)

    return call


@functools.cache
def network_flops(preset: str, shape: tuple[int, ...]) -> float:
    """Operations of the products, convolutions and attention, without those that cannot change the result."""
    with FakeTensorMode(), torch.no_grad(), backend("reference"), FlopCounterMode(display=False) as counter:
        model = create_model(preset)
        draws = Draws.sample(model.config, shape, 0)
        rows, cols, _ = grid_of(model.config, shape)
        cells = table_cells(model.config, draws.positions, rows, cols)
        model.reconstruct_shuffled(torch.empty(shape), draws, cells, rows, cols, lambda _, x: x)
    return float(counter.get_total_flops())


def _attention(
    batch: int, heads: int, tokens: int, width: int, hidden: int = 0, chunks: int = 0, small: bool = False
) -> Problem:
    options = {"scale": width**-0.5, "chunks": chunks}
    shape = f"{batch}x{heads}x{tokens}x{width}"
    if chunks:  # tokens: of a replica, L + 1
        rows, clean = 2 * (tokens - 1) + chunks, (tokens - 1) // chunks * (chunks - 1)  # of a replica
        # K > 2: what a clean row and a clean row have in common is the same in every replica.
        pairs = chunks * (tokens**2 - clean**2) + (tokens - 1) ** 2
        tensors, shape = {"q k v": ((batch, rows, 3, heads, width), "normal")}, f"{shape} shared {chunks}"
    elif hidden:
        tensors = {
            "q": ((batch, hidden, heads, width), "normal"),
            "k v": ((batch, tokens, 2, heads, width), "normal"),
        }
        pairs, shape = hidden * tokens, f"{shape} hidden {hidden}"
    else:
        tensors, pairs = {"q k v": ((batch, tokens, 3, heads, width), "normal")}, tokens * tokens
    flops = 4.0 * batch * heads * pairs * width
    return Problem("reconstruction_attention", shape, tensors, options, flops, gradients=("q", "k", "v"), small=small)


def _patches(n: int, side: int, patch: int, small: bool = False) -> Iterator[Problem]:
    """The four operators on patches, n square pictures."""
    rows = side // patch
    tokens, pixels = rows * rows, (n, 3, side, side)
    shape, shuffle, step = f"{n}x3x{side}x{side} p{patch}", ((n, tokens), "order"), ((n,), "uniform")
    values, noised = 3 * patch * patch, {"signal": step, "level": step}
    yield Problem("order", f"{n}x{tokens}", {"uniforms": ((n, tokens), "ties")}, {}, 0.0, small=small)
    yield Problem(
        "patch_mask",
        shape,
        {"images": (pixels, "image"), "order": shuffle, **noised, "noise": (pixels, "normal")},
        {"patch": patch, "mean": MEAN, "std": STD},
        5.0 * math.prod(pixels),
        gradients=("images",),
        small=small,
    )
    start, stop = shown(tokens, 4, 1)
    tensors = {"purified": (pixels, "image"), "images": (pixels, "image"), "order": shuffle}
    yield Problem(
        "patch_mix",
        shape,
        tensors,
        {"start": start, "stop": stop, "patch": patch},
        0.0,
        unread=math.prod(pixels),  # of each pixel one picture's is shown
        gradients=("purified", "images"),
        small=small,
    )
    yield Problem(
        "patch_assemble",
        shape,
        {
            "patches": ((n, tokens, values), "normal"),
            "order": shuffle,
            "weight": ((3, 3, 3, 3), "normal"),
            "bias": ((3,), "normal"),
        },
        {"rows": rows, "cols": rows, "mean": MEAN, "std": STD},
        (2 * 27 + 2.0) * math.prod(pixels),
        gradients=("patches", "weight", "bias"),
        small=small,
    )


def _net(preset: str, batch: int, side: int, small: bool = False, large: bool = False) -> Problem:
    tensors = {"images": ((batch, 3, side, side), "image")}
    shape = f"{batch}x3x{side}x{side}"
    return Problem(f"reconstruct {preset}", shape, tensors, {}, float("nan"), small=small, large=large, preset=preset)


def _noise(n: int, count: int, small: bool = False) -> Problem:
    tensors = {"streams": ((n,), "counters"), "seed": ((), "counters")}
    options = {"purpose": IMAGE_NOISE, "count": count, "gaussian": True}
    return Problem("noise", f"{n}x{count}", tensors, options, 0.0, small=small)


def _rows(*shape: int, small: bool = False) -> Problem:
    """Floats to floats: 8-bit results may differ by one, which a gate for integers refuses."""
    tensors = {"x": (shape, "normal"), "weight": (shape[-1:], "uniform"), "bias": (shape[-1:], "uniform")}
    flops = 7.0 * math.prod(shape)  # sum; square and sum; scale and shift, twice
    return Problem("normalise_rows", "x".join(map(str, shape)), tensors, {"eps": 1e-6}, flops, small=small)


PROBLEMS: tuple[Problem, ...] = (
    *_patches(2, 16, 4, small=True),
    *_patches(64, 224, 16),
    *_patches(256, 64, 4),
    _attention(2, 2, 10, 8, small=True),
    _attention(2, 2, 10, 8, hidden=3, small=True),
    _attention(2, 2, 13, 8, chunks=4, small=True),
    _attention(16, 16, 197, 32),
    _attention(64, 12, 50, 64),
    _attention(512, 4, 65, 24),
    _attention(1024, 4, 17, 32),
    _attention(144, 3, 65, 32),  # impure_tiny: 18 tiles, both passes, K = 4
    _attention(72, 2, 257, 32),
    _attention(72, 2, 257, 32, hidden=64),
    _attention(18, 2, 257, 32, chunks=4),
    _attention(4, 16, 197, 32, chunks=4),  # the released network's first decoder block
    _attention(4, 16, 785, 32),  # and at 448 pixels
    _noise(2, 77, small=True),
    _noise(4, 3 * 224 * 224),
    _noise(18, 3 * 64 * 64),
    _rows(3, 5, 24, small=True),
    _rows(32, 50, 768),
    _rows(144, 65, 96),
    _net("impure_tiny", 1, 32, small=True),
    _net("impure_tiny", 9, 64),
    _net("impure_base_patch16_224", 1, 224),
    _net("impure_base_patch16_224", 4, 224),
    _net("impure_base_patch16_224", 64, 224, large=True),
)


def problems(names: str = "", shapes: str = "", small: bool = False, device: str = "cpu") -> list[Problem]:
    """Problems whose operator begins with one of ``names`` (commas between) and whose shape holds ``shapes``.

    Raises InputError where there is none.
    """
    found = [p for p in PROBLEMS if p.small == small and shapes in p.shape and (device != "cpu" or not p.large)]
    taken = [p for p in found if p.op.startswith(tuple(names.split(",")))]
    if not taken:
        known = "; ".join(f"{p.op} {p.shape}" for p in PROBLEMS if p.small == small)
        raise InputError(f"No problem fits ops {names!r} and shapes {shapes!r} on {device}; there are {known}.")
    return taken


def cases(options: Any) -> Iterator[tuple[Problem, str, str]]:
    """(problem, dtype, mode) as the command line's options choose them."""
    for problem in problems(options.ops, options.shapes, options.small, options.device):
        for dtype in options.dtypes:
            for mode in options.modes:
                if dtype in problem.dtypes and (mode == "forward" or problem.gradients):
                    yield problem, dtype, mode
