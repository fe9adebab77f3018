"""The policy of asynchronous runs: facts in, exact commands out. No broker, no tensor, no waiting: time is an argument."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from syncline.averaging.staleness import Constant, Hinge, Polynomial
from syncline.errors import PeerError
from syncline.policy.asynchronous import Asynchronous
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
    LetRun,
    Merge,
    OfferReady,
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
    NotStarted,
    Replaced,
    StopRequested,
    TooFewUpdates,
    TooStale,
    Unusable,
    VersionsReached,
)
from syncline.policy.words import REASON_CHARS, closed_words
from syncline.wire.messages import Presence
from unit.ledgers import ledger_at
from unit.traces import command_as_json

SILENT = "not heard of for 5.1 s"
DEFAULTS: dict[str, Any] = {
    "buffer": 2, "max_lag": 8, "staleness": Constant(), "weights": "uniform", "versions": 100, "grace_s": 2.0,
}  # fmt: skip


def policy(agents: int = 4, *, joined: bool = True, **settings: Any) -> Asynchronous:
    """A policy that starts with so many agents; `joined`: they are there, and run."""
    made = Asynchronous(min_agents=agents, **{**DEFAULTS, **settings})
    if joined:
        tell(made, *(AgentJoined(f"a{i}") for i in range(1, agents + 1)))
    return made


def tell(policy: Asynchronous, *facts: Fact, at: float = 0.0) -> list[Command]:
    """The commands that follow on these facts; what must always hold is checked after each."""
    commands: list[Command] = []
    for fact in facts:
        commands += policy.handle(fact, at)
        policy.validate()
    return commands


def refused(policy: Asynchronous, fact: Fact) -> str:
    """The words of a refusal that changes nothing."""
    before = copy.deepcopy(policy)
    with pytest.raises(PeerError) as error:
        policy.handle(fact, 0.0)
    assert policy == before
    return str(error.value)


def offers(*agents: str, clock: int = 1, base: int = 0, **sizes: int) -> list[OfferReady]:
    return [OfferReady(agent, clock, base, **sizes) for agent in agents]


def merge(*chosen: tuple[str, int, int], reason: Closed, weight: Any = None) -> Merge:
    """Of (agent, clock, lag); uniform weights where none is given."""
    return Merge(tuple(Chosen(*c, 1 / len(chosen) if weight is None else weight) for c in chosen), reason)


def run(version: int, *agents: str, gate: int | None = None, merging: bool = False, **offsets: int) -> LetRun:
    return LetRun(version, agents, gate, tuple(sorted(offsets.items())), merging)


ALL = ("a1", "a2", "a3", "a4")


# -- the start ---------------------------------------------------------------------------------------------------------
def test_the_run_starts_when_enough_agents_have_joined() -> None:
    made = policy(3, joined=False)
    assert tell(made, AgentJoined("b"), AgentJoined("c"), Tick()) == []
    assert tell(made, AgentJoined("a")) == [run(0, "a", "b", "c")]


def test_an_agent_lost_before_the_start_is_not_counted() -> None:
    made = policy(2, joined=False)
    assert tell(made, AgentJoined("a"), AgentLost("a", SILENT), AgentJoined("b")) == []
    assert tell(made, AgentJoined("a")) == [run(0, "a", "b")]


def test_an_agent_that_joins_twice_counts_once() -> None:
    made = policy(2, joined=False)
    assert tell(made, AgentJoined("a"), AgentJoined("a")) == []
    assert tell(made, AgentJoined("b")) == [run(0, "a", "b")]
    assert tell(made, AgentJoined("b")) == []


def test_an_offer_before_the_start_is_dropped_with_the_reason() -> None:
    made = policy(2, joined=False)
    assert tell(made, *offers("a1")) == [Drop("a1", 1, NotStarted())]
    assert tell(made, *offers("a1")) == [], "told twice"
    assert tell(made, AgentJoined("a1"), AgentJoined("a2")) == [run(0, "a1", "a2")]
    assert tell(made, *offers("a1", clock=2), *offers("a2")) == [
        merge(("a1", 2, 0), ("a2", 1, 0), reason=Closed("complete", 2, 2))
    ]


def test_an_agent_that_joins_later_runs_at_once() -> None:
    made = policy(2)
    assert tell(made, AgentJoined("a3")) == [run(0, "a1", "a2", "a3")]
    assert tell(made, *offers("a3", "a1")) == [merge(("a1", 1, 0), ("a3", 1, 0), reason=Closed("complete", 2, 2))]


# -- the buffer --------------------------------------------------------------------------------------------------------
def test_a_full_buffer_is_merged_and_everybody_is_told() -> None:
    made = policy(4, buffer=3)
    assert tell(made, *offers("a3", "a1")) == []
    assert tell(made, *offers("a4")) == [
        merge(("a1", 1, 0), ("a3", 1, 0), ("a4", 1, 0), reason=Closed("complete", 3, 3))
    ]
    assert tell(made, VersionCommitted(1)) == [run(1, *ALL)]


def test_a_buffer_of_one_merges_each_update_as_it_comes() -> None:
    made = policy(2, buffer=1)
    assert tell(made, *offers("a2")) == [merge(("a2", 1, 0), reason=Closed("complete", 1, 1))]
    assert tell(made, VersionCommitted(1)) == [run(1, "a1", "a2")]
    assert tell(made, *offers("a1")) == [merge(("a1", 1, 1), reason=Closed("complete", 1, 1))]


def test_the_first_k_are_taken_in_the_order_of_arrival_and_the_rest_waits_for_the_next_version() -> None:
    made = policy(4, buffer=2)
    assert tell(made, *offers("a4", "a2")) == [merge(("a2", 1, 0), ("a4", 1, 0), reason=Closed("complete", 2, 2))]
    assert tell(made, *offers("a3", "a1"), *offers("a4", clock=2)) == [], "a plan is executed as it is"
    assert tell(made, VersionCommitted(1)) == [
        run(1, *ALL),
        merge(("a1", 1, 1), ("a3", 1, 1), reason=Closed("complete", 2, 2)),
    ]
    assert tell(made, VersionCommitted(2)) == [run(2, *ALL)]
    assert tell(made, *offers("a1", clock=2, base=1)) == [
        merge(("a1", 2, 1), ("a4", 2, 2), reason=Closed("complete", 2, 2))
    ]


def test_two_updates_of_one_agent_are_merged_in_the_order_of_their_clocks() -> None:
    made = policy(4, buffer=4)
    tell(made, *offers("a2"), *offers("a1", clock=1), *offers("a1", clock=2))
    assert tell(made, *offers("a2", clock=2)) == [
        merge(("a1", 1, 0), ("a1", 2, 0), ("a2", 1, 0), ("a2", 2, 0), reason=Closed("complete", 4, 4))
    ]


def test_a_buffer_of_all_waits_for_one_of_every_live_agent() -> None:
    made = policy(3, buffer=None)
    assert tell(made, *offers("a1", "a3"), *offers("a1", clock=2)) == []
    assert tell(made, *offers("a2")) == [
        merge(("a1", 1, 0), ("a1", 2, 0), ("a2", 1, 0), ("a3", 1, 0), reason=Closed("complete", 3, 3))
    ]


def test_a_buffer_of_all_takes_the_agent_that_joins_into_account() -> None:
    made = policy(2, buffer=None)
    tell(made, *offers("a1"), AgentJoined("a3"))
    assert tell(made, *offers("a2")) == []
    assert tell(made, *offers("a3")) == [
        merge(("a1", 1, 0), ("a2", 1, 0), ("a3", 1, 0), reason=Closed("complete", 3, 3))
    ]


def test_with_a_robust_rule_a_merge_holds_one_update_of_an_agent() -> None:
    made = policy(3, buffer=2, one_each=True)
    assert tell(made, *offers("a1"), *offers("a1", clock=2)) == []
    assert tell(made, *offers("a3")) == [merge(("a1", 1, 0), ("a3", 1, 0), reason=Closed("complete", 2, 2))]
    assert tell(made, *offers("a2"), VersionCommitted(1)) == [
        run(1, "a1", "a2", "a3"),
        merge(("a1", 2, 1), ("a2", 1, 1), reason=Closed("complete", 2, 2)),
    ], "the second one waited its turn"


# -- what is judged already, or cannot be ------------------------------------------------------------------------------
def test_an_offer_told_twice_changes_nothing() -> None:
    made = policy(3, buffer=3)
    tell(made, *offers("a1"), *offers("a1", clock=2))
    before = copy.deepcopy(made)
    assert tell(made, *offers("a1"), *offers("a1", clock=2)) == []
    assert made == before


def test_an_update_that_was_merged_and_is_told_again_changes_nothing() -> None:
    made = policy(1, buffer=1)
    tell(made, *offers("a1"))
    merging = copy.deepcopy(made)
    assert tell(made, *offers("a1")) == [] and made == merging
    tell(made, VersionCommitted(1))
    before = copy.deepcopy(made)
    assert tell(made, *offers("a1"), *offers("a1", base=1)) == []
    assert made == before


def test_a_clock_may_be_left_out() -> None:
    made = policy(2)
    assert tell(made, *offers("a1", clock=3), *offers("a2")) == [
        merge(("a1", 3, 0), ("a2", 1, 0), reason=Closed("complete", 2, 2))
    ]
    assert tell(made, *offers("a1", clock=2)) == [], "an older one is judged with it"


def test_an_offer_from_the_future_is_refused_and_changes_nothing() -> None:
    assert refused(policy(2), OfferReady("a1", 1, base=1)) == "a1: base 1 is newer than version 0"


@pytest.mark.parametrize("merging", [False, True])
def test_an_update_from_an_older_version_than_the_one_before_it_is_refused_and_changes_nothing(merging: bool) -> None:
    made = policy(2, buffer=2)
    tell(made, *offers("a1", "a2"), VersionCommitted(1), *offers("a1", clock=2, base=1))
    if merging:
        tell(made, *offers("a2", clock=2, base=1))
    assert refused(made, OfferReady("a1", 3, base=0)) == "a1: base 0 is older than 1, that of clock 2"


def test_a_commit_out_of_order_is_our_own_bug() -> None:
    made = policy(1, buffer=1)
    with pytest.raises(AssertionError, match="that is open"):
        made.handle(VersionCommitted(1), 0.0)
    tell(made, *offers("a1"))
    with pytest.raises(AssertionError, match="commit of version 2 after 0"):
        made.handle(VersionCommitted(2), 0.0)


# -- weights -----------------------------------------------------------------------------------------------------------
def weights(made: Asynchronous, *facts: Fact) -> list[float]:
    (merged,) = (c for c in tell(made, *facts) if isinstance(c, Merge))
    return [c.weight for c in merged.updates]


def at_version(version: int, **settings: Any) -> Asynchronous:
    """Three agents, after so many versions of one update each."""
    made = policy(3, **{**settings, "buffer": 1, "staleness": Constant()})
    for v in range(version):
        tell(made, *offers("a3", clock=v + 1, base=v), VersionCommitted(v + 1))
    for name, value in settings.items():
        setattr(made, name, value)
    return made


def test_a_full_buffer_divides_by_k() -> None:
    assert weights(policy(3, buffer=3), *offers("a1", "a2", "a3")) == [1 / 3] * 3


def test_a_buffer_that_closes_early_divides_by_k_all_the_same() -> None:
    made = policy(2, buffer=5, overlap=False)
    assert weights(made, *offers("a1", "a2")) == pytest.approx([1 / 5] * 2, rel=1e-15)


def test_weights_by_samples_are_shares_of_the_rows_and_of_the_part_of_the_buffer() -> None:
    sizes = (*offers("a1", samples=1), *offers("a2", samples=3))
    assert weights(policy(3, buffer=2, weights="samples"), *sizes) == [0.25, 0.75]
    assert weights(policy(2, buffer=4, overlap=False, weights="samples"), *sizes) == [0.125, 0.375]


def test_steps_can_be_normalized() -> None:
    made = policy(2, buffer=2, normalize="fednova")
    assert weights(made, *offers("a1", steps=1), *offers("a2", steps=3)) == [0.5 * 2 / 1, 0.5 * 2 / 3]


@pytest.mark.parametrize(
    ("staleness", "expected"),
    [
        (Constant(), [1.0, 1.0, 1.0]),
        (Polynomial(a=0.5), [1.0, 1 / 2**0.5, 0.5]),
        (Polynomial(a=1.0), [1.0, 0.5, 0.25]),
        (Polynomial(a=0.0), [1.0, 1.0, 1.0]),
        (Hinge(a=10.0, b=4), [1.0, 1.0, 1.0]),
        (Hinge(a=10.0, b=0), [1.0, 1 / 11, 1 / 31]),
        (Hinge(a=0.5, b=1), [1.0, 1.0, 0.5]),
    ],
    ids=str,
)
def test_an_update_counts_by_its_lag(staleness: Any, expected: list[float]) -> None:
    """At lags of 0, 1 and 3 versions, as a third of a buffer of three."""
    made = at_version(3, buffer=3, staleness=staleness)
    found = weights(made, *offers("a1", base=0), *offers("a2", base=2), *offers("a3", clock=4, base=3))
    assert found == pytest.approx([expected[2] / 3, expected[1] / 3, expected[0] / 3], rel=1e-15)
    assert [staleness.weight(lag) for lag in (0, 1, 3)] == pytest.approx(expected, rel=1e-15)


def test_the_staleness_of_fedasync_falls_beyond_the_hinge() -> None:
    hinge = Hinge(a=10.0, b=4)
    assert [hinge.weight(lag) for lag in (0, 4, 5, 6)] == [1.0, 1.0, 1 / 11, 1 / 21]


def test_an_elastic_difference_is_added_whole_whatever_the_buffer_and_its_lag() -> None:
    made = at_version(3, buffer=4, staleness=Polynomial(a=0.5), elastic=True, overlap=False)
    assert weights(made, *offers("a1", base=0), *offers("a2", base=2), *offers("a3", clock=4, base=3)) == [1.0] * 3


# -- buffers that close early ------------------------------------------------------------------------------------------
def test_a_buffer_closes_at_once_when_nobody_may_run_before_something_is_judged() -> None:
    made = policy(2, buffer=5)
    assert tell(made, *offers("a1", "a2"), *offers("a1", clock=2)) == [], "a2 may be training its second"
    assert tell(made, *offers("a2", clock=2)) == [
        merge(
            ("a1", 1, 0), ("a1", 2, 0), ("a2", 1, 0), ("a2", 2, 0),
            reason=Closed("nobody may run", 4, 5), weight=pytest.approx(1 / 5, rel=1e-15),
        )
    ]  # fmt: skip


def test_without_overlap_an_agent_waits_for_the_verdict() -> None:
    made = policy(2, buffer=5, overlap=False)
    assert tell(made, *offers("a1")) == []
    (merged,) = tell(made, *offers("a2"))
    assert isinstance(merged, Merge) and merged.reason == Closed("nobody may run", 2, 5)


def test_a_buffer_closes_when_the_last_agent_that_may_run_is_lost() -> None:
    made = policy(3, buffer=3, overlap=False)
    tell(made, *offers("a1", "a2"))
    assert tell(made, AgentLost("a3", SILENT)) == [
        run(0, "a1", "a2"),
        merge(
            ("a1", 1, 0), ("a2", 1, 0), weight=1 / 2 * 2 / 3,
            reason=Closed("nobody may run", 2, 3, absent=(("a3", "not heard of for 5.1 s"),)),
        ),
    ]  # fmt: skip


def test_what_lost_agents_have_left_is_merged_when_nobody_is_there() -> None:
    made = policy(2, buffer=5)
    tell(made, *offers("a1"), AgentLost("a1", "it left"))
    assert tell(made, AgentLost("a2", SILENT)) == [
        run(0),
        merge(
            ("a1", 1, 0), weight=1 / 5,
            reason=Closed("nobody may run", 1, 5, absent=(("a1", "it left"),("a2", "not heard of for 5.1 s"),)),
        ),
    ]  # fmt: skip
    assert tell(made, VersionCommitted(1)) == [run(1)]
    assert tell(made, AgentJoined("a2")) == [run(1, "a2")]


def test_after_the_quorum_the_rest_has_the_grace_period() -> None:
    made = policy(4, buffer=4, quorum=2)
    assert tell(made, *offers("a1"), at=5.0) == []
    assert tell(made, *offers("a2"), at=10.0) == [WakeAt(12.0)]
    assert tell(made, *offers("a1", clock=2), at=11.0) == [WakeAt(12.0)], "it runs on"
    assert tell(made, Tick(), at=11.9) == [WakeAt(12.0)], "a tick that comes early waits on"
    assert tell(made, Tick(), at=12.0) == [
        merge(
            ("a1", 1, 0), ("a1", 2, 0), ("a2", 1, 0), reason=Closed("quorum", 3, 4, grace_s=2.0), weight=1 / 3 * 3 / 4
        )
    ]


def test_a_full_buffer_ends_the_grace_period() -> None:
    made = policy(3, buffer=3, quorum=2)
    assert tell(made, *offers("a1", "a2")) == [WakeAt(2.0)]
    assert tell(made, *offers("a3"), at=1.0) == [
        merge(("a1", 1, 0), ("a2", 1, 0), ("a3", 1, 0), reason=Closed("complete", 3, 3))
    ]
    assert tell(made, VersionCommitted(1), Tick(), at=5.0) == [run(1, "a1", "a2", "a3")]


def test_without_grace_the_quorum_closes_the_buffer() -> None:
    made = policy(4, buffer=3, quorum=2, grace_s=0.0)
    assert tell(made, *offers("a1", "a2")) == [
        merge(("a1", 1, 0), ("a2", 1, 0), reason=Closed("quorum", 2, 3, grace_s=0.0), weight=1 / 2 * 2 / 3)
    ]


def test_what_is_left_at_a_commit_has_a_grace_period_of_its_own() -> None:
    made = policy(4, buffer=3, quorum=1)
    tell(made, *offers("a1", "a2", "a3"), at=0.5)
    assert tell(made, *offers("a4"), at=1.0) == []
    assert tell(made, VersionCommitted(1), at=4.0) == [run(1, *ALL), WakeAt(6.0)]


def test_the_grace_period_begins_anew_where_the_quorum_was_lost_meanwhile() -> None:
    made = policy(4, buffer=3, quorum=2, max_lag=0, overlap=False)
    tell(made, *offers("a1", "a2", "a3"), *offers("a4"))
    assert tell(made, VersionCommitted(1), at=1.0) == [Drop("a4", 1, TooStale(1, 0)), run(1, *ALL)]
    assert tell(made, *offers("a1", clock=2, base=1), at=2.0) == []
    assert tell(made, *offers("a2", clock=2, base=1), at=3.0) == [WakeAt(5.0)]


def test_the_default_grace_period_is_the_median_of_the_last_versions() -> None:
    made = policy(2, buffer=2, quorum=1, grace_s=None)
    assert made.grace() == 1.0, "nothing is known yet"
    now = 0.0
    for version, seconds in enumerate((3.0, 100.0, 5.0)):
        tell(made, *offers("a1", "a2", clock=version + 1, base=version), at=now)
        now += seconds
        tell(made, VersionCommitted(version + 1), at=now)
    assert tell(made, *offers("a1", clock=4, base=3), at=now) == [WakeAt(now + 5.0)]


# -- a rule that needs so many -----------------------------------------------------------------------------------------
def test_a_buffer_does_not_close_early_with_fewer_updates_than_the_rule_needs() -> None:
    made = policy(2, buffer=4, overlap=False, min_updates=3, rule="median", quorum=1)
    assert tell(made, *offers("a1")) == []
    few = TooFewUpdates(version=0, rule="median", needed=3, received=2, present=2, slow=0)
    assert tell(made, *offers("a2")) == [Warn(few)]
    assert tell(made, Tick(), at=1e6) == [], "told once"
    assert tell(made, AgentJoined("a3"), at=1e6) == [run(0, "a1", "a2", "a3")]
    (merged,) = tell(made, *offers("a3"), at=1e6)
    assert isinstance(merged, Merge) and merged.reason == Closed("nobody may run", 3, 4)


def test_an_unusable_update_counts_for_the_rule_because_it_is_out() -> None:
    made = policy(3, buffer=3, min_updates=3, rule="median", overlap=False)
    tell(made, *offers("a1", "a2", "a3"))
    assert tell(made, UpdateBroken("a3", 1, "NaN"))[-1] == merge(
        ("a1", 1, 0), ("a2", 1, 0), reason=Closed("complete", 3, 3, without=(("a3", "NaN"),)), weight=1 / 2 * 2 / 3
    )


def test_a_gate_does_not_keep_a_rule_from_the_updates_it_needs() -> None:
    """Three quick agents are as far ahead of the slow one as they may be; its update alone is too little for the rule."""
    made = policy(4, buffer=3, min_updates=3, rule="median", max_ahead=1, overlap=False)
    for v in range(2):
        tell(made, *offers("a1", "a2", "a3", clock=v + 1, base=v), VersionCommitted(v + 1))
    assert made.last_broadcast.gate == 1, "all three are at 2"
    assert tell(made, *offers("a4", base=0)) == [run(2, *ALL, gate=2)]
    assert tell(made, *offers("a1", "a2", clock=3, base=2)) == [
        merge(("a1", 3, 0), ("a2", 3, 0), ("a4", 1, 2), reason=Closed("complete", 3, 3))
    ]
    assert tell(made, VersionCommitted(3)) == [run(3, *ALL, gate=2)]


def test_the_rule_gets_its_updates_also_of_an_agent_whose_clock_has_left_some_out() -> None:
    made = policy(3, buffer=None, min_updates=3, rule="median", max_ahead=0)
    tell(made, *offers("a1", clock=3), *offers("a2", "a3"), VersionCommitted(1))
    assert made.last_broadcast.gate == 1, "a1 is at 3"
    assert tell(made, *offers("a2", "a3", clock=2, base=1)) == [run(1, "a1", "a2", "a3", gate=3)]
    (merged,) = tell(made, *offers("a1", clock=4, base=1))
    assert isinstance(merged, Merge) and merged.reason == Closed("complete", 3, 3)


def test_an_agent_that_joins_stands_beside_what_the_others_had_judged_not_beside_what_waits() -> None:
    made = policy(3, buffer=None, min_updates=3, rule="median", max_ahead=0)
    tell(
        made,
        *offers("a1", "a2", "a3"),
        VersionCommitted(1),
        *offers("a2", "a3", clock=2, base=1),
        AgentLost("a1", SILENT),
    )
    assert tell(made, AgentJoined("a1")) == [run(1, "a1", "a2", "a3", gate=2)], "no offset, and it may run"


# -- max_lag -----------------------------------------------------------------------------------------------------------
def test_an_update_that_is_too_stale_when_it_comes_is_dropped_and_its_agent_is_told() -> None:
    made = at_version(3, buffer=2, max_lag=2)
    assert tell(made, *offers("a1", base=1)) == [], "a lag of 2 is within the bound"
    assert tell(made, *offers("a2", base=0)) == [Drop("a2", 1, TooStale(3, 2)), run(3, "a1", "a2", "a3")]
    assert tell(made, *offers("a2", base=0)) == [], "told twice"


def test_an_update_that_has_become_too_stale_while_it_waited_is_dropped_at_the_commit() -> None:
    made = policy(3, buffer=1, max_lag=1)
    tell(made, *offers("a1"))
    assert tell(made, *offers("a2", "a3")) == []
    assert tell(made, VersionCommitted(1)) == [
        run(1, "a1", "a2", "a3"),
        merge(("a2", 1, 1), reason=Closed("complete", 1, 1)),
    ]
    assert tell(made, VersionCommitted(2)) == [Drop("a3", 1, TooStale(2, 1)), run(2, "a1", "a2", "a3")]


def test_with_a_bound_of_zero_only_what_is_of_the_newest_version_is_merged() -> None:
    made = policy(2, buffer=1, max_lag=0)
    tell(made, *offers("a1", "a2"))
    assert tell(made, VersionCommitted(1)) == [Drop("a2", 1, TooStale(1, 0)), run(1, "a1", "a2")]
    assert tell(made, *offers("a2", clock=2, base=1)) == [merge(("a2", 2, 0), reason=Closed("complete", 1, 1))]


def test_the_drop_of_an_agent_that_is_away_is_told_when_it_is_back() -> None:
    made = at_version(3, buffer=2, max_lag=2)
    tell(made, AgentLost("a2", SILENT))
    assert tell(made, *offers("a2", base=0)) == [Drop("a2", 1, TooStale(3, 2))]
    assert tell(made, AgentJoined("a2")) == [run(3, "a1", "a2", "a3")]


# -- max_ahead: who may run --------------------------------------------------------------------------------------------
def test_the_gate_is_so_far_above_the_slowest_live_agent() -> None:
    made = policy(2, buffer=1, max_ahead=2, joined=False)
    assert tell(made, AgentJoined("a1"), AgentJoined("a2")) == [run(0, "a1", "a2", gate=2)]
    tell(made, *offers("a1"))
    assert tell(made, VersionCommitted(1)) == [run(1, "a1", "a2", gate=2)], "a2 has nothing judged"
    tell(made, *offers("a2"))
    assert tell(made, VersionCommitted(2)) == [run(2, "a1", "a2", gate=3)]


def test_a_gate_that_nobody_may_pass_closes_the_buffer() -> None:
    made = policy(2, buffer=8, max_ahead=1)
    assert tell(made, *offers("a1"), *offers("a1", clock=2), *offers("a2")) == []
    (merged,) = tell(made, *offers("a2", clock=2))
    assert isinstance(merged, Merge) and merged.reason == Closed("nobody may run", 4, 8)


def test_only_what_was_told_counts_for_who_may_run() -> None:
    """The agents know the gate of the last LetRun, not the one that follows from what is being merged."""
    made = policy(2, buffer=1, max_ahead=1)
    tell(made, *offers("a1"))
    assert tell(made, AgentLost("a2", SILENT)) == [run(0, "a1", gate=1, merging=True)]
    assert tell(made, VersionCommitted(1)) == [run(1, "a1", gate=2)]


def test_the_loss_of_the_slowest_raises_the_gate() -> None:
    made = policy(3, buffer=1, max_ahead=1)
    for version, agent in enumerate(("a1", "a2", "a1", "a2")):
        tell(made, *offers(agent, clock=version // 2 + 1, base=version), VersionCommitted(version + 1))
    assert made.last_broadcast.gate == 1, "a3 holds them up"
    assert tell(made, AgentLost("a3", SILENT)) == [run(4, "a1", "a2", gate=3)]


def test_an_agent_that_joins_is_set_beside_the_slowest_of_the_others() -> None:
    made = policy(2, buffer=2, max_ahead=1)
    for v in range(5):
        tell(made, *offers("a1", "a2", clock=v + 1, base=v), VersionCommitted(v + 1))
    assert tell(made, AgentJoined("a3")) == [run(5, "a1", "a2", "a3", gate=6, a3=5)]
    tell(made, *offers("a3", base=5), *offers("a1", clock=6, base=5))
    assert tell(made, VersionCommitted(6)) == [run(6, "a1", "a2", "a3", gate=6, a3=5)], "a2 is the slowest now"


def test_an_agent_that_comes_back_is_set_beside_the_slowest_of_the_others_and_never_back() -> None:
    made = policy(2, buffer=1, max_ahead=9)
    tell(made, *offers("a1"), VersionCommitted(1), *offers("a2", base=1), VersionCommitted(2), AgentLost("a2", SILENT))
    for v in range(2, 6):
        tell(made, *offers("a1", clock=v, base=v), VersionCommitted(v + 1))
    assert tell(made, AgentJoined("a2")) == [run(6, "a1", "a2", gate=14, a2=4)]
    tell(made, AgentLost("a1", SILENT))
    assert tell(made, AgentJoined("a1")) == [run(6, "a1", "a2", gate=14, a2=4)], "ahead of a2, it stays where it is"
    tell(made, AgentLost("a2", SILENT))
    assert tell(made, AgentJoined("a2")) == [run(6, "a1", "a2", gate=14, a2=4)]


def test_an_agent_that_joins_twice_is_not_lifted() -> None:
    made = policy(2, buffer=1, max_ahead=3)
    tell(made, *offers("a1"), VersionCommitted(1))
    assert tell(made, AgentJoined("a2")) == []
    assert not any(made.offsets.values())


def test_a_joiner_without_others_stands_where_it_stands() -> None:
    made = policy(1, buffer=1, max_ahead=1)
    tell(made, *offers("a1"), VersionCommitted(1), AgentLost("a1", SILENT))
    assert tell(made, AgentJoined("a2")) == [run(1, "a2", gate=1)]
    assert tell(made, AgentJoined("a1")) == [run(1, "a1", "a2", gate=1)]


def test_without_a_bound_there_is_no_gate_and_no_offset() -> None:
    made = policy(1, buffer=1)
    for v in range(3):
        tell(made, *offers("a1", clock=v + 1, base=v), VersionCommitted(v + 1))
    assert tell(made, AgentJoined("a2")) == [run(3, "a1", "a2")]
    assert made.offsets == {}


def test_max_ahead_zero_allows_one_update_at_a_time() -> None:
    assert policy(2, buffer=None, max_ahead=0).ahead == 1
    assert policy(2, overlap=False).ahead == 1
    assert policy(2, max_ahead=1).ahead == policy(2).ahead == 2


def test_a_newer_update_of_an_agent_that_may_have_one_replaces_its_older_one() -> None:
    made = policy(2, buffer=None, max_ahead=0)
    tell(made, *offers("a1"))
    assert tell(made, *offers("a1", clock=2)) == [
        Drop("a1", 1, Replaced(2)),
        run(0, "a1", "a2", gate=0),
    ]
    assert tell(made, *offers("a2")) == [merge(("a1", 2, 0), ("a2", 1, 0), reason=Closed("complete", 2, 2))]


def test_an_update_waits_to_be_replaced_while_an_older_one_of_its_agent_is_merged() -> None:
    made = policy(2, buffer=1, overlap=False)
    tell(made, *offers("a1"))
    assert tell(made, *offers("a1", clock=2), *offers("a1", clock=3)) == []
    assert tell(made, VersionCommitted(1)) == [
        Drop("a1", 2, Replaced(3)),
        run(1, "a1", "a2"),
        merge(("a1", 3, 1), reason=Closed("complete", 1, 1)),
    ]


# -- losses ------------------------------------------------------------------------------------------------------------
def test_the_update_of_an_agent_that_was_lost_afterwards_is_merged() -> None:
    made = policy(3, buffer=2)
    tell(made, *offers("a1"))
    assert tell(made, AgentLost("a1", SILENT)) == [run(0, "a2", "a3")]
    assert tell(made, *offers("a2")) == [
        merge(("a1", 1, 0), ("a2", 1, 0), reason=Closed("complete", 2, 2, absent=(("a1", "not heard of for 5.1 s"),)))
    ]


def test_the_update_that_an_agent_left_behind_counts_although_it_is_told_of_after_the_loss() -> None:
    made = policy(2, buffer=2)
    tell(made, AgentLost("a1", SILENT))
    assert tell(made, *offers("a2", "a1")) == [
        merge(("a1", 1, 0), ("a2", 1, 0), reason=Closed("complete", 2, 2, absent=(("a1", "not heard of for 5.1 s"),)))
    ]


def test_a_loss_during_a_merge_is_told_and_the_plan_stands() -> None:
    made = policy(3, buffer=2)
    tell(made, *offers("a1", "a2"))
    assert tell(made, AgentLost("a3", SILENT)) == [run(0, "a1", "a2", merging=True)]
    assert tell(made, AgentJoined("a3")) == [run(0, "a1", "a2", "a3", merging=True)]
    assert tell(made, VersionCommitted(1)) == [run(1, "a1", "a2", "a3")]


def test_the_loss_of_an_agent_that_nobody_knows_changes_nothing() -> None:
    made = policy(2)
    assert tell(made, AgentLost("a9", SILENT)) == []


def test_when_nobody_is_left_the_run_waits_for_whoever_comes() -> None:
    made = policy(1)
    assert tell(made, AgentLost("a1", SILENT), Tick(), at=1e6) == [run(0)]
    assert tell(made, AgentJoined("a2"), at=1e6) == [run(0, "a2")]


def test_a_buffer_of_all_counts_those_whose_updates_it_holds_and_those_it_lost() -> None:
    made = policy(4, buffer=None)
    tell(made, *offers("a1", "a2", "a3"), AgentLost("a1", "it left"))
    assert tell(made, AgentLost("a4", SILENT))[-1] == merge(
        ("a1", 1, 0),
        ("a2", 1, 0),
        ("a3", 1, 0),
        reason=Closed(
            "complete",
            3,
            4,
            absent=(
                ("a1", "it left"),
                ("a4", "not heard of for 5.1 s"),
            ),
        ),
    )


def test_many_long_words_about_losses_stay_short_in_the_reason() -> None:
    made = policy(50, buffer=50)
    tell(made, *offers("a1"), *(AgentLost(f"a{i}", f"it says: {'x' * 2000}", True) for i in range(1, 50)))
    merged = tell(made, AgentLost("a50", SILENT))[-1]
    assert isinstance(merged, Merge)
    words = closed_words(merged.reason)
    assert len(words) <= REASON_CHARS and "1 of 50" in words and words.endswith("…; and 45 more)")


# -- slow agents -------------------------------------------------------------------------------------------------------
STILL = "no progress for 5.1 s"


def merged_by(commands: list[Command]) -> list[Merge]:
    return [command for command in commands if isinstance(command, Merge)]


def test_a_slow_agent_is_outside_the_gate_and_its_update_is_still_merged() -> None:
    made = policy(2, buffer=1, max_ahead=1)
    tell(made, AgentSlow("a2", STILL))
    assert made.last_broadcast.participants == ("a1",) and made.presence("a2") == Presence.SLOW
    for clock in (1, 2, 3):
        assert merged_by(tell(made, OfferReady("a1", clock, made.version))), (
            "the gate of a2's clock does not hold it up"
        )
        tell(made, VersionCommitted(clock))
    (merge,) = merged_by(tell(made, OfferReady("a2", 1, 0)))
    assert [(c.agent, c.lag) for c in merge.updates] == [("a2", 3)]


def test_a_slow_agent_that_moves_stands_beside_the_slowest_of_the_others() -> None:
    made = policy(2, buffer=1, max_ahead=1)
    tell(made, AgentSlow("a2", STILL), OfferReady("a1", 1, 0), VersionCommitted(1))
    (start,) = [c for c in tell(made, AgentJoined("a2")) if isinstance(c, LetRun)]
    assert start.participants == ("a1", "a2") and start.offsets == (("a2", 1),) and start.gate == 2


def test_a_buffer_of_all_does_not_wait_for_a_slow_agent_and_the_reason_names_it() -> None:
    made = policy(2, buffer=None)
    assert not merged_by(tell(made, OfferReady("a1", 1, 0)))
    (merge,) = merged_by(tell(made, AgentSlow("a2", STILL)))
    assert merge.reason == Closed("complete", 1, 2, absent=(("a2", f"slow: {STILL}"),))


def test_a_run_whose_agents_are_all_slow_waits_and_does_not_fail() -> None:
    made = policy(2, buffer=1)
    tell(made, AgentSlow("a1", STILL), AgentSlow("a2", STILL))
    assert tell(made, Tick(), at=1e6) == []
    tell(made, OfferReady("a1", 1, 0))
    commands = tell(made, UpdateBroken("a1", 1, "NaN"))
    assert not [c for c in commands if isinstance(c, Finish)], "a2 may still deliver"
    assert merged_by(tell(made, OfferReady("a2", 1, 0)))


# -- unusable updates --------------------------------------------------------------------------------------------------
def test_an_unusable_update_leaves_the_merge_and_is_named_in_its_reason() -> None:
    made = policy(3, buffer=3)
    tell(made, *offers("a1", "a2", "a3"))
    assert tell(made, UpdateBroken("a2", 1, "NaN")) == [
        Drop("a2", 1, Unusable("NaN")),
        merge(
            ("a1", 1, 0), ("a3", 1, 0), reason=Closed("complete", 3, 3, without=(("a2", "NaN"),)), weight=1 / 2 * 2 / 3
        ),
    ]
    assert tell(made, UpdateBroken("a1", 1, "cut off")) == [
        Drop("a1", 1, Unusable("cut off")),
        merge(
            ("a3", 1, 0),
            reason=Closed(
                "complete",
                3,
                3,
                without=(
                    ("a2", "NaN"),
                    ("a1", "cut off"),
                ),
            ),
            weight=1 / 3,
        ),
    ]
    assert tell(made, VersionCommitted(1)) == [run(1, "a1", "a2", "a3")]


def test_an_update_that_is_not_merged_cannot_be_broken() -> None:
    made = policy(3, buffer=2)
    tell(made, *offers("a1"))
    before = copy.deepcopy(made)
    assert tell(made, UpdateBroken("a1", 1, "?"), UpdateBroken("a2", 1, "?")) == []
    assert made == before


def test_an_unusable_update_waits_for_the_verdict_on_the_one_before_it() -> None:
    """Verdicts come in the order of clocks: a roster can tell of no other, and an elastic agent relies on it."""
    made = policy(2, buffer=3)
    tell(made, *offers("a1"), *offers("a1", clock=2), *offers("a2"))
    assert tell(made, UpdateBroken("a1", 2, "NaN")) == [
        merge(
            ("a1", 1, 0), ("a2", 1, 0), reason=Closed("complete", 3, 3, without=(("a1", "NaN"),)), weight=1 / 2 * 2 / 3
        )
    ]
    assert tell(made, *offers("a2", clock=2)) == []
    assert tell(made, VersionCommitted(1)) == [run(1, "a1", "a2")]
    assert tell(made, *offers("a1", clock=3, base=1)) == [
        merge(("a1", 2, 1), ("a1", 3, 0), ("a2", 2, 1), reason=Closed("complete", 3, 3))
    ]
    assert tell(made, UpdateBroken("a1", 2, "NaN")) == [
        Drop("a1", 2, Unusable("NaN")),
        merge(
            ("a1", 3, 0), ("a2", 2, 1), reason=Closed("complete", 3, 3, without=(("a1", "NaN"),)), weight=1 / 2 * 2 / 3
        ),
    ]


def test_several_unusable_updates_of_an_agent_stay_in_the_order_of_their_clocks() -> None:
    made = policy(3, buffer=4)
    tell(made, *(o for clock in (1, 2, 3) for o in offers("a1", clock=clock)), *offers("a2"), *offers("a3"))
    tell(made, UpdateBroken("a1", 2, "NaN"), UpdateBroken("a1", 3, "NaN"))
    assert [(o.agent, o.clock) for o in made.waiting] == [("a1", 2), ("a1", 3), ("a3", 1)]
    assert [(o.agent, o.clock) for o in made.merging] == [("a1", 1), ("a2", 1)]


def test_when_all_merged_updates_are_unusable_the_buffer_is_open_again_with_what_came_meanwhile() -> None:
    made = policy(3, buffer=2)
    tell(made, *offers("a1", "a2"), *offers("a3"))
    tell(made, UpdateBroken("a1", 1, "NaN"))
    assert tell(made, UpdateBroken("a2", 1, "NaN")) == [
        Drop("a2", 1, Unusable("NaN")),
        run(0, "a1", "a2", "a3"),
    ]
    assert tell(made, *offers("a1", clock=2)) == [merge(("a1", 2, 0), ("a3", 1, 0), reason=Closed("complete", 2, 2))]


def test_when_all_merged_updates_are_unusable_the_next_ones_are_merged_at_once_where_they_fill_a_buffer() -> None:
    made = policy(2, buffer=1)
    tell(made, *offers("a1", "a2"))
    assert tell(made, UpdateBroken("a1", 1, "NaN")) == [
        Drop("a1", 1, Unusable("NaN")),
        run(0, "a1", "a2"),
        merge(("a2", 1, 0), reason=Closed("complete", 1, 1)),
    ]


def test_when_every_live_agent_has_sent_an_unusable_update_the_run_fails_and_says_why() -> None:
    made = policy(2, buffer=1)
    tell(made, *offers("a1"))
    assert tell(made, UpdateBroken("a1", 1, "NaN")) == [Drop("a1", 1, Unusable("NaN")), run(0, "a1", "a2")]
    tell(made, *offers("a2"))
    assert tell(made, UpdateBroken("a2", 1, "Inf")) == [
        Drop("a2", 1, Unusable("Inf")),
        Finish(NothingUsable(0, "a2", "Inf"), failed=True),
    ]


def test_a_commit_forgives_unusable_updates() -> None:
    made = policy(2, buffer=1)
    tell(made, *offers("a1"), UpdateBroken("a1", 1, "NaN"), *offers("a2"), VersionCommitted(1))
    tell(made, *offers("a2", clock=2, base=1))
    assert tell(made, UpdateBroken("a2", 2, "NaN"))[-1] == run(1, "a1", "a2"), "a1 has a new chance"


def test_when_all_live_agents_have_sent_unusable_updates_the_run_fails_while_others_are_away() -> None:
    made = policy(2, buffer=1)
    tell(made, *offers("a1"), AgentLost("a2", SILENT))
    assert tell(made, UpdateBroken("a1", 1, "NaN"))[-1] == Finish(NothingUsable(0, "a1", "NaN"), failed=True)


# -- agents that cannot train ------------------------------------------------------------------------------------------
def test_the_run_fails_when_no_agent_can_train() -> None:
    made = policy(2)
    assert tell(made, AgentLost("a1", "no such file", failed=True)) == [run(0, "a2")]
    assert tell(made, AgentLost("a2", "a bug", failed=True)) == [
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


def test_the_run_waits_for_an_agent_that_is_away_when_the_others_cannot_train() -> None:
    made = policy(2)
    tell(made, AgentLost("a1", SILENT))
    assert tell(made, AgentLost("a2", "a bug", failed=True)) == [run(0)]
    assert tell(made, AgentJoined("a1")) == [run(0, "a1")]


def test_an_update_that_is_in_is_merged_before_the_run_fails_for_want_of_agents() -> None:
    made = policy(1, buffer=2)
    tell(made, *offers("a1"))
    (_, merged) = tell(made, AgentLost("a1", "a bug", failed=True))
    assert isinstance(merged, Merge)
    assert tell(made, VersionCommitted(1)) == [run(1)], "told that nobody runs"
    assert tell(made, Tick()) == [Finish(NoAgentCanTrain((("a1", "a bug"),)), failed=True)]


def test_a_run_that_has_made_its_versions_is_done_though_no_agent_can_train_any_more() -> None:
    made = policy(1, buffer=1, versions=1)
    tell(made, *offers("a1"), AgentLost("a1", "a bug", failed=True))
    assert tell(made, VersionCommitted(1)) == [Finish(VersionsReached(1))]


# -- the end -----------------------------------------------------------------------------------------------------------
def test_the_run_is_done_after_its_versions_whatever_still_waits() -> None:
    made = policy(2, buffer=1, versions=2)
    tell(made, *offers("a1", "a2"), VersionCommitted(1), *offers("a1", clock=2))
    assert tell(made, VersionCommitted(2)) == [Finish(VersionsReached(2))]


def test_the_run_is_done_at_once_when_the_target_is_reached_in_an_open_buffer() -> None:
    made = policy(2)
    tell(made, *offers("a1"))
    assert tell(made, TargetReached("accuracy = 0.96")) == [Finish(StopRequested("accuracy = 0.96"))]


def test_a_merge_under_way_is_finished_when_the_target_is_reached() -> None:
    made = policy(1, buffer=1)
    tell(made, *offers("a1"))
    assert tell(made, TargetReached("accuracy = 0.96")) == []
    assert tell(made, VersionCommitted(1)) == [Finish(StopRequested("accuracy = 0.96"))]


def test_a_target_that_was_reached_stays_reached_when_the_merge_under_way_is_unusable() -> None:
    made = policy(2, buffer=1)
    tell(made, *offers("a1"), TargetReached("accuracy = 0.96"))
    assert tell(made, UpdateBroken("a1", 1, "NaN")) == [
        Drop("a1", 1, Unusable("NaN")),
        Finish(StopRequested("accuracy = 0.96")),
    ]


def test_after_the_end_nothing_is_asked_for() -> None:
    made = policy(1)
    tell(made, TargetReached("enough"))
    before = copy.deepcopy(made)
    late: tuple[Fact, ...] = (
        AgentJoined("a2"),
        AgentLost("a1", SILENT),
        *offers("a1"),
        *offers("a1", base=9),
        Tick(),
        TargetReached("2"),
    )
    assert tell(made, *late, UpdateBroken("a1", 1, "?"), VersionCommitted(1), at=99.0) == []
    assert made == before


# -- a coordinator takes over ------------------------------------------------------------------------------------------
def taken_over(
    resume_point: ResumePoint,
    plan: list[OfferReady] | None = None,
    at: float = 100.0,
    clocks: dict[str, int] | None = None,
    **settings: Any,
) -> Asynchronous:
    """As the shell does it: resume, the plan where head has one, and a look."""
    made = policy(2, joined=False, **settings)
    made.ledger = ledger_at(CLOCKS if clocks is None else clocks)
    made.resume(resume_point, at)
    if plan is not None:
        made.resume_merge(plan)
    return made


BOTH = frozenset({"a1", "a2"})
RESUME_POINT = ResumePoint(7, ("a1", "a2"), BOTH)
CLOCKS = {"a1": 5, "a2": 9}


def test_an_open_buffer_taken_over_is_told_its_offers_again() -> None:
    made = taken_over(RESUME_POINT, buffer=2)
    assert tell(made, Tick(), at=100.0) == [], "everybody was told"
    assert tell(made, *offers("a2", clock=9, base=6)) == [], "judged before"
    assert tell(made, *offers("a1", clock=6, base=6), *offers("a2", clock=10, base=7)) == [
        merge(("a1", 6, 1), ("a2", 10, 0), reason=Closed("complete", 2, 2))
    ]


def test_what_the_roster_did_not_tell_is_told_after_the_takeover() -> None:
    made = taken_over(ResumePoint(7, ("a1", "a2", "a3"), BOTH), clocks={})
    assert tell(made, Tick()) == [run(7, "a1", "a2")]


def test_the_gate_and_the_offsets_go_on_after_a_takeover() -> None:
    resume_point = ResumePoint(7, ("a1", "a2"), BOTH, {"a2": 4}, gate=6)
    made = taken_over(resume_point, clocks={"a1": 5, "a2": 2}, buffer=1, max_ahead=1)
    assert tell(made, Tick()) == []
    tell(made, *offers("a1", clock=6, base=7))
    assert tell(made, VersionCommitted(8)) == [run(8, "a1", "a2", gate=7, a2=4)]
    tell(made, AgentLost("a2", SILENT), *offers("a1", clock=7, base=8), VersionCommitted(9))
    assert tell(made, AgentJoined("a2")) == [run(9, "a1", "a2", gate=8, a2=5)]


def test_a_merge_taken_over_is_committed_and_what_was_merged_is_not_merged_again() -> None:
    plan = [OfferReady("a1", 6, 6), OfferReady("a2", 10, 7)]
    made = taken_over(RESUME_POINT, plan, buffer=2)
    assert tell(made, Tick(), *plan, *offers("a1", clock=7, base=7)) == []
    assert tell(made, VersionCommitted(8)) == [run(8, "a1", "a2")]
    assert tell(made, *plan) == [], "told again, they stay judged"
    assert tell(made, *offers("a2", clock=11, base=8)) == [
        merge(("a1", 7, 1), ("a2", 11, 0), reason=Closed("complete", 2, 2))
    ]


def test_an_unusable_update_of_a_merge_taken_over_leaves_it() -> None:
    made = taken_over(RESUME_POINT, [OfferReady("a1", 6, 6), OfferReady("a2", 10, 7)], buffer=2)
    assert tell(made, UpdateBroken("a2", 10, "gone")) == [
        Drop("a2", 10, Unusable("gone")),
        merge(("a1", 6, 1), reason=Closed("complete", 2, 2, without=(("a2", "gone"),)), weight=1 / 2),
    ]


def test_a_loss_while_a_merge_taken_over_is_executed_leaves_the_plan() -> None:
    made = taken_over(RESUME_POINT, [OfferReady("a1", 6, 6)], buffer=1)
    assert tell(made, AgentLost("a2", "not heard of")) == [run(7, "a1", merging=True)]
    assert tell(made, VersionCommitted(8)) == [run(8, "a1")]


def test_a_run_taken_over_with_nobody_there_goes_on_with_whoever_comes() -> None:
    made = taken_over(ResumePoint(3, (), frozenset()), clocks={}, buffer=1)
    assert tell(made, Tick()) == []
    assert tell(made, AgentJoined("a1")) == [run(3, "a1")], "the run has started: it waits for no other"


def test_a_run_taken_over_after_its_last_version_is_done() -> None:
    assert tell(taken_over(ResumePoint(100, (), frozenset()), clocks={}), Tick()) == [Finish(VersionsReached(100))]
    assert tell(taken_over(ResumePoint(100, ("a1",), BOTH), clocks={}), *offers("a1", base=100)) == [
        Finish(VersionsReached(100))
    ]


def test_the_last_version_taken_over_in_its_merge_ends_the_run() -> None:
    made = taken_over(ResumePoint(99, ("a1", "a2"), BOTH), offers("a1", "a2", base=99), clocks={}, buffer=2)
    assert tell(made, Tick(), *offers("a1", clock=2, base=99)) == []
    assert tell(made, VersionCommitted(100)) == [Finish(VersionsReached(100))]


def test_a_merge_of_nobody_left_taken_over_is_committed() -> None:
    made = taken_over(ResumePoint(3, (), frozenset()), [OfferReady("a1", 2, 3)], clocks={"a1": 1}, buffer=4)
    assert tell(made, Tick()) == []
    assert tell(made, VersionCommitted(4)) == [run(4)]


# -- golden traces: a refactor proves itself by identical ones ---------------------------------------------------------
Schedule = list[tuple[float, Fact]]


def _joined(*agents: str) -> Schedule:
    return [(0.0, AgentJoined(a)) for a in agents]


def _at(at: float, *facts: Fact) -> Schedule:
    return [(at, fact) for fact in facts]


def _buffered() -> Schedule:
    """FedBuff: three quick ones and a straggler; more than K at once, a lag of three, one lost and back."""
    return [
        *_joined("a3", "a1", "a4", "a2"),
        *_at(1.0, *offers("a2", "a1", "a3")),
        *_at(1.1, VersionCommitted(1)),
        *_at(2.0, *offers("a1", "a2", clock=2, base=1)),
        *_at(2.1, VersionCommitted(2)),
        *_at(2.2, AgentLost("a3", SILENT)),
        *_at(3.0, *offers("a1", clock=3, base=2), *offers("a2", clock=3, base=2)),
        *_at(3.1, AgentJoined("a3"), VersionCommitted(3)),
        *_at(5.0, *offers("a4", base=0), *offers("a3", clock=2, base=3)),
        *_at(5.1, VersionCommitted(4)),
    ]


def _each() -> Schedule:
    """FedAsync by its differences: every update is a version; one too stale when it comes, one when its turn has come."""
    return [
        *_joined("a1", "a2", "a3"),
        *_at(1.0, *offers("a1"), *offers("a2"), *offers("a3")),
        *_at(1.1, VersionCommitted(1)),
        *_at(1.2, VersionCommitted(2)),
        *_at(2.0, *offers("a1", clock=2), *offers("a1", clock=3, base=2), *offers("a1", clock=3, base=2)),
        *_at(2.1, VersionCommitted(3)),
    ]


def _bounded() -> Schedule:
    """Stale synchronous parallel: the gate, a joiner and a returner beside the slowest, and a buffer that nobody can fill."""
    return [
        *_joined("a1", "a2"),
        *_at(1.0, *offers("a1"), *offers("a1", clock=2), *offers("a2")),
        *_at(1.1, VersionCommitted(1)),
        *_at(2.0, AgentJoined("a3")),
        *_at(3.0, *offers("a2", clock=2, base=1), *offers("a3", base=1), *offers("a1", clock=3, base=1)),
        *_at(3.1, VersionCommitted(2)),
        *_at(4.0, *offers("a3", clock=2, base=2), AgentLost("a2", "it left"), *offers("a3", clock=3, base=2)),
        *_at(4.1, *offers("a1", clock=4, base=2), VersionCommitted(3), AgentJoined("a2")),
        *_at(5.0, *offers("a1", clock=5, base=3), *offers("a1", clock=6, base=3), *offers("a3", clock=4, base=3)),
    ]


def _elastic() -> Schedule:
    """Asynchronous elastic averaging: differences whole, one unusable behind another of its agent, a target in the end."""
    return [
        *_joined("a1", "a2"),
        *_at(1.0, *offers("a1"), *offers("a1", clock=2)),
        *_at(1.5, Tick()),
        *_at(2.0, Tick()),
        *_at(2.1, UpdateBroken("a1", 2, "NaN")),
        *_at(2.2, VersionCommitted(1)),
        *_at(4.0, Tick(), UpdateBroken("a1", 2, "NaN")),
        *_at(5.0, *offers("a2", base=1), TargetReached("loss = 0.1 at version 1")),
    ]


SCHEDULES: dict[str, tuple[Schedule, dict[str, Any]]] = {
    "buffered": (_buffered(), {"agents": 4, "buffer": 2, "staleness": Polynomial(a=0.5), "weights": "samples"}),
    "each": (_each(), {"agents": 3, "buffer": 1, "max_lag": 1, "staleness": Hinge(a=10.0, b=0), "versions": 3}),
    "bounded": (_bounded(), {"agents": 2, "buffer": 3, "max_ahead": 1}),
    "elastic": (_elastic(), {"agents": 2, "buffer": 4, "elastic": True, "quorum": 1, "grace_s": 1.0}),
}


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_the_trace_of_a_schedule_is_the_golden_one(name: str, golden: Callable[[str, Any], None]) -> None:
    schedule, settings = SCHEDULES[name]
    made, trace = policy(joined=False, **settings), []
    for at, fact in schedule:
        said = [command_as_json(c) for c in tell(made, fact, at=at)]
        trace.append({"at_s": at, "fact": [type(fact).__name__, asdict(fact)], "commands": said})
    golden(f"asynchronous_{name}", trace)
