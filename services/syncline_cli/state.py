"""What a watcher knows of a run, gathered from its metrics and events. Pure: no bus, no terminal, no clock."""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import ValidationError

from syncline.telemetry import AgentEval, CenterEval, Event, Round, Train
from syncline.wire.subjects import COORDINATOR, FLEET

POINTS = 1024  # of a curve; a longer one is thinned out
BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(slots=True)
class AgentState:
    """One agent, by its newest metric."""

    train: Train | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)  # of its own W_i
    lost: str = ""  # why, in the words of the coordinator
    failed: str = ""


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
    events: list[Event] = field(default_factory=list)  # warnings and errors, not yet shown
    ended: str = ""

    # -- facts ---------------------------------------------------------------------------------------------------------
    def on_metric(self, who: str, what: str, data: bytes) -> None:
        """A message on `….metrics.<who>.<what>`. One that is none, or of a kind we do not know, changes nothing."""
        try:
            if what == Train.what:
                self._agent(who).train = Train.model_validate_json(data)
            elif what == Round.what:
                self.round = Round.model_validate_json(data)
            elif what == CenterEval.what and who == COORDINATOR:
                self._evaluated(CenterEval.model_validate_json(data))
            elif what == AgentEval.what:
                self._agent(who).metrics = AgentEval.model_validate_json(data).metrics
        except ValidationError:
            pass

    def on_event(self, run: str, data: bytes) -> None:
        """A message on `….events.<who>`, of this run or of the fleet."""
        if run not in (self.run, FLEET):
            return
        try:
            event = Event.model_validate_json(data)
        except ValidationError:
            return
        if event.level != "info":
            self.events.append(event)
        if event.agent and event.event in ("agent-joined", "agent-lost", "agent-failed"):
            agent = self._agent(event.agent)
            agent.lost = event.text if event.event == "agent-lost" else ""
            if event.event == "agent-failed":
                agent.failed = event.text
        if run == self.run and event.event.startswith("run-") and event.event != "run-accepted":
            self.ended = event.text

    def take_events(self) -> list[Event]:
        taken, self.events = self.events, []
        return taken

    def _agent(self, name: str) -> AgentState:
        return self.agents.setdefault(name, AgentState())

    def _evaluated(self, result: CenterEval) -> None:
        if result.version < self.evaluated:
            return
        self.metrics, self.evaluated = result.metrics, result.version
        for name, value in result.metrics.items():
            self.curves.setdefault(name, Curve()).add(result.version, value)

    # -- what follows --------------------------------------------------------------------------------------------------
    @property
    def version(self) -> int:
        return max(self.round.version if self.round else 0, self.evaluated, 0)

    @property
    def bytes_up(self) -> int:
        return self.round.bytes_up if self.round else 0

    @property
    def bytes_down(self) -> int:
        return self.round.bytes_down if self.round else 0

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
