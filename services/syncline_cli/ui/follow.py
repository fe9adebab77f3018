"""Submitting a run and following it: head is the truth, notifies wake up, metrics and events are what is shown."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from syncline.bus.address import masked
from syncline.bus.base import Bus, Delivery
from syncline.bus.connect import connection_problem
from syncline.errors import BusError, ConfigError, Denied, NoResponders, PeerError, RunFailed, Unavailable, Unreachable
from syncline.observe.run_state import RunState
from syncline.spec.run_spec import RunSpec
from syncline.spec.submission import submission
from syncline.wire import subjects
from syncline.wire.messages import ENDED, Head, Notify, Submit, Submitted, decode, encode
from syncline_cli.process import since_start_s
from syncline_cli.ui.standstill import Standstill

READ_AGAIN_S = 2.0
ANSWER_S = 20.0  # a coordinator that is alive answers a submitted run within a quarter of that
SILENT_S = 120.0  # without an answer of one that was there, after which it is waited for no more
QUIET_S = 10.0  # before it is said what is waited for
LAST_METRICS_S = 2.0
LOOK_S = 0.5  # how often it is looked whether the run moves

Say = Callable[[str, str], None]  # level, text
T = TypeVar("T")


def _say_nothing(level: str, text: str) -> None: ...


def _now_s() -> float:
    return asyncio.get_running_loop().time()


async def submit(bus: Bus, spec: RunSpec, *, patience_s: float = 60.0, say: Say = _say_nothing) -> Submitted:
    """Hand the run to the coordinator, and wait for its verdict as long as it answers: it loads the task first.

    Args:
        patience_s: for a coordinator that is not up.
        say: takes a level and what the coordinator does meanwhile, sooner at first and then more seldom.

    Raises:
        ConfigError: the run is refused.
        NoResponders: there is no coordinator.
        BusError: it has not answered for long.
    """
    question = encode(submission(spec))
    wait, lost = _Wait(say), False
    deadline = _now_s() + patience_s
    while True:
        try:
            answer = decode(Submitted, await bus.request(subjects.submit(), question, ANSWER_S))
        except NoResponders:
            if _now_s() > deadline:
                raise
            await asyncio.sleep(0.05)
        except Unreachable:
            if wait.silent_s() > SILENT_S:
                raise
            lost = True
            await asyncio.sleep(LOOK_S)
        else:
            if not answer.doing:
                break
            wait.hears(answer.doing)
            deadline = _now_s() + max(patience_s, SILENT_S)  # it was up: it may be started again
    if not answer.run:
        if lost and answer.setting == "name" and await _is_there(bus, spec):  # accepted, and the answer was lost
            return Submitted(run=spec.name, warnings=[*spec.warnings])
        raise ConfigError(answer.setting, answer.problem, answer.hint)
    return answer


async def _is_there(bus: Bus, spec: RunSpec) -> bool:
    """Whether the broker holds a run of that name with the very same settings, which has not ended."""
    head = await bus.kv_get(subjects.RUNS_BUCKET, subjects.head_key(spec.name))
    stored = await bus.kv_get(subjects.RUNS_BUCKET, subjects.spec_key(spec.name))
    if head is None or stored is None or decode(Head, head.value).phase in ENDED:
        return False
    return decode(Submit, stored.value).spec == submission(spec).spec


@dataclass(slots=True)
class _Wait:
    """Says what a coordinator is doing: after some seconds, when that changes, and after twice the time."""

    _say: Say
    _began_s: float = field(default_factory=_now_s)
    _heard_s: float = field(default_factory=_now_s)
    _doing: str = ""
    _since_s: float = 0.0  # the coordinator does that
    _next_s: float = QUIET_S  # from the beginning

    def hears(self, doing: str) -> None:
        now_s, before_s = _now_s(), self._heard_s
        self._heard_s = now_s
        if doing != self._doing:
            self._doing, self._since_s = doing, before_s
            self._next_s = min(self._next_s, max(QUIET_S, now_s - self._began_s))
        if now_s - self._began_s >= self._next_s:
            self._say("hint", f"waiting for the coordinator: it {doing}, for {now_s - self._since_s:.0f} s")
            self._next_s = 2 * (now_s - self._began_s)

    def silent_s(self) -> float:
        return _now_s() - self._heard_s


async def submit_remote(bus: Bus, spec: RunSpec, url: str, key: str = "", say: Say = _say_nothing) -> Submitted:
    """The same with a broker that somebody else runs: whatever is wrong with it is said as a ConfigError."""
    try:
        return await submit(bus, spec, patience_s=5.0, say=say)
    except NoResponders:
        await _check_jetstream(bus, url)
        url = masked(url)
        start = f"syncline coordinator --connect {url}" + (f" --key {key}" if key else "")
        hint = f"Start one with `{start}`, or name another broker with --connect"
        raise ConfigError("--connect", f"no coordinator answers on {url}", hint) from None
    except Denied as error:
        raise ConfigError("--key", f"it may not submit runs: {error}", "Use the coordinator's key") from None
    except BusError as error:
        raise connection_problem(error, url) from None


async def _check_jetstream(bus: Bus, url: str) -> None:
    """Raises ConfigError where the broker stores nothing: then no coordinator can ever come up there."""
    try:
        await bus.state(f"KV_{subjects.RUNS_BUCKET}")
    except Unavailable as error:
        if "JetStream" in str(error):
            raise connection_problem(error, url) from None
    except BusError:
        pass


class Follower:
    """Follows one run to its end. `say` is told when the broker does not answer, and when it does again."""

    def __init__(self, bus: Bus, run: str, say: Callable[[str, str], None] = lambda level, text: None) -> None:
        self._bus, self._run, self._say = bus, run, say
        self._moved = asyncio.Event()
        self.head: Head | None = None
        self.began_s = time.monotonic()
        self.first_commit_s: float | None = None  # since this process was created
        self.seconds = 0.0
        self._trouble = False

    @property
    def opened(self) -> bool:
        """Whether a first round has been opened: from then on the run goes on with whoever is left."""
        return self.head is not None and (self.head.round > 0 or self.head.version > 0)

    @property
    def ended(self) -> bool:
        return self.head is not None and self.head.phase in ENDED

    async def until_ended(self) -> Head:
        """The last head. Raises RunFailed where the run is gone from the bus."""
        watching = await self._bus.subscribe(subjects.notify(self._run), self._on_notify)
        try:
            while not await self._look():
                try:
                    async with asyncio.timeout(READ_AGAIN_S):
                        await self._moved.wait()
                except TimeoutError:
                    pass
                self._moved.clear()
        finally:
            self.seconds = time.monotonic() - self.began_s
            try:
                await watching.unsubscribe()
            except BusError:
                pass
        assert self.head is not None
        return self.head

    async def _look(self) -> bool:
        """Reads head; True when the run has ended."""
        try:
            entry = await self._bus.kv_get(subjects.RUNS_BUCKET, subjects.head_key(self._run))
        except BusError as error:
            if not self._trouble:
                self._say("warning", f"the broker does not answer, still trying: {error}")
            self._trouble = True
            return False
        if self._trouble:
            self._say("warning", "the broker answers again")
        self._trouble = False
        if entry is None:
            raise RunFailed(f"run {self._run} is gone from the bus: its head was deleted")
        try:
            self._see(decode(Head, entry.value))
        except PeerError as error:
            raise RunFailed(f"run {self._run} has a head that this Syncline cannot read: {error}") from None
        return self.ended

    async def _on_notify(self, delivery: Delivery) -> None:
        try:
            head = decode(Head, decode(Notify, delivery.data).head)
        except PeerError:
            return
        self._see(head)
        if head.phase in ENDED:
            self._moved.set()

    def _see(self, head: Head) -> None:
        """A notify that comes late changes nothing."""
        if self.ended or (self.head is not None and _order(head) < _order(self.head)):
            return
        self.head = head
        if head.version and self.first_commit_s is None:
            self.first_commit_s = since_start_s()


async def tell_standstill(follower: Follower, state: RunState, say: Callable[[str, str], None]) -> NoReturn:
    """Says what the run waits for where it does not move, until cancelled."""
    still = Standstill()
    while True:
        if text := still.look(state, follower.head, time.monotonic()):
            say("warning", text)
        await asyncio.sleep(LOOK_S)


async def first(*works: Coroutine[Any, Any, T]) -> T:
    """The result of whichever ends first; the others are cancelled."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(iter(done)).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _order(head: Head) -> tuple[int, int, int]:
    return head.term, head.version, head.round


class Feed:
    """Passes the public metrics and events of one run on to its state. Missing ones are a gap in a plot, nothing more."""

    def __init__(self, bus: Bus, state: RunState) -> None:
        self._bus, self.state = bus, state
        self._news = asyncio.Event()

    async def open(self) -> None:
        run = self.state.run
        for whose in (run, subjects.FLEET):
            await self._bus.subscribe(f"{subjects.PREFIX}.{whose}.metrics.>", self._on_metric)
            await self._bus.subscribe(f"{subjects.PREFIX}.{whose}.events.*", self._on_event)

    async def _on_metric(self, delivery: Delivery) -> None:
        tokens = delivery.subject.split(".")
        if len(tokens) == 6 and tokens[2] == subjects.FLEET:
            self.state.on_fleet(tokens[4], tokens[5], delivery.data)
        elif len(tokens) == 6:
            self.state.on_metric(tokens[4], tokens[5], delivery.data)
            self._news.set()

    async def _on_event(self, delivery: Delivery) -> None:
        tokens = delivery.subject.split(".")
        self.state.on_event(tokens[2], delivery.data, tokens[4])

    async def last(self, version: int, *, evaluated: bool, agents: int = 0) -> None:
        """Waits a moment for the metrics of the end: they travel on another connection than head."""
        try:
            async with asyncio.timeout(LAST_METRICS_S):
                while not self._complete(version, evaluated, agents):
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            pass

    def _complete(self, version: int, evaluated: bool, agents: int) -> bool:
        own = sum(1 for agent in self.state.agents.values() if agent.metrics)
        return self.state.complete(version, evaluated) and own >= agents
