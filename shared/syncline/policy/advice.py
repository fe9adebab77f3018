"""Advice for the owner of a run: facts about offers and verdicts in, advice in plain words out. Pure.

An advice names the observation with its figures, and a setting to change. Each is given once for an agent. Advice never
changes a run.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

DROPPED_IN_A_ROW = 4  # updates of an agent, all too stale: its data would never be learned from
EVEN_AFTER = 8  # updates an agent, after which shares are compared
UNEVEN = 2.0  # times an even share
SLOW = 2.0  # times the usual period
SLOW_S = 0.1  # shorter periods are not advised about
LOOK_EVERY = 4  # versions: a look costs a little for every agent
ROUNDS_IN_A_ROW = 5
AGAINST = 0.5  # of the drift of unrelated updates, 1/N
STILL = 0.25  # of the largest mean |update|²: below that share the agents converge, and their short updates may cancel
OUTLIER = 10.0  # times the median norm
MANY_ROWS = 100.0  # times the median of rows, where rows are weights
PERIODS = 9  # of an agent, for the median
NEVER_FINITE = 3  # evaluations after which a metric that was never finite is advised about
METRICS_WATCHED = 100


@dataclass(frozen=True, slots=True)
class Advice:
    """One observation, with a hint."""

    agent: str  # '': the run as a whole
    text: str


@dataclass(frozen=True, slots=True)
class Norms:
    """Lengths of the updates of one merge."""

    updates: Mapping[str, float]  # ‖Δ_i‖ by agent
    drift: float | None  # ‖Σ p_i Δ_i‖² / Σ p_i ‖Δ_i‖²; None for a rule that is no mean


@dataclass(slots=True)
class _Agent:
    """Counts of one agent."""

    merged: int = 0
    dropped: int = 0
    too_stale: int = 0  # in a row
    lag: int = 0  # the largest
    rows: int = 0
    periods_s: deque[float] = field(default_factory=lambda: deque(maxlen=PERIODS))


@dataclass(slots=True, kw_only=True)
class Adviser:
    """Observes a run: call `offered` and `judged` for every update, and `committed` for every version."""

    waits: bool  # every version waits for every agent: rounds without a quorum, or bounded clocks
    max_lag: int | None  # asynchronous runs
    max_ahead: int | None
    by_rows: bool  # merge weights are rows
    alpha: float = 1.0
    _agents: dict[str, _Agent] = field(default_factory=dict)
    _versions: int = 0
    _given: set[tuple[str, str]] = field(default_factory=set)
    _farthest: float = 0.0  # mean |update|², the largest so far
    _apart: int = 0  # rounds in a row in which the updates pulled in different directions
    _spread: deque[float] = field(default_factory=lambda: deque(maxlen=ROUNDS_IN_A_ROW + 1))

    def offered(self, agent: str, rows: int, seconds: float) -> None:
        """Note an offer.

        Args:
            rows: of the agent's part.
            seconds: duration of its local period.
        """
        known = self._agent(agent)
        known.rows = rows
        if seconds > 0:
            known.periods_s.append(seconds)

    def judged(self, agent: str, lag: int, *, merged: bool, too_stale: bool = False) -> None:
        """Note a verdict. `lag`: in versions."""
        known = self._agent(agent)
        known.merged += merged
        known.dropped += not merged
        known.too_stale = known.too_stale + 1 if too_stale else 0
        known.lag = max(known.lag, lag)

    def committed(self, norms: Norms | None = None) -> list[Advice]:
        """Return new advice after a version."""
        found: list[Advice] = []
        self._versions += 1
        if self._versions % LOOK_EVERY == 0 and self._agents:
            self._look(found)
        if norms is not None:
            self._on_norms(found, norms)
        return found

    def _look(self, found: list[Advice]) -> None:
        agents = self._agents
        total = sum(a.merged for a in agents.values())
        usual_rows = statistics.median_low([a.rows for a in agents.values()])
        periods_s = {
            n: statistics.median(a.periods_s) for n, a in agents.items() if len(a.periods_s) >= ROUNDS_IN_A_ROW
        }
        usual_s = statistics.median_low(periods_s.values()) if periods_s else 0.0
        for agent, known in sorted(agents.items()):
            self._give(found, agent, "stale", self._on_staleness(agent, known))
            self._give(found, agent, "share", self._on_share(agent, known, total))
            self._give(found, agent, "slow", self._on_slowness(agent, periods_s.get(agent, 0.0), usual_s))
            self._give(found, agent, "rows", self._on_rows(agent, known.rows, usual_rows))

    # -- one finding each ----------------------------------------------------------------------------------------------
    def _on_staleness(self, agent: str, known: _Agent) -> str:
        if known.too_stale < DROPPED_IN_A_ROW or self.max_lag is None:
            return ""
        every = known.merged + known.dropped
        return (
            f"{agent}: its last {known.too_stale} updates were dropped, more than sync.max_lag = {self.max_lag} versions old; "
            f"of {every} in all {known.merged} were merged. What only its data hold is not learned. Raise sync.max_lag to "
            f"{known.lag} at least, or set local.seconds, so that a slow agent makes fewer steps a period"
        )

    def _on_share(self, agent: str, known: _Agent, total: int) -> str:
        n = len(self._agents)
        if self.max_lag is None or n < 2 or total < EVEN_AFTER * n:
            return ""
        share = known.merged / total
        if share <= UNEVEN / n:
            return ""
        return (
            f"{agent} has made {share:.0%} of what was merged, where an even share is {1 / n:.0%}: the center leans to its "
            "data. Bound sync.max_ahead, or set local.seconds, so that fast agents do more steps a period and no more periods"
        )

    def _on_slowness(self, agent: str, period_s: float, usual_s: float) -> str:
        if not self.waits or period_s < SLOW_S or period_s <= SLOW * usual_s:
            return ""
        times = period_s / max(usual_s, 1e-9)
        seen = f"{agent} takes {times:.1f} times as long for a period as the others, and everybody waits for it"
        if self.max_ahead is not None:
            return (
                f"{seen}: bounded clocks even out short delays and not a permanent one. Set local.seconds with "
                "merge.normalize: fednova, or leave sync.max_ahead out"
            )
        return (
            f"{seen}. Set sync.quorum with grace_s, or local.seconds with merge.normalize: fednova, or use "
            "`sync: {kind: async}`"
        )

    def _on_rows(self, agent: str, rows: int, usual: int) -> str:
        if not self.by_rows or len(self._agents) < 3 or rows <= MANY_ROWS * max(1, usual):
            return ""
        return (
            f"{agent} says that it has {rows:,} rows, more than {MANY_ROWS:.0f} times the median of the others, and weighs "
            "as much. If that is not so, set merge.weights: uniform, and look at that agent"
        )

    def _on_norms(self, found: list[Advice], norms: Norms) -> None:
        lengths = {agent: length for agent, length in norms.updates.items() if length > 0}
        n = len(lengths)
        if n < 3:
            return
        median = statistics.median(lengths.values())
        for agent, length in sorted(lengths.items()):
            times = length / median
            text = (
                f"{agent}: its update is {times:.0f} times as long as the median of the others'. A robust rule bounds what one "
                "agent can do, as `merge: {rule: norm_clip}` or `{rule: median}`"
            )
            self._give(found, agent, "norm", text if times > OUTLIER else "")
        spread = sum(length**2 for length in lengths.values()) / n
        self._farthest = max(self._farthest, spread)
        if norms.drift is not None:
            self._on_drift(found, norms.drift, n, still=spread >= STILL * self._farthest)
        if 0 < self.alpha < 1:
            self._on_spread(found, spread)

    def _on_drift(self, found: list[Advice], drift: float, n: int, *, still: bool) -> None:
        """Advise where updates cancel for several rounds.

        A drift near 1/N is noise, as late in any training. Well below 1/N, agents undo the progress of others. With unlike
        data, updates cancel at the end of every good training too, when they are short.

        Args:
            still: updates are nearly as long as the longest of the run.
        """
        self._apart = self._apart + 1 if still and drift < AGAINST / n else 0
        text = (
            f"the agents pull against each other: |mean update|² is {drift:.3f} of the mean |update|² (1: aligned, "
            f"{1 / n:.2f}: unrelated). Lower local.steps or the learning rate, or use `local: {{control_variates: scaffold}}`"
        )
        self._give(found, "", "drift", text if self._apart >= ROUNDS_IN_A_ROW else "")

    def _on_spread(self, found: list[Advice], spread: float) -> None:
        """Advise where agents move away from the center. In rounds with α < 1 an update is the distance from the center."""
        self._spread.append(spread)
        steps = list(self._spread)
        grows = len(steps) > ROUNDS_IN_A_ROW and all(a < b for a, b in itertools.pairwise(steps))
        text = (
            f"the agents drift apart: their mean squared distance from the center has grown for {ROUNDS_IN_A_ROW} rounds, "
            f"to {steps[-1]:.3g}. Raise mix.alpha (now {self.alpha:g}), or lower local.steps"
        )
        self._give(found, "", "spread", text if grows else "")

    def _give(self, found: list[Advice], agent: str, what: str, text: str) -> None:
        if text and (agent, what) not in self._given:
            self._given.add((agent, what))
            found.append(Advice(agent, text))

    def _agent(self, name: str) -> _Agent:
        return self._agents.setdefault(name, _Agent())


@dataclass(slots=True)
class MetricsAdviser:
    """Finds held-out metrics of little use: call `evaluated` for every evaluation, and `ended` after the last."""

    _evaluations: int = 0
    _known: dict[str, float | None] = field(default_factory=dict)  # the last value by name; None: it was finite once
    _given: set[tuple[str, str]] = field(default_factory=set)

    def evaluated(self, metrics: Mapping[str, float], skipped: Mapping[str, int]) -> list[str]:
        """Return new advice after an evaluation.

        Args:
            metrics: values by name; NaN or infinite for a metric without a value.
            skipped: by name, batches in which the metric was NaN, and which its mean leaves out.
        """
        self._evaluations += 1
        for name, value in metrics.items():
            if name not in self._known and len(self._known) >= METRICS_WATCHED:
                break
            if self._known.get(name, value) is not None:
                self._known[name] = None if math.isfinite(value) else value
        found = [
            f"metric {name!r} was NaN in {count} of the batches of an evaluation, which are left out of its mean. "
            "Figures that are no means over batches, as AUC, belong in the task's `evaluate(model, dataset)`"
            for name, count in skipped.items()
            if self._known.get(name, 0.0) is None and self._is_new(name, "skipped")
        ]
        return found + (self.ended() if self._evaluations >= NEVER_FINITE else [])

    def ended(self) -> list[str]:
        """Return new advice about metrics that were never finite."""
        return [
            f"metric {name!r} has no value: it was never finite in {self._evaluations} evaluations, the last time {value}. "
            "Return a finite number, or leave the metric out"
            for name, value in self._known.items()
            if value is not None and self._is_new(name, "never finite")
        ]

    def _is_new(self, name: str, what: str) -> bool:
        if (name, what) in self._given:
            return False
        self._given.add((name, what))
        return True
