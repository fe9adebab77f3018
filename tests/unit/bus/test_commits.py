"""The log of commits: small records in their lines, large ones as blobs beside them, and the space for both."""

from __future__ import annotations

from typing import Any

import pytest

from syncline.bus.base import StreamConfig
from syncline.bus.blobs import BlobGone
from syncline.bus.commits import line_of, put_commit, record_in
from syncline.bus.memory.bus import MemoryBroker, MemoryBus
from syncline.errors import StreamFull, Unreachable
from syncline.model.manifest import Manifest
from syncline.spec.run_spec import RunSpec, parse
from syncline.wire import subjects
from syncline.wire.chunks import LEAST_PAYLOAD_BYTES
from syncline.wire.messages import LOG_INLINE_BYTES, BlobRef, Committed, Dropped, LogLine, Plan, PlanEntry, encode
from syncline_coordinator.reservation import (
    LOG_BYTES,
    LOG_REASON_BYTES,
    LOG_UPDATE_BYTES,
    LOG_VERSION_BYTES,
    Reservation,
    log_updates,
)

LARGE = BlobRef(id="f" * 32, size=1 << 50, chunks=1 << 24)
LAYOUT = Manifest(dtype="fp32", elements=6, chunk_elements=1024, tensors=[])


def entry(name: str) -> PlanEntry:
    return PlanEntry(agent=name, clock=1 << 40, lag=1 << 20, weight=0.1, blob=LARGE, digest=b"d" * 32,
                     samples=1 << 40, steps=1 << 40, seconds=1.5)  # fmt: skip


def record(updates: int, term: int = 1, name: str = "a1", dropped: int = 0, late: int = 0) -> Committed:
    plan = Plan(version=1, reason="r" * 200, merged=[entry(name)] * updates, late=[name] * late)
    drops = [Dropped(agent=name, clock=1 << 40, reason="r" * LOG_REASON_BYTES)] * dropped
    return Committed(run="r", term=term, version=1, digest="f" * 32, model=LARGE, plan=plan, norms=[1.5] * updates,
                     dropped=drops, bytes_up=1 << 60, bytes_down=1 << 60, phases_s={"collect": 0.5, "merge": 0.5})  # fmt: skip


async def log(max_bytes: int = 64 << 20, **broker: Any) -> MemoryBus:
    bus = MemoryBroker(**broker).connect("coordinator")
    await bus.ensure_stream(StreamConfig(subjects.log_stream("r"), ("syncline.v1.r.log.>",), max_bytes, 1, "refuse"))
    return bus


@pytest.mark.parametrize("payload", [LEAST_PAYLOAD_BYTES, 1 << 20])
@pytest.mark.parametrize("updates", [0, 3, 400, 10_000])
async def test_a_record_of_any_size_is_put_and_read_whole(updates: int, payload: int) -> None:
    bus, put = await log(max_payload=payload), record(updates)
    await put_commit(bus, put)
    line = await line_of(bus, "r", 1, 1)
    assert line is not None and line.model == LARGE and await record_in(bus, "r", line) == put
    assert isinstance(line.record, bytes) == (len(encode(put)) <= min(LOG_INLINE_BYTES, payload // 32))
    largest = max(len(message.data) for message in await bus.read(subjects.log_stream("r"), 1, 1000))
    assert largest <= payload - 4096


async def test_the_line_comes_after_its_record_and_again_takes_no_more_room() -> None:
    bus = await log()
    for _ in range(3):  # an answer was lost
        await put_commit(bus, record(0))
    assert (await bus.state(subjects.log_stream("r"))).messages == 1
    await put_commit(bus, record(1000, term=2))
    last = (await bus.read(subjects.log_stream("r"), 1, 1000))[-1]
    assert last.subject == subjects.log_record("r", 1, 2)


async def test_a_record_that_lost_a_chunk_says_so() -> None:
    bus = await log()
    await put_commit(bus, record(1000))
    line = await line_of(bus, "r", 1, 1)
    assert line is not None
    await bus.purge(subjects.log_stream("r"), f"{subjects.log_record('r', 1, 1)}.>")
    with pytest.raises(BlobGone):
        await record_in(bus, "r", line)


async def test_a_log_that_is_full_refuses_and_keeps_what_it_has() -> None:
    bus = await log(max_bytes=60_000)
    await put_commit(bus, record(100))
    for term in (2, 3):
        with pytest.raises(StreamFull):
            await put_commit(bus, record(1000 * term, term=term))
    line = await line_of(bus, "r", 1, 9)
    assert line is not None and line.term == 1 and await record_in(bus, "r", line) == record(100)


async def test_a_line_is_put_again_until_the_bus_takes_it(bus: Any) -> None:
    bus.fail("put", Unreachable("no answer"))
    await put_commit(bus, record(1))
    assert [*bus.held] == [subjects.log_record("r", 1, 1)]


# -- space -------------------------------------------------------------------------------------------------------------
def size(**counts: int) -> int:
    put = record(name="n" * 63, **{"updates": 0, **counts})
    return len(encode(put)) + len(encode(LogLine(version=1, term=1, model=LARGE, record=LARGE)))


def test_what_a_record_reserves_is_enough_for_the_longest_names_and_numbers() -> None:
    """Frames of chunks add a sixteenth at most."""
    share = 16 / 17
    assert size() < LOG_VERSION_BYTES * share
    assert size(updates=1000) - size() < 1000 * LOG_UPDATE_BYTES * share
    assert size(late=1000, dropped=1000) - size() < 1000 * LOG_UPDATE_BYTES * share


@pytest.mark.parametrize(
    ("changes", "updates"),
    [
        ({"agents": {"min": 2, "max": 1000}}, 1000),
        ({"agents": {"min": 2, "max": 1000}, "sync": {"sample": 0.1}}, 100),
        ({"agents": {"min": 2, "max": 1000}, "sync": {"sample": 0.1, "quorum": 2}}, 1000),
        ({"agents": {"min": 2, "max": 1000}, "sync": {"kind": "async", "buffer": 7}}, 14),
        ({"agents": {"min": 2, "max": 1000}, "sync": {"kind": "async", "buffer": "all"}}, 2000),
    ],
)
def test_the_log_is_sized_for_every_version_of_the_run(changes: dict[str, Any], updates: int) -> None:
    spec = parse(RunSpec, {"task": "a:B", "stop": {"versions": 500}, **changes})
    assert log_updates(spec, 1000) == updates
    space = Reservation.of(spec, LAYOUT, 1000)
    assert space.log == LOG_BYTES + 500 * (LOG_VERSION_BYTES + updates * LOG_UPDATE_BYTES)
    assert space.total >= space.log and [s.full for s in space.streams("r") if s.name == subjects.log_stream("r")] == [
        "refuse"
    ]
