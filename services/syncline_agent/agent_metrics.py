"""Metrics that an agent publishes while it works in a run."""

from __future__ import annotations

import asyncio
from typing import Any

from syncline.bus.base import Bus
from syncline.observe.telemetry import STATUS_S, AgentEval, Once, Pace, Telemetry, Train, numbers
from syncline.policy.advice import MetricsAdviser
from syncline.runtime.child_messages import PeriodReport
from syncline_agent.session_status import SessionStatus
from syncline_agent.states import SessionState
from syncline_agent.training_child import Training

METRICS_S = 0.2
SHORTEST_S = 0.1  # between two metrics of an agent


class AgentMetrics:
    """Publishes the metrics of one session.

    Attributes:
        advises: comment on metrics of the held-out data; off where the coordinator does so, which has the same metrics.
    """

    def __init__(self, bus: Bus, run: str, agent: str, status: SessionStatus, training: Training) -> None:
        self.advises = True
        self._agent = agent
        self._status = status
        self._training = training
        self._telemetry = Telemetry(bus, run, agent)
        self._pace = Pace(SHORTEST_S)
        self._adviser = MetricsAdviser()
        self._failures = Once()

    async def publish_forever(self) -> None:
        """Publish the status five times a second while something changes, and every few seconds while nothing does."""
        status = self._status
        clock = asyncio.get_running_loop().time
        published: Any = None
        again_s = 0.0
        while True:
            status.changed.clear()
            now = (status.state.reported, status.version, status.clock, self._training.progress())
            if (now != published or clock() >= again_s) and self._pace.due(clock()):
                published = now
                again_s = clock() + STATUS_S
                await self.publish()
            elif now == published and status.state is not SessionState.TRAINING:
                await self._until_changed(again_s - clock())
            await asyncio.sleep(METRICS_S)

    async def publish(self) -> None:
        """Publish the status once."""
        status = self._status
        progress = self._training.progress()
        last = status.last_report
        metric = Train(
            state=status.state.reported,
            version=status.version,
            clock=status.clock,
            step=progress.step,
            steps=progress.steps,
            loss=last.loss if last is not None else None,
            samples_per_s=last.samples_per_s if last is not None else None,
            part=status.part,
            rows=progress.rows,
            bytes_up=status.bytes_up,
            bytes_down=status.bytes_down,
        )
        await self._telemetry.metric(metric)

    async def period_over(self, clock: int, version: int, report: PeriodReport) -> None:
        """Publish the results of a period."""
        if (evaluation := report.evaluation) is not None:
            metric = AgentEval(version=version, clock=clock, metrics=numbers(evaluation.metrics))
            await self._telemetry.metric(metric)
            advice = self._adviser.evaluated(evaluation.metrics, evaluation.skipped)
            for text in advice if self.advises else ():
                await self._telemetry.event("advice", f"{self._agent}: {text}", level="warning", agent=self._agent)
        if (problem := report.evaluation_problem) and self._failures.is_new(problem):
            text = f"{self._agent}: its model is not evaluated, version {version}: {problem} (told once)"
            await self._telemetry.event("evaluation-failed", text, level="warning", agent=self._agent)
        if self._pace.due(asyncio.get_running_loop().time()):
            await self.publish()

    async def _until_changed(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self._status.changed.wait()
        except TimeoutError:
            pass
