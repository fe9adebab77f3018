"""What the contract's tests need: a broker under test, whatever it is, and ways to look at it."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from syncline.bus.base import BucketConfig, Bus, Delivery, StreamConfig
from syncline.bus.memory.bus import MemoryBroker
from syncline.bus.memory.faults import Instant
from syncline.bus.server.accounts import Account
from syncline.bus.server.violations import Violation
from syncline.errors import BusError, NoResponders
from syncline.wire.subjects import RUNS_BUCKET

PATIENCE_S = 10.0
QUIET_S = 0.1  # how long to listen for what should not come
ROOM = 1 << 20
MAX_STORE_BYTES = 4 << 30  # of the broker under test
HEAD = ("syncline-runs", "r.head")
MODEL, OFFERS, UPDATES = "SYNCLINE_MODEL_r", "SYNCLINE_OFFERS_r", "SYNCLINE_UPDATES_r"
S = StreamConfig("S", ("s.>",), ROOM)
B = BucketConfig("b", ROOM, 1000)


class Backend(Protocol):
    """A broker under test."""

    async def connect(self, who: str, name: str = "") -> Bus:
        """`who` holds the key; `name` is what it calls itself, by default the same."""
        ...

    async def stop(self) -> None: ...

    async def start(self) -> None: ...

    async def hang(self) -> None:
        """Its connections look alive, and nothing is answered."""
        ...

    async def wake(self) -> None: ...

    def violations(self) -> list[Violation]:
        """All so far."""
        ...


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its time stands still while anything can be done, and then jumps to the next timer."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0

    def time(self) -> float:
        return self._now_s

    def _run_once(self) -> None:
        loop: Any = self
        while loop._scheduled and loop._scheduled[0].cancelled():
            heapq.heappop(loop._scheduled)._scheduled = False
            loop._timer_cancelled_count -= 1
        if not loop._ready and loop._scheduled:
            self._now_s = max(self._now_s, loop._scheduled[0].when())
        super()._run_once()  # type: ignore[misc]


class _Mute(Instant):
    """No answer arrives."""

    def delay(self, source: str, target: str, kind: str, size_bytes: int) -> float | None:
        return None if kind == "answer" else 0.0


class MemoryBackend:
    """The bus in memory, be it a sound one or not."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.broker, self._network = broker, broker.network
        self._buses: list[Bus] = []

    async def connect(self, who: str, name: str = "") -> Bus:
        account: Account = "CORE" if who == "coordinator" else "WATCH" if who == "watch" else "FLEET"
        self._buses.append(self.broker.connect(f"{who} {len(self._buses)}", account, who, inbox=name))
        return self._buses[-1]

    async def stop(self) -> None:
        self.broker.stop()

    async def start(self) -> None:
        self.broker.start()

    async def hang(self) -> None:
        self.broker.network = _Mute()

    async def wake(self) -> None:
        self.broker.network = self._network

    def violations(self) -> list[Violation]:
        return self.broker.violations

    async def close(self) -> None:
        for bus in self._buses:
            await bus.close()


class Heard(list[Delivery]):
    async def __call__(self, delivery: Delivery) -> None:
        self.append(delivery)

    @property
    def data(self) -> list[bytes]:
        return [delivery.data for delivery in self]


class HeardSlowly(Heard):
    """Stays with the first message until `gate` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()

    async def __call__(self, delivery: Delivery) -> None:
        self.append(delivery)
        await self.gate.wait()


async def until(true: Callable[[], bool | Awaitable[bool]], what: str) -> None:
    deadline = asyncio.get_running_loop().time() + PATIENCE_S
    while True:
        answer = true()
        if answer if isinstance(answer, bool) else await answer:
            return
        assert asyncio.get_running_loop().time() < deadline, f"not within {PATIENCE_S:g} s: {what}"
        await asyncio.sleep(0.01)


async def settled(*buses: Bus) -> None:
    """The broker knows what each bus said before: what is asked behind it is answered."""
    for bus in buses:
        try:
            await bus.kv_get(RUNS_BUCKET, "settled")
        except NoResponders:
            pass


async def a_run(backend: Backend) -> Bus:
    """The coordinator of a run `r` that has a head, a model of one chunk, and streams for offers and updates."""
    core = await backend.connect("coordinator")
    await core.ensure_bucket(BucketConfig(RUNS_BUCKET, ROOM, 4096))
    await core.kv_create(*HEAD, b"HEAD")
    await core.ensure_stream(StreamConfig(MODEL, ("syncline.v1.r.model.>", "syncline.v1.r.outer.>"), 64 * ROOM))
    await core.ensure_stream(StreamConfig(OFFERS, ("syncline.v1.r.agent.*.offer",), ROOM))
    await core.ensure_stream(StreamConfig(UPDATES, ("syncline.v1.r.agent.*.update.*.*",), ROOM, write_once=True))
    await core.put("syncline.v1.r.model.b.0", b"MODEL")
    return core


async def outcome(call: Awaitable[object]) -> object:
    """What it returns, or the type of the error that it raises."""
    try:
        return await call
    except BusError as error:
        return next(kind for kind in type(error).__mro__ if kind.__module__ == BusError.__module__)


async def outcomes(*calls: Awaitable[object]) -> list[object]:
    return [await outcome(call) for call in calls]
