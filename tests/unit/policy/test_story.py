"""The story of an agent: the recent facts and commands that concern it, with their causes."""

from __future__ import annotations

import pytest

from syncline.policy.events import (
    AgentJoined,
    AgentLost,
    Drop,
    Fact,
    Merge,
    OfferReady,
    StartRound,
    Tick,
    VersionCommitted,
    WakeAt,
)
from syncline.policy.rounds import Rounds
from syncline.policy.story import MAX_MENTIONS, MAX_STEPS, History


def rounds(agents: int = 3, quorum: int | None = 2) -> Rounds:
    made = Rounds(
        min_agents=agents, versions=9, quorum=quorum, sample=None, weights="uniform", seed=1, grace_s=2.0
    )  # fmt: skip
    for i in range(1, agents + 1):
        made.handle(AgentJoined(f"a{i}"), 0.0)
    return made


def tell(policy: Rounds, *facts: tuple[float, Fact]) -> None:
    for now_s, fact in facts:
        policy.handle(fact, now_s)


def test_a_story_tells_why_an_update_was_dropped_and_what_closed_the_round() -> None:
    policy = rounds()
    tell(
        policy,
        (1.0, OfferReady("a1", 1, 0)),
        (2.0, OfferReady("a2", 1, 0)),
        (4.0, Tick()),
        (4.5, VersionCommitted(1)),
        (5.0, OfferReady("a3", 1, 0)),
    )
    story = policy.story("a3")
    facts = [(step.at_s, type(step.fact), [type(c) for c in step.commands]) for step in story]
    assert facts == [
        (0.0, AgentJoined, [StartRound]),
        (2.0, OfferReady, [WakeAt]),  # the cause of the Tick
        (4.0, Tick, [Merge]),  # names a3 as late
        (4.5, VersionCommitted, [StartRound]),
        (5.0, OfferReady, [Drop]),
    ]
    by_number = {step.number: step for step in story}
    tick, commit = story[2], story[3]
    assert isinstance(by_number[tick.cause].fact, OfferReady) and by_number[commit.cause] is tick


def test_a_story_is_of_one_agent() -> None:
    policy = rounds(2, quorum=None)
    tell(policy, (1.0, AgentLost("a2", "not heard of")), (2.0, OfferReady("a1", 1, 0)))
    assert [type(step.fact) for step in policy.story("a2")] == [AgentJoined, AgentLost, OfferReady]
    assert policy.story("a9") == []


def test_a_tick_without_commands_is_not_kept() -> None:
    history = History()
    history.add(Tick(), [], 1.0)
    assert not history.steps


@pytest.mark.parametrize(("agents", "kept"), [(1, MAX_STEPS), (MAX_MENTIONS // 10, 10), (MAX_MENTIONS * 2, 1)])
def test_a_history_is_bounded_by_steps_and_by_the_agents_that_they_name(agents: int, kept: int) -> None:
    history, names = History(), tuple(f"a{i}" for i in range(agents))
    for version in range(MAX_STEPS + 10 if agents == 1 else 20):
        history.add(Tick(), [StartRound(version, names)], float(version))
    assert len(history.steps) == kept and len(history.story("a0")) == kept
