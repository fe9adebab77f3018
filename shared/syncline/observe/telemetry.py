"""Metrics and events: JSON on public subjects, for people and dashboards. Core messages: a lost one is a gap in a plot.

`syncline.v1.<run>.metrics.<who>.<what>` and `syncline.v1.<run>.events.<who>`; who: an agent's id, `coordinator` or `broker`.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from syncline.bus.base import Bus
from syncline.chance import wall_time_s
from syncline.errors import BusError
from syncline.wire import subjects

log = logging.getLogger(__name__)

STATUS_S = 2.0  # what stands still is told again so often, for whoever begins to listen late
LOST_NAMED = 100
QUEUED_NAMED = 20
REASON_CHARS = 500
MOST_KNOWN = 100  # texts that are told once
_FIGURES = re.compile(r"[0-9][0-9.e+-]*")


class Published(BaseModel):
    """What every metric and event says."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="null")
    kind: ClassVar[str] = ""
    time_s: float = Field(
        default_factory=wall_time_s, description="when, in seconds since the epoch, by the sender's clock"
    )


class Train(Published):
    """An agent at work. At most 10 a second, one when a period ends, and one every few seconds while nothing moves."""

    kind: ClassVar[str] = "train"
    state: str = Field(description="starting, waiting, fetching, training, sending or failed")
    version: int = Field(description="version of the center it trains from")
    clock: int = Field(description="local periods finished")
    step: int = Field(description="steps done in this period")
    steps: int = Field(description="steps of this period")
    loss: float | None = Field(None, description="mean training loss of the last period")
    samples_per_s: float | None = Field(None, description="rows trained on a second, in the last period")
    part: int = Field(description="number of its part of the data")
    rows: int = Field(description="rows of that part")
    bytes_up: int = Field(description="update bytes put since the session began")
    bytes_down: int = Field(description="model bytes got since the session began")


class AgentEval(Published):
    """An agent's own W_i on the held-out data, after a period; only with `evaluate: {agents: true}`."""

    kind: ClassVar[str] = "eval"
    version: int = Field(description="version of the center it trained from")
    clock: int
    metrics: dict[str, float | None]


class CenterEval(Published):
    """The center on the held-out data."""

    kind: ClassVar[str] = "eval"
    version: int
    metrics: dict[str, float | None]
    seconds: float


class Round(Published):
    """A version was committed. At most 10 a second."""

    kind: ClassVar[str] = "round"
    version: int
    closed_by: str
    merged: int = Field(description="updates in the merge")
    late: list[str] = Field(max_length=100)
    seconds: float = Field(description="from the opening of the round to its commit")
    collect_s: float
    merge_s: float
    norm: float = Field(0.0, description="the length of D, the merged update")
    drift: float | None = Field(
        None,
        description="‖Σ p Δ‖² / Σ p ‖Δ‖² of a mean: 1 where the updates agree, 1/N where they have nothing in common",
    )
    bytes_up: int = Field(description="update bytes got since the run began")
    bytes_down: int = Field(description="model bytes put since the run began")


class RunStatus(Published):
    """Where a run stands, every few seconds and at its end: for whoever begins to listen late."""

    kind: ClassVar[str] = "run"
    task: str
    phase: str = Field(description="as in head: waiting, training, merging; done, failed and refused are ends")
    version: int
    versions: int = Field(description="commits after which it is done")
    agents: int = Field(description="agents that take part now, slow ones too")
    needed: int = Field(description="agents with which it starts")
    lost: list[str] = Field(max_length=LOST_NAMED, description="those that took part and are gone, so many at most")
    slow: list[str] = Field(
        default_factory=list,
        max_length=LOST_NAMED,
        description="those that are here and make no progress, so many at most",
    )
    reason: str = Field(description="what closed the last round, or ended the run")


class FleetStatus(Published):
    """What the coordinator has to do, every few seconds. The run is `fleet`."""

    kind: ClassVar[str] = "fleet"
    agents: int = Field(description="agents that are here, with or without a run")
    run: str = Field(description="the run that goes on, or empty")
    doing: str = Field("", max_length=200, description="what the coordinator does before that run can begin")
    queued: list[str] = Field(max_length=QUEUED_NAMED, description="runs that wait for it to end, so many at most")


class Event(Published):
    """Something happened that a person may want to know."""

    event: str = Field(
        description="its kind, for programs: agent-joined, agent-slow, agent-lost, update-dropped, advice, …"
    )
    level: Literal["info", "warning", "error"]
    text: str = Field(description="the same for people, with the hint where there is one")
    agent: str = Field("", description="whom it concerns")


METRICS: tuple[tuple[str, type[Published]], ...] = (
    ("<agent>", Train),
    ("<agent>", AgentEval),
    ("coordinator", Round),
    ("coordinator", CenterEval),
    ("coordinator", RunStatus),
    ("coordinator", FleetStatus),
)


class Telemetry:
    """Publishes for one service in one run. Never raises: a run does not stop because nobody could be told."""

    def __init__(self, bus: Bus, run: str, who: str) -> None:
        self._bus, self._run, self._who = bus, run, who

    async def metric(self, metric: Published) -> None:
        await self._say(subjects.metrics(self._run, self._who, metric.kind), metric)

    async def event(
        self, event: str, text: str, *, level: Literal["info", "warning", "error"] = "info", agent: str = ""
    ) -> None:
        run = "" if self._run == subjects.FLEET else f"run {self._run}: "
        log.log(_LEVELS[level], "%s%s: %s", run, event, text)
        await self._say(
            subjects.events(self._run, self._who), Event(event=event, level=level, text=_clean(text), agent=agent)
        )

    async def _say(self, subject: str, published: Published) -> None:
        try:
            await self._bus.publish(subject, published.model_dump_json().encode())
        except BusError as error:
            log.debug("%s: %s", subject, error)


async def tell_often(telemetry: Telemetry, status: Callable[[], Published]) -> None:
    """Says it every few seconds, until cancelled."""
    while True:
        await telemetry.metric(status())
        await asyncio.sleep(STATUS_S)


class Pace:
    """Lets something through at most so often."""

    def __init__(self, every_s: float) -> None:
        self._every_s, self._next_s = every_s, 0.0

    def due(self, now_s: float) -> bool:
        if now_s < self._next_s:
            return False
        self._next_s = now_s + self._every_s
        return True


class Once:
    """Lets a text through that is new. Those that differ in figures alone count as one; keeps a bounded number of them."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def is_new(self, text: str) -> bool:
        """Tell whether the text is to be told, and remember it."""
        key = _FIGURES.sub("#", text[:REASON_CHARS])
        if key in self._known or len(self._known) >= MOST_KNOWN:
            return False
        self._known.add(key)
        return True


def _clean(text: str) -> str:
    """As JSON can hold it: an error of somebody else's may bring anything."""
    return text[:2000].encode(errors="replace").decode()


def numbers(metrics: dict[str, Any]) -> dict[str, float | None]:
    """Metrics as JSON can hold them: NaN and Inf become null."""
    return {k: v if v == v and abs(v) != float("inf") else None for k, v in metrics.items()}


_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
