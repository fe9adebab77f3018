"""Planted bugs of asynchronous and elastic runs: the simulation must find each of them within some seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sim.test_planted import SEEDS, Plant, found_in
from syncline.averaging.staleness import Staleness
from syncline.policy.asynchronous import Asynchronous
from syncline.policy.events import LetRun, OfferReady, StartRound
from syncline.policy.ledger import Judged, Ledger
from syncline.policy.reasons import Closed, Unusable
from syncline.runtime.child_messages import MakeElasticUpdate, TrainPeriod
from syncline.wire.messages import Verdict
from syncline_agent.local_update import ElasticUpdate, Verdicts
from syncline_agent.run_view import RosterLine
from syncline_agent.session import Session
from syncline_coordinator.run import Run
from syncline_sim.inline_children import InlineTraining

pytestmark = pytest.mark.long

SOONER = {  # where to begin, for those that few seeds show
    "agents_forget_their_offset": 150,
    "what_a_plan_that_was_found_merges_is_taken_for_new": 160,
    "what_is_pending_is_not_kept": 160,
    "one_outbox_for_both_updates": 250,
}


def instead(patch: pytest.MonkeyPatch, owner: type, name: str, make: Callable[[Any], Any]) -> None:
    """`make(real)` takes the place of a method."""
    patch.setattr(owner, name, make(getattr(owner, name)))


# -- the gate ----------------------------------------------------------------------------------------------------------
def the_gate_is_one_too_high(patch: pytest.MonkeyPatch) -> None:
    def make(real: Any) -> Any:
        return lambda self: None if real(self) is None else real(self) + 1

    instead(patch, Asynchronous, "_gate", make)


def whoever_joins_stands_at_nought(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Asynchronous, "_joined", lambda self, agent, now_s: self._go_on(now_s))


def the_roster_forgets_the_offsets(patch: pytest.MonkeyPatch) -> None:
    def make(real: Any) -> Any:
        return lambda self, present, who, offsets, presence: real(self, present, who, {}, presence)

    instead(patch, Ledger, "roster", make)


def agents_do_not_know_of_the_gate(patch: pytest.MonkeyPatch) -> None:
    def due(real: Any) -> Any:
        def without(self: Session, seen: Any) -> Any:
            return real(self, replace(seen, head=seen.head.model_copy(update={"gate": None})))

        return without

    instead(patch, Session, "_due", due)


def agents_forget_their_offset(patch: pytest.MonkeyPatch) -> None:
    real = RosterLine.of
    patch.setattr(RosterLine, "of", lambda roster, agent: (p := real(roster, agent)) and replace(p, offset=0))


def everybody_seems_to_run(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Asynchronous, "_may_run", lambda self, agent: True)


# -- the buffer --------------------------------------------------------------------------------------------------------
def a_buffer_takes_one_more(patch: pytest.MonkeyPatch) -> None:
    def ready(self: Asynchronous) -> list[OfferReady]:
        return self.waiting if self.buffer is None else self.waiting[: self.buffer + 1]

    patch.setattr(Asynchronous, "_ready", ready)


def the_bound_on_lags_is_one_too_high_at_a_commit(patch: pytest.MonkeyPatch) -> None:
    def committed(real: Any) -> Any:
        def with_more(self: Asynchronous, now_s: float) -> Any:
            self.max_lag += 1
            try:
                return real(self, now_s)
            finally:
                self.max_lag -= 1

        return with_more

    instead(patch, Asynchronous, "_committed", committed)


def staleness_changes_nothing(patch: pytest.MonkeyPatch) -> None:
    for kind in Staleness.__subclasses__():
        patch.setattr(kind, "weight", lambda self, lag: 1.0)


def the_plan_is_in_the_order_of_arrival(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("syncline.policy.asynchronous.sorted", lambda values, **_: list(values), raising=False)


def a_run_goes_on_behind_its_last_version(patch: pytest.MonkeyPatch) -> None:
    def committed(real: Any) -> Any:
        def further(self: Asynchronous, now_s: float) -> Any:
            self.versions += 1
            try:
                return real(self, now_s)
            finally:
                self.versions -= 1

        return further

    instead(patch, Asynchronous, "_committed", committed)


def an_unusable_update_is_judged_before_the_one_before_it(patch: pytest.MonkeyPatch) -> None:
    def broken(real: Any) -> Any:
        def at_once(self: Asynchronous, agent: str, clock: int, why: str, now_s: float) -> Any:
            earlier = [o for o in self.merging if o.agent == agent and o.clock < clock]
            offer = next(o for o in self.merging if (o.agent, o.clock) == (agent, clock))
            if not earlier:
                return real(self, agent, clock, why, now_s)
            self.merging.remove(offer)
            assert self.closed_by is not None
            return [self._drop(offer, Unusable(why)), self._plan(self.merging, self.closed_by)]

        return at_once

    def judge(real: Any) -> Any:
        def forgetting(self: Ledger, agent: str, clock: int, verdict: Verdict) -> None:
            self._planned = set()  # what a plan names goes with a newer update of its agent
            real(self, agent, clock, verdict)

        return forgetting

    instead(patch, Asynchronous, "_broken", broken)
    instead(patch, Ledger, "judge", judge)


# -- takeovers ---------------------------------------------------------------------------------------------------------
def news_during_a_merge_clears_the_plan(patch: pytest.MonkeyPatch) -> None:
    def let_train(real: Any) -> Any:
        async def clearing(self: Run, command: StartRound | LetRun) -> None:
            await real(self, replace(command, merging=False) if isinstance(command, LetRun) else command)

        return clearing

    instead(patch, Run, "_let_train", let_train)


def what_a_plan_that_was_found_merges_is_taken_for_new(patch: pytest.MonkeyPatch) -> None:
    def resume_merge(self: Asynchronous, offers: list[OfferReady]) -> None:
        self.merging, self.state, self.closed_by = list(offers), "merging", Closed("complete", 1, 1)

    patch.setattr(Asynchronous, "resume_merge", resume_merge)


# -- elastic differences -----------------------------------------------------------------------------------------------
def the_roster_tells_of_the_last_clock_alone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Judged, "then", lambda self, clock, verdict: Judged(clock, verdict) if clock > self.clock else self)


def agents_look_at_the_last_verdict_alone(patch: pytest.MonkeyPatch) -> None:
    real = RosterLine.of

    def of(roster: Any, agent: str) -> RosterLine | None:
        place = real(roster, agent)
        return place and replace(place, verdicts={c: m for c, m in place.verdicts.items() if c == place.judged})

    patch.setattr(RosterLine, "of", of)


def every_verdict_is_that_it_was_merged(patch: pytest.MonkeyPatch) -> None:
    instead(patch, Ledger, "judge", lambda real: lambda self, agent, clock, _: real(self, agent, clock, Verdict.MERGED))


def what_was_dropped_is_not_given_back(patch: pytest.MonkeyPatch) -> None:
    def resolve(self: ElasticUpdate, verdicts: Verdicts, own_P: Any) -> None:
        for clock in [c for c in self.pending if c <= max(verdicts, default=0)]:
            del self.pending[clock]

    patch.setattr(ElasticUpdate, "resolve", resolve)


def what_was_merged_is_given_back(patch: pytest.MonkeyPatch) -> None:
    def given_back(real: Any) -> Any:
        return lambda self, verdicts, own_P: real(self, dict.fromkeys(verdicts, False), own_P)

    instead(patch, ElasticUpdate, "resolve", given_back)


def what_is_pending_is_not_kept(patch: pytest.MonkeyPatch) -> None:
    def prepare(real: Any) -> Any:
        async def forgetting(self: InlineTraining, *args: Any) -> Any:
            answer = await real(self, *args)
            handler = self._child._handlers[TrainPeriod].__self__  # type: ignore[union-attr]
            handler._updates.pending.clear()
            return answer

        return forgetting

    instead(patch, InlineTraining, "prepare", prepare)


def one_outbox_for_both_updates(patch: pytest.MonkeyPatch) -> None:
    def into_first(period: TrainPeriod) -> TrainPeriod:
        return TrainPeriod(**{**dict(period), "outbox": 0})

    def trained(real: Any) -> Any:
        return lambda self, period: real(self, into_first(period))

    def met(real: Any) -> Any:
        def made(self: InlineTraining, question: MakeElasticUpdate) -> Any:
            fresh = question.fresh_center
            return real(self, MakeElasticUpdate(period=into_first(question.period), fresh_center=fresh))

        return made

    instead(patch, InlineTraining, "period", trained)
    instead(patch, InlineTraining, "make_elastic_update", met)
    instead(patch, InlineTraining, "outbox", lambda real: lambda self, nbytes, number: real(self, nbytes, 0))


PLANTED: tuple[Plant, ...] = (
    the_gate_is_one_too_high,
    whoever_joins_stands_at_nought,
    the_roster_forgets_the_offsets,
    agents_do_not_know_of_the_gate,
    agents_forget_their_offset,
    everybody_seems_to_run,
    a_buffer_takes_one_more,
    the_bound_on_lags_is_one_too_high_at_a_commit,
    staleness_changes_nothing,
    the_plan_is_in_the_order_of_arrival,
    a_run_goes_on_behind_its_last_version,
    an_unusable_update_is_judged_before_the_one_before_it,
    news_during_a_merge_clears_the_plan,
    what_a_plan_that_was_found_merges_is_taken_for_new,
    the_roster_tells_of_the_last_clock_alone,
    agents_look_at_the_last_verdict_alone,
    every_verdict_is_that_it_was_merged,
    what_was_dropped_is_not_given_back,
    what_was_merged_is_given_back,
    what_is_pending_is_not_kept,
    one_outbox_for_both_updates,
)


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    found_in(SOONER.get(plant.__name__, 0), SEEDS)
