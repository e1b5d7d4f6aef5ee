"""``Batcher``: work of one kind that waits at the same time goes through one call, in one thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class _Job:
    kind: Hashable
    item: Any
    size: int
    due: float
    result: asyncio.Future[Any]


class Batcher:
    """Forms batches by size and deadline.

    run: (kind, items) -> one result an item; called in one thread, never twice at once.
    wait: seconds that the oldest job waits for others of its kind.  While a batch is in work, the next one fills.

    A job that its caller no longer waits for is not run.  ``start`` needs a running event loop.
    """

    def __init__(self, run: Callable[[Any, list[Any]], list[Any]], wait: float) -> None:
        self._run, self._wait = run, wait
        self._waiting: list[_Job] = []  # oldest first
        self._stopping = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")

    def start(self) -> None:
        self._changed = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._work())

    async def stop(self) -> None:
        """End after the batch in work; what still waits is cancelled."""
        self._stopping = True
        self._changed.set()
        await asyncio.wait([self._task])
        for job in self._waiting:
            job.result.cancel()
        await asyncio.to_thread(self._thread.shutdown)

    @property
    def running(self) -> bool:
        return not self._task.done()

    async def submit(self, kind: Hashable, item: Any, size: int) -> Any:
        """The result for ``item``, run together with at most ``size`` - 1 others of an equal ``kind``."""
        loop = asyncio.get_running_loop()
        job = _Job(kind, item, size, loop.time() + self._wait, loop.create_future())
        self._waiting.append(job)
        self._changed.set()
        return await job.result  # a caller that is cancelled cancels it

    async def _next(self) -> list[_Job]:
        """The oldest job and its companions, once they are enough or it has waited long enough; none at the end."""
        loop = asyncio.get_running_loop()
        while not self._stopping:
            self._changed.clear()
            self._waiting = [job for job in self._waiting if not job.result.cancelled()]
            left = None
            if self._waiting:
                oldest = self._waiting[0]
                jobs = [job for job in self._waiting if job.kind == oldest.kind][: oldest.size]
                left = oldest.due - loop.time()
                if len(jobs) == oldest.size or left <= 0:
                    self._waiting = [job for job in self._waiting if job not in jobs]
                    return jobs
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
        return []

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while jobs := await self._next():
            items = [job.item for job in jobs]
            try:
                results: list[Any] = await loop.run_in_executor(self._thread, self._run, jobs[0].kind, items)
            except Exception as error:
                for job in jobs:
                    if not job.result.done():
                        job.result.set_exception(error)
            else:
                for job, result in zip(jobs, results, strict=True):
                    if not job.result.done():
                        job.result.set_result(result)
