"""What a watcher knows of a run, gathered from its metrics and events. Pure: no bus, no terminal, no clock."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from pydantic import ValidationError

from syncline.observe.telemetry import LOST_NAMED, AgentEval, CenterEval, Event, FleetStatus, Round, RunStatus, Train
from syncline.wire.messages import ENDED
from syncline.wire.subjects import COORDINATOR, FLEET, NAME

POINTS = 1024  # of a curve; a longer one is thinned out
BLOCKS = "▁▂▃▄▅▆▇█"
MAX_AGENTS = 10_000  # names that are remembered; a broker without accounts lets anybody make them up
MAX_EVENTS = 1000
PRESENCE_EVENTS = ("agent-joined", "agent-present", "agent-slow", "agent-lost", "agent-failed")
MOST_TEXT = 1000  # of an event: it goes to the terminal
TRAINING_LOSS = "training loss"  # the curve of the agents' mean


@dataclass(slots=True)
class AgentState:
    """One agent, by its newest metric."""

    train: Train | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)  # of its own W_i
    lost: str = ""  # why, in the words of the coordinator
    slow: str = ""  # the same
    failed: str = ""
    seen_s: float = 0.0  # when its newest metric came, by the watcher's clock
    late_at_s: float = -math.inf  # when it was last named as late
    late: int = 0  # rounds in which it was


@dataclass(slots=True)
class Curve:
    """A value by version, thinned out evenly when it grows long."""

    points: list[tuple[int, float]] = field(default_factory=list)
    _every: int = 1

    def add(self, version: int, value: float | None) -> None:
        if value is None or (self.points and version <= self.points[-1][0]):
            return
        if self.points and version - self.points[-1][0] < self._every and version % self._every:
            return
        self.points.append((version, value))
        if len(self.points) > POINTS:
            self.points, self._every = self.points[::2], 2 * self._every

    @property
    def span(self) -> tuple[float, float]:
        """The lowest and the highest value; of a curve that has points."""
        values = [value for _, value in self.points]
        return min(values), max(values)

    def sparkline(self, width: int) -> str:
        """`width` blocks, each the last value up to its version, between the lowest and the highest of all."""
        if not self.points or width < 1:
            return ""
        first, last = self.points[0][0], self.points[-1][0]
        values = [value for _, value in self.points]
        low, span = min(values), max(values) - min(values)
        line, k = "", 0
        for column in range(width):
            up_to = first + (last - first) * (column + 1) / width
            while k + 1 < len(self.points) and self.points[k + 1][0] <= up_to:
                k += 1
            line += BLOCKS[round((values[k] - low) / span * (len(BLOCKS) - 1)) if span else 0]
        return line


@dataclass(slots=True)
class RunState:
    """A run as its metrics tell it. `versions`: the commits after which it is done."""

    run: str
    versions: int
    steps: int = 0  # of a period, where the spec says it; an agent knows its own only after the first
    agents: dict[str, AgentState] = field(default_factory=dict)
    round: Round | None = None  # the newest
    metrics: dict[str, float | None] = field(default_factory=dict)  # of the center, held out
    evaluated: int = -1  # the version they are of
    curves: dict[str, Curve] = field(default_factory=dict)  # by metric, of the center
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS))  # warnings and errors, not yet shown
    advice: Event | None = None  # the newest: it is given once, and drops come by the dozen
    status: RunStatus | None = None  # the newest
    statuses: int = 0  # of them, so far
    fleet: FleetStatus | None = None  # what the coordinator has to do, the newest; where that is listened to
    fleet_statuses: int = 0
    ended: str = ""  # how, and where that is known why
    phase: str = ""

    # -- facts ---------------------------------------------------------------------------------------------------------
    def on_metric(self, who: str, what: str, data: bytes, now_s: float = 0.0) -> None:
        """A message on `….metrics.<who>.<what>`. One that is none, or of a kind we do not know, changes nothing.

        What only the coordinator can know is believed of it alone: the broker holds everybody to his own subjects.
        """
        try:
            if who != COORDINATOR:
                self._of_agent(who, what, data, now_s)
            elif what == Round.what:
                self._committed(Round.model_validate_json(data), now_s)
            elif what == CenterEval.what:
                self._evaluated(CenterEval.model_validate_json(data))
            elif what == RunStatus.what:
                self._stands(RunStatus.model_validate_json(data))
        except ValidationError:
            pass

    def on_fleet(self, who: str, what: str, data: bytes) -> None:
        """A message on `fleet.metrics.<who>.<what>`."""
        if (who, what) != (COORDINATOR, FleetStatus.what):
            return
        try:
            self.fleet = FleetStatus.model_validate_json(data)
        except ValidationError:
            return
        self.fleet_statuses += 1

    def on_event(self, run: str, data: bytes, who: str = COORDINATOR) -> Event | None:
        """A message on `….events.<who>`, of this run or of the fleet; the event, where it is one that concerns us."""
        if run not in (self.run, FLEET):
            return None
        try:
            event = Event.model_validate_json(data)
        except ValidationError:
            return None
        signed = (
            "" if who == COORDINATOR or event.text.startswith(who) else f"{who}: "
        )  # nobody speaks in the run's own name
        event = event.model_copy(update={"text": f"{signed}{event.text}"[:MOST_TEXT]})
        if event.level != "info":
            self.events.append(event)
        if event.event == "advice" and who == COORDINATOR:
            self.advice = event
        about = event.agent if who == COORDINATOR else who
        if event.event in PRESENCE_EVENTS and (agent := self._agent(about)) is not None:
            agent.lost = event.text if event.event == "agent-lost" else ""
            agent.slow = event.text if event.event == "agent-slow" else ""
            if event.event == "agent-failed":
                agent.failed = event.text
        if run == self.run and who == COORDINATOR and event.event.removeprefix("run-") in ENDED:
            self.ended, self.phase = event.text, event.event.removeprefix("run-")
        return event

    def take_events(self) -> list[Event]:
        taken = list(self.events)
        self.events.clear()
        return taken

    def _agent(self, name: str) -> AgentState | None:
        """None for what is no agent's name, and for one too many."""
        if name not in self.agents and NAME.fullmatch(name) and len(self.agents) < MAX_AGENTS:
            self.agents[name] = AgentState()
        return self.agents.get(name)

    def _of_agent(self, name: str, what: str, data: bytes, now_s: float) -> None:
        if what == Train.what:
            train = Train.model_validate_json(data)
            if (agent := self._agent(name)) is not None:
                agent.train, agent.seen_s = train, now_s
        elif what == AgentEval.what:
            metrics = AgentEval.model_validate_json(data).metrics
            if (agent := self._agent(name)) is not None:
                agent.metrics = metrics

    def _committed(self, round_: Round, now_s: float) -> None:
        self.round = round_
        for name in round_.late:
            if (agent := self._agent(name)) is not None:
                agent.late_at_s, agent.late = now_s, agent.late + 1
        here = [a.train for a in self.agents.values() if a.train is not None and not (a.lost or a.failed)]
        losses = [train.loss for train in here if train.loss is not None]
        if losses:
            self.curves.setdefault(TRAINING_LOSS, Curve()).add(round_.version, sum(losses) / len(losses))

    def _stands(self, status: RunStatus) -> None:
        """The truth, for whoever missed what led to it."""
        self.status, self.phase, self.versions = status, status.phase, status.versions
        self.statuses += 1
        gone, slow = {*status.lost}, {*status.slow}
        for name in gone:
            if (agent := self._agent(name)) is not None:
                agent.lost = agent.lost or f"{name} lost"
        for name in slow:
            if (agent := self._agent(name)) is not None:
                agent.slow = agent.slow or f"{name} slow"
        for name, agent in self.agents.items():
            if name not in gone and len(gone) < LOST_NAMED:
                agent.lost = ""
            if name not in slow and len(slow) < LOST_NAMED:
                agent.slow = ""
        if status.phase in ENDED:
            self.ended = self.ended or f"run {self.run}: {status.reason}"

    def _evaluated(self, result: CenterEval) -> None:
        if result.version < self.evaluated:
            return
        self.metrics, self.evaluated = result.metrics, result.version
        for name, value in result.metrics.items():
            self.curves.setdefault(name, Curve()).add(result.version, value)

    # -- what follows --------------------------------------------------------------------------------------------------
    @property
    def version(self) -> int:
        known = (self.round.version if self.round else 0, self.status.version if self.status else 0)
        return max(*known, self.evaluated)

    def lag(self, agent: AgentState) -> int | None:
        """Versions that the center has moved on since the one the agent trains from; None where it trains from none."""
        train = agent.train
        return None if train is None or train.state == "starting" else max(0, self.version - train.version)

    @property
    def bytes_up(self) -> int:
        return self.round.bytes_up if self.round else 0

    @property
    def bytes_down(self) -> int:
        return self.round.bytes_down if self.round else 0

    @property
    def deaf(self) -> bool:
        """The coordinator is heard and no agent, though some take part: with the coordinator's own key, for one."""
        silent = all(agent.train is None for agent in self.agents.values())
        return silent and self.statuses >= 3 and self.status is not None and self.status.agents > 0

    @property
    def failed(self) -> dict[str, str]:
        """Agents that cannot train, and why."""
        return {name: agent.failed for name, agent in self.agents.items() if agent.failed}

    def steps_of(self, agent: AgentState) -> tuple[int, int]:
        """Steps done and to do in the period that the agent is in; (0, 0) where that is not known."""
        train = agent.train
        if train is None or train.state == "starting":
            return 0, 0
        steps = train.steps or self.steps
        return min(train.step, steps), steps

    def shown_metrics(self) -> list[str]:
        """The metrics of the center in the order of interest: accuracy, loss, then the others by name."""
        return sorted(self.metrics, key=lambda name: (name != "accuracy", name != "loss", name))

    def complete(self, version: int, evaluated: bool) -> bool:
        """Whether the metrics of the last version are all here."""
        counted = self.round is not None and self.round.version >= version
        return counted and (self.evaluated >= version or not evaluated)
