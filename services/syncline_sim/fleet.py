"""A fleet that trains a real task in one process: real services and tensors, virtual time. `syncline sim` runs it.

    result = run_fleet(RunSpec(task="syncline.tasks.digits:Digits", agents={"min": 100}), SimSettings(step_s=0.01))

The same spec and settings give the same result, bit for bit; a synchronous run gives the digest that real processes give.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from syncline.errors import RunFailed
from syncline.spec.run_spec import RunSpec
from syncline.tasks.seeding import generators_restored
from syncline.wire.messages import ENDED
from syncline_sim.cluster import Cluster, Environment
from syncline_sim.determinism import deterministic, logging_disabled
from syncline_sim.fleet_statistics import Commit, FleetStatistics, MetricPoint, UpdateCounts
from syncline_sim.loop import VirtualLoop
from syncline_sim.network import LinkNetwork
from syncline_sim.rng import Rng
from syncline_sim.scenario import Scenario
from syncline_sim.settings import SimSettings
from syncline_sim.timed_children import TimedChildFactory

Follow = Callable[[str, bytes], None]
MAX_TURNS = 10_000_000  # at one instant: a link without a rate transfers all chunks of a large model at once


def _ignore(subject: str, data: bytes) -> None:
    pass


@dataclass(frozen=True, slots=True)
class AgentResult:
    """The work of an agent and the verdicts of its updates."""

    agent: str
    step_s: float
    periods: int  # that the agent began
    steps: int
    busy_s: float  # training
    merged: int
    late: int  # merges that did not wait for the agent
    dropped: int
    mean_lag: float
    max_lag: int
    bytes_up: int  # sent over the agent's link
    bytes_down: int


@dataclass(frozen=True, slots=True)
class FleetResult:
    """The result of a run. All times are virtual seconds from the start of the fleet."""

    run: str
    phase: str
    reason: str
    versions: int
    digest: str
    opened_s: float  # when the first round was opened
    ended_s: float
    metrics: dict[str, float | None]  # of the last version
    timeline: tuple[MetricPoint, ...]
    commits: tuple[Commit, ...]
    agents: tuple[AgentResult, ...]
    warnings: tuple[tuple[float, str], ...]

    @property
    def seconds(self) -> float:
        """The time from the opening of the first round to the end."""
        return self.ended_s - self.opened_s

    @property
    def updates(self) -> int:
        """The number of merged updates."""
        return sum(commit.updates for commit in self.commits)

    def first(self, metric: str, at_least: float) -> float | None:
        """Return the seconds from the opening of the first round until a metric reached a value; None if it never did."""
        times = (p.time_s for p in self.timeline if (p.metrics.get(metric) or float("-inf")) >= at_least)
        found = next(times, None)
        return None if found is None else found - self.opened_s


def run_fleet(
    spec: RunSpec,
    settings: SimSettings | None = None,
    *,
    task_dir: Path = Path(),
    follow: Follow = _ignore,
) -> FleetResult:
    """Run a spec from submit to end.

    Args:
        spec: the run.
        settings: the fleet; None: the default settings.
        task_dir: the directory of task files.
        follow: called with the subject and content of every metric and event during the run.

    Raises:
        ConfigError: the coordinator refuses the spec.
        RunFailed: the run did not end within `sim.longest_s`.
    """
    fleet = Fleet(spec, settings or SimSettings(), task_dir, follow)
    fleet.run()
    return fleet.result()


class Fleet:
    """One run of a fleet. Call `run` once, and `result` at any time, also after an interruption."""

    def __init__(self, spec: RunSpec, settings: SimSettings, task_dir: Path = Path(), follow: Follow = _ignore) -> None:
        settings.check(spec)
        self.spec, self.settings = spec, settings
        agents = settings.names(spec)
        starts_s = tuple(settings.start_within_s * i / len(agents) for i in range(len(agents)))
        self._scenario = Scenario(
            spec, agents, starts_s=starts_s, longest_delay_s=0.0, children="real", task_dir=task_dir.absolute()
        )
        self._seed = spec.seed if settings.seed is None else settings.seed
        self._loop = VirtualLoop(longest_s=settings.longest_s, max_turns=MAX_TURNS)
        links = {agent: settings.link[i % len(settings.link)] for i, agent in enumerate(agents)}
        self._links = LinkNetwork(Rng(f"{self._seed} network"), 0.0, links=links)
        self.statistics = FleetStatistics(spec, self._loop.time, follow)
        self._children: TimedChildFactory | None = None
        self.on_warning: Callable[[str], None] = lambda text: None  # called with warnings about the spec

    def run(self) -> None:
        """Run from submit to end. Raises ConfigError and RunFailed, as `run_fleet` does."""
        with (
            tempfile.TemporaryDirectory(prefix="syncline-sim-") as disk,
            chdir("."),  # restores the working directory: the task changes it to its own
            deterministic(threads=True),
            logging_disabled(),
            generators_restored(),
            _threads(self.settings.threads),
        ):
            self._children = TimedChildFactory(self._scenario, Path(disk), self._loop.time, self.settings)
            environment = Environment(self._children, self._links, self.statistics)
            cluster = Cluster(self._scenario, self.settings.schedule(), self._seed, self._loop, environment)
            cluster.on_accepted = self._accepted
            try:
                outcome = cluster.run()
            finally:
                self._loop.close()
        if cluster.refused is not None:
            raise cluster.refused
        if self.statistics.broken is not None:
            raise self.statistics.broken
        if outcome.problems and (self.statistics.head is None or self.statistics.head.phase not in ENDED):
            raise RunFailed(self._unfinished() if self.now_s > self.settings.longest_s else outcome.problems[0])

    def _accepted(self, warnings: list[str]) -> None:
        for text in warnings:
            self.statistics.warnings.append((self.now_s, text))
            self.on_warning(text)

    def _unfinished(self) -> str:
        head, longest_s = self.statistics.head, self.settings.longest_s
        where = f"it stands at version {head.version}, {head.phase}" if head is not None else "it has not begun"
        return (
            f"the run did not end within {longest_s:g} s of its own time (sim.longest_s): {where}. Raise sim.longest_s"
        )

    @property
    def now_s(self) -> float:
        """Virtual seconds since the start of the fleet."""
        return self._loop.time()

    def result(self) -> FleetResult:
        """Return the result so far; the run must have been accepted."""
        statistics, head = self.statistics, self.statistics.head
        assert head is not None
        last = statistics.points[-1] if statistics.points else None
        return FleetResult(
            run=head.run,
            phase=head.phase,
            reason=head.reason,
            versions=head.version,
            digest=head.digest,
            opened_s=statistics.opened_s,
            ended_s=statistics.ended_s,
            metrics=last.metrics if last is not None and last.version == head.version else {},
            timeline=tuple(statistics.points),
            commits=tuple(statistics.commits),
            agents=tuple(self._agent(name) for name in self._scenario.agents),
            warnings=tuple(statistics.warnings),
        )

    def _agent(self, name: str) -> AgentResult:
        assert self._children is not None
        speed, updates = self._children.speeds[name], self.statistics.updates.get(name, UpdateCounts())
        return AgentResult(
            agent=name,
            step_s=speed.step_s,
            periods=speed.periods,
            steps=speed.steps,
            busy_s=speed.busy_s,
            merged=updates.merged,
            dropped=updates.dropped,
            late=updates.late,
            mean_lag=updates.lags / max(1, updates.merged),
            max_lag=updates.max_lag,
            bytes_up=self._links.up[name].bytes,
            bytes_down=self._links.down[name].bytes,
        )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Set the number of torch's threads inside the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
