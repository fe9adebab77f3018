"""Faults of a simulated run, as data: a failing schedule can be printed, replayed and reduced.

Every fault ends; the run must finish after the last one. Times are virtual seconds from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from syncline_sim.rng import Rng


@dataclass(frozen=True, slots=True)
class Crash:
    """The service dies at its `at_op`-th bus operation: before it is sent, or after the broker's work and before the answer."""

    service: str
    at_op: int
    when: Literal["before", "done"] = "before"
    down_s: float = 0.5  # until the service is started again
    disk: bool = True  # the state directory is kept


@dataclass(frozen=True, slots=True)
class Down:
    """The service is killed at `at_s`, at any point of its work, and started again after `for_s`."""

    service: str
    at_s: float
    for_s: float
    disk: bool = True


@dataclass(frozen=True, slots=True)
class Cut:
    """The service's connection is cut."""

    service: str
    at_s: float
    for_s: float


@dataclass(frozen=True, slots=True)
class Unanswered:
    """The connection is cut after the broker's work on the service's `at_op`-th operation and before the answer."""

    service: str
    at_op: int
    for_s: float


@dataclass(frozen=True, slots=True)
class BrokerDown:
    """The broker is stopped and started again with the content of its streams."""

    at_s: float
    for_s: float


@dataclass(frozen=True, slots=True)
class RollBack:
    """A power failure of the broker: it comes back with its store of `lost_s` before, so acknowledged writes are lost.

    With `torn` some streams come back complete, because each stream is flushed to disk at a time of its own.
    """

    at_s: float
    for_s: float
    lost_s: float
    torn: bool = False


@dataclass(frozen=True, slots=True)
class Lose:
    """A share of the core messages is lost: notifications, heartbeats, hellos, and those answers that are core messages."""

    share: float
    at_s: float
    for_s: float


@dataclass(frozen=True, slots=True)
class Delay:
    """Every message from and to the service is delayed by additional `seconds`."""

    service: str
    seconds: float
    at_s: float
    for_s: float


@dataclass(frozen=True, slots=True)
class LongStep:
    """One step of the agent's training takes `for_s` longer; the agent still sends heartbeats."""

    service: str
    at_s: float
    for_s: float


@dataclass(frozen=True, slots=True)
class KillTrainer:
    """The training child of an agent is killed; the agent service goes on."""

    service: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Twin:
    """A second process with the agent's name starts and takes over; the first one exits."""

    service: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Zombie:
    """The coordinator is cut off and replaced; it reconnects, believing that it is in charge, and dies after `awake_s`."""

    at_s: float
    for_s: float  # cut off
    awake_s: float = 0.2
    service: str = "coordinator"


AtOperation = Crash | Unanswered
Fault = AtOperation | Down | Cut | BrokerDown | RollBack | Lose | Delay | LongStep | KillTrainer | Twin | Zombie


@dataclass(frozen=True, slots=True)
class Faults:
    """A schedule of faults. Each builder method returns a schedule with one more fault."""

    items: tuple[Fault, ...] = ()

    def crash(
        self,
        service: str,
        *,
        at_op: int,
        when: Literal["before", "done"] = "before",
        down_s: float = 0.5,
        disk: bool = True,
    ) -> Faults:
        return self._and(Crash(service, at_op, when, down_s, disk))

    def down(self, service: str, *, after_s: float, for_s: float, disk: bool = True) -> Faults:
        return self._and(Down(service, after_s, for_s, disk))

    def cut(self, service: str, *, after_s: float, for_s: float) -> Faults:
        return self._and(Cut(service, after_s, for_s))

    def unanswered(self, service: str, *, at_op: int, for_s: float = 0.1) -> Faults:
        return self._and(Unanswered(service, at_op, for_s))

    def restart_broker(self, *, after_s: float, for_s: float = 0.0) -> Faults:
        return self._and(BrokerDown(after_s, for_s))

    def roll_back(self, *, after_s: float, lost_s: float, for_s: float = 0.0, torn: bool = False) -> Faults:
        return self._and(RollBack(after_s, for_s, lost_s, torn))

    def lose(self, share: float, *, after_s: float, for_s: float) -> Faults:
        return self._and(Lose(share, after_s, for_s))

    def delay(self, service: str, seconds: float, *, after_s: float, for_s: float) -> Faults:
        return self._and(Delay(service, seconds, after_s, for_s))

    def long_step(self, agent: str, *, after_s: float, for_s: float) -> Faults:
        return self._and(LongStep(agent, after_s, for_s))

    def kill_trainer(self, agent: str, *, after_s: float) -> Faults:
        return self._and(KillTrainer(agent, after_s))

    def twin(self, agent: str, *, after_s: float) -> Faults:
        return self._and(Twin(agent, after_s))

    def zombie(self, *, after_s: float, for_s: float, awake_s: float = 0.2) -> Faults:
        return self._and(Zombie(after_s, for_s, awake_s))

    def _and(self, fault: Fault) -> Faults:
        return replace(self, items=(*self.items, fault))

    @property
    def over_s(self) -> float:
        """The end of the last fault that has a time."""
        return max(
            (f.at_s + getattr(f, "for_s", 0.0) for f in self.items if not isinstance(f, AtOperation)), default=0.0
        )

    @classmethod
    def random(cls, rng: Rng, services: Sequence[str], *, most: int = 6, within_s: float = 3.0) -> Faults:
        """Return up to `most` faults that begin within `within_s`; crashes come within the first few hundred operations."""
        return cls(tuple(_draw(rng, services, within_s) for _ in range(rng.between(0, most))))


def shrunk(faults: Faults, fails: Callable[[Faults], bool]) -> Faults:
    """Return a smaller schedule that still fails: remove one fault at a time, as long as `fails` returns True."""
    smaller = True
    while smaller:
        smaller = False
        for i in range(len(faults.items)):
            fewer = Faults(faults.items[:i] + faults.items[i + 1 :])
            if fails(fewer):
                faults, smaller = fewer, True
                break
    return faults


def _draw(rng: Rng, services: Sequence[str], within_s: float) -> Fault:
    agents = [s for s in services if s != "coordinator"]
    service, agent, at_s = rng.choice(services), rng.choice(agents), round(rng.uniform(0.0, within_s), 3)
    for_s = round(0.02 * 1000 ** rng.random(), 3)  # log-uniform, 20 ms to 20 s
    kind = rng.choice(
        (*["crash"] * 3, *["unanswered"] * 3, "cut", "cut", "broker", "lose", "delay", "trainer", "twin", "zombie")
    )
    match kind:
        case "crash":
            service = "coordinator" if rng.random() < 0.6 else agent
            most = 250 if service == "coordinator" else 60
            when: Literal["before", "done"] = "done" if rng.random() < 0.5 else "before"
            return Crash(service, rng.between(1, most), when, min(for_s, 5.0), rng.random() < 0.8)
        case "unanswered":
            return Unanswered(service, rng.between(1, 250 if service == "coordinator" else 60), for_s)
        case "cut":
            return Cut(service, at_s, for_s)
        case "broker":
            return BrokerDown(at_s, min(for_s, 5.0))
        case "lose":
            return Lose(round(rng.uniform(0.05, 0.9), 2), at_s, for_s)
        case "delay":
            return Delay(service, round(rng.uniform(0.001, 1.0), 3), at_s, for_s)
        case "trainer":
            return KillTrainer(agent, at_s)
        case "zombie":
            return Zombie(at_s, min(for_s, 5.0), round(rng.uniform(0.01, 0.5), 3))
        case _:
            return Twin(agent, at_s)
