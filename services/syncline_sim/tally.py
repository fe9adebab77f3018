"""What a simulated fleet came to, counted as it happens: commits, metrics, warnings, and what became of everybody's updates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from syncline.bus.base import Stored
from syncline.bus.memory.store import Store
from syncline.observe.telemetry import CenterEval, Event
from syncline.spec.run_spec import RunSpec
from syncline.wire import subjects
from syncline.wire.messages import Committed, Head, Heartbeat, LogLine, decode
from syncline_sim.books import Books, is_line, record_of

WARNINGS = 1000  # that are kept; the rest are counted


@dataclass(frozen=True, slots=True)
class Commit:
    """A version: when, and of what."""

    time_s: float
    version: int
    updates: int
    mean_lag: float


@dataclass(frozen=True, slots=True)
class Point:
    """The center's held-out metrics, by the time at which it was committed."""

    time_s: float
    version: int
    metrics: dict[str, float | None]


@dataclass(slots=True)
class Updates:
    """Of one agent."""

    merged: int = 0
    lags: int = 0  # their sum
    max_lag: int = 0
    dropped: int = 0
    late: int = 0  # merges that did not wait for it


@dataclass
class Tally:
    """`clock`: the fleet's time. `follow(subject, data)`: told of every metric and event, as a watcher is."""

    spec: RunSpec
    clock: Callable[[], float]
    follow: Callable[[str, bytes], None] = lambda subject, data: None
    problems: list[str] = field(default_factory=list)
    merged: dict[tuple[str, int], int] = field(default_factory=dict)
    head: Head | None = None
    opened_s: float = 0.0  # when the first round was
    ended_s: float = 0.0
    commits: list[Commit] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    updates: dict[str, Updates] = field(default_factory=dict)  # by agent
    warnings: list[tuple[float, str]] = field(default_factory=list)
    events: dict[str, int] = field(default_factory=dict)  # warnings and errors by their kind
    incomplete: bool = False
    broken: BaseException | None = None  # what `follow` raised
    _records: dict[int, Committed] = field(default_factory=dict)  # of versions that are not committed yet
    _frames: dict[str, bytes] = field(default_factory=dict)  # of records that have no line yet

    def stored(self, stream: str, message: Stored) -> str:
        if stream == subjects.log_stream(self.spec.name):
            self._on_log(message)
        elif message.subject.endswith(f".{subjects.head_key(self.spec.name)}"):
            self._on_head(decode(Head, message.data))
        return ""

    def answered(self, agent: str, heard_s: float) -> None:
        """Heartbeats are not counted."""

    def told(self, subject: str, data: bytes) -> None:
        kind = subject.split(".")[3:4]
        if kind not in (["metrics"], ["events"]):
            return
        try:
            if self.broken is None:
                self.follow(subject, data)
        except (Exception, SystemExit) as error:  # whoever follows is no service, and none may have to deal with it
            self.broken = error
            self.problems.append(f"whoever follows the run failed: {type(error).__name__}: {error}")
        run = self.spec.name
        if subject == subjects.metrics(run, subjects.COORDINATOR, CenterEval.kind):
            self._on_metrics(CenterEval.model_validate_json(data))
        elif kind == ["events"] and subjects.run_of(subject) == run and b'"level":"info"' not in data:
            event = Event.model_validate_json(data)
            self.events[event.event] = self.events.get(event.event, 0) + 1
            if len(self.warnings) < WARNINGS:
                self.warnings.append((self.clock(), event.text))

    def purged(self, stream: str, removed: list[str]) -> None:
        pass

    def copy(self) -> Tally:
        return replace(self, updates={agent: replace(mine) for agent, mine in self.updates.items()})

    def rolled_back(self, then: Books, store: Store) -> None:
        """What was committed and is lost does not count."""
        assert isinstance(then, Tally)
        self.head, self.updates, version = then.head, then.updates, then.head.version if then.head else 0
        self.commits = [commit for commit in self.commits if commit.version <= version]
        self.points = [point for point in self.points if point.version <= version]

    def heard(self, beat: Heartbeat) -> None:
        pass

    def wrote(self, who: str, head: Head) -> None:
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
            mine = self.updates.setdefault(entry.agent, Updates())
            mine.merged, mine.lags, mine.max_lag = mine.merged + 1, mine.lags + entry.lag, max(mine.max_lag, entry.lag)
        for agent in record.plan.late:
            self.updates.setdefault(agent, Updates()).late += 1
        for drop in record.dropped:
            self.updates.setdefault(drop.agent, Updates()).dropped += 1
        self.commits.append(Commit(self.clock(), version, len(lags), sum(lags) / max(1, len(lags))))

    def _on_metrics(self, result: CenterEval) -> None:
        when_s = self.opened_s
        for commit in reversed(self.commits):
            if commit.version <= result.version:
                when_s = commit.time_s
                break
        self.points.append(Point(when_s, result.version, dict(result.metrics)))
