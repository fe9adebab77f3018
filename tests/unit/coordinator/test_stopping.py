"""A run that nobody drives is ended by moving its head, once, whoever else moves it meanwhile."""

from __future__ import annotations

import asyncio
import json

import pytest

from syncline.bus.base import Delivery
from syncline.bus.memory.bus import MemoryBroker, MemoryBus
from syncline.errors import Unavailable
from syncline.observe.telemetry import Telemetry
from syncline.wire import subjects
from syncline.wire.messages import Head, Stop, Stopped, decode, encode
from syncline_coordinator.head import Deposed, HeadKeeper
from syncline_coordinator.run_queue import TRIES, end_undriven, give_up, stop_reason
from unit.stored_run import RUN, StoredRun, bucket, lose_head, submitted, waiting

STOP = Stop(run=RUN, by="ann@hub")


@pytest.fixture
async def bus() -> MemoryBus:
    return MemoryBroker().connect(subjects.COORDINATOR)


async def head(bus: MemoryBus) -> Head:
    entry = await bus.kv_get(subjects.RUNS_BUCKET, subjects.head_key(RUN))
    assert entry is not None
    return decode(Head, entry.value)


async def test_a_queued_run_is_done_before_it_began(bus: MemoryBus) -> None:
    await submitted(bus)
    assert await end_undriven(bus, STOP) == Stopped(run=RUN, outcome="stopped", reason="stopped by ann@hub")
    now = await head(bus)
    assert (now.phase, now.version, now.term, now.reason) == ("done", 0, 2, "stopped by ann@hub")


async def test_what_it_reserved_is_free_again_but_for_models_and_log(bus: MemoryBus) -> None:
    stored = await StoredRun(bus).make(2)
    await end_undriven(bus, STOP)
    for gone in (subjects.updates_stream, subjects.offers_stream):
        with pytest.raises(Unavailable):
            await bus.state(gone(RUN))
    assert (await bus.state(subjects.log_stream(RUN))).messages == 2
    assert (await bus.state(subjects.model_stream(RUN))).messages == 2 + sum(m.chunks for m in stored.models)


async def test_asking_again_changes_nothing_and_says_how_it_ended(bus: MemoryBus) -> None:
    await submitted(bus)
    await end_undriven(bus, STOP)
    before = await bus.kv_get(subjects.RUNS_BUCKET, subjects.head_key(RUN))
    again = await end_undriven(bus, Stop(run=RUN, by="bob@edge"))
    assert again == Stopped(run=RUN, outcome="ended", reason="stopped by ann@hub")
    assert await bus.kv_get(subjects.RUNS_BUCKET, subjects.head_key(RUN)) == before


async def test_a_run_that_is_not_there_is_unknown(bus: MemoryBus) -> None:
    await bucket(bus)
    assert await end_undriven(bus, STOP) == Stopped(run=RUN, outcome="unknown")


async def test_a_spec_without_a_head_gets_one_that_is_done(bus: MemoryBus) -> None:
    await submitted(bus)
    await lose_head(bus)
    assert (await end_undriven(bus, STOP)).outcome == "stopped"
    assert (await head(bus)).phase == "done"


async def test_whoever_moves_head_meanwhile_is_caught_up_with_or_given_up_on(
    bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    await submitted(bus)
    real, left = MemoryBus.kv_update, 0

    async def moved_before(self: MemoryBus, bucket: str, key: str, value: bytes, revision: int) -> int:
        nonlocal left
        if left:
            left -= 1
            await real(self, bucket, key, encode(waiting()), revision)
        return await real(self, bucket, key, value, revision)

    monkeypatch.setattr(MemoryBus, "kv_update", moved_before)
    left = TRIES
    with pytest.raises(Deposed):
        await end_undriven(bus, STOP)
    assert (await head(bus)).phase == "waiting"
    left = TRIES - 1
    assert (await end_undriven(bus, STOP)).outcome == "stopped"


async def test_it_is_told_in_the_events(bus: MemoryBus) -> None:
    await submitted(bus)
    heard: list[dict[str, str]] = []

    async def hear(delivery: Delivery) -> None:
        heard.append(json.loads(delivery.data))

    await bus.subscribe(subjects.events(RUN, "*"), hear)
    await end_undriven(bus, STOP)
    while not heard:  # noqa: ASYNC110 (a core message takes its turns of the loop, and no time)
        await asyncio.sleep(0)
    assert [(e["event"], e["text"]) for e in heard] == [("run-done", f"run {RUN}: stopped by ann@hub")]


@pytest.mark.parametrize(
    ("by", "said"), [("ann@hub", "ann@hub"), ("", "somebody"), (" \t", "�"), ("a\x1b[2Jb", "a�[2Jb")]
)
def test_who_asked_is_said_as_people_can_read_it(by: str, said: str) -> None:
    assert stop_reason(Stop(run=RUN, by=by)) == f"stopped by {said}"


async def test_a_run_that_cannot_be_opened_fails_but_not_where_another_coordinator_has_moved_it_on(
    bus: MemoryBus,
) -> None:
    await submitted(bus)
    telemetry = Telemetry(bus, RUN, subjects.COORDINATOR)
    mine, others = [await HeadKeeper.read(bus, RUN) for _ in range(2)]
    assert mine is not None and others is not None
    await others.write(waiting().model_copy(update={"version": 7}))
    await give_up(mine, "chunk 0 of blob 12345678 is not on the bus", telemetry)
    assert (await head(bus)).phase == "waiting" and (await head(bus)).version == 7
    await give_up(others, "no such task", telemetry)
    assert (await head(bus)).phase == "failed" and (await head(bus)).reason == "no such task"
