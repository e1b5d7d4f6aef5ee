"""Network calls as CUDA graphs: drawing and network in one launch, captured once for each number of tiles.

tiles, streams, seed -> copied into a graph's own tensors -> replay -> a copy of its result
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import IMPureConfig
from ..draws import Draws
from ..ops._dispatch import wished
from ..philox import Seed
from ..purify import even_batch

LIMIT = 64  # graphs kept, the latest used; pictures smaller than a tile may ask for one each size
WARM = 3  # calls before a capture: kernels are compiled and workspaces made there

_capturing = threading.Lock()  # torch allows one capture at a time in a process

_log = logging.getLogger("impure_fast")


class Cuda:
    """Capturing and replaying on one GPU; all graphs share one memory pool and run on one stream, one at a time."""

    def __init__(self, device: torch.device) -> None:
        # Of the priority pool: no stream that a caller may hold is the same.
        self.device, self.stream = device, torch.cuda.Stream(device, priority=-1)
        self.pool = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Work of the block goes to the graphs' stream, after the caller's and before what the caller does next."""
        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            caller.wait_stream(self.stream)

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(replay, the tensor that holds the result after it)."""
        for _ in range(WARM):
            function()
        graph = torch.cuda.CUDAGraph()
        try:
            # The default mode would also forbid what other threads do meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                result = function()
        except RuntimeError:
            self.pool = torch.cuda.graph_pool_handle()  # the old one may still be taken for recording
            raise
        return graph.replay, result


class Captured(NamedTuple):
    """One graph with the tensors that it reads and writes."""

    tiles: Tensor
    streams: Tensor
    seed: Tensor
    replay: Callable[[], None]
    result: Tensor


class Graphs:
    """A folded network with its draws, called through graphs.

    sizes: numbers of tiles to capture; a smaller batch is padded to the next.  None: those of ``even_batch``.
    Each replay takes its seed and streams as tensors, so that it draws afresh.
    """

    def __init__(self, network: Any, sizes: Sequence[int] | None, cuda: Any = None) -> None:
        self.network, self.sizes = network, sizes
        self.cuda = Cuda(network.device) if cuda is None else cuda
        self.captured: dict[tuple[Any, ...], Captured | None] = {}  # oldest use first; None: cannot be captured
        self.hits, self._lock = 0, threading.Lock()

    def __call__(self, config: IMPureConfig, tiles: Tensor, seed: Seed, streams: Tensor) -> Tensor:
        """tiles: [B, 3, h, w] float32 in [0, 1], streams: [B] int64, both on the GPU -> purified tiles."""
        n = len(tiles)
        sizes = self.sizes or (s for s in itertools.count(n) if s == even_batch(s))
        size = next(s for s in sizes if s >= n)
        key = (size, *tiles.shape[2:], config.image_step, config.feature_step, wished())
        out = torch.empty_like(tiles)  # of the caller's stream, which may outlive the next replay
        with self._lock, self.cuda.aside():
            graph = self.captured.pop(key) if key in self.captured else self._capture(config, size, tiles)
            self.captured[key] = graph
            if len(self.captured) > LIMIT:
                del self.captured[next(iter(self.captured))]
            if graph is not None:
                graph.tiles[:n] = tiles
                graph.streams[:n] = streams
                if isinstance(seed, Tensor):
                    graph.seed.copy_(seed)
                else:
                    graph.seed.fill_((seed + 2**63) % 2**64 - 2**63)
                graph.replay()
                self.hits += 1
                return out.copy_(graph.result[:n])
        return self._launch(config, tiles, seed, streams)

    def _launch(self, config: IMPureConfig, tiles: Tensor, seed: Seed, streams: Tensor) -> Tensor:
        return self.network(tiles, Draws.sample(config, tiles.shape, seed, streams, device=tiles.device))

    def _capture(self, config: IMPureConfig, size: int, like: Tensor) -> Captured | None:
        tiles = like.new_zeros(size, *like.shape[1:])
        streams, seed = (torch.zeros(s, dtype=torch.int64, device=like.device) for s in ((size,), ()))
        launch = partial(self._launch, config, tiles, seed, streams)
        try:
            with _capturing:
                return Captured(tiles, streams, seed, *self.cuda.record(launch))
        except RuntimeError as error:
            _log.warning("No CUDA graph for %d tiles of %dx%d: %s", size, *like.shape[2:], error)
            return None
