"""Planted bugs in the recovery from lost acknowledged writes: the simulation must find each of them within some seeds."""

from __future__ import annotations

from typing import Any

import pytest

from sim.test_planted import Plant, found_in
from syncline.bus.base import Bus
from syncline.wire.messages import Head, Offer
from syncline_agent.run_view import RunView
from syncline_agent.session import Session
from syncline_coordinator import run_host, run_queue
from syncline_coordinator.head import HeadKeeper
from syncline_coordinator.recovery import LossDetector, head_under_new_term
from syncline_coordinator.run import Run

pytestmark = pytest.mark.long

SEEDS = 100
SOONER = {  # where to begin, for those that few seeds show
    "an_older_head_is_no_news": 460,
    "what_head_names_is_never_looked_for": 870,
    "no_new_epoch_is_begun": 200,
    "agents_believe_an_older_head_after_a_reconnect": 200,
}


def an_older_head_is_no_news(patch: pytest.MonkeyPatch) -> None:
    real = HeadKeeper.check

    async def check(self: HeadKeeper, seen_term: int = 0) -> Head:
        self._revision, kept = 0, self._revision
        try:
            return (await real(self, seen_term)).model_copy(update={"version": 1 << 60})
        finally:
            self._revision = kept

    patch.setattr(HeadKeeper, "check", check)


def lost_offers_are_waited_for(patch: pytest.MonkeyPatch) -> None:
    async def check(self: LossDetector, term: int) -> None:
        pass

    patch.setattr(LossDetector, "_check_offers", check)


def what_head_names_is_never_looked_for(patch: pytest.MonkeyPatch) -> None:
    async def check(self: LossDetector, head: Head, before: Head, risks: int) -> None:
        pass

    patch.setattr(LossDetector, "_check_blobs", check)


def no_new_epoch_is_begun(patch: pytest.MonkeyPatch) -> None:
    async def same_epoch(bus: Bus, head: Head, lost_term: int | None) -> Head:
        return (await head_under_new_term(bus, head, lost_term)).model_copy(update={"epoch": head.epoch})

    for module in (run_host, run_queue):
        patch.setattr(module, "head_under_new_term", same_epoch)


def offers_of_every_epoch_are_taken(patch: pytest.MonkeyPatch) -> None:
    real = Run._offer_problem

    def problem(self: Run, agent: str, offer: Offer) -> Any:
        return real(self, agent, offer.model_copy(update={"epoch": self.keeper.head.epoch}))

    patch.setattr(Run, "_offer_problem", problem)


def agents_believe_an_older_head_after_a_reconnect(patch: pytest.MonkeyPatch) -> None:
    real = RunView.forget

    def forget(self: RunView) -> None:
        real(self)
        self._order = (0, 0, 0, 0)

    patch.setattr(RunView, "forget", forget)


def agents_wait_for_the_verdict_on_what_is_lost(patch: pytest.MonkeyPatch) -> None:
    def rebase(self: Session, line: int) -> None:
        self._status.epoch = line

    patch.setattr(Session, "_rebase", rebase)


PLANTED: tuple[Plant, ...] = (
    an_older_head_is_no_news,
    lost_offers_are_waited_for,
    what_head_names_is_never_looked_for,
    no_new_epoch_is_begun,
    offers_of_every_epoch_are_taken,
    agents_believe_an_older_head_after_a_reconnect,
    agents_wait_for_the_verdict_on_what_is_lost,
)


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    found_in(SOONER.get(plant.__name__, 0), SEEDS)
