"""Metrics and events: JSON that people can read, on the subjects that are documented; and never an error."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import pytest

from syncline.errors import Denied, Unreachable
from syncline.observe.telemetry import (
    METRICS,
    AgentEval,
    CenterEval,
    Event,
    FleetStatus,
    Pace,
    Published,
    Round,
    RunStatus,
    Telemetry,
    Train,
    numbers,
)

TRAIN = Train(
    state="training", version=3, clock=3, step=5, steps=20, loss=0.5, samples_per_s=1e3, part=0, rows=449,
    bytes_up=1, bytes_down=2,
)  # fmt: skip
ROUND = Round(
    version=4, closed_by="4 of 4", merged=4, late=[], seconds=0.2, collect_s=0.1, merge_s=0.05, bytes_up=1, bytes_down=2
)
EXAMPLES: dict[type[Published], Published] = {
    Train: TRAIN,
    AgentEval: AgentEval(version=3, clock=4, metrics={"accuracy": 0.9}),
    Round: ROUND,
    CenterEval: CenterEval(version=4, metrics={"accuracy": 0.9}, seconds=0.1),
    RunStatus: RunStatus(
        task="t:T", phase="training", version=4, versions=40, agents=3, needed=4, lost=["a4"], reason="3 of 3"
    ),
    FleetStatus: FleetStatus(agents=4, run="r", queued=["s"]),
}


def last(bus: Any) -> tuple[str, dict[str, Any]]:
    subject, data = bus.published[-1]
    return subject, json.loads(data)


# -- metrics -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("who", "metric"), METRICS, ids=lambda value: str(getattr(value, "__name__", value)))
async def test_a_metric_is_published_under_who_and_what(bus: Any, who: str, metric: type[Published]) -> None:
    name = who.replace("<agent>", "a1")
    await Telemetry(bus, "r", name).metric(EXAMPLES[metric])
    subject, fields = last(bus)
    assert subject == f"syncline.v1.r.metrics.{name}.{metric.kind}"
    assert set(fields) == set(metric.model_fields) and metric.model_validate(fields) == EXAMPLES[metric]


def test_every_metric_has_a_subject_of_its_own() -> None:
    assert {metric for _, metric in METRICS} == set(EXAMPLES)
    assert len({(who, metric.kind) for who, metric in METRICS}) == len(METRICS) and all(m.kind for _, m in METRICS)


def test_a_metric_says_when(monkeypatch: pytest.MonkeyPatch) -> None:
    from syncline import chance

    token = chance.wall_clock.set(lambda: 1234.5)
    try:
        assert Event(event="e", level="info", text="t").time_s == 1234.5
    finally:
        chance.wall_clock.reset(token)


async def test_what_json_cannot_hold_becomes_null(bus: Any) -> None:
    await Telemetry(bus, "r", "a1").metric(TRAIN.model_copy(update={"loss": math.nan, "samples_per_s": math.inf}))
    _, fields = last(bus)
    assert fields["loss"] is None and fields["samples_per_s"] is None


def test_metrics_of_the_users_task_become_numbers_or_null() -> None:
    assert numbers({"accuracy": 0.5, "loss": math.nan, "ratio": -math.inf, "count": 3}) == {
        "accuracy": 0.5, "loss": None, "ratio": None, "count": 3,
    }  # fmt: skip


# -- events ------------------------------------------------------------------------------------------------------------
async def test_an_event_is_published_and_logged(bus: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "syncline.observe.telemetry"):
        await Telemetry(bus, "r", "coordinator").event("agent-lost", "a1 lost", level="warning", agent="a1")
    subject, fields = last(bus)
    assert subject == "syncline.v1.r.events.coordinator"
    del fields["time_s"]
    assert fields == {"event": "agent-lost", "level": "warning", "text": "a1 lost", "agent": "a1"}
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [("WARNING", "run r: agent-lost: a1 lost")]


async def test_a_long_text_is_cut_off(bus: Any) -> None:
    await Telemetry(bus, "r", "a1").event("e", "x" * 99_999)
    assert len(last(bus)[1]["text"]) == 2000


@pytest.mark.parametrize("error", [Unreachable("no connection"), Denied("permissions violation")])
async def test_a_bus_that_takes_nothing_stops_nobody(bus: Any, error: Exception) -> None:
    bus.fail("publish", error, error)
    telemetry = Telemetry(bus, "r", "a1")
    await telemetry.metric(TRAIN)
    await telemetry.event("e", "t")
    assert bus.published == []


# -- pace --------------------------------------------------------------------------------------------------------------
def test_a_pace_lets_something_through_at_most_so_often() -> None:
    pace = Pace(0.1)
    assert [t for t in (0.0, 0.05, 0.0999, 0.1, 0.11, 0.35, 0.4, 0.46) if pace.due(t)] == [0.0, 0.1, 0.35, 0.46]
