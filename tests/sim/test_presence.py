"""Slow agents: the run goes on without an agent whose step takes long, waits if all agents are slow, and loses no agent."""

from __future__ import annotations

from typing import Any

import pytest

from syncline.observe.telemetry import Event
from syncline.policy.membership import Membership
from syncline.wire.messages import Head, Presence, Roster
from syncline_sim.faults import Faults
from syncline_sim.invariants import Invariants
from syncline_sim.scenario import Outcome, Scenario, small_spec
from syncline_sim.simulate import simulate

SECOND_STEP_S = 0.65  # the first round opens at .58 s, and has four steps in .1 s
HELD_S = 5.0  # lost_after_s is 2 s


class Listener(Invariants):
    """Keeps the events about agents' presence, and the presence in rosters."""

    def on_published(self, subject: str, data: bytes) -> None:
        super().on_published(subject, data)
        if subject.endswith(".events.coordinator"):
            event = Event.model_validate_json(data)
            if event.event in ("agent-slow", "agent-present", "agent-lost"):
                HEARD.append((event.event, event.agent))

    def _check_verdicts(self, head: Head, roster: Roster) -> None:
        super()._check_verdicts(head, roster)
        SHOWN.update((agent, roster.state(i)) for i, agent in enumerate(roster.agents))


HEARD: list[tuple[str, str]] = []
SHOWN: set[tuple[str, Presence]] = set()


def play(monkeypatch: pytest.MonkeyPatch, scenario: Scenario, faults: Faults) -> Outcome:
    monkeypatch.setattr("syncline_sim.simulate.Invariants", Listener)
    HEARD.clear()
    SHOWN.clear()
    outcome = simulate(scenario, faults)
    assert not outcome.problems, "\n".join([*outcome.problems, *outcome.timeline])
    assert outcome.head is not None and outcome.head.phase == "done"
    return outcome


def held(*agents: str) -> Faults:
    faults = Faults()
    for agent in agents:
        faults = faults.long_step(agent, after_s=SECOND_STEP_S, for_s=HELD_S)
    return faults


KINDS: dict[str, dict[str, Any]] = {
    "rounds": {},
    "async": {"sync": {"kind": "async", "buffer": 2, "max_ahead": 1, "max_lag": 50}},
    "elastic": {
        "sync": {"kind": "async", "buffer": "all", "max_lag": 50},
        "mix": {"kind": "elastic", "alpha": 0.2},
        "merge": {"weights": "uniform"},
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_goes_on_without_a_slow_agent_which_is_present_again_when_it_moves(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = Scenario(small_spec(stop={"versions": 120 if kind == "async" else 50}, **KINDS[kind]))
    outcome = play(monkeypatch, scenario, held("a2"))
    assert HEARD == [("agent-slow", "a2"), ("agent-present", "a2")]
    assert {("a2", Presence.SLOW), ("a2", Presence.PRESENT)} <= SHOWN and ("a2", Presence.LOST) not in SHOWN
    without = [agents for agents in outcome.merged if "a2" not in agents]
    assert len(without) > 10 and "a2" in outcome.merged[-1], "it works with the others again"


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_whose_agents_are_all_slow_waits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = Scenario(small_spec(**KINDS[kind]))
    outcome = play(monkeypatch, scenario, held(*scenario.agents))
    assert sorted(HEARD[:4]) == [("agent-slow", agent) for agent in scenario.agents]
    assert "agent-lost" not in {event for event, _ in HEARD} and outcome.seconds > HELD_S


def test_a_coordinator_that_starts_again_knows_who_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = Scenario(small_spec(stop={"versions": 40}))
    play(monkeypatch, scenario, held("a2").down("coordinator", after_s=3.5, for_s=0.3))
    assert {agent for _, agent in HEARD} == {"a2"} and HEARD[-1] == ("agent-present", "a2")


def test_the_invariants_find_a_coordinator_that_calls_slow_agents_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    expired = Membership.expired

    def impatient(self: Membership, now_s: float) -> list[tuple[str, str]]:
        slow = [agent for agent, life in self.lives.items() if life.training and now_s - life.moved_at_s > 2.0]
        for agent in slow:
            self.lives[agent].heard_at_s = self.lives[agent].moved_at_s
        return expired(self, now_s)

    monkeypatch.setattr(Membership, "expired", impatient)
    outcome = simulate(Scenario(small_spec()), held("a2"))
    assert "a2 lost: not heard of for" in outcome.problems[0] and "it was answered" in outcome.problems[0]
