"""What an agent tells while it works: heartbeats to the coordinator, metrics to whoever listens."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from syncline.bus.base import Bus
from syncline.chance import jitter
from syncline.errors import BusError, PeerError, SynclineError
from syncline.observe.telemetry import STATUS_S, AgentEval, Once, Pace, Telemetry, Train, numbers
from syncline.policy.advice import MetricsAdviser
from syncline.runtime.child_messages import PeriodReport
from syncline.wire import subjects
from syncline.wire.messages import Heartbeat, Welcome, decode, encode
from syncline_agent.run_view import News
from syncline_agent.training_child import Training

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
HEARTBEATS_TO_MISS = 5  # in a row, before this agent counts as lost
METRICS_S = 0.2


class Superseded(SynclineError):
    """Another process has claimed this agent's name: exit."""


@dataclass(slots=True)
class Stand:
    """Where an agent stands in its run."""

    moved: asyncio.Event = field(default_factory=asyncio.Event)  # anything here was written
    turned: asyncio.Event = field(default_factory=asyncio.Event)  # it is ready, out, or of no use: that is news
    state: Any = "starting"
    why: str = ""  # it failed, or is out
    clock: int = 0  # local periods finished
    epoch: int = 0  # of the head that all this is about
    handed: int = 0  # clock of the newest offer that the bus has acknowledged in that epoch
    version: int = 0  # of the center it trains from
    part: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    last_report: PeriodReport | None = None  # of the last period that made an update

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name != "moved":
            self.moved.set()

    def is_ready(self) -> None:
        self.state, self.why = "waiting", ""
        self.turned.set()

    def is_out(self, why: str) -> None:
        """For a while: nobody waits for this agent until it is ready again."""
        self.state, self.why = "leaving", why[:2000]
        self.turned.set()

    def cannot(self, why: str) -> None:
        self.state, self.why = "failed", why
        self.turned.set()


class SignsOfLife:
    def __init__(
        self, bus: Bus, run: str, agent: str, session: str, stand: Stand, news: News, training: Training
    ) -> None:
        self._bus, self._run, self._agent, self._session = bus, run, agent, session
        self._stand, self._news, self._training = stand, news, training
        self._telemetry = Telemetry(bus, run, agent)
        self._metrics = Pace(0.1)
        self._adviser, self._failures = MetricsAdviser(), Once()
        self.heartbeat_s = HEARTBEAT_S
        self.advises = True  # on metrics of the held-out data; else the coordinator does, which has the same ones

    async def beat(self, hello: Callable[[], Awaitable[str]]) -> None:
        """Until the coordinator has other plans for this agent. Raises Superseded."""
        subject, stand = subjects.heartbeat(self._run, self._agent), self._stand
        while True:
            stand.turned.clear()
            try:
                answer = decode(Welcome, await self._bus.request(subject, encode(self._heartbeat()), 5.0))
                if answer.superseded:
                    raise Superseded(answer.reason)
                if not answer.run and not answer.unknown:
                    log.info("no place in run %s: %s", self._run, answer.reason)
                    return
                if answer.unknown:  # the coordinator was restarted, or counted us as lost
                    if await hello() not in ("", self._run):
                        return
                    await asyncio.sleep(0.05)
                    continue
            except BusError as error:
                log.debug("heartbeat: %s", error)
            except PeerError as error:
                log.warning("heartbeat: %s", error)
            try:
                async with asyncio.timeout(jitter(self.heartbeat_s, 0.8, 1.0)):
                    await stand.turned.wait()
            except TimeoutError:
                pass

    async def leave(self) -> None:
        """Says goodbye, so that nobody waits for this agent."""
        self._stand.state = "leaving"
        try:
            await self._bus.request(subjects.heartbeat(self._run, self._agent), encode(self._heartbeat()), 1.0)
        except BusError:
            pass

    async def show(self) -> None:
        """Where this agent stands, five times a second while something moves, and now and then while nothing does."""
        shown: Any = None
        stand, clock, again_s = self._stand, asyncio.get_running_loop().time, 0.0
        while True:
            stand.moved.clear()
            now = (stand.state, stand.version, stand.clock, self._training.progress())
            if (now != shown or clock() >= again_s) and self._metrics.due(clock()):
                shown, again_s = now, clock() + STATUS_S
                await self.show_once()
            elif now == shown and stand.state != "training":
                await self._until_moved(again_s - clock())
            await asyncio.sleep(METRICS_S)

    async def _until_moved(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self._stand.moved.wait()
        except TimeoutError:
            pass

    async def show_once(self) -> None:
        progress, stand = self._training.progress(), self._stand
        last = stand.last_report
        metric = Train(
            state=stand.state,
            version=stand.version,
            clock=stand.clock,
            step=progress.step,
            steps=progress.steps,
            loss=last.loss if last is not None else None,
            samples_per_s=last.samples_per_s if last is not None else None,
            part=stand.part,
            rows=progress.rows,
            bytes_up=stand.bytes_up,
            bytes_down=stand.bytes_down,
        )
        await self._telemetry.metric(metric)

    async def tell(self, clock: int, version: int, report: PeriodReport) -> None:
        """Publish the results of a period that is over."""
        if (evaluation := report.evaluation) is not None:
            metric = AgentEval(version=version, clock=clock, metrics=numbers(evaluation.metrics))
            await self._telemetry.metric(metric)
            advice = self._adviser.evaluated(evaluation.metrics, evaluation.skipped)
            for text in advice if self.advises else ():
                await self._telemetry.event("advice", f"{self._agent}: {text}", level="warning", agent=self._agent)
        if (why := report.evaluation_problem) and self._failures.is_new(why):
            text = f"{self._agent}: its model is not evaluated, version {version}: {why} (told once)"
            await self._telemetry.event("evaluation-failed", text, level="warning", agent=self._agent)
        if self._metrics.due(asyncio.get_running_loop().time()):
            await self.show_once()

    def _heartbeat(self) -> Heartbeat:
        stand = self._stand
        return Heartbeat(
            session=self._session,
            clock=stand.clock,
            progress=self._training.progress().steps_ever,
            state=stand.state,
            reason=stand.why,
            seen_term=self._news.highest[0],
            seen_version=self._news.highest[1],
            seen_round=self._news.highest[2],
            seen_epoch=stand.epoch,
            handed=stand.handed,
        )
