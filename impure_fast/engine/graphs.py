"""Network calls as CUDA graphs: drawing and network in one launch, captured once for each number of tiles.

tiles, streams, seed -> copied into a graph's own tensors -> replay -> a copy of its result
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import IMPureConfig
from ..draws import Draws
from ..philox import Seed

LIMIT = 64  # graphs kept; pictures smaller than a tile could ask for one each size
WARM = 3  # calls before a capture: kernels are compiled and workspaces made there

_log = logging.getLogger("impure_fast")


class Cuda:
    """Capturing and replaying on one GPU; all graphs share one memory pool and run on one stream, one at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Work of the block goes to the graphs' stream, after the caller's and before what the caller does next."""
        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            yield
        caller.wait_stream(self.stream)

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(replay, the tensor that holds the result after it)."""
        for _ in range(WARM):
            function()
        graph = torch.cuda.CUDAGraph()
        # The default mode would also forbid what other threads do meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            result = function()
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

    sizes: numbers of tiles to capture; a smaller batch is padded to the next.  None: the powers of two.
    Each replay takes its seed and streams as tensors, so that it draws afresh.
    """

    def __init__(self, network: Any, sizes: Sequence[int] | None, cuda: Any = None) -> None:
        self.network, self.sizes = network, sizes
        self.cuda = Cuda(network.device) if cuda is None else cuda
        self.captured: dict[tuple[int, ...], Captured | None] = {}  # None: cannot be captured
        self.hits, self._lock = 0, threading.Lock()

    def __call__(self, config: IMPureConfig, tiles: Tensor, seed: Seed, streams: Tensor) -> Tensor:
        """tiles: [B, 3, h, w] float32 in [0, 1], streams: [B] int64, both on the GPU -> purified tiles."""
        n = len(tiles)
        size = 1 << (n - 1).bit_length() if self.sizes is None else min(s for s in self.sizes if s >= n)
        key = (size, *tiles.shape[2:], config.image_step, config.feature_step)
        out = torch.empty_like(tiles)  # of the caller's stream, which may outlive the next replay
        with self._lock, self.cuda.aside():
            if key not in self.captured and len(self.captured) < LIMIT:
                self.captured[key] = self._capture(config, size, tiles)
            graph = self.captured.get(key)
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
            return Captured(tiles, streams, seed, *self.cuda.record(launch))
        except RuntimeError as error:
            _log.warning("No CUDA graph for %d tiles of %dx%d: %s", size, *like.shape[2:], error)
            return None
