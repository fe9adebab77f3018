"""Head moves by compare-and-set alone: whoever loses is deposed, and an answer that does not come is looked up."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from syncline.bus.base import Entry
from syncline.errors import Conflict, Denied, Unreachable
from syncline.wire import subjects
from syncline.wire.messages import MAX_HEAD_BYTES, Head, Notify, Roster, decode, encode
from syncline_coordinator.head import NOTIFY_ROSTER_BYTES, Deposed, HeadKeeper, RolledBack

RUN = "run-1"
KEY = subjects.head_key(RUN)
FIRST = Head(run=RUN, term=1, version=0, phase="waiting")
SECOND = FIRST.model_copy(update={"phase": "training", "round": 1})
THEIRS = FIRST.model_copy(update={"term": 2})
ROSTER = Roster(parts=1, agents=["a1"], clocks=[0], flags=bytes([1]), presence=bytes([1]))
Simulated = Callable[[Coroutine[Any, Any, Any]], tuple[Any, float]]


def on_bus(bus: Any) -> Head:
    return decode(Head, bus.keys[KEY].value)


def notified(bus: Any) -> list[Notify]:
    assert {subject for subject, _ in bus.published} <= {subjects.notify(RUN)}
    return [decode(Notify, data) for _, data in bus.published]


async def test_the_first_head_is_created_and_read_again(bus: Any) -> None:
    keeper = await HeadKeeper.create(bus, FIRST)
    assert keeper.head == on_bus(bus) == FIRST
    again = await HeadKeeper.read(bus, RUN)
    assert again is not None and again.head == FIRST


async def test_a_run_that_is_not_there_has_no_head(bus: Any) -> None:
    assert await HeadKeeper.read(bus, RUN) is None


async def test_a_head_that_is_there_is_not_created_again(bus: Any) -> None:
    await HeadKeeper.create(bus, FIRST)
    with pytest.raises(Conflict):
        await HeadKeeper.create(bus, SECOND)
    assert on_bus(bus) == FIRST


async def test_writing_moves_head_on_and_tells_everybody(bus: Any) -> None:
    keeper = await HeadKeeper.create(bus, FIRST)
    await keeper.write(SECOND, ROSTER)
    await keeper.write(SECOND.model_copy(update={"version": 1}))
    assert keeper.head == on_bus(bus) and on_bus(bus).version == 1
    first, second = notified(bus)
    assert decode(Head, first.head) == SECOND and decode(Roster, first.roster) == ROSTER
    assert decode(Head, second.head).version == 1 and second.roster == b""


async def test_a_coordinator_that_reads_head_may_write_it(bus: Any) -> None:
    await HeadKeeper.create(bus, FIRST)
    keeper = await HeadKeeper.read(bus, RUN)
    assert keeper is not None
    await keeper.write(THEIRS)
    assert on_bus(bus) == THEIRS


async def test_whoever_comes_second_is_deposed_and_changes_nothing(bus: Any) -> None:
    ours = await HeadKeeper.create(bus, FIRST)
    theirs = await HeadKeeper.read(bus, RUN)
    assert theirs is not None
    await theirs.write(THEIRS)
    bus.published.clear()
    with pytest.raises(Deposed, match=rf"^{KEY} holds term 2: another coordinator is in charge"):
        await ours.write(SECOND)
    assert on_bus(bus) == THEIRS and ours.head == FIRST and notified(bus) == []


async def test_a_head_that_is_gone_was_lost_by_the_broker(bus: Any) -> None:
    keeper = await HeadKeeper.create(bus, FIRST)
    del bus.keys[KEY]
    with pytest.raises(RolledBack, match=f"^the broker has lost writes that it had acknowledged: {KEY} is gone$"):
        await keeper.write(SECOND)


def test_a_write_whose_answer_was_lost_was_ours(bus: Any, simulated: Simulated) -> None:
    async def write() -> HeadKeeper:
        keeper = await HeadKeeper.create(bus, FIRST)
        bus.lose_answer("kv_update")
        await keeper.write(SECOND)
        await keeper.write(SECOND.model_copy(update={"version": 1}))
        return keeper

    keeper, _ = simulated(write())
    assert on_bus(bus) == keeper.head and keeper.head.version == 1
    assert [o for o, _ in bus.calls].count("kv_update") == 2, "it was looked up, and not written again"


def test_a_write_that_did_not_arrive_is_made_again(bus: Any, simulated: Simulated) -> None:
    async def write() -> None:
        keeper = await HeadKeeper.create(bus, FIRST)
        bus.fail("kv_update", Unreachable("no answer"), Unreachable("no answer"))
        bus.fail("kv_get", Unreachable("no answer"))
        await keeper.write(SECOND)

    simulated(write())
    assert on_bus(bus) == SECOND and len(notified(bus)) == 1


def test_a_write_that_arrives_late_while_it_is_made_again_was_ours(bus: Any, simulated: Simulated) -> None:
    async def write() -> HeadKeeper:
        keeper = await HeadKeeper.create(bus, FIRST)
        bus.fail("kv_update", Unreachable("no answer"))
        bus.lose_answer("kv_update")
        await keeper.write(SECOND)
        return keeper

    keeper, _ = simulated(write())
    assert keeper.head == on_bus(bus) == SECOND


def test_a_write_without_an_answer_deposes_where_another_was_faster(bus: Any, simulated: Simulated) -> None:
    async def write() -> None:
        keeper = await HeadKeeper.create(bus, FIRST)
        bus.fail("kv_update", Unreachable("no answer"))
        bus.keys[KEY] = Entry(encode(THEIRS), 7)
        with pytest.raises(Deposed):
            await keeper.write(SECOND)

    simulated(write())
    assert on_bus(bus) == THEIRS


async def test_what_the_broker_forbids_is_raised(bus: Any) -> None:
    keeper = await HeadKeeper.create(bus, FIRST)
    bus.fail("kv_update", Denied("permissions violation"))
    with pytest.raises(Denied):
        await keeper.write(SECOND)
    assert keeper.head == FIRST


async def test_a_notify_that_cannot_be_sent_holds_up_nothing(bus: Any) -> None:
    keeper = await HeadKeeper.create(bus, FIRST)
    bus.fail("publish", Unreachable("no connection"))
    await keeper.write(SECOND)
    assert on_bus(bus) == SECOND


async def test_a_large_roster_is_left_for_the_blob(bus: Any) -> None:
    keeper = await HeadKeeper.create(bus, FIRST)
    n = NOTIFY_ROSTER_BYTES // 6
    names = [f"a{i}" for i in range(n)]
    await keeper.write(SECOND, Roster(parts=n, agents=names, clocks=[0] * n, flags=bytes(n), presence=bytes(n)))
    (note,) = notified(bus)
    assert note.roster == b"" and decode(Head, note.head) == SECOND


async def test_a_reason_of_any_length_can_be_written(bus: Any) -> None:
    keeper = await HeadKeeper.create(bus, FIRST)
    await keeper.write(SECOND.model_copy(update={"reason": "ä" * 10_000}))
    assert len(bus.keys[KEY].value) < MAX_HEAD_BYTES and on_bus(bus).reason == "ä" * 1000
    await keeper.write(SECOND)
