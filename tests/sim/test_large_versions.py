"""A version of ten thousand updates: the real coordinator on the bus in memory, and agents that are no more than messages."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

from syncline.bus.blobs import get_record, put_blob
from syncline.bus.commits import line_of, record_in
from syncline.bus.memory import MemoryBroker, MemoryBus
from syncline.chance import new_id
from syncline.shm import SharedMemory
from syncline.spec import RunSpec
from syncline.wire import subjects
from syncline.wire.messages import (
    MAX_BLOB_RECORD_BYTES,
    MAX_HEAD_BYTES,
    BlobRef,
    Committed,
    Head,
    Heartbeat,
    Hello,
    Offer,
    Roster,
    Submit,
    Submitted,
    decode,
    encode,
)
from syncline_cli import runs
from syncline_coordinator.service import Coordinator, CoordinatorSettings
from syncline_sim.children import StubChildren
from syncline_sim.loop import VirtualLoop
from syncline_sim.scene import Scene, small_spec

RUN = "r"
AT_ONCE = 500  # messages, so that no subscription of the coordinator's overflows


class Crowd:
    """So many agents: what they would say, over one connection."""

    def __init__(self, bus: MemoryBus, count: int) -> None:
        self.bus, self.names = bus, [f"agent-{i:05}" for i in range(count)]
        self.sessions = {name: new_id() for name in self.names}

    async def join(self) -> None:
        for some in self._batches():
            for name in some:
                hello = Hello(session=self.sessions[name], tasks=["*"])
                await self.bus.publish(subjects.hello(name), encode(hello))
                beat = Heartbeat(session=self.sessions[name], clock=0, progress=0)
                await self.bus.publish(subjects.heartbeat(RUN, name), encode(beat))
            await asyncio.sleep(0.01)

    async def offer(self, names: list[str], clock: int, head: Head) -> None:
        update = memoryview(np.full(1, 0.5).tobytes())
        for name in names:
            prefix = partial(subjects.update_prefix, RUN, name)
            blob, digest = await put_blob(self.bus, prefix, update, 8192, codec="fp64")
            offer = Offer(session=self.sessions[name], clock=clock, base=head.version, term=head.term, line=head.line,
                          samples=4, steps=4, blob=blob, digest=digest)  # fmt: skip
            await self.bus.put(subjects.offer(RUN, name), encode(offer))

    def _batches(self) -> Iterator[list[str]]:
        return (self.names[i : i + AT_ONCE] for i in range(0, len(self.names), AT_ONCE))


async def head_when(bus: MemoryBus, version: int, phase: str) -> Head:
    while True:
        head = await runs.head_of(bus, RUN)
        if head.version == version and head.phase == phase:
            return head
        assert head.phase != "failed", head.reason
        await asyncio.sleep(0.05)


async def two_versions(spec: RunSpec, merged: int) -> tuple[MemoryBus, list[Head]]:
    """The second version is made by as many agents as the first; what the others offer for the first comes too late."""
    children, broker = StubChildren(Scene(spec)), MemoryBroker()

    async def child(memory: SharedMemory) -> Any:
        return children.evaluator(memory)

    bus = broker.connect("cli")
    serving = asyncio.create_task(Coordinator(broker.connect("coordinator"), child, CoordinatorSettings()).serve())
    await asyncio.sleep(0.1)
    answer = decode(
        Submitted, await bus.request(subjects.submit(), encode(Submit(spec=spec.model_dump(mode="json"))), 60)
    )
    assert answer.run, answer
    await head_when(bus, 0, "waiting")
    await asyncio.sleep(1.0)
    crowd = Crowd(bus, spec.agents.min)
    await crowd.join()
    first = await head_when(bus, 0, "training")
    await crowd.offer(crowd.names[:merged], 1, first)
    second = await head_when(bus, 1, "training")
    await crowd.offer(crowd.names[merged:], 1, first)
    await crowd.offer(crowd.names[:merged], 2, second)
    last = await head_when(bus, 2, "done")
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    return bus, [first, second, last]


def played(agents: int, merged: int) -> tuple[MemoryBus, list[Head], list[Committed]]:
    spec = small_spec(
        agents={"min": agents, "max": agents, "lost_after_s": 3600.0},
        sync={"quorum": merged, "grace_s": 0.0},
        stop={"versions": 2},
        task_options={"elements": 1},
    )

    async def whole() -> tuple[MemoryBus, list[Head], list[Committed]]:
        bus, heads = await two_versions(spec, merged)
        records = []
        for version in (1, 2):
            line = await line_of(bus, RUN, version, 1)
            assert line is not None and isinstance(line.record, BlobRef)
            records.append(await record_in(bus, RUN, line))
        for head in heads:
            assert len(encode(head)) < MAX_HEAD_BYTES
            assert head.roster is not None and isinstance(head.plan, BlobRef | None)
        prefix = partial(subjects.model_prefix, RUN)
        assert heads[-1].roster is not None
        found = await get_record(bus, subjects.model_stream(RUN), prefix, heads[-1].roster, MAX_BLOB_RECORD_BYTES)
        assert len(decode(Roster, found).agents) == agents
        return bus, heads, records

    loop = VirtualLoop(most_turns=10_000_000)
    try:
        return loop.run_until_complete(whole())
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.close()


def check(agents: int, merged: int) -> None:
    _, heads, (first, second) = played(agents, merged)
    assert [len(record.plan.merged) for record in (first, second)] == [merged, merged]
    assert (len(first.norms), len(first.plan.late), len(first.dropped)) == (merged, agents - merged, 0)
    assert len(second.dropped) == agents - merged and second.dropped_more == 0
    assert {drop.clock for drop in second.dropped} == {1} and "late" in second.dropped[0].reason
    assert heads[-1].digest == second.digest


def test_a_version_of_a_thousand_updates_commits_with_a_record_that_is_a_blob() -> None:
    check(1000, 900)


@pytest.mark.long
def test_a_version_of_ten_thousand_updates_commits() -> None:
    """A message holds the record of some 6,000."""
    check(11_000, 10_000)
