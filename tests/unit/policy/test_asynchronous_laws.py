"""Laws of asynchronous averaging that hold exactly, on agents that work by the clock: staleness, clocks, and what it comes to.

The numbers behind them: staleness is conserved, a bound on clocks is a bound at every instant, and buffered asynchrony with
nothing asynchronous about it is the synchronous run.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from syncline.averaging.staleness import Constant
from syncline.policy.asynchronous import Asynchronous
from syncline.policy.events import (
    AgentJoined,
    AgentLost,
    Chosen,
    Command,
    Drop,
    LetRun,
    Merge,
    OfferReady,
    StartRound,
    VersionCommitted,
)
from syncline.policy.rounds import Rounds

Seconds = Callable[[str, int], float]  # how long an agent's period of that clock takes


def asynchronous(agents: int, **settings: Any) -> Asynchronous:
    defaults = {"buffer": 1, "max_lag": 10**9, "staleness": Constant(), "weights": "uniform", "versions": 10**9}
    return Asynchronous(min_agents=agents, **{**defaults, **settings})


def names(agents: int) -> list[str]:
    return [f"a{i}" for i in range(1, agents + 1)]


@dataclass
class Clockwork:
    """Agents that never fail, hear at once what is told and begin as soon as they may; merging takes no time."""

    policy: Asynchronous
    seconds: Seconds
    on_merge: Callable[[list[Chosen]], None] = lambda _: None
    now_s: float = 0.0
    finished: dict[str, int] = field(default_factory=dict)  # clocks
    judged: dict[str, int] = field(default_factory=dict)
    training: dict[str, int] = field(default_factory=dict)  # agent → version it began with
    told: LetRun | None = None
    lags: list[tuple[str, int]] = field(default_factory=list)  # of every merged update
    drops: int = 0
    spread: int = 0  # the largest difference of finished clocks so far
    widest_start: int = 0  # … and of a clock that was begun and the slowest judged one

    def __post_init__(self) -> None:
        self._due: list[tuple[float, str]] = []
        agents = names(self.policy.min_agents)
        self.finished, self.judged = dict.fromkeys(agents, 0), dict.fromkeys(agents, 0)
        for agent in agents:
            self._obey(self.policy.handle(AgentJoined(agent), 0.0))

    def play(self, updates: int) -> Clockwork:
        for _ in range(updates):
            self.now_s, agent = heapq.heappop(self._due)
            self.finished[agent] += 1
            self.spread = max(self.spread, max(self.finished.values()) - min(self.finished.values()))
            offer = OfferReady(agent, self.finished[agent], self.training.pop(agent))
            self._obey(self.policy.handle(offer, self.now_s))
            self._begin()
        return self

    def _obey(self, commands: list[Command]) -> None:
        self.policy.validate()
        for command in commands:
            match command:
                case LetRun():
                    self.told = command
                case Drop(agent, clock):
                    self.judged[agent], self.drops = clock, self.drops + 1
                case Merge(updates):
                    self.on_merge(list(updates))
                    self.lags += [(c.agent, c.lag) for c in updates]
                    self.judged |= {c.agent: c.clock for c in updates}
                    self._begin()  # whoever may, by what was told, before the version is there
                    self._obey(self.policy.handle(VersionCommitted(self.policy.version + 1), self.now_s))
        self._begin()

    def _begin(self) -> None:
        told = self.told
        if told is None:
            return
        for agent in told.participants:
            clock, known = self.finished[agent], self.policy.last_broadcast.judged.get(agent, 0)
            gated = told.gate is not None and clock + dict(told.offsets).get(agent, 0) > told.gate
            if agent in self.training or gated or clock - known >= self.policy.ahead:
                continue
            self.widest_start = max(self.widest_start, clock - min(self.judged.values()))
            self.training[agent] = self.policy.version
            heapq.heappush(self._due, (self.now_s + self.seconds(agent, clock), agent))


def steady(slowest: float = 1.0) -> Seconds:
    """Nearly a second each, no two at the same time; the last of them so many times as long."""
    return lambda agent, _: (slowest if agent == "a1" else 1.0) + 1e-6 * int(agent[1:])


def jittery(seed: int) -> Seconds:
    chance = random.Random(seed)
    return lambda agent, _: chance.expovariate(1.0)


# -- staleness ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("agents", [1, 2, 4, 8])
@pytest.mark.parametrize("seconds", [steady(), steady(5.0), jittery(1), jittery(2)], ids=["even", "5x", "exp", "exp2"])
def test_staleness_is_conserved(agents: int, seconds: Seconds) -> None:
    """Σ applied τ + Σ τ in flight = (N − 1) V: every version makes all but the agent it is made of one version older."""
    fleet = Clockwork(asynchronous(agents, overlap=False), seconds)
    for _ in range(300):
        fleet.play(1)
        in_flight = sum(fleet.policy.version - base for base in fleet.training.values())
        assert len(fleet.training) == agents
        assert sum(lag for _, lag in fleet.lags) + in_flight == (agents - 1) * fleet.policy.version


@pytest.mark.parametrize("agents", [2, 4, 8])
def test_the_mean_lag_is_n_minus_one(agents: int) -> None:
    fleet = Clockwork(asynchronous(agents, overlap=False), jittery(3)).play(3000)
    assert sum(lag for _, lag in fleet.lags) / len(fleet.lags) == pytest.approx(agents - 1, rel=0.01)


@pytest.mark.parametrize(("agents", "buffer"), [(4, 1), (8, 1), (8, 2), (9, 3)])
def test_where_sending_overlaps_the_mean_lag_is_n_over_k(agents: int, buffer: int) -> None:
    """The next period begins before the agent's own update is merged, which makes it one of those that come in between."""
    fleet = Clockwork(asynchronous(agents, buffer=buffer), jittery(3)).play(3000)
    assert sum(lag for _, lag in fleet.lags) / len(fleet.lags) == pytest.approx(agents / buffer, rel=0.05)


@pytest.mark.parametrize(("agents", "buffer", "times"), [(4, 1, 5), (8, 1, 5), (8, 2, 5), (8, 4, 5), (4, 1, 20)])
def test_the_lag_of_a_straggler_is_r_times_n_minus_one_over_k(agents: int, buffer: int, times: int) -> None:
    fleet = Clockwork(asynchronous(agents, buffer=buffer), steady(times)).play(4000)
    lags = [lag for agent, lag in fleet.lags if agent == "a1"]
    assert sum(lags) / len(lags) == pytest.approx(times * (agents - 1) / buffer, abs=1.0)
    assert max(lags) <= times * (agents - 1) / buffer + 2


def test_a_bound_below_that_lag_drops_everything_the_straggler_makes() -> None:
    bounded = Clockwork(asynchronous(4, max_lag=11), steady(5.0)).play(2000)
    assert bounded.drops > 100 and not [agent for agent, _ in bounded.lags if agent == "a1"]
    assert max(lag for _, lag in bounded.lags) <= 11


@pytest.mark.parametrize(("agents", "times"), [(4, 5), (8, 5)])
def test_a_straggler_holds_up_nobody(agents: int, times: int) -> None:
    """Updates a second, beside those of synchronous rounds: (r (N − 1) + 1) / N."""
    fleet = Clockwork(asynchronous(agents), steady(times)).play(4000)
    synchronous = agents / times
    assert 4000 / fleet.now_s / synchronous == pytest.approx((times * (agents - 1) + 1) / agents, rel=0.01)


# -- clocks ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ahead", [0, 1, 3, 10])
@pytest.mark.parametrize("buffer", [None, 1, 3])
@pytest.mark.parametrize("seconds", [steady(), steady(5.0), jittery(4), jittery(5)], ids=["even", "5x", "exp", "exp2"])
def test_no_agent_is_further_ahead_than_allowed_at_any_instant(
    ahead: int, buffer: int | None, seconds: Seconds
) -> None:
    """Stale synchronous parallel: no start with c − min > s, so finished clocks differ by at most s + 1."""
    if ahead == 0:
        buffer = None
    fleet = Clockwork(asynchronous(4, max_ahead=ahead, buffer=buffer), seconds)
    for _ in range(500):
        fleet.play(1)
        assert fleet.spread <= ahead + 1 and fleet.widest_start <= ahead
    assert min(fleet.finished.values()) > 500 / 4 - ahead - 2, "somebody never ran"


def test_bounded_clocks_cannot_beat_a_permanent_straggler() -> None:
    for ahead in (0, 1, 3, 10):
        fleet = Clockwork(asynchronous(4, max_ahead=ahead, buffer=None), steady(5.0)).play(2000)
        assert fleet.finished["a4"] / fleet.now_s == pytest.approx(1 / 5, rel=0.03)


def test_bounded_clocks_do_gain_where_everybody_is_slow_at_times() -> None:
    speeds = []
    for ahead in (0, 1, 3, 10):
        fleet = Clockwork(asynchronous(4, max_ahead=ahead, buffer=None if ahead == 0 else 1), jittery(6)).play(8000)
        speeds.append(min(fleet.finished.values()) / fleet.now_s)
    gains = [speed / speeds[0] for speed in speeds[1:]]
    assert gains == pytest.approx([1.38, 1.68, 1.92], rel=0.08)


# -- the synchronous run as a special case -----------------------------------------------------------------------------
def both(agents: int, **settings: Any) -> tuple[Rounds, Asynchronous]:
    rounds = Rounds(min_agents=agents, versions=50, quorum=None, sample=None, seed=0, **settings)
    return rounds, asynchronous(agents, max_ahead=0, buffer=None, versions=50, **settings)


@pytest.mark.parametrize("seed", range(20))
def test_max_ahead_zero_gives_the_very_merges_of_synchronous_rounds(seed: int) -> None:
    """The same updates with the same weights to the last bit, the same words, at the same facts, until the same end."""
    chance, agents = random.Random(seed), names(5)
    settings = {
        "weights": chance.choice(["uniform", "samples", "steps"]),
        "normalize": chance.choice([None, "fednova"]),
    }
    policies = both(5, **settings)
    found: list[list[Any]] = [[], []]
    live = list(agents)

    def tell(fact: Any) -> None:
        for policy, log in zip(policies, found, strict=True):
            commands = policy.handle(fact, 0.0)
            policy.validate()
            for command in commands:
                match command:
                    case Merge(updates, reason, _):
                        log.append((updates, reason))
                    case StartRound(version, invited) | LetRun(version, invited) if policy.state != "merging":
                        log.append((version, invited))
                    case LetRun():
                        pass
                    case _:
                        log.append(command)

    for agent in chance.sample(agents, 5):
        tell(AgentJoined(agent))
    for version in range(50):
        gone = live.pop(chance.randrange(len(live))) if len(live) > 1 and chance.random() < 0.1 else None
        for agent in chance.sample(live, len(live)):
            tell(OfferReady(agent, version + 1, version, chance.randint(1, 9), chance.choice([3, 3, 4])))
        if gone is not None:
            tell(AgentLost(gone, "it left"))
        tell(VersionCommitted(version + 1))
    without_starts = [
        [entry for entry in log if not isinstance(entry[0] if isinstance(entry, tuple) else "", int)] for log in found
    ]
    assert without_starts[0] == without_starts[1] and len(without_starts[0]) == 51
    assert [e for e in found[0] if e not in without_starts[0]][-1] == [
        e for e in found[1] if e not in without_starts[1]
    ][-1]


@pytest.mark.parametrize("agents", [1, 3, 7])
def test_a_buffer_of_n_updates_of_one_version_is_federated_averaging(agents: int) -> None:
    merges: list[list[Chosen]] = []
    Clockwork(asynchronous(agents, buffer=agents, overlap=False), steady(), merges.append).play(5 * agents)
    rounds = Rounds(min_agents=agents, versions=9, quorum=None, sample=None, seed=0, weights="uniform")
    for agent in names(agents):
        rounds.handle(AgentJoined(agent), 0.0)
    (expected,) = [c for a in names(agents) for c in rounds.handle(OfferReady(a, 1, 0), 0.0) if isinstance(c, Merge)]
    assert merges[0] == list(expected.updates)
    assert [[(c.agent, c.lag, c.weight) for c in m] for m in merges] == 5 * [
        [(c.agent, 0, c.weight) for c in merges[0]]
    ]


def test_one_agent_with_a_buffer_of_one_is_serial_training() -> None:
    merges: list[list[Chosen]] = []
    Clockwork(asynchronous(1, overlap=False), steady(), merges.append).play(9)
    assert merges == [[Chosen("a1", clock, 0, 1.0)] for clock in range(1, 10)]


# -- what staleness does to a learning rate ----------------------------------------------------------------------------
@pytest.mark.parametrize(("lag", "most"), [(0, 2.0), (1, 1.0), (2, 0.618), (5, 0.285), (10, 0.149)])
@pytest.mark.parametrize("stable", [True, False])
def test_delayed_gradient_descent_is_stable_up_to_a_learning_rate_that_the_lag_sets(
    lag: int, most: float, stable: bool
) -> None:
    """x ← x − ηh x_{t−τ} converges iff ηh < 2 sin(π / (2 (2τ + 1))); N agents in turns have a lag of N − 1, always."""
    bound = 2 * math.sin(math.pi / (2 * (2 * lag + 1)))
    assert bound == pytest.approx(most, abs=6e-4)
    rate = bound * (0.93 if stable else 1.07)
    centers = [1.0]

    def descend(merged: list[Chosen]) -> None:
        (update,) = merged
        assert update.lag == min(lag, len(centers) - 1) and update.weight == 1.0
        centers.append(centers[-1] - rate * centers[-1 - update.lag])

    Clockwork(asynchronous(lag + 1, overlap=False), steady(), descend).play(2500)
    late = max(abs(x) for x in centers[-100:])
    assert late < 1e-3 if stable else late > 1e3
