"""What goes wrong in a simulated run: data, so that a failing schedule can be printed, replayed and made smaller.

Every fault ends by itself. Once the last one is over the run has to finish. Times are virtual seconds from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from syncline.bus.memory.faults import BROKER, CORE_KINDS
from syncline_sim.dice import Dice


@dataclass(frozen=True, slots=True)
class Crash:
    """The service dies at its `at_op`-th bus operation, before it is sent or when the broker has done it and not answered."""

    service: str
    at_op: int
    when: Literal["before", "done"] = "before"
    down_s: float = 0.5  # until it is started again
    disk: bool = True  # it finds its state directory again


@dataclass(frozen=True, slots=True)
class Down:
    """The service is dead for a while: whatever it was doing, it dies at this time."""

    service: str
    at_s: float
    for_s: float
    disk: bool = True


@dataclass(frozen=True, slots=True)
class Cut:
    """The service has no connection."""

    service: str
    at_s: float
    for_s: float


@dataclass(frozen=True, slots=True)
class Unanswered:
    """The broker has done the service's `at_op`-th operation, and the connection is gone before the answer."""

    service: str
    at_op: int
    for_s: float


@dataclass(frozen=True, slots=True)
class BrokerDown:
    """The broker is stopped, and started again with what its streams hold."""

    at_s: float
    for_s: float


@dataclass(frozen=True, slots=True)
class RollBack:
    """A power failure at the broker's: it comes back with its store as that was `lost_s` before; acknowledged writes are lost.

    `torn`: not of every stream, as each is flushed at a time of its own.
    """

    at_s: float
    for_s: float
    lost_s: float
    torn: bool = False


@dataclass(frozen=True, slots=True)
class Lose:
    """A share of the core messages is lost: notifies, heartbeats, hellos, and their answers where those are core too."""

    share: float
    at_s: float
    for_s: float


@dataclass(frozen=True, slots=True)
class Delay:
    """Every message from and to the service takes so much longer."""

    service: str
    seconds: float
    at_s: float
    for_s: float


@dataclass(frozen=True, slots=True)
class LongStep:
    """A step of the agent's training takes so much longer; its heartbeats go on."""

    service: str
    at_s: float
    for_s: float


@dataclass(frozen=True, slots=True)
class KillTrainer:
    """The training child of an agent is killed, and the agent is not."""

    service: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Twin:
    """A second process of the agent's name starts: it takes over, and the first one exits."""

    service: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Zombie:
    """The coordinator is cut off and replaced; it comes back, believes to be in charge for a while, and dies."""

    at_s: float
    for_s: float  # cut off
    awake_s: float = 0.2
    service: str = "coordinator"


AtOperation = Crash | Unanswered
Fault = AtOperation | Down | Cut | BrokerDown | RollBack | Lose | Delay | LongStep | KillTrainer | Twin | Zombie


@dataclass(frozen=True, slots=True)
class Faults:
    """A schedule. Every method returns a longer one."""

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
        """When the last of those that come at a time is over."""
        return max(
            (f.at_s + getattr(f, "for_s", 0.0) for f in self.items if not isinstance(f, AtOperation)), default=0.0
        )

    @classmethod
    def random(cls, rng: Dice, services: Sequence[str], *, most: int = 6, within_s: float = 3.0) -> Faults:
        """Up to `most` faults that begin within `within_s`; crashes within the first few hundred operations."""
        return cls(tuple(_draw(rng, services, within_s) for _ in range(rng.between(0, most))))


def shrunk(faults: Faults, fails: Callable[[Faults], bool]) -> Faults:
    """The schedule without what the failure does not need: one fault less at a time, as long as it still fails."""
    smaller = True
    while smaller:
        smaller = False
        for i in range(len(faults.items)):
            fewer = Faults(faults.items[:i] + faults.items[i + 1 :])
            if fails(fewer):
                faults, smaller = fewer, True
                break
    return faults


def _draw(rng: Dice, services: Sequence[str], within_s: float) -> Fault:
    agents = [s for s in services if s != "coordinator"]
    service, agent, at_s = rng.choice(services), rng.choice(agents), round(rng.uniform(0.0, within_s), 3)
    for_s = round(0.02 * 1000 ** rng.random(), 3)  # 20 ms to 20 s, every order of magnitude as often
    kind = rng.choice(
        (*["crash"] * 3, *["unanswered"] * 3, "cut", "cut", "broker", "lose", "delay", "trainer", "twin", "zombie")
    )
    match kind:
        case "crash":
            whom = "coordinator" if rng.random() < 0.6 else agent
            most = 250 if whom == "coordinator" else 60
            when: Literal["before", "done"] = "done" if rng.random() < 0.5 else "before"
            return Crash(whom, rng.between(1, most), when, min(for_s, 5.0), rng.random() < 0.8)
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


@dataclass(slots=True)
class Weather:
    """The network of a simulation: uniform delays up to `longest_s`, worse while a fault says so."""

    rng: Dice
    longest_s: float
    share_lost: float = 0.0
    slow_s: dict[str, float] = field(default_factory=dict)  # service → seconds more

    def delay(self, source: str, target: str, kind: str, size_bytes: int) -> float | None:
        if self.share_lost and kind in CORE_KINDS and self.rng.random() < self.share_lost:
            return None
        who = (target if source == BROKER else source).partition("/")[0]
        return self.rng.uniform(0.0, self.longest_s) + self.slow_s.get(who, 0.0)
