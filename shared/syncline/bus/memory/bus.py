"""The bus port in memory: a deterministic broker with streams and accounts, in one event loop.

This broker is not a mock. `MemoryBus` behaves as `NatsBus` does on nats-server 2.15, down to the bytes that a message takes
in a stream, and both pass one contract suite (`tests/bus/contract.py`). Services run on either without change, in real time
or on an event loop with virtual time.

The broker uses no thread, no clock but the event loop's, and no randomness. Operations take effect in the order of the
calls, and a given `Network` decides about delays and losses. A test can also cut a client off, stop the broker, set its
store back to an earlier fsync, and observe every operation before and after its effect.

*Order of delivery and storing.* As on a real server, a message on a stream's subject takes two independent ways: to the
core subscribers and into the stream. A subscriber may receive the message before the stream has stored the message, and a
`get` right after a `publish` may miss the message; only the acknowledgement of a `put` guarantees the storing.
`Network.delay("broker", stream, "store")` separates the two moments.
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
    """The bus port for one client of a `MemoryBroker`; `MemoryBroker.connect` makes one. `Bus` documents the methods.

    As with NATS, a client has two connections, so that small messages do not wait behind bulk data.
    """

    def __init__(self, broker: Router, control: Lane, bulk: Lane) -> None:
        self._broker = broker
        self._control = control
        self._bulk = bulk

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

    async def check_store(self, *streams: str) -> None:
        with self._operation("check_store", *streams) as now:
            for stream in streams:
                held = partial(self._broker.stream, stream, Unavailable)
                await self._ask_now(now, f"$JS.API.STREAM.PURGE.{stream}", held)

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
        """Announce the body as one operation to the hooks of the broker."""
        return self._broker.hooks.around(self._control.client.name, name, arguments)

    def _check(self, subject: str, data: bytes, headers: int = 0) -> None:
        """Raise Unavailable for a subject that is not valid or a message that is too large. `headers`: their size in bytes."""
        checked(subject)
        if headers + len(data) > self.max_payload:
            raise Unavailable(f"{subject}: {len(data)} bytes exceed the broker's max_payload of {self.max_payload}")

    async def _put(
        self, now: Operation, subject: str, data: bytes, expected: int | None = None, *, bulk: bool = False
    ) -> int:
        """Store a message and return its sequence number. `expected`: the revision of a compare-and-set, or None."""
        self._check(subject, data, 0 if expected is None else CAS_HEADER_BYTES)
        message = Message(subject, bytes(data), expected=expected, operation=now)
        if bulk:
            result = (await self._bulk.request_bulk(message, now.name, len(data))).result
        else:
            result = (await self._control.request(message, now.name, ANSWER_S)).result
        if isinstance(result, BusError):
            raise result
        if not isinstance(result, int):
            raise Unavailable(f"{subject}: a subscriber answered, not a stream")
        return result

    async def _get(self, now: Operation, stream: str, subject: str, *, bulk: bool = False) -> Stored | None:
        held = partial(self._broker.stream, stream, NoResponders)
        api = f"$JS.API.DIRECT.GET.{stream}.{subject}"
        return await self._ask(now, api, lambda: held().last(subject), bulk=bulk)

    async def _state(self, now: Operation, stream: str, subjects: str) -> StreamState:
        held = partial(self._broker.stream, stream, Unavailable)
        return await self._ask(now, f"$JS.API.STREAM.INFO.{stream}", lambda: held().state(subjects))

    async def _ensure(self, now: Operation, name: str, config: StreamConfig | BucketConfig) -> None:
        shape = Shape.of(config)
        await self._ask(now, f"$JS.API.STREAM.CREATE.{name}", lambda: self._broker.store.ensure(name, shape))

    async def _ask_now(self, now: Operation, subject: str, ask: Callable[[], T]) -> T:
        """Act as `_ask`, but raise Unreachable at once while the connection is lost."""
        self._must_be_up(subject)
        return await self._ask(now, subject, ask)

    def _must_be_up(self, subject: str) -> None:
        if not self._control.up:
            raise Unreachable(f"{subject}: the connection to the broker is lost")

    async def _ask(self, now: Operation, subject: str, ask: Callable[[], T], *, bulk: bool = False) -> T:
        """Send a request to the JetStream API and return its result.

        Args:
            now: the bus operation, for the hooks.
            subject: the API subject, which decides about the permission.
            ask: the work of JetStream, done when the request arrives. A BusError is the answer.
            bulk: whether the request uses the bulk connection and its time limit.
        """
        message = Message(checked(subject), ask=ask, operation=now)
        if bulk:
            result = (await self._bulk.request_bulk(message, now.name, self.max_payload)).result
        else:
            result = (await self._control.request(message, now.name, ANSWER_S)).result
        if isinstance(result, BusError):
            raise result
        return cast(T, result)


class MemoryBroker(Router):
    """A broker in memory. `connect` makes clients. All delays pass on the running event loop."""

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
        """Make a broker with an empty store.

        Args:
            network: delays and losses; by default `Instant`.
            clock: returns seconds since the Unix epoch; by default the event loop's time plus a constant.
            max_payload: the size of the largest message in bytes, headers included.
            max_store_bytes: room that all streams together can reserve; None: no limit.
        """
        super().__init__(network or Instant(), Store(self.stream_type, max_store_bytes), clock, max_payload)
        self._cut: dict[str, None] = {}
        self._running = True

    def connect(self, name: str, account: Account = "CORE", identity: str = "", *, inbox: str = "") -> MemoryBus:
        """Connect a client.

        Args:
            name: the name of the client for `cut`, `reconnect`, the network and the hooks.
            account: the account of its key.
            identity: the owner of its key; by default `name`, or "watch" in the account WATCH.
            inbox: the name in its inbox subjects; by default `identity`.

        Raises:
            Unreachable: the broker is stopped, or the client is cut off.
        """
        if not self._running or name in self._cut:
            raise Unreachable("no broker answers")
        client = ClientId(name, account, identity or (WATCH if account == "WATCH" else name))
        return self.bus_type(self, self._lane(client, inbox), self._lane(client, inbox))

    def before_op(self, hook: Hook) -> None:
        """Add a hook. The broker calls it in each phase of every bus operation, as `Operation` describes."""
        self.hooks.add(hook)

    def cut(self, name: str) -> None:
        """Break the connections of a client. The client cannot reconnect until `reconnect`."""
        self._cut[name] = None
        for lane in self._named(name):
            lane.cut()

    def reconnect(self, name: str) -> None:
        """Let a client that was cut off reconnect, as soon as the broker runs."""
        self._cut.pop(name, None)
        for lane in self._named(name):
            if self._running:
                lane.reconnect()

    def stop(self) -> None:
        """Break all connections. Messages on their way into a stream are lost; stored messages stay."""
        self._running = False
        for pipe in self._storing.values():
            pipe.cut()
        self._replies.clear()
        for lane in list(self._lanes):
            lane.cut()

    def start(self) -> None:
        """Accept connections again. Clients that are not cut off reconnect."""
        self._running = True
        for lane in list(self._lanes):
            if lane.client.name not in self._cut:
                lane.reconnect()

    def restart(self) -> None:
        """Stop and start: every connection is lost once, and no stored message."""
        self.stop()
        self.start()

    def snapshot(self) -> Store:
        """Return a copy of the store, as of an fsync at this moment. `roll_back` takes it."""
        return self.store.copy()

    def roll_back(self, to: Store) -> None:
        """Simulate a power failure: restart with the store of an earlier fsync. Writes acknowledged since then are lost."""
        self.stop()
        self.store, self._storing = to.copy(), {}
        self.start()

    def _named(self, name: str) -> list[Lane]:
        return [lane for lane in self._lanes if lane.client.name == name]
