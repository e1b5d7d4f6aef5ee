"""The batcher: what goes together, when, and what becomes of failures and of callers that have gone."""

import asyncio
import threading

import pytest

from impure_fast.serving.batching import Batcher


def run(scenario, wait=0.02, work=lambda kind, items: [(kind, item) for item in items]):
    """Run scenario(batcher, calls); calls lists the (kind, items) that went through together."""
    calls = []

    def record(kind, items):
        calls.append((kind, items))
        return work(kind, items)

    async def main():
        batcher = Batcher(record, wait)
        batcher.start()
        try:
            return await asyncio.wait_for(scenario(batcher, calls), 10)
        finally:
            await batcher.stop()

    return asyncio.run(main())


def test_equal_kinds_go_together_and_others_apart():
    async def scenario(batcher, calls):
        jobs = [batcher.submit("ab"[i % 2], i, 8) for i in range(6)]
        assert await asyncio.gather(*jobs) == [("ab"[i % 2], i) for i in range(6)]
        assert calls == [("a", [0, 2, 4]), ("b", [1, 3, 5])]

    run(scenario)


def test_a_full_batch_does_not_wait():
    async def scenario(batcher, calls):
        await asyncio.gather(*(batcher.submit("a", i, 3) for i in range(6)))
        assert [items for _, items in calls] == [[0, 1, 2], [3, 4, 5]]

    run(scenario, wait=100)


def test_a_lone_job_waits_no_longer_than_the_deadline():
    async def scenario(batcher, calls):
        loop = asyncio.get_running_loop()
        began = loop.time()
        await batcher.submit("a", 0, 8)
        assert 0.05 <= loop.time() - began < 2

    run(scenario, wait=0.05)


def test_what_comes_during_a_batch_fills_the_next():
    gate = threading.Event()

    def work(kind, items):
        gate.wait(10)
        return items

    async def scenario(batcher, calls):
        first = asyncio.create_task(batcher.submit("a", 0, 4))
        while not calls:
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(batcher.submit("a", i, 4)) for i in range(1, 6)]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(first, *others)
        assert [items for _, items in calls] == [[0], [1, 2, 3, 4], [5]]

    run(scenario, wait=0, work=work)


def test_a_failure_reaches_its_batch_alone():
    def work(kind, items):
        if kind == "bad":
            raise ValueError("broken")
        return items

    async def scenario(batcher, calls):
        jobs = [batcher.submit(kind, kind, 8) for kind in ("bad", "good", "bad")]
        a, b, c = await asyncio.gather(*jobs, return_exceptions=True)
        assert (str(a), b, str(c)) == ("broken", "good", "broken")
        assert batcher.running

    run(scenario, work=work)


def test_a_caller_that_has_gone_is_not_worked_for():
    async def scenario(batcher, calls):
        gone = asyncio.create_task(batcher.submit("a", "gone", 8))
        stays = asyncio.create_task(batcher.submit("a", "stays", 8))
        await asyncio.sleep(0)
        gone.cancel()
        assert await stays == ("a", "stays")
        assert calls == [("a", ["stays"])]

    run(scenario)


def test_stopping_answers_the_batch_in_work():
    begun, go = threading.Event(), threading.Event()

    def work(kind, items):
        begun.set()
        go.wait(5)
        return items

    async def scenario(batcher, calls):
        job = asyncio.create_task(batcher.submit("a", 7, 1))
        await asyncio.to_thread(begun.wait, 5)
        stopping = asyncio.create_task(batcher.stop())
        await asyncio.sleep(0.01)
        go.set()
        assert await job == 7
        await stopping

    run(scenario, work=work)


def test_stopping_ends_the_waiting():
    async def scenario(batcher, calls):
        waits = asyncio.create_task(batcher.submit("a", 0, 8))
        await asyncio.sleep(0)
        await batcher.stop()
        with pytest.raises(asyncio.CancelledError):
            await waits
        assert not batcher.running and calls == []

    run(scenario, wait=100)
