"""The bus port in memory: a whole broker with its streams and accounts, in one event loop, and deterministic.

The broker is no mock. It behaves as nats-server 2.15 does behind `NatsBus`, down to the bytes that a message takes in a
stream, and both pass one contract suite (`tests/bus/contract.py`). Services run on this bus unchanged, on real time or
on a loop with virtual time.

The module uses no thread, no real time and no randomness. The time is the event loop's, requests are carried out in
their order, and delays and losses come from a `Network` that is passed in. A test may also cut a client off, stop the
broker, return its store to an earlier fsync, and watch every operation before and after its execution.

*Order of delivery.* As on a real server, a message on a stream's subject goes to the core subscribers and, on a
separate way, into the stream. A subscriber may get the message before the stream holds it, and a `get` right after a
`publish` may miss the message; only the acknowledgement of a `put` guarantees storage. `Network.delay("broker", stream,
"store")` separates the two moments.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TypeVar, cast

from syncline.bus.base import BucketConfig, Entry, Handler, Stored, StreamConfig, StreamState, Subscription
from syncline.bus.memory.faults import Hook, Instant, Network, Operation
from syncline.bus.memory.lane import ClientId, Lane, Message
from syncline.bus.memory.routing import Router
from syncline.bus.memory.store import CAS_HEADER_BYTES, Shape, Store, Stream, checked
from syncline.bus.server.accounts import MAX_PAYLOAD_BYTES, WATCH, Account
from syncline.bus.silence import ANSWER_S
from syncline.errors import BusError, NoResponders, Unavailable, Unreachable

T = TypeVar("T")


class MemoryBus:
    """A client of a `MemoryBroker`: the bus port. Like the NATS client, each has two connections."""

    def __init__(self, broker: Router, control: Lane, bulk: Lane) -> None:
        self._broker, self._control, self._bulk = broker, control, bulk

    async def close(self) -> None:
        with self._operation("close"):
            await asyncio.gather(self._control.close(), self._bulk.close())

    @property
    def max_payload(self) -> int:
        return self._broker.max_payload

    @property
    def losses(self) -> int:
        return self._control.losses + self._bulk.losses

    def when_reconnected(self, call: Callable[[], None]) -> None:
        self._control.reconnected.append(call)

    # -- key-value -------------------------------------------------------------------------------------------------
    async def ensure_bucket(self, config: BucketConfig) -> None:
        with self._operation("ensure_bucket", config) as now:
            await self._ensure(now, f"KV_{config.name}", config)

    async def kv_get(self, bucket: str, key: str) -> Entry | None:
        with self._operation("kv_get", bucket, key) as now:
            stored = await self._get(now, f"KV_{bucket}", f"$KV.{bucket}.{key}")
            return None if stored is None else Entry(stored.data, stored.seq)

    async def kv_create(self, bucket: str, key: str, value: bytes) -> int:
        with self._operation("kv_create", bucket, key, value) as now:
            self._must_be_up(key)
            return await self._put(now, f"$KV.{bucket}.{key}", value, 0)

    async def kv_update(self, bucket: str, key: str, value: bytes, revision: int) -> int:
        with self._operation("kv_update", bucket, key, value, revision) as now:
            self._must_be_up(key)
            return await self._put(now, f"$KV.{bucket}.{key}", value, revision)

    async def kv_keys(self, bucket: str) -> list[str]:
        with self._operation("kv_keys", bucket) as now:
            prefix = f"$KV.{bucket}."
            state = await self._state(now, f"KV_{bucket}", f"{prefix}>")
            return sorted(subject.removeprefix(prefix) for subject in state.subjects)

    # -- streams ---------------------------------------------------------------------------------------------------
    async def ensure_stream(self, config: StreamConfig) -> None:
        with self._operation("ensure_stream", config) as now:
            await self._ensure(now, config.name, config)

    async def delete_stream(self, stream: str) -> None:
        with self._operation("delete_stream", stream) as now:
            await self._ask_now(now, f"$JS.API.STREAM.DELETE.{stream}", lambda: self._broker.delete(stream))

    async def fit_stream(self, stream: str) -> None:
        with self._operation("fit_stream", stream) as now:
            held = partial(self._broker.stream, stream, Unavailable)
            await self._ask_now(now, f"$JS.API.STREAM.UPDATE.{stream}", lambda: held().fit())

    async def put(self, subject: str, data: bytes, *, bulk: bool = False) -> int:
        with self._operation("put", subject, data) as now:
            return await self._put(now, subject, data, bulk=bulk)

    async def get(self, stream: str, subject: str, *, bulk: bool = False) -> Stored | None:
        with self._operation("get", stream, subject) as now:
            return await self._get(now, stream, subject, bulk=bulk)

    async def read(self, stream: str, from_seq: int, limit: int) -> list[Stored]:
        with self._operation("read", stream, from_seq, limit) as now:
            held = partial(self._broker.stream, stream, NoResponders)
            return await self._ask(now, f"$JS.API.DIRECT.GET.{stream}", lambda: held().read(from_seq, limit))

    async def state(self, stream: str, subjects: str = "") -> StreamState:
        with self._operation("state", stream, subjects) as now:
            return await self._state(now, stream, subjects)

    async def purge(self, stream: str, subject: str) -> None:
        with self._operation("purge", stream, subject) as now:
            held = partial(self._broker.stream, stream, Unavailable)
            await self._ask_now(now, f"$JS.API.STREAM.PURGE.{stream}", lambda: held().purge(subject))

    # -- core ------------------------------------------------------------------------------------------------------
    async def publish(self, subject: str, data: bytes) -> None:
        with self._operation("publish", subject, data) as now:
            self._check(subject, data)
            self._control.publish(Message(subject, bytes(data), operation=now), now.name)

    async def subscribe(self, subject: str, handler: Handler, *, limit: int = 4096) -> Subscription:
        with self._operation("subscribe", subject):
            return self._control.subscribe(checked(subject, pattern=True), handler, limit)

    async def request(self, subject: str, data: bytes, timeout_s: float) -> bytes:
        with self._operation("request", subject, data, timeout_s) as now:
            self._check(subject, data)
            message = Message(subject, bytes(data), operation=now)
            return (await self._control.request(message, now.name, timeout_s, of_broker=False)).data

    # -- the JetStream API -----------------------------------------------------------------------------------------
    def _operation(self, name: str, *arguments: object) -> AbstractContextManager[Operation]:
        return self._broker.hooks.around(self._control.who.name, name, arguments)

    def _check(self, subject: str, data: bytes, headers: int = 0) -> None:
        checked(subject)
        if headers + len(data) > self.max_payload:
            raise Unavailable(f"{subject}: {len(data)} bytes are more than the broker's max_payload")

    async def _put(
        self, now: Operation, subject: str, data: bytes, expected: int | None = None, *, bulk: bool = False
    ) -> int:
        self._check(subject, data, 0 if expected is None else CAS_HEADER_BYTES)
        message = Message(subject, bytes(data), expected=expected, operation=now)
        if bulk:
            result = (await self._bulk.request_bulk(message, now.name, len(data))).result
        else:
            result = (await self._control.request(message, now.name, ANSWER_S)).result
        if isinstance(result, BusError):
            raise result
        if not isinstance(result, int):
            raise Unavailable(f"{subject}: the answer is not an acknowledgement of a stream")
        return result

    async def _get(self, now: Operation, stream: str, subject: str, *, bulk: bool = False) -> Stored | None:
        held = partial(self._broker.stream, stream, NoResponders)
        where = f"$JS.API.DIRECT.GET.{stream}.{subject}"
        return await self._ask(now, where, lambda: held().last(subject), bulk=bulk)

    async def _state(self, now: Operation, stream: str, subjects: str) -> StreamState:
        held = partial(self._broker.stream, stream, Unavailable)
        return await self._ask(now, f"$JS.API.STREAM.INFO.{stream}", lambda: held().state(subjects))

    async def _ensure(self, now: Operation, name: str, config: StreamConfig | BucketConfig) -> None:
        shape = Shape.of(config)
        await self._ask(now, f"$JS.API.STREAM.CREATE.{name}", lambda: self._broker.store.ensure(name, shape))

    async def _ask_now(self, now: Operation, subject: str, ask: Callable[[], T]) -> T:
        self._must_be_up(subject)
        return await self._ask(now, subject, ask)

    def _must_be_up(self, what: str) -> None:
        if not self._control.up:
            raise Unreachable(f"{what}: the connection to the broker is lost")

    async def _ask(self, now: Operation, subject: str, ask: Callable[[], T], *, bulk: bool = False) -> T:
        """Ask JetStream, if the permissions allow the question, and return its result."""
        message = Message(checked(subject), ask=ask, operation=now)
        if bulk:
            result = (await self._bulk.request_bulk(message, now.name, self.max_payload)).result
        else:
            result = (await self._control.request(message, now.name, ANSWER_S)).result
        if isinstance(result, BusError):
            raise result
        return cast(T, result)


class MemoryBroker(Router):
    """The server. Its clients come from `connect`. All times pass in the running event loop."""

    stream_type: type[Stream] = Stream
    bus_type: type[MemoryBus] = MemoryBus

    def __init__(
        self,
        network: Network | None = None,
        *,
        clock: Callable[[], float] | None = None,
        max_payload: int = MAX_PAYLOAD_BYTES,
        max_store_bytes: int | None = None,
    ) -> None:
        """Make a broker without streams.

        Args:
            network: delays and losses; None: no delay and no loss.
            clock: seconds since the epoch; None: the event loop's time plus a constant.
            max_payload: bytes of a message, at most.
            max_store_bytes: bytes that all streams together may reserve; None: no limit.
        """
        super().__init__(network or Instant(), Store(self.stream_type, max_store_bytes), clock, max_payload)
        self._cut: dict[str, None] = {}
        self._running = True

    def connect(self, name: str, account: Account = "CORE", identity: str = "", *, inbox: str = "") -> MemoryBus:
        """Make a client.

        Args:
            name: any name that tells the client from others, for `cut` and `reconnect`.
            identity: the owner of the client's key; by default `name`.
            inbox: the name in the client's inbox; by default its identity.

        Raises:
            Unreachable: the broker is stopped, or the client is cut off.
        """
        if not self._running or name in self._cut:
            raise Unreachable("no broker answers")
        who = ClientId(name, account, identity or (WATCH if account == "WATCH" else name))
        return self.bus_type(self, self._lane(who, inbox), self._lane(who, inbox))

    def before_op(self, hook: Hook) -> None:
        """Call `hook(operation)` before each bus operation, after its execution, and after its end."""
        self.hooks.add(hook)

    def cut(self, name: str) -> None:
        """Cut the connections of a client, until `reconnect`."""
        self._cut[name] = None
        for lane in self._named(name):
            lane.cut()

    def reconnect(self, name: str) -> None:
        """Let a client that was cut off connect again."""
        self._cut.pop(name, None)
        for lane in self._named(name):
            if self._running:
                lane.reconnect()

    def stop(self) -> None:
        """Stop the broker: all connections are lost, with the messages on their way into streams. The content of the
        streams stays.
        """
        self._running = False
        for pipe in self._storing.values():
            pipe.cut()
        self._replies.clear()
        for lane in list(self._lanes):
            lane.cut()

    def start(self) -> None:
        """Start the broker again, and let its clients reconnect."""
        self._running = True
        for lane in list(self._lanes):
            if lane.who.name not in self._cut:
                lane.reconnect()

    def restart(self) -> None:
        self.stop()
        self.start()

    def snapshot(self) -> Store:
        """Return a copy of the store: the state after a later power failure, if this moment were the last fsync."""
        return self.store.copy()

    def roll_back(self, to: Store) -> None:
        """Simulate a power failure: restart with the store of an earlier fsync. Acknowledged writes since then are
        lost.
        """
        self.stop()
        self.store, self._storing = to.copy(), {}
        self.start()

    def _named(self, name: str) -> list[Lane]:
        return [lane for lane in self._lanes if lane.who.name == name]
