"""A version of ten thousand updates: the real coordinator on the memory bus, with agents that consist of messages only."""

from __future__ import annotations

from functools import partial

import pytest

from sim.crowd import RUN, Crowd, head_when, in_virtual_time, start_coordinator, submit
from syncline.bus.blobs import get_record
from syncline.bus.commits import line_of, record_in
from syncline.bus.memory.bus import MemoryBroker, MemoryBus
from syncline.wire import subjects
from syncline.wire.messages import (
    MAX_BLOB_RECORD_BYTES,
    MAX_HEAD_BYTES,
    BlobRef,
    Committed,
    Head,
    Roster,
    decode,
    encode,
)
from syncline_sim.loop import VirtualLoop
from syncline_sim.scenario import small_spec


async def two_versions(bus: MemoryBus, agents: int, merged: int) -> list[Head]:
    """Make the second version with as many agents as the first; the offers of the others for the first come too late."""
    spec = small_spec(
        agents={"min": agents, "max": agents, "lost_after_s": 3600.0},
        sync={"quorum": merged, "grace_s": 0.0},
        stop={"versions": 2},
        task_options={"elements": 1},
    )
    answer = await submit(bus, spec)
    assert answer.run, answer
    await head_when(bus, 0, "waiting")
    crowd = Crowd(bus, agents)
    await crowd.join()
    first = await head_when(bus, 0, "training")
    await crowd.offer(crowd.names[:merged], 1, first)
    second = await head_when(bus, 1, "training")
    await crowd.offer(crowd.names[merged:], 1, first)
    await crowd.offer(crowd.names[:merged], 2, second)
    return [first, second, await head_when(bus, 2, "done")]


async def whole_record(bus: MemoryBus, version: int) -> Committed:
    line = await line_of(bus, RUN, version, 1)
    assert line is not None and isinstance(line.record, BlobRef)
    return await record_in(bus, RUN, line)


def check(agents: int, merged: int) -> None:
    async def play(_: VirtualLoop) -> tuple[list[Head], Roster, Committed, Committed]:
        broker = MemoryBroker()
        await start_coordinator(broker)
        bus = broker.connect("cli")
        heads = await two_versions(bus, agents, merged)
        assert heads[-1].roster is not None
        prefix, stream = partial(subjects.model_prefix, RUN), subjects.model_stream(RUN)
        listed = await get_record(bus, stream, prefix, heads[-1].roster, MAX_BLOB_RECORD_BYTES)
        return heads, decode(Roster, listed), await whole_record(bus, 1), await whole_record(bus, 2)

    heads, roster, first, second = in_virtual_time(play)
    assert max(len(encode(head)) for head in heads) < MAX_HEAD_BYTES
    assert len(roster.agents) == agents
    assert [len(record.plan.merged) for record in (first, second)] == [merged, merged]
    assert (len(first.norms), len(first.plan.late), len(first.dropped)) == (merged, agents - merged, 0)
    assert len(second.dropped) == agents - merged and second.dropped_more == 0
    assert {drop.clock for drop in second.dropped} == {1} and "late" in second.dropped[0].reason
    assert heads[-1].digest == second.digest


def test_a_version_of_hundreds_of_updates_commits_with_a_record_that_is_a_blob() -> None:
    check(400, 350)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_version_of_ten_thousand_updates_commits() -> None:
    """A message holds the record of some 6,000."""
    check(10_500, 10_000)
