"""A finished update is offered despite faults of the bus, unless the run goes on without that update."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from syncline.bus.base import Entry
from syncline.bus.blobs import STALE_S
from syncline.errors import Denied, DiskFull, NoResponders, StreamFull, Unavailable, Unreachable
from syncline.observe.telemetry import Telemetry
from syncline.runtime.child_messages import PeriodReport, TrainPeriod
from syncline.transform.codecs import RAW
from syncline.wire import subjects
from syncline.wire.messages import Head, Offer, decode, encode
from syncline_agent.identity import AgentIdentity
from syncline_agent.local_period import LocalPeriod
from syncline_agent.run_view import RunView
from syncline_agent.update_sender import SendOptions, UpdateSender
from unit.stored_run import LAYOUT

RUN, ME = "r", AgentIdentity("a1", "5" * 32, Path(), None)
CONTENT = memoryview(bytes(range(LAYOUT.blob_bytes)))
SYNC, ASYNC = SendOptions(LAYOUT, RAW, 2, late_counts=False), SendOptions(LAYOUT, RAW, 2, late_counts=True)
PERIOD = TrainPeriod(version=2, clock=3, part=0, parts=1)
UPDATE = LocalPeriod(PERIOD, 2, 1, 0, PeriodReport(rows=8, steps=4, seconds=0.5))
Simulated = Callable[[Coroutine[Any, Any, Any]], tuple[Any, float]]


def sender(bus: Any, **head: Any) -> UpdateSender:
    """Make a sender, and put this head on the bus."""
    now = Head(**{"run": RUN, "term": 1, "version": 2, "phase": "training", **head})
    bus.keys[subjects.head_key(RUN)] = Entry(encode(now), 1)
    return UpdateSender(bus, RUN, ME, RunView(bus, RUN, lambda head: None), Telemetry(bus, RUN, "a1"))


def blobs(bus: Any) -> dict[str, int]:
    """Count the chunks on the bus, by blob."""
    found = [subject.split(".")[6] for subject in bus.held if ".update." in subject]
    return {blob: found.count(blob) for blob in found}


def offer(bus: Any) -> Offer:
    return decode(Offer, bus.held[subjects.offer(RUN, "a1")])


def test_an_update_is_offered_once_all_its_chunks_are_held(bus: Any, simulated: Simulated) -> None:
    assert simulated(sender(bus).send(UPDATE, CONTENT, SYNC)) == (True, 0.0)
    assert blobs(bus) == {offer(bus).blob.id: 2} and [*bus.held][-1] == subjects.offer(RUN, "a1")
    assert (offer(bus).clock, offer(bus).base, offer(bus).samples) == (3, 2, 8)


@pytest.mark.parametrize("error", [Unreachable("cut off"), NoResponders("no stream"), Unavailable("no JetStream")])
def test_it_is_kept_while_the_bus_is_out_of_reach_and_then_delivered(
    bus: Any, simulated: Simulated, error: Exception
) -> None:
    bus.fail("put", None, *[error] * 1000)
    bus.fail("kv_get", *[error] * 100)
    sent, took_s = simulated(sender(bus).send(UPDATE, CONTENT, ASYNC))
    assert sent and took_s > 600.0
    assert blobs(bus)[offer(bus).blob.id] == 2, "what was put before the outage may be purged: all of it is put again"
    assert len(blobs(bus)) > 1


@pytest.mark.parametrize("error", [Unreachable("cut off"), Unavailable("no JetStream")])
@pytest.mark.parametrize(
    ("how", "head", "sent"),
    [
        (SYNC, {"version": 3}, False),
        (ASYNC, {"version": 3}, True),
        (ASYNC, {"version": 3, "term": 2, "epoch": 7}, False),
        (SYNC, {"term": 2}, True),
    ],
)
def test_it_is_given_up_where_the_run_goes_on_without_it(
    bus: Any, simulated: Simulated, how: SendOptions, head: dict[str, int], sent: bool, error: Exception
) -> None:
    bus.fail("put", *[error] * 60)
    assert simulated(sender(bus, **head).send(UPDATE, CONTENT, how))[0] == sent
    assert (subjects.offer(RUN, "a1") in bus.held) == sent


def test_an_offer_that_cannot_be_made_in_time_is_none_of_a_blob_that_may_be_gone(
    bus: Any, simulated: Simulated
) -> None:
    bus.fail("put", None, None, *[Unreachable("cut off")] * 30)
    sent, took_s = simulated(sender(bus).send(UPDATE, CONTENT, ASYNC))
    assert sent and took_s > STALE_S - 4.0
    assert len(blobs(bus)) == 2 and [*blobs(bus)][-1] == offer(bus).blob.id


def test_where_there_is_no_room_it_says_so_and_goes_on_with_the_blob_that_it_began(
    bus: Any, simulated: Simulated
) -> None:
    bus.fail("put", None, *[StreamFull("limit reached")] * 10)
    assert simulated(sender(bus).send(UPDATE, CONTENT, ASYNC))[0]
    assert blobs(bus) == {offer(bus).blob.id: 2}
    assert [what for call, what in bus.calls if call == "put"].count(next(iter(bus.held))) == 1, (
        "what is held is not put again"
    )
    (told,) = [data for _, data in bus.published if b"stream-full" in data]
    assert b"Raise agents.max" in told


def test_a_broker_without_room_is_told_once_each_time_with_its_own_remedy(bus: Any, simulated: Simulated) -> None:
    async def twice() -> None:
        one = sender(bus)
        for _ in range(2):
            bus.fail("put", *[DiskFull("no space left on device")] * 5)
            assert await one.send(UPDATE, CONTENT, ASYNC)
            bus.held.clear()

    simulated(twice())
    told = [data for _, data in bus.published if b"stream-full" in data]
    assert len(told) == 2 and all(b"Free some of the disk" in data for data in told)


def test_where_there_is_no_room_for_long_what_was_begun_is_left_to_be_purged(bus: Any, simulated: Simulated) -> None:
    bus.fail("put", None, *[StreamFull("limit reached")] * 100)
    assert simulated(sender(bus).send(UPDATE, CONTENT, ASYNC))[0]
    assert blobs(bus)[offer(bus).blob.id] == 2 and len(blobs(bus)) == 2


def test_what_the_broker_forbids_is_not_tried_again(bus: Any, simulated: Simulated) -> None:
    bus.fail("put", Denied("not yours"))
    with pytest.raises(Denied):
        simulated(sender(bus).send(UPDATE, CONTENT, ASYNC))


def test_whoever_is_cancelled_stops_at_once(bus: Any, simulated: Simulated) -> None:
    bus.fail("put", *[Unreachable("cut off")] * 1000)

    async def stopped() -> None:
        task = asyncio.create_task(sender(bus).send(UPDATE, CONTENT, ASYNC))
        await asyncio.sleep(100.0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    assert simulated(stopped())[1] == 100.0
