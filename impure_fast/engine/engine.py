"""``Engine``: ``model.purify`` for service.  Same law, weights folded and packed in one precision, no gradients.

images -> purify_images (checks, tiles, draws; as the model's) -> Folded, on each device its own -> images
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import IMPureConfig
from ..draws import Draws, stream_ids
from ..errors import ConfigError, Error, InputError
from ..model import IMPure
from ..philox import Seed, seed_or_fresh
from ..purify import Tiling, check_images, purify_images, with_steps
from .folded import Folded
from .graphs import Graphs
from .products import Fp8, Observed, OneDnn, OneDnnInt8, Plain, Product, onednn_missing

PRECISIONS = {"cpu": ("fp32", "bf16", "int8"), "cuda": ("fp32", "bf16", "fp16", "fp8")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KEPT = 10_000  # calls whose times stats() looks at


class Engine:
    """A purifier ready for service.

    model: an ``IMPure``, of which the engine folds a copy; changed weights (an optimiser's step, load_state_dict) are
        noticed at the next call and folded anew.  Writes through ``.data`` leave no trace: call ``refresh`` after them.
    precision: "fp32", "bf16" or "int8" on a CPU; "fp32", "bf16", "fp16" or "fp8" (from compute capability 8.9 on) on
        a GPU.  None takes bf16 where the hardware has it, else fp32 or fp16.
    batch_sizes: tiles that one network call may take; the largest bounds memory, and on a GPU each is captured as a
        CUDA graph at its first use, or by ``warmup``.  None: as ``model.purify``; graphs of 1, 2, 3, 4, 6, 8, 12, ...
    device: as torch names it, or several, over which batches are split; None stays with the model's.
    calibration: for int8 and fp8, pictures [N, 3, H, W] in [0, 1] of the size to come, whose activations fix the
        scales; None takes synthetic ones.
    compile: also let torch.compile fuse what lies between products and operators; a minute or more at the first call.
        For GPUs: on a CPU oneDNN's packed products, which it cannot take, are worth more.

    Results equal ``model.purify`` under the same seed and streams up to the precision.  Thread-safe; can be pickled,
    and is then folded again at the first call.  Raises ConfigError for options that cannot be.
    """

    def __init__(
        self,
        model: IMPure,
        *,
        precision: str | None = None,
        batch_sizes: Sequence[int] | None = None,
        device: str | torch.device | Sequence[str | torch.device] | None = None,
        calibration: Tensor | None = None,
        compile: bool = False,
    ) -> None:
        if not isinstance(model, IMPure):
            raise ConfigError(f"model is a {type(model).__name__}; Engine wants an IMPure (imp.load gives one).")
        wanted: Any = model.cls_token.device if device is None else device
        self.devices = [_numbered(d) for d in (wanted if isinstance(wanted, list | tuple) else (wanted,))]
        kinds = {d.type for d in self.devices}
        if len(kinds) != 1 or not kinds <= PRECISIONS.keys():
            raise ConfigError(f"device={wanted!r}: wanted one or more devices of one kind, cpu or cuda.")
        known = PRECISIONS[kind := kinds.pop()]
        self.precision = _best(kind) if precision is None else precision
        if self.precision not in known:
            raise ConfigError(f"precision={precision!r}: on {kind} choose one of {', '.join(known)}.")
        if compile and self.precision == "int8":
            raise ConfigError('compile=True: int8 runs on oneDNN alone; choose "fp32" or "bf16".')
        if batch_sizes is not None and (isinstance(batch_sizes, int) or not batch_sizes or min(batch_sizes) < 1):
            raise ConfigError(f"batch_sizes={batch_sizes!r}: wanted tile counts of at least 1, or None.")
        if calibration is not None and len(calibration) == 0:
            raise ConfigError("calibration holds no pictures; leave it out, or give some dozens of yours.")
        self.batch_sizes = None if batch_sizes is None else tuple(sorted(batch_sizes))
        self.model, self.calibration, self.compile = model, calibration, compile
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._networks: list[tuple[Folded, Graphs | None]] = []
        self._state: list[tuple[int, int]] = []
        self._forget()

    def _forget(self) -> None:
        self._times: deque[float] = deque(maxlen=KEPT)
        self._images, self._calls, self._busy = 0, 0, 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def purify(
        self,
        images: Tensor,
        *,
        seed: Seed | None = None,
        streams: Tensor | Sequence[int] | None = None,
        draws: Draws | None = None,
        clamp: bool = True,
        image_step: int | None = None,
        feature_step: int | None = None,
        check: bool = True,
    ) -> Tensor:
        """``model.purify`` without gradients: the same arguments, the same shape, dtype and device of the result.

        Raises Error where a gradient is asked for, and as ``model.purify`` does.
        """
        if torch.is_grad_enabled() and isinstance(images, Tensor) and images.requires_grad:
            raise Error("An Engine gives no gradients; model.purify does (or detach the images).")
        check_images(images, clamp, False)
        began = time.perf_counter()
        config = with_steps(self.model.config, image_step, feature_step, draws)
        options: dict[str, Any] = dict(seed=seed_or_fresh(seed), streams=streams, draws=draws, clamp=clamp, check=check)
        result = self._on_devices(config, images, options)
        if result.is_inference():  # which could enter no graph, such as that of a classifier's training
            result = result.clone()
        with self._lock:
            self._times.append(taken := time.perf_counter() - began)
            self._busy += taken
            self._calls += 1
            self._images += 1 if images.ndim == 3 else len(images)
        return result

    def _on_devices(self, config: IMPureConfig, images: Tensor, options: dict[str, Any]) -> Tensor:
        networks = self._ready()
        if len(networks) == 1 or images.ndim != 4 or len(images) < 2 or options["draws"] is not None:
            return self._run(networks[0], config, images, options)
        ids = stream_ids(options["streams"], len(images), "cpu")
        parts, own = images.tensor_split(len(networks)), ids.tensor_split(len(networks))
        streams = [torch.cuda.current_stream(d) for d in self.devices if d.type == "cuda"]

        def there(network: tuple[Folded, Graphs | None], part: Tensor, ids: Tensor) -> Tensor:
            with contextlib.ExitStack() as stack:  # a thread begins on streams of its own
                for stream in streams:
                    stack.enter_context(torch.cuda.stream(stream))
                return self._run(network, config, part, {**options, "streams": ids})

        with ThreadPoolExecutor(len(networks)) as pool:
            todo = [partial(there, *one) for one in zip(networks, parts, own, strict=True)]
            calls = [pool.submit(copy_context().run, call) for call in todo]
            return torch.cat([call.result() for call in calls])

    def _run(
        self, chosen: tuple[Folded, Graphs | None], config: IMPureConfig, images: Tensor, options: dict[str, Any]
    ) -> Tensor:
        network, drawing = chosen
        draws, device = options["draws"], network.device
        options = options | dict(draws=draws and draws.to(device), max_batch=self.batch_sizes and self.batch_sizes[-1])
        with _plain(device):
            moved = images.to(device, non_blocking=device.type == "cuda")  # to a CPU nothing would wait for it
            result = purify_images(network, config, torch.float32, moved, drawing=drawing, **options)
        return _moved(result, images.device)

    def _ready(self) -> list[tuple[Folded, Graphs | None]]:
        """The folded network of each device, a GPU's with graphs, made anew if the model's weights have changed."""
        weights = list(self.model.parameters())
        if any(p.is_inference() for p in weights):
            raise ConfigError("The model was made under torch.inference_mode, where no change of it can be seen.")
        state = [(p.data_ptr(), p._version) for p in weights]
        with self._lock:
            if state != self._state:
                self._networks = list(map(self._network, self.devices))
                self._state, self._held = state, [p.detach() for p in weights]  # held: their addresses stay theirs
            return self._networks

    def _network(self, device: torch.device) -> tuple[Folded, Graphs | None]:
        network = _fold(self.model, device, self.precision, self.calibration, self.compile)
        if self.compile:
            network.compile()
        return network, Graphs(network, self.batch_sizes) if device.type == "cuda" else None

    def refresh(self) -> None:
        """Fold the model's weights anew at the next call."""
        with self._lock:
            self._state = []

    def warmup(
        self,
        height: int | None = None,
        width: int | None = None,
        *,
        image_step: int | None = None,
        feature_step: int | None = None,
    ) -> None:
        """Do the first call's work now on every device: fold, pack, load, and on a GPU capture the graphs of one
        picture and of ``batch_sizes``.

        height, width: of the pictures to come; default one tile.  image_step, feature_step: of the calls to come.
        """
        config = self.model.config.with_steps(image_step, feature_step)
        picture = torch.zeros(1, 3, height or config.tile_size, width or config.tile_size)
        options = dict(seed=0, streams=None, draws=None, clamp=True, check=False)
        tile = Tiling.of(config, *picture.shape[2:]).tile
        for network, graphs in self._ready():
            self._run((network, graphs), config, picture, options)
            if graphs is not None:
                with _plain(network.device):
                    for size in self.batch_sizes or ():
                        tiles = torch.zeros(size, 3, *tile, device=network.device)
                        graphs(config, tiles, 0, torch.arange(size, device=network.device))
        with self._lock:
            self._forget()

    def stream(
        self, images: Iterable[Tensor], *, seed: Seed | None = None, batch: int = 1, **options: Any
    ) -> Iterator[Tensor]:
        """Purify pictures one after another, in order: a video, a queue.

        images: tensors [3, H, W], of any sizes; the i-th has stream i, so that a seed fixes all.
        batch: neighbours of one size and dtype that go through together; more give more images a second, and wait for
            each other.  Holds at most ``batch`` pictures and their results; on a GPU it reads ``batch`` ahead of its
            results.
        options: as in ``purify``.
        """
        if batch < 1:
            raise InputError(f"batch={batch}: must be at least 1 picture.")
        key, device = seed_or_fresh(seed), self.devices[0]
        ahead = device.type == "cuda"  # the transfers of one group overlap the work of another
        home = torch.cuda.current_stream(device) if ahead else None  # where frames of a GPU were made
        lanes = [torch.cuda.Stream(device) if ahead else None for _ in range(2)]

        def run(group: list[Tensor], first: int, lane: torch.cuda.Stream | None) -> Tensor:
            streams = (torch.arange(len(group)) + first) % 2**32
            with torch.cuda.stream(lane if group[0].is_cpu else home):  # None changes nothing
                stacked = torch.stack(group)
                stacked = stacked.pin_memory() if ahead and stacked.is_cpu else stacked
                return self.purify(stacked, seed=key, streams=streams, **options)

        calls = (partial(run, *group, lanes[i % 2]) for i, group in enumerate(_groups(images, batch)))
        for results in _in_order(calls, 2 if ahead else 1):
            yield from results

    def stats(self) -> dict[str, float]:
        """Of the calls since construction or ``warmup``: count, images, p50_ms, p90_ms, p99_ms (the last 10,000),
        images_per_second (over the time spent in calls: of pictures that lie on a GPU until the work is queued, not
        done); and graph_hits, the network calls that CUDA graphs answered
        since the weights were folded (0 on a CPU)."""
        with self._lock:
            times, images, calls, busy = sorted(self._times), self._images, self._calls, self._busy
        ms = [1e3 * t for t in times]
        cuts = statistics.quantiles(ms, n=100, method="inclusive") if len(ms) > 1 else (ms or [0.0]) * 99
        return {
            "count": calls,
            "images": images,
            "p50_ms": cuts[49],
            "p90_ms": cuts[89],
            "p99_ms": cuts[98],
            "images_per_second": images / busy if busy else 0.0,
            "graph_hits": sum(graphs.hits for _, graphs in self._networks if graphs is not None),
        }


def _numbered(name: str | torch.device) -> torch.device:
    """A device; the caller's current GPU where "cuda" names none, since other threads have another."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is none that torch knows; cpu always works.") from error
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _moved(result: Tensor, device: torch.device) -> Tensor:
    """On ``device``; from a GPU to the host through pinned memory, and there."""
    if result.device.type != "cuda" or device.type != "cpu":
        return result.to(device)
    host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
    host.copy_(result, non_blocking=True)
    torch.cuda.current_stream(result.device).synchronize()
    return host


@contextlib.contextmanager
def _plain(device: torch.device) -> Iterator[None]:
    """Without gradients, and in the engine's precision whatever autocast the caller is under."""
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        yield


def _groups(images: Iterable[Tensor], batch: int) -> Iterator[tuple[list[Tensor], int]]:
    """(neighbours of one shape and dtype, at most ``batch``; the place of the first)."""
    group: list[Tensor] = []
    for place, image in enumerate(images):
        check_images(image, True, False)
        if group and (image.shape, image.dtype) != (group[0].shape, group[0].dtype):
            yield group, place - len(group)
            group = []
        group.append(image)
        if len(group) == batch:  # at once: the next frame of a video may not be there yet
            yield group, place + 1 - len(group)
            group = []
    if group:
        yield group, place + 1 - len(group)


def _in_order(calls: Iterable[Callable[[], Tensor]], depth: int) -> Iterator[Tensor]:
    """Their results; depth: how many run at once, in threads where it is more than 1."""
    if depth == 1:
        yield from (call() for call in calls)
        return
    with ThreadPoolExecutor(depth) as pool:
        waiting: deque[Future[Tensor]] = deque()
        for call in calls:
            waiting.append(pool.submit(copy_context().run, call))
            if len(waiting) == depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _best(kind: str) -> str:
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def _fold(
    model: IMPure, device: torch.device, precision: str, calibration: Tensor | None, compile: bool = False
) -> Folded:
    """The model's weights on ``device``, packed for ``precision``; compile: in products that torch.compile takes."""
    missing = "not to be compiled" if compile else onednn_missing() if device.type == "cpu" else "not a CPU"
    plain = Plain if missing else OneDnn
    if precision in DTYPES:
        dtype = DTYPES[precision]
        if precision == "bf16" and not missing and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            plain = Plain
        return Folded(model, lambda w, b, _: plain(w.to(dtype), b.to(dtype)), dtype, dtype, device)
    if precision == "int8" and missing:
        raise ConfigError(f'precision="int8" needs oneDNN ({missing}); choose "fp32" or "bf16".')
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(f'precision="fp8" needs compute capability 8.9; {device} has less: choose "bf16" or "fp16".')
    seen: list[Observed] = []

    def observe(weight: Tensor, bias: Tensor, _: torch.dtype) -> Observed:
        seen.append(Observed(weight, bias))
        return seen[-1]

    network = Folded(model, observe, torch.float32, torch.float32, device)
    side, tokens = model.config.image_size, (model.config.image_size // model.config.patch_size) ** 2
    count = min(64, max(8, 2_000_000 // (tokens * model.config.embed_dim)))  # a few seconds' work
    images = synthetic_pictures(count, side) if calibration is None else calibration
    options: dict[str, Any] = dict(seed=0, streams=None, draws=None, clamp=True, max_batch=None, check=True)
    with torch.inference_mode():
        purify_images(network, model.config, torch.float32, images.to(device), **options)
    products = iter(seen)  # Folded packs in a fixed order
    if precision == "int8":
        form = (torch.float32, torch.bfloat16, device)
        return Folded(model, lambda w, b, dtype: OneDnnInt8(next(products), dtype), *form)

    def fp8(weight: Tensor, bias: Tensor, _: torch.dtype) -> Product:
        observed = next(products)
        if any(side % 16 for side in weight.shape):
            return Plain(weight.to(torch.bfloat16), bias.to(torch.bfloat16))
        return Fp8(observed)

    return Folded(model, fp8, torch.bfloat16, torch.bfloat16, device)


def synthetic_pictures(count: int, side: int, seed: int = 0) -> Tensor:
    """Pictures to calibrate by where none are given: smooth and hard-edged cells at every scale, some uniform noise.

    -> [count, 3, side, side] in [0, 1].
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    total = torch.zeros(count, 3, side, side)
    for level in range(1, side.bit_length()):
        cells = normal(3, 2**level, 2**level) + normal(1, 2**level, 2**level)  # colours, and what they share
        total += F.interpolate(cells, (side, side), mode="nearest" if level % 2 else "bilinear") * 2.0 ** (1 - level)
    pictures = 0.5 + 0.3 * normal(3, 1, 1) + torch.rand(count, 1, 1, 1, generator=generator) * total
    pictures[::8] = torch.rand(pictures[::8].shape, generator=generator)
    return pictures.clamp(0, 1)
