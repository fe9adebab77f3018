"""The policy of synchronous rounds: facts in, exact commands out. No broker, no tensor, no waiting: time is an argument."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncline.errors import PeerError
from syncline.policy.base import ResumePoint
from syncline.policy.events import (
    AgentJoined,
    AgentLost,
    AgentSlow,
    Chosen,
    Command,
    Drop,
    Fact,
    Finish,
    Merge,
    OfferReady,
    StartRound,
    TargetReached,
    Tick,
    UpdateBroken,
    VersionCommitted,
    WakeAt,
    Warn,
)
from syncline.policy.reasons import (
    Closed,
    NoAgentCanTrain,
    NothingUsable,
    NotParticipant,
    Replaced,
    RoundClosed,
    StopRequested,
    TooFewUpdates,
    Unusable,
    VersionsReached,
)
from syncline.policy.rounds import ASKED_AGAIN, Rounds
from syncline.policy.words import REASON_CHARS, closed_words
from syncline.wire.messages import Presence
from unit.ledgers import ledger_at
from unit.traces import command_as_json

SILENT = "not heard of for 5.1 s"


def policy(agents: int = 4, *, joined: bool = True, **settings: Any) -> Rounds:
    """Rounds that start with so many agents; `joined`: they are there, and the first round is open."""
    defaults = {"quorum": None, "grace_s": 2.0, "sample": None, "weights": "uniform", "versions": 100, "seed": 7}
    made = Rounds(min_agents=agents, **{**defaults, **settings})
    if joined:
        tell(made, *(AgentJoined(f"a{i}") for i in range(1, agents + 1)))
    return made


def tell(policy: Rounds, *facts: Fact, at: float = 0.0) -> list[Command]:
    """The commands that follow on these facts; what must always hold is checked after each."""
    commands: list[Command] = []
    for fact in facts:
        commands += policy.handle(fact, at)
        policy.validate()
    return commands


def offers(*agents: str, clock: int = 1, base: int = 0, samples: int = 1) -> list[OfferReady]:
    return [OfferReady(agent, clock, base, samples) for agent in agents]


def merge(*agents: str, clock: int = 1, reason: Closed, late: tuple[str, ...] = ()) -> Merge:
    """A merge with uniform weights."""
    return Merge(tuple(Chosen(a, clock, 0, 1 / len(agents)) for a in agents), reason, late)


# -- the start ---------------------------------------------------------------------------------------------------------
def test_the_run_starts_when_enough_agents_have_joined() -> None:
    rounds = policy(3, joined=False)
    assert tell(rounds, AgentJoined("b"), AgentJoined("c")) == []
    assert tell(rounds, AgentJoined("a")) == [StartRound(0, ("a", "b", "c"))]


def test_an_agent_that_joins_twice_counts_once() -> None:
    rounds = policy(2, joined=False)
    assert tell(rounds, AgentJoined("a"), AgentJoined("a")) == []
    assert tell(rounds, AgentJoined("b")) == [StartRound(0, ("a", "b"))]
    assert tell(rounds, AgentJoined("b")) == []


def test_an_agent_lost_before_the_start_is_not_counted() -> None:
    rounds = policy(2, joined=False)
    assert tell(rounds, AgentJoined("a"), AgentLost("a", SILENT), AgentJoined("b")) == []
    assert tell(rounds, AgentJoined("a")) == [StartRound(0, ("a", "b"))]


def test_a_tick_before_the_start_does_nothing() -> None:
    assert tell(policy(1, joined=False), Tick(), at=1e9) == []


def test_an_offer_before_the_start_is_dropped_with_the_reason() -> None:
    rounds = policy(2, joined=False)
    assert tell(rounds, *offers("a")) == [Drop("a", 1, NotParticipant(0))]


def test_an_agent_that_joins_late_takes_part_from_the_next_round() -> None:
    rounds = policy(2)
    assert tell(rounds, AgentJoined("a3")) == []
    assert tell(rounds, *offers("a3")) == [Drop("a3", 1, NotParticipant(0))]
    assert tell(rounds, *offers("a1", "a2")) == [merge("a1", "a2", reason=Closed("complete", 2, 2))]
    assert tell(rounds, VersionCommitted(1)) == [StartRound(1, ("a1", "a2", "a3"))]


# -- the round closes --------------------------------------------------------------------------------------------------
def test_a_round_closes_at_once_when_every_update_is_in() -> None:
    rounds = policy(4)
    assert tell(rounds, *offers("a3", "a1", "a4")) == []
    assert tell(rounds, *offers("a2")) == [merge("a1", "a2", "a3", "a4", reason=Closed("complete", 4, 4))]


def test_updates_are_merged_in_the_order_of_names_whatever_the_order_of_arrival() -> None:
    first, second = policy(3), policy(3)
    assert tell(first, *offers("a1", "a2", "a3")) == tell(second, *offers("a3", "a2", "a1"))


def test_an_offer_told_twice_changes_nothing() -> None:
    rounds = policy(2)
    tell(rounds, *offers("a1"))
    before = copy.deepcopy(rounds)
    assert tell(rounds, *offers("a1")) == []
    assert rounds == before


def test_an_older_clock_after_a_newer_one_changes_nothing() -> None:
    rounds = policy(2)
    tell(rounds, *offers("a1", clock=3))
    before = copy.deepcopy(rounds)
    assert tell(rounds, *offers("a1", clock=2)) == []
    assert rounds == before


def test_a_newer_update_of_an_agent_replaces_its_older_one() -> None:
    rounds = policy(2)
    tell(rounds, *offers("a1", clock=1))
    assert tell(rounds, *offers("a1", clock=2)) == [Drop("a1", 1, Replaced(2))]
    (merged,) = tell(rounds, *offers("a2", clock=1))
    assert merged == Merge((Chosen("a1", 2, 0, 0.5), Chosen("a2", 1, 0, 0.5)), Closed("complete", 2, 2))


def test_an_offer_from_the_future_is_refused_and_changes_nothing() -> None:
    rounds = policy(2)
    before = copy.deepcopy(rounds)
    with pytest.raises(PeerError, match=r"^a1: base 1 is newer than version 0$"):
        rounds.handle(OfferReady("a1", 1, base=1), 0.0)
    assert rounds == before


def test_an_update_from_an_older_version_than_the_one_before_it_is_refused_and_changes_nothing() -> None:
    rounds = policy(2)
    tell(rounds, *offers("a1", "a2"), VersionCommitted(1), *offers("a1", clock=2, base=1))
    before = copy.deepcopy(rounds)
    with pytest.raises(PeerError, match=r"^a1: base 0 is older than 1, that of clock 2$"):
        rounds.handle(OfferReady("a1", 3, base=0), 0.0)
    assert rounds == before


def test_an_update_that_comes_while_others_are_merged_is_late() -> None:
    rounds = policy(2, quorum=1, grace_s=0.0)
    tell(rounds, *offers("a1"))
    assert tell(rounds, *offers("a2")) == [Drop("a2", 1, RoundClosed(0))]
    assert tell(rounds, *offers("a2")) == [], "told twice"


def test_an_update_of_an_older_version_is_late_and_dropped_once() -> None:
    rounds = policy(2, quorum=1, grace_s=0.0)
    tell(rounds, *offers("a1"), VersionCommitted(1))
    assert tell(rounds, *offers("a2")) == [Drop("a2", 1, RoundClosed(0))]
    assert tell(rounds, *offers("a2")) == []


def test_an_update_that_was_merged_and_is_told_again_changes_nothing() -> None:
    rounds = policy(1)
    tell(rounds, *offers("a1"), VersionCommitted(1))
    before = copy.deepcopy(rounds)
    assert tell(rounds, *offers("a1")) == []
    assert rounds == before


def test_an_agent_whose_clock_another_process_of_its_name_has_used_up_is_asked_again() -> None:
    """The older one's came late and was judged; the newer one's of the same clock cannot be: the roster tells it so."""
    rounds = policy(2)
    tell(rounds, *offers("a1", "a2"), VersionCommitted(1))
    tell(rounds, OfferReady("a2", 2, 0, 10, 5))  # late, of the older process
    assert rounds.ledger.judged_clock("a2") == 2
    assert tell(rounds, OfferReady("a2", 2, 1, 10, 5)) == [StartRound(1, ("a1", "a2"))]
    (merge,) = [
        c for c in tell(rounds, OfferReady("a1", 2, 1, 10, 5), OfferReady("a2", 3, 1, 10, 5)) if isinstance(c, Merge)
    ]
    assert [(u.agent, u.clock) for u in merge.updates] == [("a1", 2), ("a2", 3)]


def test_who_uses_up_its_clocks_again_and_again_is_not_waited_for() -> None:
    rounds = policy(2)
    tell(rounds, *offers("a1", "a2"), VersionCommitted(1), OfferReady("a2", 2, 0, 10, 5))
    asked = [tell(rounds, OfferReady("a2", 2, 1, 10, 5)) for _ in range(ASKED_AGAIN + 2)]
    assert [len(commands) for commands in asked] == [*[1] * ASKED_AGAIN, 0, 0]
    (merge,) = [c for c in tell(rounds, OfferReady("a1", 2, 1, 10, 5)) if isinstance(c, Merge)]
    assert [u.agent for u in merge.updates] == ["a1"]


# -- quorum and grace --------------------------------------------------------------------------------------------------
def test_after_the_quorum_the_rest_has_the_grace_period() -> None:
    rounds = policy(4, quorum=3, grace_s=2.0)
    assert tell(rounds, *offers("a1", "a2"), at=5.0) == []
    assert tell(rounds, *offers("a3"), at=10.0) == [WakeAt(12.0)]
    assert tell(rounds, Tick(), at=11.9) == [WakeAt(12.0)], "a tick that comes early waits on"
    assert tell(rounds, Tick(), at=12.0) == [
        merge("a1", "a2", "a3", reason=Closed("quorum", 3, 4, grace_s=2.0), late=("a4",))
    ]


def test_the_last_update_ends_the_grace_period() -> None:
    rounds = policy(3, quorum=2)
    assert tell(rounds, *offers("a1", "a2")) == [WakeAt(2.0)]
    assert tell(rounds, *offers("a3"), at=1.0) == [merge("a1", "a2", "a3", reason=Closed("complete", 3, 3))]


def test_without_grace_the_quorum_closes_the_round() -> None:
    rounds = policy(3, quorum=2, grace_s=0.0)
    (merged,) = tell(rounds, *offers("a1", "a2"))
    assert merged == merge("a1", "a2", reason=Closed("quorum", 2, 3, grace_s=0.0), late=("a3",))


def test_an_agent_lost_in_the_grace_period_is_not_waited_for() -> None:
    rounds = policy(3, quorum=2)
    tell(rounds, *offers("a1", "a2"))
    assert tell(rounds, AgentLost("a3", SILENT), at=0.5) == [
        merge("a1", "a2", reason=Closed("complete", 2, 3, absent=(("a3", "not heard of for 5.1 s"),)), late=("a3",))
    ]


def test_an_agent_back_in_the_grace_period_is_waited_for_no_longer_than_the_others() -> None:
    rounds = policy(4, quorum=2)
    tell(rounds, *offers("a1", "a2"), AgentLost("a3", SILENT))
    assert tell(rounds, AgentJoined("a3"), at=1.5) == [WakeAt(2.0)]
    assert tell(rounds, Tick(), at=2.0) == [
        merge("a1", "a2", reason=Closed("quorum", 2, 4, grace_s=2.0), late=("a3", "a4"))
    ]


def test_the_default_grace_period_is_the_median_of_the_last_rounds() -> None:
    rounds = policy(2, quorum=1, grace_s=None)
    assert rounds.grace() == 1.0, "nothing is known yet"
    now = 0.0
    for version, seconds in enumerate((3.0, 100.0, 5.0)):
        tell(rounds, *offers("a1", "a2", clock=version + 1, base=version), at=now)
        tell(rounds, VersionCommitted(version + 1), at=now + seconds)
        now += seconds
    assert rounds.grace() == 5.0
    assert tell(rounds, *offers("a1", clock=4, base=3), at=now) == [WakeAt(now + 5.0)]


def test_the_grace_period_begins_anew_where_the_quorum_was_lost_meanwhile() -> None:
    rounds = policy(4, quorum=2)
    tell(rounds, *offers("a1", "a2"), at=0.0)
    tell(rounds, UpdateBroken("a2", 1, "bad"), at=1.0)
    assert tell(rounds, *offers("a3"), at=9.0) == [WakeAt(11.0)]


def test_a_quorum_that_nobody_is_left_to_reach_does_not_hold_up_the_round() -> None:
    rounds = policy(4, quorum=3)
    tell(rounds, *offers("a1", "a2"), AgentLost("a3", SILENT))
    assert tell(rounds, AgentLost("a4", "it left")) == [
        merge(
            "a1",
            "a2",
            reason=Closed(
                "complete",
                2,
                4,
                absent=(
                    ("a3", "not heard of for 5.1 s"),
                    ("a4", "it left"),
                ),
            ),
            late=("a3", "a4"),
        )
    ]


# -- losses ------------------------------------------------------------------------------------------------------------
def test_the_loss_of_the_last_missing_agent_closes_the_round_and_names_it() -> None:
    rounds = policy(4)
    tell(rounds, *offers("a1", "a2", "a3"))
    assert tell(rounds, AgentLost("a4", SILENT)) == [
        merge(
            "a1", "a2", "a3", reason=Closed("complete", 3, 4, absent=(("a4", "not heard of for 5.1 s"),)), late=("a4",)
        )
    ]


def test_the_update_of_an_agent_that_was_lost_afterwards_is_merged() -> None:
    rounds = policy(2)
    tell(rounds, *offers("a1"), AgentLost("a1", SILENT))
    assert tell(rounds, *offers("a2")) == [merge("a1", "a2", reason=Closed("complete", 2, 2))]


def test_the_update_that_an_agent_left_behind_counts_although_it_is_told_of_after_the_loss() -> None:
    rounds = policy(2)
    tell(rounds, AgentLost("a1", SILENT))
    assert tell(rounds, *offers("a1"), *offers("a2")) == [merge("a1", "a2", reason=Closed("complete", 2, 2))]


def test_an_agent_that_comes_back_takes_part_at_once_in_the_round_it_was_in() -> None:
    rounds = policy(3)
    tell(rounds, AgentLost("a3", SILENT), AgentJoined("a3"))
    assert tell(rounds, *offers("a1", "a2")) == [], "it is waited for"
    assert tell(rounds, *offers("a3")) == [merge("a1", "a2", "a3", reason=Closed("complete", 3, 3))]


def test_the_loss_of_an_agent_that_nobody_waits_for_changes_nothing() -> None:
    rounds = policy(2)
    assert tell(rounds, AgentLost("a9", SILENT), AgentJoined("a8"), AgentLost("a8", SILENT)) == []
    assert tell(rounds, *offers("a1", "a2")) == [merge("a1", "a2", reason=Closed("complete", 2, 2))]


def test_when_all_participants_are_lost_the_others_are_asked() -> None:
    rounds = policy(2)
    tell(rounds, AgentJoined("a3"), AgentJoined("a4"), AgentLost("a1", SILENT))
    assert tell(rounds, AgentLost("a2", SILENT)) == [StartRound(0, ("a1", "a2", "a3", "a4"))]
    assert tell(rounds, AgentJoined("a1")) == [], "back, and still a participant"
    assert tell(rounds, *offers("a1", "a3", "a4")) == [
        merge(
            "a1", "a3", "a4", reason=Closed("complete", 3, 4, absent=(("a2", "not heard of for 5.1 s"),)), late=("a2",)
        )
    ]


def test_when_the_quorum_is_out_of_reach_the_others_are_asked() -> None:
    rounds = policy(2, quorum=2)
    tell(rounds, AgentJoined("a3"), *offers("a1"))
    assert tell(rounds, AgentLost("a2", SILENT)) == [StartRound(0, ("a1", "a2", "a3"))]
    assert tell(rounds, *offers("a3")) == [
        merge("a1", "a3", reason=Closed("complete", 2, 3, absent=(("a2", "not heard of for 5.1 s"),)), late=("a2",))
    ]


def test_when_nobody_is_left_the_round_waits_for_whoever_comes() -> None:
    rounds = policy(1)
    assert tell(rounds, AgentLost("a1", SILENT), Tick(), at=1e6) == []
    assert tell(rounds, AgentJoined("a2"), at=1e6) == [StartRound(0, ("a1", "a2"))]


def test_after_a_commit_without_agents_the_next_one_opens_a_round_by_itself() -> None:
    rounds = policy(2)
    tell(rounds, *offers("a1", "a2"), AgentLost("a1", SILENT), AgentLost("a2", SILENT))
    assert tell(rounds, VersionCommitted(1)) == []
    assert tell(rounds, AgentJoined("a2")) == [StartRound(1, ("a2",))]


def test_many_long_words_about_losses_stay_short_in_the_reason() -> None:
    rounds = policy(50)
    tell(rounds, *offers("a1"), *(AgentLost(f"a{i}", f"it says: {'x' * 2000}", True) for i in range(2, 50)))
    (merged,) = tell(rounds, AgentLost("a50", SILENT))
    assert isinstance(merged, Merge)
    words = closed_words(merged.reason)
    assert words.startswith("1 of 50 (a10 it says: xxx") and words.endswith("…; and 44 more)")
    assert len(words) <= REASON_CHARS


# -- unusable updates --------------------------------------------------------------------------------------------------
def test_an_unusable_update_leaves_the_merge_and_is_named_in_its_reason() -> None:
    rounds = policy(3)
    tell(rounds, *offers("a1", "a2", "a3"))
    assert tell(rounds, UpdateBroken("a2", 1, "NaN")) == [
        Drop("a2", 1, Unusable("NaN")),
        merge("a1", "a3", reason=Closed("complete", 3, 3, without=(("a2", "NaN"),))),
    ]
    assert tell(rounds, UpdateBroken("a1", 1, "cut off")) == [
        Drop("a1", 1, Unusable("cut off")),
        merge(
            "a3",
            reason=Closed(
                "complete",
                3,
                3,
                without=(
                    ("a2", "NaN"),
                    ("a1", "cut off"),
                ),
            ),
        ),
    ]
    assert tell(rounds, VersionCommitted(1)) == [StartRound(1, ("a1", "a2", "a3"))]


def test_an_unusable_update_does_not_make_its_agent_late() -> None:
    rounds = policy(4, quorum=3, grace_s=0.0)
    tell(rounds, *offers("a1", "a2", "a3"))
    _, again = tell(rounds, UpdateBroken("a3", 1, "NaN"))
    assert again == merge(
        "a1", "a2", reason=Closed("quorum", 3, 4, grace_s=0.0, without=(("a3", "NaN"),)), late=("a4",)
    )


def test_an_update_that_nobody_offered_cannot_be_broken() -> None:
    rounds = policy(2)
    tell(rounds, *offers("a1", clock=2))
    before = copy.deepcopy(rounds)
    assert (
        tell(rounds, UpdateBroken("a2", 1, "?"), UpdateBroken("a1", 1, "an older one"), UpdateBroken("x", 1, "?")) == []
    )
    assert rounds == before


def test_an_update_found_unusable_while_the_round_is_open_is_dropped_and_not_waited_for() -> None:
    rounds = policy(3)
    tell(rounds, *offers("a1"))
    assert tell(rounds, UpdateBroken("a1", 1, "bad")) == [Drop("a1", 1, Unusable("bad"))]
    assert tell(rounds, *offers("a1")) == [], "told again, it stays judged"
    assert tell(rounds, *offers("a2", "a3")) == [merge("a2", "a3", reason=Closed("complete", 2, 3))]


def test_an_agent_whose_update_was_unusable_may_send_another() -> None:
    rounds = policy(2)
    tell(rounds, *offers("a1"), UpdateBroken("a1", 1, "bad"), *offers("a1", clock=2))
    (merged,) = tell(rounds, *offers("a2"))
    assert merged == Merge((Chosen("a1", 2, 0, 0.5), Chosen("a2", 1, 0, 0.5)), Closed("complete", 2, 2))


def test_when_every_update_is_unusable_the_run_fails_and_says_why() -> None:
    rounds = policy(2)
    tell(rounds, *offers("a1", "a2"), UpdateBroken("a1", 1, "NaN"))
    assert tell(rounds, UpdateBroken("a2", 1, "NaN")) == [
        Drop("a2", 1, Unusable("NaN")),
        Finish(NothingUsable(0, "a2", "NaN"), failed=True),
    ]


def test_when_all_merged_updates_are_unusable_the_round_is_opened_again_for_those_still_training() -> None:
    rounds = policy(3, quorum=1, grace_s=0.0)
    tell(rounds, AgentJoined("a4"), *offers("a1"), *offers("a2"))
    assert tell(rounds, UpdateBroken("a1", 1, "NaN")) == [
        Drop("a1", 1, Unusable("NaN")),
        StartRound(0, ("a3", "a4")),
    ]
    (merged,) = tell(rounds, *offers("a3"))
    assert merged == merge("a3", reason=Closed("quorum", 1, 2, grace_s=0.0), late=("a4",)), "a1 and a2 had their say"


def test_a_coordinator_that_takes_over_a_round_opened_again_waits_for_nobody_who_had_a_say() -> None:
    rounds = policy(1)
    tell(rounds, *offers("a1"), AgentJoined("a2"))
    assert tell(rounds, UpdateBroken("a1", 1, "NaN"))[-1] == StartRound(0, ("a2",))


def test_an_agent_whose_update_was_dropped_as_late_is_not_waited_for_in_a_round_opened_again() -> None:
    rounds = policy(3, quorum=1, grace_s=0.0)
    tell(rounds, *offers("a1"), *offers("a2"), UpdateBroken("a1", 1, "NaN"))
    assert tell(rounds, AgentLost("a3", SILENT)) == []
    assert tell(rounds, AgentJoined("a4")) == [StartRound(0, ("a3", "a4"))]


def test_when_all_live_agents_have_sent_unusable_updates_the_run_fails_while_others_are_away() -> None:
    rounds = policy(2)
    tell(rounds, *offers("a1"), AgentLost("a2", SILENT))
    assert tell(rounds, UpdateBroken("a1", 1, "NaN"))[-1] == Finish(NothingUsable(0, "a1", "NaN"), failed=True)


# -- agents that cannot train ------------------------------------------------------------------------------------------
def test_the_run_fails_when_no_agent_can_train() -> None:
    rounds = policy(2)
    assert tell(rounds, AgentLost("a1", "no such file", failed=True)) == []
    assert tell(rounds, AgentLost("a2", "a bug", failed=True)) == [
        Finish(
            NoAgentCanTrain(
                (
                    ("a1", "no such file"),
                    ("a2", "a bug"),
                )
            ),
            failed=True,
        )
    ]


def test_the_run_waits_for_its_other_agents_when_the_first_cannot_train() -> None:
    rounds = policy(2, joined=False)
    assert tell(rounds, AgentLost("a1", "no such file", failed=True)) == []
    assert tell(rounds, AgentJoined("a2"), AgentJoined("a3")) == [StartRound(0, ("a2", "a3"))]


def test_the_run_waits_for_an_agent_that_is_away_when_the_others_cannot_train() -> None:
    rounds = policy(2)
    tell(rounds, AgentLost("a1", SILENT))
    assert tell(rounds, AgentLost("a2", "a bug", failed=True)) == []
    assert tell(rounds, AgentJoined("a1"), *offers("a1")) == [
        merge("a1", reason=Closed("complete", 1, 2, absent=(("a2", "a bug"),)), late=("a2",))
    ]


def test_an_agent_that_failed_and_is_then_gone_has_still_failed() -> None:
    rounds = policy(1)
    assert tell(rounds, AgentLost("a1", "a bug", failed=True)) == [
        Finish(NoAgentCanTrain((("a1", "a bug"),)), failed=True)
    ]
    rounds = policy(2)
    tell(rounds, AgentLost("a1", "a bug", failed=True), AgentLost("a1", SILENT))
    assert isinstance(tell(rounds, AgentLost("a2", "a bug", failed=True))[0], Finish)


def test_an_update_that_is_in_is_merged_before_the_run_fails_for_want_of_agents() -> None:
    rounds = policy(2)
    tell(rounds, *offers("a1"), AgentLost("a1", "a bug", failed=True))
    assert tell(rounds, AgentLost("a2", "a bug", failed=True)) == [
        merge("a1", reason=Closed("complete", 1, 2, absent=(("a2", "a bug"),)), late=("a2",))
    ]
    assert tell(rounds, VersionCommitted(1)) == [
        Finish(
            NoAgentCanTrain(
                (
                    ("a1", "a bug"),
                    ("a2", "a bug"),
                )
            ),
            failed=True,
        )
    ]


def test_a_run_that_has_made_its_versions_is_done_though_no_agent_can_train_any_more() -> None:
    rounds = policy(1, versions=1)
    tell(rounds, *offers("a1"), AgentLost("a1", "a bug", failed=True))
    assert tell(rounds, VersionCommitted(1)) == [Finish(VersionsReached(1))]


def test_an_agent_that_was_mended_takes_part_again() -> None:
    rounds = policy(2)
    tell(rounds, AgentLost("a1", "a bug", failed=True), AgentJoined("a1"))
    assert tell(rounds, *offers("a1", "a2")) == [merge("a1", "a2", reason=Closed("complete", 2, 2))]


# -- what the merge rule needs -----------------------------------------------------------------------------------------
def test_with_fewer_updates_than_the_rule_needs_nothing_is_merged_and_it_is_told_once() -> None:
    rounds = policy(5, min_updates=5, rule="krum")
    tell(rounds, *offers("a1", "a2", "a3", "a4"))
    (told,) = tell(rounds, AgentLost("a5", SILENT))
    assert told == Warn(TooFewUpdates(version=0, rule="krum", needed=5, received=4, present=4, slow=0))
    assert tell(rounds, Tick(), AgentLost("a4", SILENT)) == []
    assert tell(rounds, AgentJoined("a6")) == [StartRound(0, ("a1", "a2", "a3", "a4", "a5", "a6"))]
    (merged,) = tell(rounds, *offers("a6"))
    assert isinstance(merged, Merge) and len(merged.updates) == 5
    assert merged.reason == Closed("complete", 5, 6, absent=(("a5", "not heard of for 5.1 s"),))


def test_the_quorum_does_not_close_a_round_with_fewer_than_the_rule_needs() -> None:
    rounds = policy(5, min_updates=4, quorum=2, grace_s=1.0)
    assert tell(rounds, *offers("a1", "a2", "a3"), Tick(), at=5.0) == []
    assert tell(rounds, *offers("a4"), at=5.0) == [WakeAt(6.0)]
    (merged,) = tell(rounds, Tick(), at=6.0)
    assert isinstance(merged, Merge) and len(merged.updates) == 4


def test_an_agent_whose_update_was_unusable_counts_it_was_a_bad_one_and_is_out() -> None:
    rounds = policy(5, min_updates=5)
    tell(rounds, *offers("a1", "a2", "a3", "a4", "a5"))
    dropped, merged = tell(rounds, UpdateBroken("a2", 1, "NaN"))
    assert isinstance(dropped, Drop) and isinstance(merged, Merge) and len(merged.updates) == 4


def test_as_many_are_drawn_as_the_rule_needs() -> None:
    assert len(participants(10, sample=0.2, min_updates=5)) == 5


# -- sampling and weights ----------------------------------------------------------------------------------------------
def participants(agents: int, version: int = 0, **settings: Any) -> tuple[str, ...]:
    rounds = policy(agents, joined=False, **settings)
    rounds.version = version
    (start,) = tell(rounds, *(AgentJoined(f"a{i:03}") for i in range(agents)))
    assert isinstance(start, StartRound)
    return start.participants


def test_a_share_of_the_agents_is_drawn_by_seed_and_version_alone() -> None:
    drawn = participants(100, sample=0.1)
    assert len(drawn) == 10 and list(drawn) == sorted(drawn)
    assert drawn == participants(100, sample=0.1), "the same every time"
    assert drawn != participants(100, sample=0.1, seed=8) and drawn != participants(100, sample=0.1, version=1)


def test_every_agent_is_drawn_as_often_as_another() -> None:
    times = [a for version in range(99) for a in participants(20, version, sample=0.25)]
    counts = [times.count(f"a{i:03}") for i in range(20)]
    assert sum(counts) == 99 * 5 and min(counts) >= 12 and max(counts) <= 40  # 24.75 ± 4.3 each


def test_one_agent_at_least_is_drawn_and_as_many_as_the_quorum_needs() -> None:
    assert len(participants(10, sample=0.01)) == 1
    assert len(participants(10, sample=0.1, quorum=4)) == 4
    assert len(participants(10, sample=1.0)) == 10


def test_who_was_not_drawn_is_asked_when_all_who_were_are_lost() -> None:
    rounds = policy(3, sample=0.3)
    (drawn,) = rounds.participants
    assert tell(rounds, AgentLost(drawn, SILENT)) == [StartRound(0, ("a1", "a2", "a3"))]


def test_weights_by_samples_are_shares_of_the_rows() -> None:
    rounds = policy(3, weights="samples")
    (merged,) = tell(rounds, *offers("a1", samples=1), *offers("a2", samples=2), *offers("a3", samples=5))
    assert isinstance(merged, Merge)
    assert [c.weight for c in merged.updates] == [0.125, 0.25, 0.625]


def test_weights_by_samples_are_uniform_where_nobody_has_rows() -> None:
    rounds = policy(2, weights="samples")
    (merged,) = tell(rounds, *offers("a1", "a2", samples=0))
    assert isinstance(merged, Merge)
    assert [c.weight for c in merged.updates] == [0.5, 0.5]


# -- slow agents -------------------------------------------------------------------------------------------------------
STILL = "no progress for 5.1 s"


def test_a_slow_agent_is_not_waited_for_and_the_reason_names_it() -> None:
    rounds = policy(3)
    assert tell(rounds, *offers("a1", "a2")) == []
    assert tell(rounds, AgentSlow("a3", STILL)) == [
        merge("a1", "a2", reason=Closed("complete", 2, 3, absent=(("a3", f"slow: {STILL}"),)), late=("a3",))
    ]
    assert tell(rounds, VersionCommitted(1)) == [StartRound(1, ("a1", "a2"))], "nor asked for the next round"
    assert rounds.presence("a3") == Presence.SLOW


def test_the_update_of_a_slow_agent_is_merged_in_its_round_while_that_is_open() -> None:
    rounds = policy(3)
    assert tell(rounds, AgentSlow("a3", STILL)) == [StartRound(0, ("a1", "a2", "a3"))], "a roster that says so"
    assert tell(rounds, *offers("a3", "a1")) == []
    assert tell(rounds, *offers("a2")) == [merge("a1", "a2", "a3", reason=Closed("complete", 3, 3))]


def test_the_update_of_a_slow_agent_is_late_when_its_round_is_closed() -> None:
    rounds = policy(2)
    tell(rounds, *offers("a1"), AgentSlow("a2", STILL), VersionCommitted(1))
    assert tell(rounds, *offers("a2")) == [Drop("a2", 1, RoundClosed(0))]


def test_a_slow_agent_that_moves_is_waited_for_again() -> None:
    rounds = policy(2)
    tell(rounds, AgentSlow("a2", STILL))
    assert tell(rounds, AgentJoined("a2")) == [StartRound(0, ("a1", "a2"))]
    assert tell(rounds, *offers("a1")) == []
    assert tell(rounds, *offers("a2")) == [merge("a1", "a2", reason=Closed("complete", 2, 2))]


def test_a_run_whose_agents_are_all_slow_waits() -> None:
    rounds = policy(2)
    tell(rounds, AgentSlow("a1", STILL), AgentSlow("a2", STILL))
    assert tell(rounds, Tick(), at=1e6) == [] and rounds.state == "open"
    assert tell(rounds, *offers("a2"), at=1e6) == [
        merge("a2", reason=Closed("complete", 1, 2, absent=(("a1", f"slow: {STILL}"),)), late=("a1",))
    ]


def test_the_run_does_not_fail_where_the_only_update_is_unusable_and_another_agent_is_slow() -> None:
    rounds = policy(2)
    tell(rounds, *offers("a1"), AgentSlow("a2", STILL))
    assert tell(rounds, UpdateBroken("a1", 1, "NaN")) == [Drop("a1", 1, Unusable("NaN")), StartRound(0, ("a2",))]
    assert tell(rounds, *offers("a2")) == [merge("a2", reason=Closed("complete", 1, 1))]


def test_the_run_does_not_fail_where_one_agent_cannot_train_and_the_other_is_slow() -> None:
    rounds = policy(1)
    tell(rounds, AgentJoined("a2"), AgentSlow("a1", STILL))
    assert tell(rounds, AgentLost("a2", "no data", failed=True)) == []


def test_a_slow_agent_counts_for_no_quorum() -> None:
    rounds = policy(3, quorum=2)
    tell(rounds, *offers("a1"), AgentSlow("a2", STILL))
    assert tell(rounds, AgentSlow("a3", STILL), at=1.0) == [
        merge(
            "a1",
            reason=Closed("complete", 1, 3, absent=(("a2", f"slow: {STILL}"), ("a3", f"slow: {STILL}"))),
            late=("a2", "a3"),
        )
    ]


def test_a_slow_agent_that_leaves_is_lost() -> None:
    rounds = policy(2)
    tell(rounds, AgentSlow("a2", STILL), AgentLost("a2", SILENT))
    assert rounds.presence("a2") == Presence.LOST
    assert tell(rounds, AgentSlow("a2", STILL)) == [], "and cannot become slow"


def test_a_takeover_knows_who_is_slow() -> None:
    rounds = policy(4, joined=False)
    rounds.resume(ResumePoint(3, ("a1", "a2"), frozenset({"a1"}), slow=frozenset({"a2"})), now_s=0.0)
    assert tell(rounds, *offers("a1", base=3)) == [merge("a1", reason=Closed("complete", 1, 2), late=("a2",))]


# -- the end -----------------------------------------------------------------------------------------------------------
def test_the_run_is_done_after_its_versions() -> None:
    rounds = policy(1, versions=2)
    tell(rounds, *offers("a1"), VersionCommitted(1), *offers("a1", clock=2, base=1))
    assert tell(rounds, VersionCommitted(2)) == [Finish(VersionsReached(2))]


def test_the_run_is_done_at_once_when_the_target_is_reached_in_an_open_round() -> None:
    assert tell(policy(2), TargetReached("accuracy = 0.96")) == [Finish(StopRequested("accuracy = 0.96"))]


def test_a_merge_under_way_is_finished_when_the_target_is_reached() -> None:
    rounds = policy(1)
    tell(rounds, *offers("a1"))
    assert tell(rounds, TargetReached("accuracy = 0.96")) == []
    assert tell(rounds, VersionCommitted(1)) == [Finish(StopRequested("accuracy = 0.96"))]


def test_a_target_that_was_reached_stays_reached_when_the_merge_under_way_is_unusable() -> None:
    rounds = policy(1)
    tell(rounds, *offers("a1"), TargetReached("accuracy = 0.96"))
    assert tell(rounds, UpdateBroken("a1", 1, "NaN")) == [
        Drop("a1", 1, Unusable("NaN")),
        Finish(StopRequested("accuracy = 0.96")),
    ]


def test_after_the_end_nothing_is_asked_for() -> None:
    rounds = policy(1)
    tell(rounds, TargetReached("enough"))
    before = copy.deepcopy(rounds)
    late: tuple[Fact, ...] = (
        AgentJoined("a2"),
        AgentLost("a1", SILENT),
        *offers("a1"),
        *offers("a1", base=9),
        Tick(),
        TargetReached("2"),
    )
    assert tell(rounds, *late, UpdateBroken("a1", 1, "?"), VersionCommitted(1), at=99.0) == []
    assert rounds == before


def test_a_commit_out_of_order_is_our_own_bug() -> None:
    rounds = policy(1)
    with pytest.raises(AssertionError, match="that is open"):
        rounds.handle(VersionCommitted(1), 0.0)
    tell(rounds, *offers("a1"))
    with pytest.raises(AssertionError, match="commit of version 2 after 0"):
        rounds.handle(VersionCommitted(2), 0.0)


# -- a coordinator takes over ------------------------------------------------------------------------------------------
def resumed(version: int, participants: tuple[str, ...], live: set[str], **settings: Any) -> Rounds:
    rounds = policy(4, joined=False, **settings)
    rounds.resume(ResumePoint(version, participants, frozenset(live)), now_s=100.0)
    rounds.validate()
    return rounds


def test_a_round_taken_over_waits_for_those_who_were_live() -> None:
    rounds = resumed(3, ("a1", "a2", "a3"), {"a1", "a2"})
    assert tell(rounds, *offers("a1", clock=9, base=3), at=100.0) == []
    assert tell(rounds, *offers("a2", clock=9, base=3), at=101.0) == [
        merge("a1", "a2", clock=9, reason=Closed("complete", 2, 3), late=("a3",))
    ]
    assert tell(rounds, VersionCommitted(4), at=101.0) == [StartRound(4, ("a1", "a2"))]


def test_a_round_taken_over_does_not_wait_for_those_who_do_not_return() -> None:
    rounds = resumed(3, ("a1", "a2"), {"a1", "a2"})
    tell(rounds, *offers("a1", base=3), at=100.0)
    assert tell(rounds, AgentLost("a2", SILENT), at=105.1) == [
        merge("a1", reason=Closed("complete", 1, 2, absent=(("a2", "not heard of for 5.1 s"),)), late=("a2",))
    ]


def test_a_run_taken_over_between_rounds_goes_on_with_whoever_comes() -> None:
    assert tell(resumed(3, (), set()), AgentJoined("a1")) == [StartRound(3, ("a1",))]


def test_a_run_taken_over_after_its_last_version_is_done() -> None:
    assert tell(resumed(100, (), set()), AgentJoined("a1")) == [Finish(VersionsReached(100))]


def test_a_merge_taken_over_is_committed_and_the_next_round_begins() -> None:
    rounds = resumed(3, ("a1", "a2"), {"a1", "a2"})
    rounds.resume_merge(offers("a1", "a2", clock=5, base=3))
    rounds.validate()
    assert tell(rounds, *offers("a1", "a2", clock=5, base=3)) == [], "told again"
    assert tell(rounds, VersionCommitted(4), at=101.0) == [StartRound(4, ("a1", "a2"))]


def test_an_unusable_update_of_a_merge_taken_over_leaves_it() -> None:
    rounds = resumed(3, ("a1", "a2"), {"a1", "a2"})
    rounds.resume_merge(offers("a1", "a2", base=3))
    assert tell(rounds, UpdateBroken("a1", 1, "gone")) == [
        Drop("a1", 1, Unusable("gone")),
        merge("a2", reason=Closed("complete", 2, 2, without=(("a1", "gone"),))),
    ]


# -- golden traces: a refactor proves itself by identical ones ---------------------------------------------------------
Schedule = list[tuple[float, Fact]]


def _steady() -> Schedule:
    """Four agents, three rounds, everybody in time."""
    schedule: Schedule = [(0.0, AgentJoined(f"a{i}")) for i in (2, 4, 1, 3)]
    for version in range(3):
        schedule += [
            (version + i / 10, o) for i, o in enumerate(offers("a3", "a1", "a4", "a2", clock=version + 1, base=version))
        ]
        schedule.append((version + 0.5, VersionCommitted(version + 1)))
    return schedule


def _stragglers() -> Schedule:
    """Quorum and grace: one always late, one lost and back, one that joins in between."""
    return [
        *((0.0, AgentJoined(a)) for a in ("a1", "a2", "a3", "a4")),
        *((1.0 + i, o) for i, o in enumerate(offers("a1", "a2", "a3"))),
        (4.0, Tick()),
        (4.5, Tick()),
        *((4.6, o) for o in offers("a4")),
        (5.0, VersionCommitted(1)),
        (5.1, AgentLost("a2", SILENT)),
        (5.2, AgentJoined("a5")),
        *((6.0 + i, o) for i, o in enumerate(offers("a1", "a3", clock=2, base=1))),
        (7.5, AgentJoined("a2")),
        *((8.0, o) for o in offers("a2", clock=2, base=1)),
        (9.0, AgentLost("a4", "it left")),
        (9.5, VersionCommitted(2)),
        *((10.0, o) for o in offers("a1", "a2", "a3", "a5", clock=3, base=2)),
        (11.0, TargetReached("accuracy = 0.96 at version 2")),
        (12.0, VersionCommitted(3)),
    ]


def _trouble() -> Schedule:
    """Unusable updates, replaced ones, an offer from the future, a round opened again, and nobody left in the end."""
    return [
        *((0.0, AgentJoined(a)) for a in ("a1", "a2", "a3")),
        *((1.0, o) for o in offers("a1", base=7)),
        *((1.0, o) for o in (*offers("a1"), *offers("a1", clock=2), *offers("a1", clock=2))),
        (2.0, UpdateBroken("a1", 2, "the checksum does not match")),
        *((3.0, o) for o in offers("a2", "a3")),
        (3.5, UpdateBroken("a3", 1, "NaN")),
        (4.0, AgentJoined("a4")),
        (4.5, UpdateBroken("a2", 1, "NaN")),
        *((5.0, o) for o in offers("a4")),
        (6.0, VersionCommitted(1)),
        (7.0, AgentLost("a2", "a bug", failed=True)),
        (7.1, AgentLost("a3", "a bug", failed=True)),
        (7.2, AgentLost("a4", SILENT)),
        (7.3, AgentLost("a1", "a bug", failed=True)),
        (7.4, AgentLost("a4", "a bug", failed=True)),
    ]


SCHEDULES: dict[str, tuple[Schedule, dict[str, Any]]] = {
    "steady": (_steady(), {"agents": 4, "versions": 3}),
    "stragglers": (_stragglers(), {"agents": 4, "quorum": 3, "grace_s": 1.5, "weights": "samples"}),
    "trouble": (_trouble(), {"agents": 3}),
}


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_the_trace_of_a_schedule_is_the_golden_one(name: str, golden: Callable[[str, Any], None]) -> None:
    schedule, settings = SCHEDULES[name]
    rounds, trace = policy(joined=False, **settings), []
    for at, fact in schedule:
        try:
            said: Any = [command_as_json(c) for c in tell(rounds, fact, at=at)]
        except PeerError as error:
            said = f"PeerError: {error}"
        trace.append({"at_s": at, "fact": [type(fact).__name__, asdict(fact)], "commands": said})
    golden(f"rounds_{name}", trace)


# -- random schedules --------------------------------------------------------------------------------------------------
NAMES = ("a1", "a2", "a3", "a4", "a5")
ACTS = ("train",) * 6 + ("join",) * 3 + ("commit",) * 3 + (
    "lose", "fail", "slow", "finish", "stale", "future", "back", "again", "uninvited", "newer", "broken", "broken elsewhere",
    "tick", "take over",
)  # fmt: skip
Act = tuple[str, str, float]


class Fleet:
    """Agents around a policy: who trains from which version, as the commands said; and what became of every update."""

    def __init__(self, rounds: Rounds) -> None:
        self.rounds, self.now_s = rounds, 0.0
        self.live: set[str] = set()
        self.slow: set[str] = set()
        self.asked: tuple[int, tuple[str, ...]] = (0, ())
        self.clocks = dict.fromkeys(NAMES, 0)
        self.sent: dict[str, list[OfferReady]] = {name: [] for name in NAMES}
        self.trained: set[tuple[str, int]] = set()  # agent and version
        self.merging: list[tuple[str, int]] = []
        self.judged: dict[tuple[str, int], str] = {}
        self.wake_at_s: float | None = None
        self.finished: Finish | None = None

    def act(self, what: str, who: str, seconds: float) -> None:
        self.now_s += seconds
        version = self.rounds.version
        match what:
            case "join":
                self.live.add(who)
                self.slow.discard(who)
                self.tell(AgentJoined(who))
            case "slow" if who in self.live:
                self.live.discard(who)
                self.slow.add(who)
                self.tell(AgentSlow(who, "no progress for 5.1 s"))
            case "finish" if who in self.slow and self.was_asked(who):
                self.trained.add((who, version))
                self.offer(who, version)
            case "lose" | "fail":
                self.live.discard(who)
                self.slow.discard(who)
                self.tell(AgentLost(who, "gone", failed=what == "fail"))
            case "train" if self.may_train(who):
                self.trained.add((who, version))
                self.offer(who, version)
            case "stale" if version > 0 and who not in self.rounds.offers:
                self.offer(who, version - 1)
            case "uninvited" if who not in self.rounds.participants:
                self.offer(who, version)
            case "newer" if (who, version) in self.trained:  # a new process of the same name
                self.offer(who, version)
            case "future" if self.finished is None:
                self.refused(OfferReady(who, self.clocks[who] + 1, version + 1))
            case "back" if version > 0 and who in self.rounds.offers and self.finished is None:
                self.refused(OfferReady(who, self.clocks[who] + 1, version - 1))
            case "again" if self.sent[who]:
                self.tell(self.sent[who][int(seconds * 10) % len(self.sent[who])])
            case "broken" if self.merging:
                self.tell(UpdateBroken(*self.merging[int(seconds * 10) % len(self.merging)], "bad"))
            case "broken elsewhere":
                self.tell(UpdateBroken(who, self.clocks[who] + 5, "bad"))
            case "commit":
                self.commit()
            case "tick":
                self.tell(Tick())
            case "take over" if self.rounds.started and self.finished is None:
                self.take_over()

    def refused(self, offer: OfferReady) -> None:
        before = copy.deepcopy(self.rounds)
        with pytest.raises(PeerError):
            self.rounds.handle(offer, self.now_s)
        assert self.rounds == before

    def may_train(self, who: str) -> bool:
        return who in self.live and self.was_asked(who)

    def was_asked(self, who: str) -> bool:
        version, invited = self.asked
        return who in invited and (who, version) not in self.trained and not self.merging

    def offer(self, who: str, base: int) -> None:
        self.clocks[who] += 1
        self.sent[who].append(OfferReady(who, self.clocks[who], base, samples=len(who)))
        self.tell(self.sent[who][-1])

    def commit(self) -> None:
        if self.merging:
            for update in self.merging:
                self.judge(update, "merged")
            self.merging = []
            self.tell(VersionCommitted(self.rounds.version + 1))

    def take_over(self) -> None:
        """Another coordinator: it knows what head says, looks at it (a Tick), and is told the offers that were not judged."""
        old, merging = self.rounds, self.merging
        new = Rounds(
            min_agents=old.min_agents,
            quorum=old.quorum,
            grace_s=old.grace_s,
            sample=old.sample,
            weights=old.weights,
            versions=old.versions,
            seed=old.seed,
            min_updates=old.min_updates,
        )
        live, slow = frozenset(self.live), frozenset(self.slow)
        assert {a: old.presence(a) for a in live} == dict.fromkeys(live, Presence.PRESENT)
        assert {a: old.presence(a) for a in slow} == dict.fromkeys(slow, Presence.SLOW)
        new.ledger = ledger_at(old.ledger.judged_clocks())
        new.resume(ResumePoint(old.version, old.participants, live, slow=slow), self.now_s)
        if merging:
            new.resume_merge(list(old.offers.values()))
        self.trained = {
            (who, version) for who, version in self.trained if version != old.version
        }  # a new term: once more
        self.rounds = new
        self.tell(Tick())
        for sent in self.sent.values():
            for offer in [o for o in sent if (o.agent, o.clock) not in self.judged]:
                self.tell(offer)

    def tell(self, fact: Fact) -> None:
        version, was = self.rounds.version, self.rounds.state
        commands = self.rounds.handle(fact, self.now_s)
        self.rounds.validate()
        for merge in [c for c in commands if isinstance(c, Merge) and was != "merging"]:
            assert len(merge.updates) + len(self.rounds.broken) >= self.rounds.min_updates, "fewer than the rule needs"
        assert self.rounds.version == version + isinstance(fact, VersionCommitted) * (self.finished is None)
        for command in commands:
            self.obey(command)
        self.check()

    def obey(self, command: Command) -> None:
        assert self.finished is None, "a command after the end"
        match command:
            case StartRound(version, invited):
                assert version == self.rounds.version and not self.merging
                assert set(invited) <= {*self.clocks} and list(invited) == sorted(set(invited)) and invited
                self.asked = (version, invited)
            case Merge(updates, reason, late):
                assert updates and len(closed_words(reason)) <= REASON_CHARS
                assert not {c.agent for c in updates} & set(late)
                assert sum(c.weight for c in updates) == pytest.approx(1.0) and {c.lag for c in updates} == {0}
                self.merging = [(c.agent, c.clock) for c in updates]
                assert self.merging == sorted(self.merging)
                bases = {o.base for sent in self.sent.values() for o in sent if (o.agent, o.clock) in self.merging}
                assert bases == {self.rounds.version}, "a merge of other versions"
            case Drop(agent, clock, reason):
                assert reason
                self.judge((agent, clock), "dropped")
                if (agent, clock) in self.merging:
                    self.merging.remove((agent, clock))
            case WakeAt(at_s):
                self.wake_at_s = at_s
            case Finish():
                self.finished, self.merging = command, []

    def judge(self, update: tuple[str, int], verdict: str) -> None:
        assert update not in self.judged, f"{update} was judged twice: {self.judged[update]}, then {verdict}"
        self.judged[update] = verdict

    def check(self) -> None:
        """When all live participants have offered, the round is closed."""
        rounds = self.rounds
        if rounds.state == "open":
            waited_for = [a for a in rounds.participants if a in self.live and (a, rounds.version) not in self.trained]
            in_and_out = len(rounds.offers) + len(rounds.broken)
            idle = rounds.offers and in_and_out >= rounds.min_updates
            assert waited_for or not idle, "everybody has offered, and nothing is merged"

    def until_the_end(self) -> None:
        """From here on nothing goes wrong: somebody new comes, everybody works, and the run must end."""
        for fresh in ("b1", "b2", "b3")[: max(self.rounds.min_agents, self.rounds.min_updates)]:
            self.clocks[fresh], self.sent[fresh] = 0, []
            self.act("join", fresh, 0.0)
        for _ in range(40):
            for who in sorted(self.live):
                self.act("train", who, 0.1)
            if self.wake_at_s is not None:
                self.now_s = max(self.now_s, self.wake_at_s)
                self.act("tick", "", 0.0)
            self.commit()
            if self.finished is not None:
                return
        raise AssertionError(f"the run never ends: {self.rounds}")


policies = st.builds(
    Rounds,
    min_agents=st.integers(1, 3),
    quorum=st.sampled_from([None, None, 1, 2, 3]),
    grace_s=st.sampled_from([None, 0.0, 1.0]),
    sample=st.sampled_from([None, None, 0.4]),
    weights=st.sampled_from(["uniform", "samples"]),
    versions=st.integers(1, 4),
    seed=st.integers(0, 3),
    min_updates=st.sampled_from([1, 1, 2, 3]),
)
acts = st.lists(
    st.tuples(st.sampled_from(ACTS), st.sampled_from(NAMES), st.sampled_from([0.0, 0.3, 2.0])), min_size=5, max_size=50
)


def judged_once_and_can_end(rounds: Rounds, schedule: list[Act]) -> None:
    fleet = Fleet(rounds)
    for act in schedule:
        fleet.act(*act)
    if fleet.finished is None:
        fleet.until_the_end()


@settings(max_examples=200)
@given(policies, acts)
def test_whatever_happens_every_update_is_judged_once_and_the_run_can_end(rounds: Rounds, schedule: list[Act]) -> None:
    judged_once_and_can_end(rounds, schedule)


@pytest.mark.parametrize("thousand", range(3))
def test_a_thousand_longer_schedules_end_just_as_well(thousand: int) -> None:
    for seed in range(1000 * thousand, 1000 * (thousand + 1)):
        draw = random.Random(seed)
        rounds = policy(
            draw.randint(1, 3),
            joined=False,
            quorum=draw.choice([None, None, 1, 2, 3]),
            grace_s=draw.choice([None, 0.0, 1.0]),
            sample=draw.choice([None, None, 0.4]),
            weights=draw.choice(["uniform", "samples"]),
            versions=draw.randint(2, 12),
            min_updates=1 if seed % 2 else draw.randint(1, 3),
        )
        schedule = [
            (draw.choice(ACTS), draw.choice(NAMES), draw.choice([0.0, 0.3, 2.0])) for _ in range(draw.randint(10, 150))
        ]
        try:
            judged_once_and_can_end(rounds, schedule)
        except AssertionError as error:
            error.add_note(f"seed {seed}, {rounds}")
            raise
