"""What a run tells of itself."""

from __future__ import annotations

import json
from typing import cast

from syncline.bus.base import Bus
from syncline.observe.telemetry import Telemetry
from syncline.spec.run_spec import RunSpec, parse
from syncline_coordinator.reporting import RunReport
from unit.fake_bus import FakeBus


async def test_a_target_that_no_metric_can_reach_is_told_once_with_those_that_there_are(bus: FakeBus) -> None:
    target = {"metric": "acuracy", "at_least": 0.9}
    spec = parse(RunSpec, {"name": "r", "task": "t:T", "stop": {"versions": 3, "target": target}})
    account = RunReport(spec, Telemetry(cast(Bus, bus), "r", "coordinator"), 9)
    await account.target_metric_missing(["loss", "accuracy"])
    await account.target_metric_missing(["loss", "accuracy"])
    ((subject, data),) = bus.published
    event = json.loads(data)
    assert subject == "syncline.v1.r.events.coordinator" and (event["event"], event["level"]) == ("advice", "warning")
    assert event["text"] == (
        "stop.target.metric: there is no 'acuracy'; known: accuracy, loss. The run goes on to stop.versions"
    )
