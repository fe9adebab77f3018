"""A violated invariant is reported with the coordinator's recent decisions about the agents that it names."""

from __future__ import annotations

import pytest

from syncline_sim.faults import Faults
from syncline_sim.invariants import Invariants
from syncline_sim.scenario import Scenario, small_spec
from syncline_sim.simulate import simulate


def test_the_story_of_the_agent_that_a_problem_names_is_part_of_the_timeline(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Invariants.on_stored

    def on_stored(self: Invariants, stream: str, message: object) -> str:
        line = real(self, stream, message)  # type: ignore[arg-type]
        if self.head is not None and self.head.version == 3 and not self.problems:
            self.problems.append("a2 did something wrong")
        return line

    monkeypatch.setattr(Invariants, "on_stored", on_stored)
    outcome = simulate(Scenario(small_spec()), Faults())
    assert outcome.problems == ("a2 did something wrong",)
    story = [line for line in outcome.timeline if "story of" in line]
    assert story and all("story of a2: " in line for line in story)
    assert any("a2 offered clock" in line for line in story) and any("merge" in line for line in story)
