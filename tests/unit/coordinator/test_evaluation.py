"""Held-out evaluation at the coordinator: what goes wrong with it is told, and ends no run."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import pytest

from syncline.bus.base import Bus
from syncline.errors import ConfigError
from syncline.observe.telemetry import Telemetry
from syncline.runtime.child import ChildDied, ChildFailed
from syncline.runtime.child_messages import CopyCenter, Done, EvaluationReport, Question
from syncline.runtime.nursery import NurseryDied
from syncline_coordinator.evaluation import Evaluation
from unit.fake_bus import FakeBus

LISTED = ConfigError("task", "`metrics` returned for 'recall' a list", "Return numbers by name")
GOOD = EvaluationReport(metrics={"loss": 0.5}, seconds=0.1)
Result = EvaluationReport | Exception


class Script:
    """A child that answers `evaluate` so, once each, and is dead after ChildDied."""

    def __init__(self, *answers: Result) -> None:
        self.answers = deque(answers)
        self.doing = ""

    async def ask(self, question: Question[Any]) -> Any:
        if isinstance(question, CopyCenter):
            return Done()
        answer = self.answers.popleft() if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def close(self) -> None:
        pass


def evaluated(bus: FakeBus, simulated: Callable[..., Any], first: Script, *later: Script | Exception) -> list[int]:
    """The versions, of three that are offered, whose metrics were reported. `later`: what starting another child gives."""
    starts = deque(later)
    reported: list[int] = []

    async def start() -> Script:
        started = starts.popleft()
        if isinstance(started, Exception):
            raise started
        return started

    async def work() -> None:
        evaluation = Evaluation(
            first, start, Telemetry(cast(Bus, bus), "r", "coordinator"), lambda version, _: reported.append(version)
        )
        for version in (1, 2, 3):
            await evaluation.last(version)
            await evaluation.copied()
        await evaluation.close()

    simulated(work())
    return reported


def said(bus: FakeBus, kind: str = "evaluation-failed") -> list[str]:
    told = [json.loads(data) for subject, data in bus.published if ".events." in subject]
    assert all(event["event"] == kind for event in told)
    return [event["text"] for event in told]


def test_a_failure_of_the_tasks_own_code_is_told_once_and_not_at_every_version(
    bus: FakeBus, simulated: Callable[..., Any]
) -> None:
    assert evaluated(bus, simulated, Script(LISTED, LISTED, GOOD)) == [3]
    assert len(said(bus)) == 1 and said(bus)[0].startswith("version 1: ") and said(bus)[0].endswith(" (told once)")


def test_another_failure_is_told_too(bus: FakeBus, simulated: Callable[..., Any]) -> None:
    assert (
        evaluated(bus, simulated, Script(LISTED, ChildFailed("IndexError: row 7"), ChildFailed("IndexError: row 8")))
        == []
    )
    assert [text.partition(":")[0] for text in said(bus)] == ["version 1", "version 2"]


def test_a_metric_that_never_has_a_value_is_advised_on_at_the_end_of_a_short_run(
    bus: FakeBus, simulated: Callable[..., Any]
) -> None:
    nothing = EvaluationReport(metrics={"loss": 0.5, "auc": float("nan")}, skipped={"auc": 2}, seconds=0.1)
    assert evaluated(bus, simulated, Script(nothing)) == [1, 2, 3]
    assert len(said(bus, "advice")) == 1 and "'auc' has no value" in said(bus, "advice")[0]


def test_batches_left_out_of_a_mean_are_advised_on_once(bus: FakeBus, simulated: Callable[..., Any]) -> None:
    holed = EvaluationReport(metrics={"auc": 0.5}, skipped={"auc": 2}, seconds=0.1)
    assert evaluated(bus, simulated, Script(holed)) == [1, 2, 3]
    assert len(said(bus, "advice")) == 1 and "'auc' was NaN in 2 of the batches" in said(bus, "advice")[0]


@pytest.mark.parametrize(
    "odd",
    [ChildFailed("TypeError: it is odd"), ConfigError("task", "`metrics` returned a Tensor")],
)
def test_a_failure_is_told_and_the_next_version_is_evaluated(
    odd: Exception, bus: FakeBus, simulated: Callable[..., Any]
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
