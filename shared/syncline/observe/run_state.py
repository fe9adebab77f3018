"""The state of one run as its metrics and events tell it. Pure: no bus, no terminal, no clock."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from syncline.observe.feed import FeedMessage
from syncline.observe.telemetry import LOST_NAMED, AgentEval, CenterEval, Event, Round, RunStatus, Train
from syncline.wire.messages import ENDED
from syncline.wire.subjects import COORDINATOR, NAME

MAX_POINTS = 1024  # of a curve; a longer one is thinned out
MAX_AGENTS = 10_000  # a broker without accounts lets any client invent names
MAX_EVENTS = 1000
MAX_CURVES = 64
DEAF_STATUSES = 3  # of the coordinator without a metric of any agent
BLOCKS = "▁▂▃▄▅▆▇█"
PRESENCE_EVENTS = ("agent-joined", "agent-present", "agent-slow", "agent-lost", "agent-failed")
TRAINING_LOSS = "training loss"  # name of the curve of the agents' mean loss


@dataclass(slots=True)
class AgentState:
    """One agent, by its newest metric. Reasons are empty while they do not apply."""

    train: Train | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)  # of the agent's own model W_i
    lost: str = ""  # the reason, in the coordinator's words
    slow: str = ""  # the reason, in the coordinator's words
    failed: str = ""  # the reason, in the agent's words
    seen_s: float = 0.0  # time of the newest metric, by the reader's clock
    late_at_s: float = -math.inf  # time of the last round that named the agent as late, by the reader's clock
    late_rounds: int = 0


@dataclass(slots=True)
class Curve:
    """A value by version. Every second point is removed when the curve exceeds MAX_POINTS."""

    points: list[tuple[int, float]] = field(default_factory=list)
    _stride: int = 1  # versions between points

    def add(self, version: int, value: float | None) -> None:
        """Append a point; ignore a missing value and a version that is not newer than the last one."""
        if value is None or (self.points and version <= self.points[-1][0]):
            return
        if self.points and version - self.points[-1][0] < self._stride and version % self._stride:
            return
        self.points.append((version, value))
        if len(self.points) > MAX_POINTS:
            self.points = self.points[::2]
            self._stride *= 2

    @property
    def span(self) -> tuple[float, float]:
        """The lowest and the highest value. The curve must have a point."""
        values = [value for _, value in self.points]
        return min(values), max(values)

    def sparkline(self, width: int) -> str:
        """Draw the curve in `width` blocks, each the last value up to its version, scaled from the lowest to the highest."""
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
    """A run as its feed tells it.

    `handle` takes messages in the order of their arrival. Missing messages leave gaps: the run's status, published every few
    seconds, corrects the state of a reader that subscribed late.
    """

    run: str
    versions: int  # commits after which the run is done; 0: not known yet
    steps: int = 0  # of a period, from the spec; used until an agent reports its own
    agents: dict[str, AgentState] = field(default_factory=dict)
    round: Round | None = None  # the newest
    metrics: dict[str, float | None] = field(default_factory=dict)  # of the center, on held-out data
    evaluated: int = -1  # the version of `metrics`
    curves: dict[str, Curve] = field(default_factory=dict)  # of the center, by metric
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS))  # warnings and errors, not taken yet
    advice: Event | None = None  # the newest; kept apart because frequent events push it out of every list
    status: RunStatus | None = None  # the newest
    statuses: int = 0  # number of them so far
    ended: str = ""  # the reason of the end
    phase: str = ""

    # -- messages --------------------------------------------------------------------------------------------------
    def handle(self, message: FeedMessage, now_s: float = 0.0) -> None:
        """Apply a message of this run, or an event of the fleet. `now_s` is the reader's clock."""
        match message.content:
            case Train() as train:
                self._on_train(message.sender, train, now_s)
            case AgentEval() as result:
                self._on_agent_eval(message.sender, result)
            case Round() as closed:
                self._on_round(closed, now_s)
            case CenterEval() as result:
                self._on_center_eval(result)
            case RunStatus() as status:
                self._on_status(status)
            case Event() as event:
                self._on_event(message.run, message.sender, event)
            case _:
                pass

    def take_events(self) -> list[Event]:
        """Return the warnings and errors since the last call."""
        taken = list(self.events)
        self.events.clear()
        return taken

    def _agent(self, name: str) -> AgentState | None:
        """Return the agent's state, or None for an invalid name and beyond MAX_AGENTS names."""
        if name not in self.agents and NAME.fullmatch(name) and len(self.agents) < MAX_AGENTS:
            self.agents[name] = AgentState()
        return self.agents.get(name)

    def _curve(self, name: str) -> Curve:
        """Return the curve of a metric; beyond MAX_CURVES one that is not kept."""
        if name not in self.curves and len(self.curves) < MAX_CURVES:
            self.curves[name] = Curve()
        return self.curves.get(name) or Curve()

    def _on_train(self, name: str, train: Train, now_s: float) -> None:
        if (agent := self._agent(name)) is not None:
            agent.train = train
            agent.seen_s = now_s

    def _on_agent_eval(self, name: str, result: AgentEval) -> None:
        if (agent := self._agent(name)) is not None:
            agent.metrics = result.metrics

    def _on_round(self, closed: Round, now_s: float) -> None:
        self.round = closed
        for name in closed.late:
            if (agent := self._agent(name)) is not None:
                agent.late_at_s = now_s
                agent.late_rounds += 1
        trains = [a.train for a in self.agents.values() if a.train is not None and not (a.lost or a.failed)]
        losses = [train.loss for train in trains if train.loss is not None]
        if losses:
            self._curve(TRAINING_LOSS).add(closed.version, sum(losses) / len(losses))

    def _on_center_eval(self, result: CenterEval) -> None:
        if result.version < self.evaluated:
            return
        self.metrics = result.metrics
        self.evaluated = result.version
        for name, value in result.metrics.items():
            self._curve(name).add(result.version, value)

    def _on_status(self, status: RunStatus) -> None:
        """Replace everything that the status states; keep reasons that were heard before."""
        self.status = status
        self.statuses += 1
        self.phase = status.phase
        self.versions = status.versions
        lost, slow = {*status.lost}, {*status.slow}
        for name in lost:
            if (agent := self._agent(name)) is not None:
                agent.lost = agent.lost or f"{name} lost"
        for name in slow:
            if (agent := self._agent(name)) is not None:
                agent.slow = agent.slow or f"{name} slow"
        for name, agent in self.agents.items():  # a list at its limit may be cut off: then absence proves nothing
            if name not in lost and len(lost) < LOST_NAMED:
                agent.lost = ""
            if name not in slow and len(slow) < LOST_NAMED:
                agent.slow = ""
        if status.phase in ENDED:
            self.ended = self.ended or f"run {self.run}: {status.reason}"

    def _on_event(self, run: str, sender: str, event: Event) -> None:
        """Apply an event. An agent's event concerns that agent alone; only the coordinator ends a run or gives advice."""
        from_coordinator = sender == COORDINATOR
        if event.level != "info":
            self.events.append(event)
        if event.event == "advice" and from_coordinator:
            self.advice = event
        subject = event.agent if from_coordinator else sender
        if event.event in PRESENCE_EVENTS and (agent := self._agent(subject)) is not None:
            agent.lost = event.text if event.event == "agent-lost" else ""
            agent.slow = event.text if event.event == "agent-slow" else ""
            if event.event == "agent-failed":
                agent.failed = event.text
        phase = event.event.removeprefix("run-")
        if run == self.run and from_coordinator and phase in ENDED:
            self.ended = event.text
            self.phase = phase

    # -- derived facts ---------------------------------------------------------------------------------------------
    @property
    def version(self) -> int:
        """The newest version that any message named."""
        of_round = self.round.version if self.round else 0
        of_status = self.status.version if self.status else 0
        return max(of_round, of_status, self.evaluated)

    def lag(self, agent: AgentState) -> int | None:
        """Return the versions between the center and the base of the agent's training, or None without a base."""
        train = agent.train
        return None if train is None or train.state == "starting" else max(0, self.version - train.version)

    @property
    def bytes_up(self) -> int:
        """Update bytes since the run began."""
        return self.round.bytes_up if self.round else 0

    @property
    def bytes_down(self) -> int:
        """Model bytes since the run began."""
        return self.round.bytes_down if self.round else 0

    @property
    def deaf(self) -> bool:
        """Whether only the coordinator is heard although agents take part, as with the coordinator's own key."""
        silent = all(agent.train is None for agent in self.agents.values())
        return silent and self.statuses >= DEAF_STATUSES and self.status is not None and self.status.agents > 0

    @property
    def failed(self) -> dict[str, str]:
        """Reasons of the agents that cannot train, by name."""
        return {name: agent.failed for name, agent in self.agents.items() if agent.failed}

    def steps_of(self, agent: AgentState) -> tuple[int, int]:
        """Return the steps done and the steps in all of the agent's current period; (0, 0) if not known."""
        train = agent.train
        if train is None or train.state == "starting":
            return 0, 0
        steps = train.steps or self.steps
        return min(train.step, steps), steps

    def metric_names(self) -> list[str]:
        """Return the center's metrics, accuracy and loss first, then the others by name."""
        return sorted(self.metrics, key=lambda name: (name != "accuracy", name != "loss", name))

    def is_complete(self, version: int, *, evaluated: bool) -> bool:
        """Tell whether the metrics of a version have arrived. `evaluated`: its evaluation is expected too."""
        counted = self.round is not None and self.round.version >= version
        return counted and (self.evaluated >= version or not evaluated)
