"""The books of a run: verdicts in whatever order they come, and what a plan names stays until it is judged."""

from __future__ import annotations

import random

import pytest

from syncline.policy.events import Chosen
from syncline.policy.ledger import Judged, Ledger
from syncline.wire.messages import REMEMBERED, BlobRef, Offer, Plan, Presence, Roster, Verdict


def offer(clock: int, seed: int = 0) -> Offer:
    blob = BlobRef(id=f"{seed:016x}{clock:016x}", size=8, chunks=1)
    return Offer(
        session="0" * 32, clock=clock, base=0, term=1, samples=clock, steps=3, blob=blob, digest=bytes(32)
    )  # fmt: skip


def chosen(*clocks: int) -> list[Chosen]:
    return [Chosen("a1", clock, 2, 0.25) for clock in clocks]


def plan(books: Ledger, *clocks: int) -> Plan:
    return Plan(version=1, reason="x", merged=books.plan_entries(chosen(*clocks)))


@pytest.mark.parametrize("seed", range(200))
def test_verdicts_on_clocks_in_any_order_come_to_the_same(seed: int) -> None:
    """Clocks may be left out, and a verdict on an older one may come after that on a newer one."""
    draw = random.Random(seed)
    clocks = sorted(draw.sample(range(1, 8), draw.randint(1, 6)))
    verdicts = {clock: draw.choice([Verdict.MERGED, Verdict.LATE, Verdict.BROKEN]) for clock in clocks}
    order = draw.sample(clocks, len(clocks)) if max(clocks) - min(clocks) <= REMEMBERED else clocks
    judged = Judged()
    for clock in order:
        judged = judged.then(clock, verdicts[clock])
    newest = max(clocks)
    before = [verdicts.get(newest - k) == Verdict.MERGED for k in range(1, REMEMBERED + 1)]
    assert judged == Judged(newest, verdicts[newest], sum(merged << k for k, merged in enumerate(before)))


def test_a_clock_from_far_away_costs_nothing() -> None:
    far = (1 << 63) - 1
    judged = Judged().then(1, Verdict.MERGED).then(far, Verdict.LATE)
    assert judged == Judged(far, Verdict.LATE) == judged.then(2, Verdict.MERGED)


def test_a_verdict_given_twice_stays() -> None:
    judged = Judged().then(1, Verdict.MERGED).then(2, Verdict.LATE)
    assert judged.then(2, Verdict.LATE) == judged.then(1, Verdict.MERGED) == judged


def slow(agent: str) -> Presence:
    return Presence.SLOW


def test_what_a_roster_tells_is_what_the_next_coordinator_knows() -> None:
    books = Ledger()
    for clock in (1, 2, 4):
        assert books.offer("a1", offer(clock), clock)
        books.judge("a1", clock, Verdict.LATE if clock == 2 else Verdict.MERGED)
    told = books.roster({"a1"}, ("a1",), {}, slow)
    assert (told.clocks, told.verdict(0), told.merged_before(0)) == ([4], Verdict.MERGED, 0b100)
    assert told.state(0) == Presence.SLOW
    after = Ledger()
    after.restore(told)
    assert after.judged("a1") == books.judged("a1") and after.roster({"a1"}, ("a1",), {}, slow) == told
    assert not after.offer("a1", offer(3), 9), "a clock left out is judged with the next one"


def test_a_plan_names_updates_as_they_were_offered_with_lag_and_weight() -> None:
    books = Ledger()
    for clock in (1, 2):
        books.offer("a1", offer(clock), clock)
    entries = books.plan_entries(chosen(2))
    assert [(e.clock, e.lag, e.weight, e.samples, e.steps, e.blob) for e in entries] == [
        (2, 2, 0.25, 2, 3, offer(2).blob)
    ]


def test_what_a_plan_names_stays_although_a_newer_update_of_its_agent_is_dropped() -> None:
    books = Ledger()
    for clock in (1, 2):
        books.offer("a1", offer(clock), clock)
    planned = plan(books, 1)
    books.judge("a1", 2, Verdict.LATE)
    assert books.plan_entries(chosen(1)) == planned.merged, (
        "a plan without somebody else's broken update names it again"
    )
    assert books.judged_up_to(2) == 0, "whoever takes over has to read its offer again"
    assert books.take_purgeable() == [("a1", offer(2).blob)]
    books.judge("a1", 1, Verdict.MERGED)
    assert books.judged("a1") == Judged(2, Verdict.LATE, 0b1) and books.judged_up_to(2) == 2


def test_an_older_update_that_no_plan_names_goes_with_the_verdict_on_a_newer_one() -> None:
    books = Ledger()
    for clock in (1, 2):
        books.offer("a1", offer(clock), clock)
    plan(books, 2)
    books.judge("a1", 2, Verdict.MERGED)
    assert books.needed_blobs() == {offer(1).blob.id, offer(2).blob.id}, "until head says so"
    assert len(books.take_purgeable()) == 2 and books.needed_blobs() == set()


def test_offsets_travel_where_there_are_any() -> None:
    books = Ledger()
    assert books.roster({"a1", "a2"}, ("a1", "a2"), {}, slow).offsets == []
    told = books.roster({"a1", "a2"}, ("a1", "a2"), {"a2": 7}, slow)
    assert isinstance(told, Roster) and told.offsets == [0, 7] and told.offset(1) == 7
