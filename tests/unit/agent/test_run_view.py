"""An agent's view of its run: the newest head, the roster, and the agent's own line."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from syncline.bus.base import Entry
from syncline.bus.blobs import put_record
from syncline.errors import PeerError
from syncline.wire import subjects
from syncline.wire.messages import BlobRef, Head, Notify, Phase, Roster, Verdict, encode
from syncline_agent.run_view import GONE_S, READ_AGAIN_S, RosterLine, RunView

RUN = "run-1"
KEY = subjects.head_key(RUN)
Simulated = Callable[[Coroutine[Any, Any, Any]], tuple[Any, float]]


def head(version: int = 0, term: int = 1, round: int = 0, phase: Phase = "training", **more: Any) -> Head:
    return Head(run=RUN, term=term, version=version, round=round, phase=phase, **more)


def roster(*flags: int, clocks: tuple[int, ...] = (), offsets: tuple[int, ...] = ()) -> Roster:
    names = [f"a{i}" for i in range(1, len(flags) + 1)]
    return Roster(
        parts=len(flags),
        agents=names,
        clocks=[*clocks] or [0] * len(flags),
        flags=bytes(flags),
        presence=bytes([1] * len(flags)),
        offsets=[*offsets],
    )


def ref(number: int) -> BlobRef:
    return BlobRef(id=f"{number:032x}", size=1, chunks=1)


def news(bus: Any) -> tuple[RunView, list[Head]]:
    told: list[Head] = []
    return RunView(bus, RUN, told.append), told


def note(head: Head, roster: Roster | None = None) -> Notify:
    return Notify(head=encode(head), roster=encode(roster) if roster is not None else b"")


# -- an agent's place --------------------------------------------------------------------------------------------------
def test_a_place_is_an_agents_line_in_the_roster() -> None:
    flags = (Roster.flag(True, Verdict.MERGED), Roster.flag(False, Verdict.LATE, 0b101))
    told = roster(*flags, clocks=(3, 7), offsets=(0, 4))
    assert RosterLine.of(told, "a1") == RosterLine(0, 2, True, 3, 0, {3: True, 2: False, 1: False})
    assert RosterLine.of(told, "a2") == RosterLine(1, 2, False, 7, 4, {7: False, 6: True, 5: False, 4: True})
    assert RosterLine.of(told, "a3") is None


@pytest.mark.parametrize(
    ("clock", "before", "verdicts"),
    [(0, 0, {}), (1, 0, {1: True}), (2, 0b1, {2: True, 1: True}), (3, 0b10, {3: True, 2: False, 1: True})],
)
def test_there_are_no_verdicts_on_clocks_that_never_were(clock: int, before: int, verdicts: dict[int, bool]) -> None:
    flag = Roster.flag(True, Verdict.MERGED if clock else Verdict.NONE, before)
    place = RosterLine.of(roster(flag, clocks=(clock,)), "a1")
    assert place is not None and place.verdicts == verdicts


# -- which head is the newest ------------------------------------------------------------------------------------------
OLD_TO_NEW = [
    head(0, phase="waiting"),
    head(0, round=1),
    head(0, round=1, phase="merging"),
    head(0, round=2, phase="merging"),  # an asynchronous run: somebody joined during the merge
    head(1, round=3, phase="waiting"),
    head(1, round=3),
    head(2, round=3, phase="done"),
    head(1, term=2, round=3),  # a broker that was rolled back: a higher term counts, even downwards
    head(1, term=2, round=3, phase="failed"),
]


@pytest.mark.parametrize("older", range(len(OLD_TO_NEW) - 1))
def test_an_older_head_changes_nothing(bus: Any, older: int) -> None:
    known, told = news(bus)
    known.hear(note(OLD_TO_NEW[older + 1]))
    known.hear(note(OLD_TO_NEW[older]))
    assert known.head == OLD_TO_NEW[older + 1] and told == [OLD_TO_NEW[older + 1]]


@pytest.mark.parametrize("older", range(len(OLD_TO_NEW) - 1))
def test_a_newer_head_takes_its_place(bus: Any, older: int) -> None:
    known, told = news(bus)
    for each in (OLD_TO_NEW[older], OLD_TO_NEW[older + 1]):
        known.hear(note(each))
    assert known.head == OLD_TO_NEW[older + 1] and told == OLD_TO_NEW[older : older + 2]


def test_a_head_told_twice_is_told_on_once(bus: Any) -> None:
    known, told = news(bus)
    known.hear(note(head(1)))
    known.hear(note(head(1)))
    assert told == [head(1)]


def test_the_head_of_another_run_changes_nothing(bus: Any) -> None:
    known, told = news(bus)
    known.hear(note(head().model_copy(update={"run": "other"})))
    assert known.head is None and told == []


def test_a_notify_that_holds_no_head_is_refused(bus: Any) -> None:
    known, _ = news(bus)
    with pytest.raises(PeerError, match="head: not msgpack"):
        known.hear(Notify(head=b"\xc1"))


def test_the_end_of_the_run_is_heard(bus: Any) -> None:
    known, _ = news(bus)
    known.hear(note(head(3)))
    assert not known.over.is_set()
    known.hear(note(head(3, phase="done")))
    assert known.over.is_set()


# -- the roster that belongs to it -------------------------------------------------------------------------------------
async def test_the_roster_comes_with_the_notify_where_it_is_small(bus: Any) -> None:
    known, _ = news(bus)
    known.hear(note(head(1, roster=ref(1)), roster(3)))
    seen = await known.newest()
    assert seen.roster == roster(3) and bus.calls == []


async def test_the_roster_is_read_where_it_does_not_and_then_kept(bus: Any) -> None:
    told = roster(3, 3)
    at = await put_record(bus, lambda blob: subjects.model_prefix(RUN, blob), encode(told))
    known, _ = news(bus)
    known.hear(note(head(1, roster=at)))
    assert (await known.newest()).roster == told
    known.hear(note(head(1, roster=at, phase="merging")))
    before = len(bus.calls)
    seen = await known.newest()
    assert (seen.head.phase, seen.roster) == ("merging", told) and len(bus.calls) == before, (
        "the same roster, read again"
    )


async def test_an_older_roster_is_not_taken_for_that_of_a_newer_head(bus: Any) -> None:
    known, _ = news(bus)
    known.hear(note(head(1, roster=ref(1)), roster(3)))
    known.hear(note(head(2, roster=ref(2)), roster(1)))
    assert (await known.newest()).roster == roster(1)
    known.hear(note(head(1, roster=ref(1)), roster(3)))
    assert (await known.newest()).roster == roster(1)


async def test_a_head_without_a_roster_has_none(bus: Any) -> None:
    known, _ = news(bus)
    known.hear(note(head()))
    assert (await known.newest()).roster is None


# -- waiting -----------------------------------------------------------------------------------------------------------
async def test_head_is_read_where_nothing_is_known(bus: Any) -> None:
    bus.keys[KEY] = Entry(encode(head(4)), 1)
    known, told = news(bus)
    assert (await known.newest()).head == head(4) and told == [head(4)]
    bus.keys[KEY] = Entry(encode(head(5)), 2)
    assert (await known.newest()).head == head(4), "it is told of what moves"
    known.forget()
    assert known.head is None and (await known.newest()).head == head(5), "after the connection was gone it asks again"


def test_a_run_that_is_gone_is_over(bus: Any, simulated: Simulated) -> None:
    async def ask() -> None:
        known, _ = news(bus)
        asking = asyncio.ensure_future(known.newest())
        await known.over.wait()
        asking.cancel()

    assert simulated(ask())[1] < 10 * GONE_S


def test_a_broker_that_lost_the_newest_head_does_not_take_an_agent_back_before_there_is_a_higher_term(
    bus: Any, simulated: Simulated
) -> None:
    async def look() -> None:
        known, told = news(bus)
        known.hear(note(head(5)))
        bus.keys[KEY] = Entry(encode(head(3)), 1)
        known.forget()
        asking = asyncio.create_task(known.newest())
        await asyncio.sleep(10 * READ_AGAIN_S)
        assert not asking.done() and known.head is None and known.highest == (1, 5, 0)
        bus.keys[KEY] = Entry(encode(head(3, term=2)), 2)
        assert (await asking).head == head(3, term=2) == told[-1] and known.highest == (2, 3, 0)

    simulated(look())


def test_who_waits_wakes_at_once_when_head_moves(bus: Any, simulated: Simulated) -> None:
    async def wait() -> None:
        known, _ = news(bus)
        known.clear()
        known.hear(note(head(1)))
        await known.wait()

    assert simulated(wait())[1] == 0.0


def test_who_is_told_nothing_reads_head_again_after_some_seconds(bus: Any, simulated: Simulated) -> None:
    async def wait() -> Head | None:
        known, _ = news(bus)
        known.hear(note(head(1)))
        known.clear()
        bus.keys[KEY] = Entry(encode(head(2)), 2)
        await known.wait()
        return known.head

    found, took_s = simulated(wait())
    assert found == head(2) and 0.5 * READ_AGAIN_S <= took_s <= 1.5 * READ_AGAIN_S
