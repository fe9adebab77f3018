"""Held-out evaluation at the coordinator: what goes wrong with it is told, and ends no run."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from conftest import FakeBus
from syncline.child import ChildDied, ChildFailed
from syncline.errors import ConfigError
from syncline.nursery import NurseryDied
from syncline.telemetry import Telemetry
from syncline_coordinator.evaluation import Evaluation

GOOD = {"metrics": {"loss": 0.5}, "seconds": 0.1}
Answer = dict[str, Any] | Exception


class Script:
    """A child that answers `evaluate` so, once each, and is dead after ChildDied."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = deque(answers)

    async def ask(self, question: str, **_: Any) -> dict[str, Any]:
        if question == "copy":
            return {}
        answer = self.answers.popleft() if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def close(self) -> None:
        pass


def evaluated(bus: FakeBus, simulated: Callable[..., Any], first: Script, *later: Script | Exception) -> list[int]:
    """The versions, of three that are offered, whose metrics were reported. `later`: what starting another child gives."""
    starts, reported = deque(later), []

    async def start() -> Script:
        started = starts.popleft()
        if isinstance(started, Exception):
            raise started
        return started

    async def work() -> None:
        evaluation = Evaluation(
            first, start, Telemetry(bus, "r", "coordinator"), lambda version, _: reported.append(version)
        )
        for version in (1, 2, 3):
            await evaluation.last(version)
            await evaluation.copied()
        await evaluation.close()

    simulated(work())
    return reported


def said(bus: FakeBus) -> list[str]:
    told = [json.loads(data) for subject, data in bus.published if ".events." in subject]
    assert all(event["event"] == "evaluation-failed" for event in told)
    return [event["text"] for event in told]


@pytest.mark.parametrize(
    "odd",
    [
        {"metrics": {0: 1.0}, "seconds": 0.1},
        {"metrics": {"loss": {"mse": 1.0}}, "seconds": 0.1},
        {"metrics": [0.5], "seconds": 0.1},
        {"metrics": None},
        {},
        ChildFailed("TypeError: it is odd"),
        ConfigError("task", "`metrics` returned a Tensor"),
    ],
)
def test_an_odd_answer_is_told_and_the_next_version_is_evaluated(
    odd: Answer, bus: FakeBus, simulated: Callable[..., Any]
) -> None:
    assert evaluated(bus, simulated, Script(odd, GOOD)) == [2, 3]
    assert len(said(bus)) == 1 and said(bus)[0].startswith("version 1: ")


def test_a_child_that_died_is_followed_by_another(bus: FakeBus, simulated: Callable[..., Any]) -> None:
    assert evaluated(bus, simulated, Script(ChildDied("gone")), Script(GOOD)) == [2, 3]


@pytest.mark.parametrize("why", [ChildDied("again"), NurseryDied("gone"), ConfigError("task", "it has changed")])
def test_where_no_other_can_be_started_that_is_told_and_tried_again(
    why: Exception, bus: FakeBus, simulated: Callable[..., Any]
) -> None:
    assert evaluated(bus, simulated, Script(ChildDied("gone")), why, Script(GOOD)) == [3]
    assert said(bus) == ["version 1: gone", f"version 1: {why}", "version 2: gone"]
