"""Following a run: head is the truth, notifications announce it, metrics and events are what is shown."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from syncline.bus.base import Bus, Delivery
from syncline.client.submit import Say, say_nothing
from syncline.errors import BusError, PeerError, RunFailed
from syncline.observe.fleet_state import FleetState
from syncline.observe.run_state import RunState
from syncline.observe.standstill import Standstill
from syncline.observe.telemetry import Event
from syncline.spec.run_spec import RunSpec
from syncline.wire import subjects
from syncline.wire.messages import ENDED, Head, Notify, decode

READ_AGAIN_S = 2.0  # a notification may be lost: head is read at least this often
LAST_METRICS_S = 2.0  # the metrics of the end travel on another connection than head
LOOK_S = 0.5  # between two looks at whether the run moves

T = TypeVar("T")


class HeadFollower:
    """Follows the head of one run to its end. Any number of coordinators may drive the run meanwhile."""

    def __init__(self, bus: Bus, run: str, say: Say = say_nothing) -> None:
        """
        Args:
            bus: a connection with a coordinator's key.
            say: receives a warning when the broker does not answer, and when it answers again.
        """
        self._bus, self._run, self._say = bus, run, say
        self._ended = asyncio.Event()
        self._silent = False  # the broker did not answer the last read
        self.changed = asyncio.Event()  # set with every new head; the reader clears it
        self.head: Head | None = None
        self.seconds = 0.0  # spent in `until_ended`
        self.first_commit_at_s: float | None = None  # by time.monotonic()

    @property
    def opened(self) -> bool:
        """Whether a first round was opened: from then on the run continues with the agents that are left."""
        return self.head is not None and (self.head.round > 0 or self.head.version > 0)

    @property
    def ended(self) -> bool:
        return self.head is not None and self.head.phase in ENDED

    async def until_ended(self) -> Head:
        """Return the last head, of a run that is done or has failed.

        Raises:
            RunFailed: the run's head was deleted, or cannot be read by this version.
        """
        began_s = time.monotonic()
        subscription = await self._bus.subscribe(subjects.notify(self._run), self._on_notify)
        try:
            while not await self._read():
                try:
                    async with asyncio.timeout(READ_AGAIN_S):
                        await self._ended.wait()
                except TimeoutError:
                    pass
                self._ended.clear()
        finally:
            self.seconds = time.monotonic() - began_s
            try:
                await subscription.unsubscribe()
            except BusError:
                pass
        assert self.head is not None
        return self.head

    async def _read(self) -> bool:
        """Read head; return whether the run has ended."""
        try:
            entry = await self._bus.kv_get(subjects.RUNS_BUCKET, subjects.head_key(self._run))
        except BusError as error:
            if not self._silent:
                self._say("warning", f"the broker does not answer, still trying: {error}")
            self._silent = True
            return False
        if self._silent:
            self._say("warning", "the broker answers again")
        self._silent = False
        if entry is None:
            raise RunFailed(f"run {self._run} is no longer on the bus: its head was deleted")
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
            self._ended.set()

    def _see(self, head: Head) -> None:
        """Take a head, unless it is older than the one that is known."""
        if self.ended or (self.head is not None and _order(head) < _order(self.head)):
            return
        if head != self.head:
            self.changed.set()
        self.head = head
        if head.version and self.first_commit_at_s is None:
            self.first_commit_at_s = time.monotonic()


def _order(head: Head) -> tuple[int, int, int]:
    return head.term, head.version, head.round


@dataclass(frozen=True, slots=True)
class Progress:
    """The state of a followed run at one moment."""

    head: Head | None  # None: not read yet
    state: RunState  # shared with the follower, which updates it further
    events: list[Event]  # warnings and errors since the last progress

    @property
    def version(self) -> int:
        """The newest committed version."""
        return max(self.state.version, self.head.version if self.head is not None else 0)

    @property
    def metrics(self) -> dict[str, float | None]:
        """The newest metrics of the center on held-out data."""
        return self.state.metrics


class RunFollower(HeadFollower):
    """Follows the head of one run, and its metrics and events.

    Call `open` before the run is submitted, so that no event is missed, then `until_ended` or `updates` once.
    """

    def __init__(self, bus: Bus, feed_bus: Bus, fleet: FleetState, say: Say = say_nothing) -> None:
        """
        Args:
            bus: a connection with a coordinator's key.
            feed_bus: a connection with a watcher's key, which hears the agents; the coordinator's does not. On a broker
                without accounts the same as `bus`.
            fleet: made by `FleetState.of` or with a selected run; updated by this follower.
        """
        super().__init__(bus, fleet.selected, say)
        self._feed_bus = feed_bus
        self.fleet = fleet
        self._subscriptions: list[Any] = []

    @property
    def state(self) -> RunState:
        return self.fleet.followed

    async def open(self) -> None:
        """Subscribe to the feeds of the run and of the fleet. The subscriptions end with the connection, or by `close`."""
        for run in (self._run, subjects.FLEET):
            for feed in ("metrics.>", "events.*"):
                subject = f"{subjects.PREFIX}.{run}.{feed}"
                self._subscriptions.append(await self._feed_bus.subscribe(subject, self._on_feed))

    async def close(self) -> None:
        """End the subscriptions to the feeds."""
        for subscription in self._subscriptions:
            try:
                await subscription.unsubscribe()
            except BusError:
                pass
        self._subscriptions.clear()

    async def _on_feed(self, delivery: Delivery) -> None:
        if self.fleet.handle(delivery.subject, delivery.data, time.monotonic()) is not None:
            self.changed.set()

    async def last_metrics(self, spec: RunSpec | None) -> None:
        """Wait at most LAST_METRICS_S for the metrics that the spec promises; call it when the run has ended."""
        if spec is None or self.head is None or self.head.phase != "done":
            return
        agents = spec.agents.min if spec.evaluate.agents else 0
        try:
            async with asyncio.timeout(LAST_METRICS_S):
                while not self._has_metrics(self.head.version, spec.evaluate.center, agents):
                    self.changed.clear()
                    await self.changed.wait()
        except TimeoutError:
            pass

    def _has_metrics(self, version: int, evaluated: bool, agents: int) -> bool:
        own = sum(1 for agent in self.state.agents.values() if agent.metrics)
        return self.state.is_complete(version, evaluated=evaluated) and own >= agents

    async def updates(self, spec: RunSpec | None = None) -> AsyncIterator[Progress]:
        """Yield the run's progress whenever something has changed, at least once and with its end.

        Changes that happen while the consumer is busy are joined in one progress. Close the generator (`contextlib.aclosing`)
        to leave early.

        Raises:
            RunFailed: see `until_ended`.
        """
        ending = asyncio.create_task(self.until_ended())
        try:
            while not ending.done():
                waiting = asyncio.create_task(self.changed.wait())
                try:
                    await asyncio.wait({ending, waiting}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    waiting.cancel()
                self.changed.clear()
                if not ending.done():
                    yield self._progress()
            await ending
            await self.last_metrics(spec)
            yield self._progress()
        finally:
            ending.cancel()
            await asyncio.gather(ending, return_exceptions=True)

    def _progress(self) -> Progress:
        return Progress(self.head, self.state, self.state.take_events())


async def report_standstill(follower: RunFollower, say: Say) -> NoReturn:
    """Report why the run does not move, at growing intervals, until cancelled."""
    standstill = Standstill()
    while True:
        if text := standstill.look(follower.fleet, follower.head, time.monotonic()):
            say("warning", text)
        await asyncio.sleep(LOOK_S)


async def first_of(*works: Coroutine[Any, Any, T]) -> T:
    """Return the result of the work that ends first, or raise its error; cancel the others and wait for their end."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(iter(done)).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
