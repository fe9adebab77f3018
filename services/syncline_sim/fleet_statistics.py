"""Statistics of a simulated fleet, counted during the run: commits, metrics, warnings and verdicts of each agent's updates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from syncline.bus.base import Stored
from syncline.bus.memory.store import Store
from syncline.observe.telemetry import CenterEval, Event
from syncline.spec.run_spec import RunSpec
from syncline.wire import subjects
from syncline.wire.messages import Committed, Head, Heartbeat, LogLine, decode
from syncline_sim.observer import Observer, is_line, record_of

MAX_WARNINGS = 1000  # warnings whose texts are kept; later ones are counted by kind


@dataclass(frozen=True, slots=True)
class Commit:
    """The commit of a version."""

    time_s: float
    version: int
    updates: int
    mean_lag: float


@dataclass(frozen=True, slots=True)
class MetricPoint:
    """The center's held-out metrics. `time_s` is the time of the version's commit, not of its evaluation."""

    time_s: float
    version: int
    metrics: dict[str, float | None]


@dataclass(slots=True)
class UpdateCounts:
    """Verdicts of one agent's updates."""

    merged: int = 0
    lags: int = 0  # the sum of the lags of merged updates, versions
    max_lag: int = 0
    dropped: int = 0
    late: int = 0  # merges that did not wait for it


@dataclass
class FleetStatistics:
    """An observer that counts.

    Args:
        spec: the run.
        clock: the fleet's virtual time.
        follow: called with every metric and event, as a watcher receives them.
    """

    spec: RunSpec
    clock: Callable[[], float]
    follow: Callable[[str, bytes], None] = lambda subject, data: None
    problems: list[str] = field(default_factory=list)
    merged: dict[tuple[str, int], int] = field(default_factory=dict)
    head: Head | None = None
    opened_s: float = 0.0  # when the first round was opened
    ended_s: float = 0.0
    commits: list[Commit] = field(default_factory=list)
    points: list[MetricPoint] = field(default_factory=list)
    updates: dict[str, UpdateCounts] = field(default_factory=dict)  # by agent
    warnings: list[tuple[float, str]] = field(default_factory=list)
    events: dict[str, int] = field(default_factory=dict)  # number of warnings and errors by kind
    incomplete: bool = False
    broken: BaseException | None = None  # raised by `follow`
    _records: dict[int, Committed] = field(default_factory=dict)  # records of versions that are not committed yet
    _frames: dict[str, bytes] = field(default_factory=dict)  # chunks of records whose line is not stored yet

    def on_stored(self, stream: str, message: Stored) -> str:
        if stream == subjects.log_stream(self.spec.name):
            self._on_log(message)
        elif message.subject.endswith(f".{subjects.head_key(self.spec.name)}"):
            self._on_head(decode(Head, message.data))
        return ""

    def on_heartbeat_answered(self, agent: str, heard_s: float) -> None:
        """Ignore heartbeats."""

    def on_published(self, subject: str, data: bytes) -> None:
        kind = subject.split(".")[3:4]
        if kind not in (["metrics"], ["events"]):
            return
        try:
            if self.broken is None:
                self.follow(subject, data)
        except (Exception, SystemExit) as error:  # an error of the follower must not reach a service
            self.broken = error
            self.problems.append(f"the function that follows the run failed: {type(error).__name__}: {error}")
        run = self.spec.name
        if subject == subjects.metrics(run, subjects.COORDINATOR, CenterEval.kind):
            self._on_metrics(CenterEval.model_validate_json(data))
        elif kind == ["events"] and subjects.run_of(subject) == run and b'"level":"info"' not in data:
            event = Event.model_validate_json(data)
            self.events[event.event] = self.events.get(event.event, 0) + 1
            if len(self.warnings) < MAX_WARNINGS:
                self.warnings.append((self.clock(), event.text))

    def on_purged(self, stream: str, removed: list[str]) -> None:
        pass

    def copy(self) -> FleetStatistics:
        return replace(self, updates={agent: replace(mine) for agent, mine in self.updates.items()})

    def on_rolled_back(self, then: Observer, store: Store) -> None:
        """Remove the commits and metrics of lost versions."""
        assert isinstance(then, FleetStatistics)
        self.head = then.head
        self.updates = then.updates
        version = then.head.version if then.head else 0
        self.commits = [commit for commit in self.commits if commit.version <= version]
        self.points = [point for point in self.points if point.version <= version]

    def on_heartbeat(self, beat: Heartbeat) -> None:
        pass

    def on_head_written(self, connection: str, head: Head) -> None:
        pass

    def _on_log(self, message: Stored) -> None:
        if not is_line(message.subject):
            self._frames[message.subject] = message.data
            return
        record = record_of(self.spec.name, decode(LogLine, message.data), self._frames)
        if record is not None:
            self._records[record.version] = record
        self._frames.clear()

    def _on_head(self, head: Head) -> None:
        before, self.head = self.head, head
        if head.round and not (before and before.round):
            self.opened_s = self.clock()
        self.ended_s = self.clock()
        if before is not None and head.version == before.version + 1:
            self._on_version(head.version)

    def _on_version(self, version: int) -> None:
        record = self._records.pop(version, None)
        if record is None:
            return
        lags = [entry.lag for entry in record.plan.merged]
        for entry in record.plan.merged:
            mine = self.updates.setdefault(entry.agent, UpdateCounts())
            mine.merged += 1
            mine.lags += entry.lag
            mine.max_lag = max(mine.max_lag, entry.lag)
        for agent in record.plan.late:
            self.updates.setdefault(agent, UpdateCounts()).late += 1
        for drop in record.dropped:
            self.updates.setdefault(drop.agent, UpdateCounts()).dropped += 1
        self.commits.append(Commit(self.clock(), version, len(lags), sum(lags) / max(1, len(lags))))

    def _on_metrics(self, result: CenterEval) -> None:
        when_s = self.opened_s
        for commit in reversed(self.commits):
            if commit.version <= result.version:
                when_s = commit.time_s
                break
        self.points.append(MetricPoint(when_s, result.version, dict(result.metrics)))
