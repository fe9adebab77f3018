"""Whose word counts for what the broker has lost; and a queue in which nobody can stand in the way."""

from __future__ import annotations

import asyncio

from syncline.bus.memory.bus import MemoryBroker
from syncline.wire import subjects
from syncline.wire.messages import Head, Submit, encode
from syncline_coordinator.head import HeadKeeper, RolledBack
from syncline_coordinator.recovery import MAX_UNCONFIRMED_REPORTS, LossReports
from syncline_coordinator.reservation import RUNS
from syncline_coordinator.run_queue import RunQueue


def test_an_agent_is_believed_so_many_times_for_each_run_until_the_connection_was_gone() -> None:
    losses = LossReports()
    said = [losses.record("r", RolledBack("a9 says so", 3, "a9")) for _ in range(MAX_UNCONFIRMED_REPORTS)]
    assert said == ["", "", "a9"]
    assert not losses.is_trusted("r", "a9") and losses.is_trusted("r", "a1") and losses.is_trusted("q", "a9")
    losses.reset_trust()
    assert losses.is_trusted("r", "a9")


def test_what_the_bus_shows_counts_against_nobody_and_the_highest_term_is_kept_until_the_run_goes_on() -> None:
    losses = LossReports()
    for term in (3, 7, 5):
        assert losses.record("r", RolledBack("head is gone", term)) == ""
    assert (losses.highest_term("r"), losses.highest_term("q")) == (7, None)
    losses.recovered("r")
    assert losses.highest_term("r") is None


def test_a_run_whose_head_cannot_be_read_stands_in_nobodys_way() -> None:
    async def play() -> list[str]:
        bus = MemoryBroker().connect("coordinator")
        await bus.ensure_bucket(RUNS)
        for run in ("broken", "first", "second"):
            spec = encode(Submit(spec={"name": run, "task": "m:T"}))
            await bus.kv_create(subjects.RUNS_BUCKET, subjects.spec_key(run), spec)
        await bus.kv_create(subjects.RUNS_BUCKET, subjects.head_key("broken"), b"\xc1 no head")
        await HeadKeeper.create(bus, Head(run="first", term=1, version=0, phase="waiting"))
        return await RunQueue(bus).read()

    assert asyncio.run(play()) == ["first", "second"], "and the second got its first head"
