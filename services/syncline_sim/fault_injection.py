"""Injects the faults of a schedule into a cluster."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from syncline.bus.memory.bus import MemoryBroker
from syncline.bus.memory.faults import Operation
from syncline.bus.memory.store import Store
from syncline.wire import subjects
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
    Zombie,
)
from syncline_sim.network import Network
from syncline_sim.observer import Observer
from syncline_sim.process import SimProcess
from syncline_sim.rng import Rng

COORDINATOR = subjects.COORDINATOR


class FaultTarget(Protocol):
    """The cluster as a fault injector sees it."""

    seed: int
    broker: MemoryBroker
    network: Network
    observer: Observer
    processes: dict[str, SimProcess]  # by connection

    @property
    def ended(self) -> bool:
        """Whether the run has ended, or an invariant was violated."""
        ...

    def start(self, service: str) -> None:
        """Start a new process of the service, unless the run has ended."""
        ...

    def current(self, service: str) -> SimProcess | None:
        """Return the newest process of the service, or None if it is dead."""
        ...

    def crash(self, process: SimProcess, disk: bool) -> None:
        """End a process at once; without `disk`, its state directory is deleted as well."""
        ...

    def end(self, process: SimProcess) -> None:
        """End a process at once: cut its connection, then cancel its tasks."""
        ...

    def rolled_back(self, store: Store, then: Observer) -> None:
        """Give the broker an older store; `then`: the observer's state when that store was current."""
        ...

    def at(self, seconds: float, call: Callable[[], None]) -> None:
        """Call a function after so many virtual seconds."""
        ...

    def say(self, text: str) -> None:
        """Append a line to the timeline."""
        ...


class FaultInjector:
    """Starts each fault at its time or at its operation, and ends it."""

    def __init__(self, target: FaultTarget) -> None:
        self._target = target
        self._flushed: dict[RollBack, tuple[Store, Observer]] = {}  # the state that a power failure goes back to

    def schedule(self, fault: Fault) -> None:
        """Set the timers of a fault. A fault at an operation has none: the cluster calls `strike`."""
        begin, end = self._actions(fault)
        if isinstance(fault, RollBack):
            self._target.at(max(0.0, fault.at_s - fault.lost_s), partial(self._flush, fault))
        if not isinstance(fault, AtOperation):
            self._target.at(fault.at_s, begin)
            self._target.at(fault.at_s, partial(self._target.at, getattr(fault, "for_s", 0.0), end))

    def _actions(self, fault: Fault) -> tuple[Callable[[], None], Callable[[], None]]:
        """Return the functions that begin and end a fault."""
        match fault:
            case Down(service, _, _, disk):
                return partial(self._kill, service, disk), partial(self._restart, service)
            case Cut(service):
                return partial(self._cut, service), partial(self._reconnect, service)
            case BrokerDown():
                return partial(self._stop_broker), partial(self._start_broker)
            case RollBack():
                return partial(self._fail_power), partial(self._restore_power, fault)
            case Lose(share):
                return partial(self._lose, share), partial(self._lose, 0.0)
            case Delay(service, seconds):
                return partial(self._slow, service, seconds), partial(self._slow, service, 0.0)
            case LongStep(service, _, for_s):
                return partial(self._hold, service, for_s), _nothing
            case KillTrainer(service):
                return partial(self._kill_trainer, service), _nothing
            case Twin(service):
                return partial(self._target.start, service), _nothing
            case Zombie(_, for_s, awake_s):
                return partial(self._replace, for_s, awake_s), _nothing
            case Crash() | Unanswered():
                return _nothing, _nothing

    def _kill(self, service: str, disk: bool) -> None:
        process = self._target.current(service)
        if process is not None:
            self._target.say(f"{process.connection} is killed" + ("" if disk else ", its disk is gone"))
            self._target.crash(process, disk)

    def _cut(self, service: str) -> None:
        process = self._target.current(service)
        if process is not None:
            self._target.say(f"{process.connection} is cut off")
            self._target.broker.cut(process.connection)

    def _reconnect(self, service: str) -> None:
        for process in self._target.processes.values():
            if process.service == service and not (process.dead or process.replaced):
                self._target.say(f"{process.connection} can connect again")
                self._target.broker.reconnect(process.connection)

    def _replace(self, for_s: float, awake_s: float) -> None:
        """Cut the coordinator off and start another one. Reconnect the old one after `for_s`, and end it `awake_s` later."""
        process = self._target.current(COORDINATOR)
        if process is None:
            return
        self._target.say(f"{process.connection} is cut off, and replaced")
        process.replaced = True
        self._target.broker.cut(process.connection)
        self._target.start(COORDINATOR)
        self._target.at(for_s, partial(self._wake, process))
        self._target.at(for_s + awake_s, partial(self._end, process))

    def _wake(self, process: SimProcess) -> None:
        if not process.dead:
            self._target.say(f"{process.connection} is back")
            self._target.broker.reconnect(process.connection)

    def _end(self, process: SimProcess) -> None:
        if not process.dead:
            self._target.say(f"{process.connection} dies")
            self._target.end(process)

    def _stop_broker(self) -> None:
        self._target.say("the broker stops")
        self._target.broker.stop()

    def _start_broker(self) -> None:
        self._target.say("the broker starts")
        self._target.broker.start()

    def _flush(self, fault: RollBack) -> None:
        self._flushed[fault] = self._target.broker.snapshot(), self._target.observer.copy()

    def _fail_power(self) -> None:
        if self._target.ended:
            return
        self._target.say("power failure: the broker is gone")
        self._target.broker.stop()

    def _restore_power(self, fault: RollBack) -> None:
        if self._target.ended:
            return
        store, then = self._flushed.pop(fault)
        newest, rng = self._target.broker.store, Rng(f"{self._target.seed} torn")
        torn = [name for name in newest.streams if fault.torn and rng.random() < 0.5]
        self._target.say(
            f"the broker is back with its store of {fault.lost_s:g} s before"
            + (f", but for {', '.join(torn)}" if torn else "")
        )
        if f"KV_{subjects.RUNS_BUCKET}" in torn:  # the bucket of heads is not rolled back
            then = self._target.observer.copy()
        self._target.rolled_back(store.with_newer(newest, torn) if fault.torn else store, then)
        for later in self._flushed:  # a later failure must not restore writes that this one lost
            self._flush(later)

    def _lose(self, share: float) -> None:
        self._target.say(f"{share:.0%} of the core messages are lost")
        self._target.network.share_lost = share

    def _slow(self, service: str, seconds: float) -> None:
        self._target.say(f"{service}'s messages take {seconds:g} s more")
        self._target.network.slow_s[service] = seconds

    def _hold(self, service: str, seconds: float) -> None:
        process = self._target.current(service)
        if process is not None and process.training is not None:
            self._target.say(f"{process.connection}: a step takes {seconds:g} s more")
            process.training.hold(seconds)

    def _kill_trainer(self, service: str) -> None:
        process = self._target.current(service)
        if process is not None and process.training is not None:
            self._target.say(f"{process.connection}: its training child is killed")
            process.training.die()

    def strike(self, fault: AtOperation, process: SimProcess, now: Operation) -> None:
        """Begin a fault at an operation of a process."""
        if isinstance(fault, Unanswered):
            self._target.say(
                f"{process.connection} is cut off with operation {fault.at_op} done: {now.name} {subject_of(now)}"
            )
            self._target.broker.cut(process.connection)
            self._target.at(fault.for_s, partial(self._reconnect, process.service))
            return
        disk = "" if fault.disk else ", its disk is gone"
        self._target.say(
            f"{process.connection} crashes, {fault.when} operation {fault.at_op}: {now.name} {subject_of(now)}{disk}"
        )
        self._target.crash(process, fault.disk)
        self._target.at(fault.down_s, partial(self._restart, process.service))

    def _restart(self, service: str) -> None:
        if self._target.current(service) is None:  # no other process was started meanwhile
            self._target.start(service)


def subject_of(now: Operation) -> str:
    """Return the subject or the name that an operation is about, with the key for buckets."""
    texts = [argument for argument in now.arguments[:2] if isinstance(argument, str)]
    return " ".join(texts)


def _nothing() -> None:
    pass
