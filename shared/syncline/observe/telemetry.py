"""Metrics and events: JSON on public subjects, for people and dashboards.

`syncline.v1.<run>.metrics.<sender>.<kind>` and `syncline.v1.<run>.events.<sender>`; the sender is an agent's name,
`coordinator` or `broker`. The messages are not stored: a lost one is a gap in a plot. `syncline.observe.feed` reads them.
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

STATUS_S = 2.0  # between statuses, which tell a new reader the state of a run
LOST_NAMED = 100  # most lost or slow agents that a status names
QUEUED_NAMED = 20  # most queued runs that a status names
REASON_CHARS = 500
MOST_KNOWN = 100  # texts that an instance of Once remembers
_FIGURES = re.compile(r"[0-9][0-9.e+-]*")


class Published(BaseModel):
    """The fields that every metric and event has."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="null")
    kind: ClassVar[str] = ""
    time_s: float = Field(
        default_factory=wall_time_s,
        description="time of the message, in seconds since the epoch, by the sender's clock",
    )


class Train(Published):
    """An agent's training. At most 10 a second, one at the end of a period, and one every few seconds in between."""

    kind: ClassVar[str] = "train"
    state: str = Field(description="starting, waiting, fetching, training, sending or failed")
    version: int = Field(description="version of the center that the agent trains from")
    clock: int = Field(description="local periods finished")
    step: int = Field(description="steps done in this period")
    steps: int = Field(description="steps of this period")
    loss: float | None = Field(None, description="mean training loss of the last period")
    samples_per_s: float | None = Field(None, description="rows trained on a second, in the last period")
    part: int = Field(description="number of the agent's part of the data")
    rows: int = Field(description="rows of that part")
    bytes_up: int = Field(description="update bytes put since the session began")
    bytes_down: int = Field(description="model bytes got since the session began")


class AgentEval(Published):
    """An agent's own model W_i on held-out data, after a period; only with `evaluate: {agents: true}`."""

    kind: ClassVar[str] = "eval"
    version: int = Field(description="version of the center that the agent trained from")
    clock: int
    metrics: dict[str, float | None]


class CenterEval(Published):
    """The center on held-out data."""

    kind: ClassVar[str] = "eval"
    version: int
    metrics: dict[str, float | None]
    seconds: float


class Round(Published):
    """A committed version. At most 10 a second."""

    kind: ClassVar[str] = "round"
    version: int
    closed_by: str
    merged: int = Field(description="updates in the merge")
    late: list[str] = Field(max_length=100)
    seconds: float = Field(description="from the opening of the round to its commit")
    collect_s: float
    merge_s: float
    norm: float = Field(0.0, description="L2 norm of the merged update D")
    drift: float | None = Field(
        None,
        description="‖Σ p Δ‖² / Σ p ‖Δ‖² of a mean: 1 if the updates are equal, 1/N if they are orthogonal",
    )
    bytes_up: int = Field(description="update bytes got since the run began")
    bytes_down: int = Field(description="model bytes put since the run began")


class RunStatus(Published):
    """The state of a run, every few seconds and at its end. Corrects readers that subscribed late or missed a message."""

    kind: ClassVar[str] = "run"
    task: str
    phase: str = Field(description="as in head: waiting, training, merging; done, failed and refused are ends")
    version: int
    versions: int = Field(description="commits after which the run is done")
    agents: int = Field(description="agents that take part now, slow ones included")
    needed: int = Field(description="agents with which the run starts")
    lost: list[str] = Field(max_length=LOST_NAMED, description="lost agents, some of them beyond the limit")
    slow: list[str] = Field(
        default_factory=list,
        max_length=LOST_NAMED,
        description="agents that send heartbeats and make no progress, some of them beyond the limit",
    )
    reason: str = Field(description="reason of the last round's end, or of the run's")


class FleetStatus(Published):
    """The coordinator's work, every few seconds. The run token of the subject is `fleet`."""

    kind: ClassVar[str] = "fleet"
    agents: int = Field(description="agents that are connected, with or without a run")
    run: str = Field(description="the active run, or empty")
    doing: str = Field("", max_length=200, description="preparation of that run that is under way, or empty")
    queued: list[str] = Field(max_length=QUEUED_NAMED, description="queued runs, the first of them beyond the limit")


class Event(Published):
    """An event that a person may want to know."""

    event: str = Field(
        description="kind, for programs: agent-joined, agent-slow, agent-lost, update-dropped, advice, …"
    )
    level: Literal["info", "warning", "error"]
    text: str = Field(description="text for people, with a hint if one exists")
    agent: str = Field("", description="the agent that the event concerns, or empty")


METRICS: tuple[tuple[str, type[Published]], ...] = (
    ("<agent>", Train),
    ("<agent>", AgentEval),
    ("coordinator", Round),
    ("coordinator", CenterEval),
    ("coordinator", RunStatus),
    ("coordinator", FleetStatus),
)


class Telemetry:
    """Publishes the metrics and events of one service in one run. Never raises: a run does not depend on its readers."""

    def __init__(self, bus: Bus, run: str, sender: str) -> None:
        """
        Args:
            run: the run's name, or `fleet`.
            sender: the service's own name; the broker refuses any other.
        """
        self._bus = bus
        self._run = run
        self._sender = sender

    async def metric(self, metric: Published) -> None:
        """Publish a metric."""
        await self._publish(subjects.metrics(self._run, self._sender, metric.kind), metric)

    async def event(
        self, event: str, text: str, *, level: Literal["info", "warning", "error"] = "info", agent: str = ""
    ) -> None:
        """Publish an event and log it.

        Args:
            event: the kind, a word with hyphens; programs rely on it.
            text: the text for people, cut off after 2,000 characters.
            agent: the agent that the event concerns.
        """
        run = "" if self._run == subjects.FLEET else f"run {self._run}: "
        log.log(_LEVELS[level], "%s%s: %s", run, event, text)
        await self._publish(
            subjects.events(self._run, self._sender), Event(event=event, level=level, text=_clean(text), agent=agent)
        )

    async def _publish(self, subject: str, published: Published) -> None:
        try:
            await self._bus.publish(subject, published.model_dump_json().encode())
        except BusError as error:
            log.debug("%s: %s", subject, error)


async def tell_often(telemetry: Telemetry, status: Callable[[], Published]) -> None:
    """Publish the current status every STATUS_S, until cancelled."""
    while True:
        await telemetry.metric(status())
        await asyncio.sleep(STATUS_S)


class Pace:
    """Limits the rate of something to one per `every_s`."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._next_s = 0.0

    def due(self, now_s: float) -> bool:
        """Tell whether the next one is due, and count it if so."""
        if now_s < self._next_s:
            return False
        self._next_s = now_s + self._every_s
        return True


class Once:
    """Recognises texts that were published before. Texts that differ only in numbers count as one."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def is_new(self, text: str) -> bool:
        """Tell whether the text is new, and remember it. Beyond MOST_KNOWN texts no text is new."""
        key = _FIGURES.sub("#", text[:REASON_CHARS])
        if key in self._known or len(self._known) >= MOST_KNOWN:
            return False
        self._known.add(key)
        return True


def _clean(text: str) -> str:
    """Return a text that JSON can hold: an error text of other code may contain lone surrogates."""
    return text[:2000].encode(errors="replace").decode()


def numbers(metrics: dict[str, Any]) -> dict[str, float | None]:
    """Return metrics that JSON can hold: NaN and Inf become null."""
    return {k: v if v == v and abs(v) != float("inf") else None for k, v in metrics.items()}


_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
