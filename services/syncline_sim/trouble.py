"""Makes the faults of a schedule happen in a world."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from syncline.bus.memory.bus import MemoryBroker
from syncline.bus.memory.faults import Operation
from syncline.bus.memory.store import Store
from syncline.wire import subjects
from syncline_sim.books import Books
from syncline_sim.dice import Dice
from syncline_sim.faults import (
    AtOperation,
    BrokerDown,
    Crash,
    Cut,
    Delay,
    Down,
    Fault,
    KillTrainer,
    LongStep,
    Lose,
    RollBack,
    Twin,
    Unanswered,
    Weather,
    Zombie,
)
from syncline_sim.life import Life

COORDINATOR = subjects.COORDINATOR


class Faulty(Protocol):
    """The simulated system that faults act on: its broker, its network and the processes of its services."""

    seed: int
    broker: MemoryBroker
    weather: Weather
    books: Books
    lives: dict[str, Life]  # by connection

    @property
    def ended(self) -> bool:
        """Whether the run has ended, or an invariant was violated."""
        ...

    def start(self, service: str) -> None:
        """Start a new process of the service, unless the run has ended."""
        ...

    def current(self, service: str) -> Life | None:
        """Return the newest process of the service, or None if it is dead."""
        ...

    def crash(self, life: Life, disk: bool) -> None:
        """End a process at once; without `disk`, its state directory is deleted as well."""
        ...

    def end(self, life: Life) -> None:
        """End a process at once: cut its connection, then cancel its tasks."""
        ...

    def rolled_back(self, store: Store, then: Books) -> None:
        """Give the broker an older store; `then`: the observer's state when that store was current."""
        ...

    def at(self, seconds: float, call: Callable[[], None]) -> None:
        """Call a function after so many virtual seconds."""
        ...

    def say(self, text: str) -> None:
        """Append a line to the timeline."""
        ...


class Trouble:
    """Every fault begins at its time or at its operation, and ends by itself."""

    def __init__(self, world: Faulty) -> None:
        self._world = world
        self._flushed: dict[RollBack, tuple[Store, Books]] = {}

    def schedule(self, fault: Fault) -> None:
        begin, end = self._how(fault)
        if isinstance(fault, RollBack):
            self._world.at(max(0.0, fault.at_s - fault.lost_s), partial(self._flush, fault))
        if not isinstance(fault, AtOperation):
            self._world.at(fault.at_s, begin)
            self._world.at(fault.at_s, partial(self._world.at, getattr(fault, "for_s", 0.0), end))

    def _how(self, fault: Fault) -> tuple[Callable[[], None], Callable[[], None]]:
        """What to do when a fault begins, and when it ends."""
        match fault:
            case Down(service, _, _, disk):
                return partial(self._kill, service, disk), partial(self._start_again, service)
            case Cut(service):
                return partial(self._cut, service), partial(self._mend, service)
            case BrokerDown():
                return partial(self._broker_down), partial(self._broker_up)
            case RollBack():
                return partial(self._power_fails), partial(self._power_is_back, fault)
            case Lose(share):
                return partial(self._lose, share), partial(self._lose, 0.0)
            case Delay(service, seconds):
                return partial(self._slow, service, seconds), partial(self._slow, service, 0.0)
            case LongStep(service, _, for_s):
                return partial(self._hold, service, for_s), _nothing
            case KillTrainer(service):
                return partial(self._kill_trainer, service), _nothing
            case Twin(service):
                return partial(self._world.start, service), _nothing
            case Zombie(_, for_s, awake_s):
                return partial(self._replace, for_s, awake_s), _nothing
            case Crash() | Unanswered():
                return _nothing, _nothing

    def _kill(self, service: str, disk: bool) -> None:
        life = self._world.current(service)
        if life is not None:
            self._world.say(f"{life.connection} is killed" + ("" if disk else ", its disk is gone"))
            self._world.crash(life, disk)

    def _cut(self, service: str) -> None:
        life = self._world.current(service)
        if life is not None:
            self._world.say(f"{life.connection} is cut off")
            self._world.broker.cut(life.connection)

    def _mend(self, service: str) -> None:
        for life in self._world.lives.values():
            if life.service == service and not (life.dead or life.replaced):
                self._world.say(f"{life.connection} can connect again")
                self._world.broker.hint(life.connection)

    def _replace(self, for_s: float, awake_s: float) -> None:
        """The coordinator is cut off, another one starts; the old one is back for `awake_s`, and dies."""
        life = self._world.current(COORDINATOR)
        if life is None:
            return
        self._world.say(f"{life.connection} is cut off, and replaced")
        life.replaced = True
        self._world.broker.cut(life.connection)
        self._world.start(COORDINATOR)
        self._world.at(for_s, partial(self._wake, life))
        self._world.at(for_s + awake_s, partial(self._die, life))

    def _wake(self, life: Life) -> None:
        if not life.dead:
            self._world.say(f"{life.connection} is back")
            self._world.broker.hint(life.connection)

    def _die(self, life: Life) -> None:
        if not life.dead:
            self._world.say(f"{life.connection} dies")
            self._world.end(life)

    def _broker_down(self) -> None:
        self._world.say("the broker stops")
        self._world.broker.stop()

    def _broker_up(self) -> None:
        self._world.say("the broker starts")
        self._world.broker.start()

    def _flush(self, fault: RollBack) -> None:
        self._flushed[fault] = self._world.broker.snapshot(), self._world.books.copy()

    def _power_fails(self) -> None:
        if self._world.ended:
            return
        self._world.say("power failure: the broker is gone")
        self._world.broker.stop()

    def _power_is_back(self, fault: RollBack) -> None:
        if self._world.ended:
            return
        store, then = self._flushed.pop(fault)
        newest, dice = self._world.broker.store, Dice(f"{self._world.seed} torn")
        torn = [name for name in newest.streams if fault.torn and dice.random() < 0.5]
        self._world.say(
            f"the broker is back with its store of {fault.lost_s:g} s before"
            + (f", but for {', '.join(torn)}" if torn else "")
        )
        if f"KV_{subjects.RUNS_BUCKET}" in torn:  # then head is the newest
            then = self._world.books.copy()
        self._world.rolled_back(store.with_newer(newest, torn) if fault.torn else store, then)
        for later in self._flushed:  # another failure brings nothing back that this one took
            self._flush(later)

    def _lose(self, share: float) -> None:
        self._world.say(f"{share:.0%} of the core messages are lost")
        self._world.weather.share_lost = share

    def _slow(self, service: str, seconds: float) -> None:
        self._world.say(f"{service}'s messages take {seconds:g} s more")
        self._world.weather.slow_s[service] = seconds

    def _hold(self, service: str, seconds: float) -> None:
        life = self._world.current(service)
        if life is not None and life.training is not None:
            self._world.say(f"{life.connection}: a step takes {seconds:g} s more")
            life.training.hold(seconds)

    def _kill_trainer(self, service: str) -> None:
        life = self._world.current(service)
        if life is not None and life.training is not None:
            self._world.say(f"{life.connection}: its training child is killed")
            life.training.die()

    def strike(self, fault: AtOperation, life: Life, now: Operation) -> None:
        if isinstance(fault, Unanswered):
            self._world.say(
                f"{life.connection} is cut off with operation {fault.at_op} done: {now.name} {subject_of(now)}"
            )
            self._world.broker.cut(life.connection)
            self._world.at(fault.for_s, partial(self._mend, life.service))
            return
        disk = "" if fault.disk else ", its disk is gone"
        self._world.say(
            f"{life.connection} crashes, {fault.when} operation {fault.at_op}: {now.name} {subject_of(now)}{disk}"
        )
        self._world.crash(life, fault.disk)
        self._world.at(fault.down_s, partial(self._start_again, life.service))

    def _start_again(self, service: str) -> None:
        if self._world.current(service) is None:  # nobody else took its place
            self._world.start(service)


def subject_of(now: Operation) -> str:
    """What an operation is about: its first argument, if that is a subject or a name; with the key for buckets."""
    texts = [argument for argument in now.arguments[:2] if isinstance(argument, str)]
    return " ".join(texts)


def _nothing() -> None:
    pass
