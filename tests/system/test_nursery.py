"""Forks on request: a fork that nobody waits for any more, and many at once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator

import pytest

from syncline.runtime.nursery import Nursery


@pytest.fixture
async def nursery() -> AsyncIterator[Nursery]:
    started = Nursery.start()
    started.open()
    yield started
    await started.close()


async def test_a_fork_that_is_cancelled_is_killed_and_the_next_one_comes(nursery: Nursery) -> None:
    cancelled = asyncio.create_task(nursery.fork("time:sleep", 60))
    await asyncio.sleep(0)
    cancelled.cancel()
    worker = await nursery.fork("time:sleep", 60)
    others = [w for w in nursery._workers.values() if w is not worker]
    assert [await w.exited for w in others] in ([], [-signal.SIGKILL]), "it may have been reaped already"
    worker.signal(signal.SIGTERM)
    assert await worker.exited == -signal.SIGTERM


async def test_hundreds_of_forks_at_once_all_come(nursery: Nursery) -> None:
    padding = "x" * 1000
    workers = await asyncio.gather(*(nursery.fork("builtins:len", padding) for _ in range(300)))
    codes = await asyncio.gather(*(worker.exited for worker in workers))
    assert len(codes) == 300 and len({worker.number for worker in workers}) == 300
