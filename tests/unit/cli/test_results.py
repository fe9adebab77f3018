"""The JSON object that a finished run ends with."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest

from syncline.bus.base import Bus
from syncline.client.follow import RunFollower
from syncline.observe.fleet_state import FleetState
from syncline.observe.telemetry import AgentEval, CenterEval, Published
from syncline.wire import subjects
from syncline.wire.messages import Head
from syncline_cli.ui.results import print_json, result_of

HEAD = Head(run="r", term=1, version=3, phase="done", reason="3 versions")


def result(*said: tuple[str, Published]) -> dict[str, Any]:
    fleet = FleetState.of("r")
    for who, metric in said:
        fleet.handle(subjects.metrics("r", who, metric.kind), metric.model_dump_json().encode(), 0.0)
    follower = RunFollower(cast(Bus, None), cast(Bus, None), fleet)
    follower.head = HEAD
    return result_of(follower)


def test_only_the_metrics_of_the_last_version_count() -> None:
    for version, accuracy in ((3, 0.9), (2, None)):
        found = result(("coordinator", CenterEval(version=version, metrics={"accuracy": 0.9}, seconds=0.1)))
        assert found["accuracy"] == accuracy and "agents" not in found


def test_what_each_agent_reached_is_told_where_agents_evaluate(capsys: pytest.CaptureFixture[str]) -> None:
    def own(clock: int, accuracy: float) -> AgentEval:
        return AgentEval(version=2, clock=clock, metrics={"accuracy": accuracy})

    found = result(("a2", own(1, 0.5)), ("a1", own(1, 0.7)), ("a2", own(2, 0.6)))
    print_json(found)
    assert json.loads(capsys.readouterr().out)["agents"] == {"a1": {"accuracy": 0.7}, "a2": {"accuracy": 0.6}}
