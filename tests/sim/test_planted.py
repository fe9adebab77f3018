"""Planted bugs in the real services: the simulation must find each of them within some seeds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from syncline.bus import blobs, commits
from syncline.bus.base import Bus
from syncline.errors import AlreadyPut, Conflict, Unreachable
from syncline.policy.events import Drop, LetRun, OfferReady, StartRound
from syncline.policy.ledger import Judged, Ledger
from syncline.policy.reasons import RoundClosed
from syncline.policy.rounds import Rounds
from syncline.wire import subjects
from syncline.wire.messages import BlobRef, Head, Offer, Roster, encode
from syncline_agent.run_view import RunView
from syncline_coordinator.head import HeadKeeper
from syncline_coordinator.merge.center import Center
from syncline_coordinator.merge.reducer import Reducer
from syncline_coordinator.recovery import LossDetector
from syncline_coordinator.retention import Retention
from syncline_coordinator.run import Run
from syncline_sim.seeds import run_seed

pytestmark = pytest.mark.long

Plant = Callable[[pytest.MonkeyPatch], None]
SEEDS = 300  # within which each is found
SOONER = {  # where to begin, for those that few seeds show
    "what_was_judged_is_judged_again": 60,
    "a_plan_found_in_head_is_forgotten": 130,
    "nobody_reads_head_again": 1000,
    "a_coordinator_never_looks_whether_it_was_replaced": 400,
}


def head_is_written_over_whoever_wrote_it(patch: pytest.MonkeyPatch) -> None:
    real = HeadKeeper.write

    async def write(self: HeadKeeper, head: Head, roster: Roster | None = None, *, tell: bool = True, **_: Any) -> None:
        entry = await self._bus.kv_get(subjects.RUNS_BUCKET, subjects.head_key(head.run))
        assert entry is not None
        self._revision = entry.revision
        await real(self, head, roster, tell=tell)

    patch.setattr(HeadKeeper, "write", write)


def a_lost_answer_is_taken_for_a_success(patch: pytest.MonkeyPatch) -> None:
    async def write(self: HeadKeeper, head: Head, roster: Roster | None = None, *, tell: bool = True, **_: Any) -> None:
        key, value = subjects.head_key(head.run), encode(head)
        try:
            self._revision = await self._bus.kv_update(subjects.RUNS_BUCKET, key, value, self._revision)
        except (Conflict, Unreachable):
            pass
        self.head = head
        await self.notify(roster)

    patch.setattr(HeadKeeper, "write", write)


def a_restarted_coordinator_keeps_the_term(patch: pytest.MonkeyPatch) -> None:
    real = HeadKeeper.write

    async def write(self: HeadKeeper, head: Head, roster: Roster | None = None, *, tell: bool = True, **_: Any) -> None:
        if head.term != self.head.term:
            return
        await real(self, head, roster, tell=tell)

    patch.setattr(HeadKeeper, "write", write)


def what_was_judged_is_judged_again(patch: pytest.MonkeyPatch) -> None:
    real_offer, real_policy = Ledger.offer, Rounds._offer

    def offer(self: Ledger, agent: str, offer: Offer, seq: int) -> bool:
        kept, self._judged = self._judged, {}
        try:
            return real_offer(self, agent, offer, seq)
        finally:
            self._judged = kept

    def policy(self: Rounds, offer: OfferReady, now_s: float) -> list[Any]:
        kept, self.ledger._judged = self.ledger._judged, {}
        try:
            return real_policy(self, offer, now_s)
        finally:
            self.ledger._judged = kept | self.ledger._judged

    patch.setattr(Ledger, "offer", offer)
    patch.setattr(Rounds, "_offer", policy)


def updates_are_purged_before_head_says_they_are_judged(patch: pytest.MonkeyPatch) -> None:
    real = Run._put_roster

    async def put_roster(self: Run, start: StartRound | LetRun | None) -> tuple[Roster, BlobRef]:
        run = self.parts.spec.name
        for agent, blob in self.ledger._purgeable:
            self._purger.add(subjects.updates_stream(run), subjects.update_prefix(run, agent, blob.id))
        return await real(self, start)

    patch.setattr(Run, "_put_roster", put_roster)


def models_are_purged_one_too_many(patch: pytest.MonkeyPatch) -> None:
    real = Retention.head_moved

    def moved(self: Retention, before: Head, after: Head, judged: list[tuple[str, BlobRef]]) -> None:
        self._keep_models = 0
        real(self, before, after, judged)

    patch.setattr(Retention, "head_moved", moved)


def all_updates_of_an_agent_are_purged_at_once(patch: pytest.MonkeyPatch) -> None:
    real = Retention.head_moved

    def moved(self: Retention, before: Head, after: Head, judged: list[tuple[str, BlobRef]]) -> None:
        for agent, _ in judged:
            self._purger.add(subjects.updates_stream(self._run), subjects.update_prefix(self._run, agent, "x")[:-2])
        real(self, before, after, judged)

    patch.setattr(Retention, "head_moved", moved)


def the_merge_starts_without_its_plan_in_head(patch: pytest.MonkeyPatch) -> None:
    real = HeadKeeper.write

    async def write(self: HeadKeeper, head: Head, roster: Roster | None = None, *, tell: bool = True, **_: Any) -> None:
        if head.phase != "merging":
            await real(self, head, roster, tell=tell)

    patch.setattr(HeadKeeper, "write", write)


def a_plan_found_in_head_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    real = Run.resume

    async def resume(self: Run) -> None:
        self.keeper.head = self.keeper.head.model_copy(update={"plan": None})
        await real(self)

    patch.setattr(Run, "resume", resume)


def late_offers_are_merged(patch: pytest.MonkeyPatch) -> None:
    def offer(self: Rounds, offer: OfferReady, now_s: float) -> list[Any]:
        if self.state == "merging" or offer.agent not in self.participants:
            return [Drop(offer.agent, offer.clock, RoundClosed(0))]
        self.offers[offer.agent] = offer
        return self._go_on(now_s)

    patch.setattr(Rounds, "_offer", offer)


def offers_seq_runs_ahead_of_what_is_judged(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ledger, "judged_up_to", lambda self, read_up_to: read_up_to)


def the_plan_is_in_the_order_of_arrival(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("syncline.policy.rounds.sorted", lambda values, **_: list(values), raising=False)


def the_roster_forgets_the_verdicts(patch: pytest.MonkeyPatch) -> None:
    real = Ledger.restore

    def restore(self: Ledger, roster: Roster) -> None:
        real(self, roster)
        self._judged = {agent: Judged() for agent in self._judged}

    patch.setattr(Ledger, "restore", restore)


def agents_are_numbered_anew_after_a_restart(patch: pytest.MonkeyPatch) -> None:
    real = Ledger.restore

    def restore(self: Ledger, roster: Roster) -> None:
        real(self, roster)
        self.numbering.names.reverse()

    patch.setattr(Ledger, "restore", restore)


def a_restarted_coordinator_begins_with_another_center(patch: pytest.MonkeyPatch) -> None:
    async def get_center(self: Reducer, ref: BlobRef, version: int) -> None:
        self._center.w_P.zero_()
        self._stored_as = ref, version

    patch.setattr(Reducer, "get_center", get_center)


def a_restarted_coordinator_forgets_the_outer_state(patch: pytest.MonkeyPatch) -> None:
    real = Reducer.get_center

    async def get_center(self: Reducer, ref: BlobRef, version: int) -> None:
        await real(self, ref, 0)

    patch.setattr(Reducer, "get_center", get_center)


def the_outer_state_is_purged_with_the_model_before_the_last(patch: pytest.MonkeyPatch) -> None:
    real = Retention.purge_model

    def purge(self: Retention, blob: str) -> None:
        real(self, blob)
        for model in self._kept:
            self._purger.add(subjects.model_stream(self._run), subjects.outer_prefix(self._run, model.id))

    patch.setattr(Retention, "purge_model", purge)


def the_outer_state_stays_where_it_was(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Center, "states", lambda self, part: [state_P[part].clone() for state_P in self._states])


def a_commit_is_recorded_after_it(patch: pytest.MonkeyPatch) -> None:
    async def record(self: Run, done: Any) -> None:
        pass

    patch.setattr(Run, "_put_commit_record", record)


def the_line_of_a_commit_names_a_record_that_is_put_after_it(patch: pytest.MonkeyPatch) -> None:
    real = blobs.put_record

    async def put_record(bus: Bus, prefix: Any, data: bytes) -> BlobRef:
        ref = BlobRef(id="f" * 32, size=len(data), chunks=1)
        asyncio.get_running_loop().call_later(0.1, lambda: asyncio.ensure_future(real(bus, prefix, data, blob=ref.id)))
        return ref

    patch.setattr(commits, "put_record", put_record)


def a_coordinator_that_takes_over_purges_the_newest_record(patch: pytest.MonkeyPatch) -> None:
    async def uncommitted(bus: Bus, head: Head) -> list[str]:
        return [subjects.log_record(head.run, head.version, head.term - 1)]

    patch.setattr("syncline_coordinator.run.uncommitted", uncommitted)


def an_offer_goes_out_before_its_chunks_are_held(patch: pytest.MonkeyPatch) -> None:
    async def put_chunk(bus: Bus, subject: str, frame: bytes) -> bool:
        await bus.publish(subject, frame)
        return True

    patch.setattr(blobs, "put_chunk", put_chunk)


def a_chunk_that_is_there_already_is_an_error(patch: pytest.MonkeyPatch) -> None:
    async def put_chunk(bus: Bus, subject: str, frame: bytes) -> bool:
        try:
            await blobs.with_retries(partial(bus.put, subject, frame, bulk=True))
        except AlreadyPut as error:
            raise AssertionError(subject) from error
        return True

    patch.setattr(blobs, "put_chunk", put_chunk)


def nobody_reads_head_again(patch: pytest.MonkeyPatch) -> None:
    async def wait(self: RunView) -> None:
        await self._moved.wait()

    patch.setattr(RunView, "wait", wait)


def a_coordinator_never_looks_whether_it_was_replaced(patch: pytest.MonkeyPatch) -> None:
    async def watch(self: LossDetector) -> None:
        await asyncio.Event().wait()

    patch.setattr(LossDetector, "watch", watch)


PLANTED: tuple[Plant, ...] = (
    head_is_written_over_whoever_wrote_it,
    a_lost_answer_is_taken_for_a_success,
    a_restarted_coordinator_keeps_the_term,
    what_was_judged_is_judged_again,
    updates_are_purged_before_head_says_they_are_judged,
    models_are_purged_one_too_many,
    all_updates_of_an_agent_are_purged_at_once,
    the_merge_starts_without_its_plan_in_head,
    a_plan_found_in_head_is_forgotten,
    late_offers_are_merged,
    offers_seq_runs_ahead_of_what_is_judged,
    the_plan_is_in_the_order_of_arrival,
    the_roster_forgets_the_verdicts,
    agents_are_numbered_anew_after_a_restart,
    a_restarted_coordinator_begins_with_another_center,
    a_restarted_coordinator_forgets_the_outer_state,
    the_outer_state_is_purged_with_the_model_before_the_last,
    the_outer_state_stays_where_it_was,
    a_commit_is_recorded_after_it,
    the_line_of_a_commit_names_a_record_that_is_put_after_it,
    a_coordinator_that_takes_over_purges_the_newest_record,
    an_offer_goes_out_before_its_chunks_are_held,
    a_chunk_that_is_there_already_is_an_error,
    nobody_reads_head_again,
    a_coordinator_never_looks_whether_it_was_replaced,
)


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    found_in(SOONER.get(plant.__name__, 0), SEEDS)


def found_in(first: int, seeds: int) -> None:
    """Return whether a seed finds the planted bug. A plant that no longer fits the code is found by no seed."""
    failed = (outcome.problems[0] for seed in range(first, first + seeds) if (outcome := run_seed(seed)).failed)
    found = next(failed, None)
    assert found is not None, f"not in {seeds} seeds"
    assert "TypeError" not in found and "AttributeError" not in found, found
