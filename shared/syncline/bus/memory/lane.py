"""One connection of the bus in memory: the client's half. Package-private; knows no stream and no account's permissions.

A connection is two pipes, and a pipe keeps its order, as TCP does: nothing overtakes on one connection, whatever its
`Network` says. A `Lane` heals itself as the NATS one does, and fails as that one does: what is under way when the connection
goes fails at once, what is asked meanwhile waits in a bounded buffer *and is still sent later*, even when the caller has long
been told Unreachable. It draws no random number and reads no clock but the event loop's.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

from syncline.bus.base import WAITING_BYTES, Delivery, Handler, Stored
from syncline.bus.connection_state import State, moved
from syncline.bus.memory.faults import BROKER, Network, Operation
from syncline.bus.server.accounts import Account
from syncline.bus.silence import SILENT_ANSWERS, Queue, Silent, Turn, in_turn
from syncline.errors import BusError, Denied, NoResponders, Unreachable

log = logging.getLogger(__name__)

PENDING_BYTES = 4 << 20  # what waits for a connection to come back, per lane


@dataclass(frozen=True, slots=True)
class Who:
    """A client: the name it is cut and seen by, and whose key it holds."""

    name: str
    account: Account
    identity: str


@dataclass(frozen=True, slots=True)
class Message:
    """What travels. Between a client and JetStream its arguments and results do, and not their JSON."""

    subject: str
    data: bytes = b""
    reply: str = ""
    expected: int | None = None  # a compare-and-set: the revision that its subject must be at
    ask: Callable[[], object] | None = None  # a question to JetStream: what is to be done there
    result: Any = None  # JetStream's answer, or the error it is
    operation: Operation | None = None

    def answered_to(self, reply: str) -> Message:
        """The same, but for where its answer is to go."""
        return Message(self.subject, self.data, reply, self.expected, self.ask, self.result, self.operation)

    @property
    def size_bytes(self) -> int:
        """What it takes on the way, but for headers: subject and content."""
        held = self.result if isinstance(self.result, list) else [self.result]
        return len(self.subject) + len(self.data) + sum(len(m.data) for m in held if isinstance(m, Stored))


class Server(Protocol):
    """The broker, as its connections see it."""

    network: Network

    def arrive(self, lane: Lane, message: Message) -> None: ...
    def listen(self, ear: Ear) -> None: ...
    def unlisten(self, ear: Ear) -> None: ...
    def forget(self, lane: Lane) -> None: ...


class Pipe:
    """One direction of a connection: what is sent later arrives later."""

    def __init__(self) -> None:
        self._calls: deque[Callable[[], None]] = deque()
        self._busy_until_s = 0.0
        self._life = 0

    def send(self, delay_s: float, arrive: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._calls.append(arrive)
        self._busy_until_s = max(self._busy_until_s, now + delay_s)
        if self._busy_until_s > now:
            loop.call_at(self._busy_until_s, self._next, self._life)
        else:
            loop.call_soon(self._next, self._life)

    def _next(self, life: int) -> None:
        if life == self._life:
            self._calls.popleft()()

    def cut(self) -> None:
        """What is in it is lost."""
        self._calls.clear()
        self._busy_until_s = 0.0
        self._life += 1


class Ear:
    """A subscription as the broker knows it: a pattern, and what to do at the client with a message that matches."""

    kind = "answer"

    def __init__(self, lane: Lane, pattern: str, hear: Callable[[Message], None]) -> None:
        self.lane, self.pattern, self.hear = lane, pattern, hear


class Listener(Ear):
    """A user's subscription: a bounded queue, and a task that calls the handler for one message after the other."""

    kind = "deliver"

    def __init__(self, lane: Lane, pattern: str, handler: Handler, limit: int) -> None:
        super().__init__(lane, pattern, self._push)
        self._handler = handler
        self._queue: asyncio.Queue[Message] = asyncio.Queue(limit)
        self._bytes = 0  # that wait
        self._task = asyncio.create_task(self._serve())

    def _push(self, message: Message) -> None:
        size = len(message.data)
        if not self._queue.full() and self._bytes + size < WAITING_BYTES:
            self._queue.put_nowait(message)
            self._bytes += size

    async def _serve(self) -> None:
        while True:
            message = await self._queue.get()
            self._bytes -= len(message.data)
            try:
                await self._handler(Delivery(message.subject, message.data, message.reply))
            except asyncio.CancelledError:
                if self._task.cancelling():
                    raise
                log.exception("the handler of %s was cancelled", message.subject)
            except Exception:
                log.exception("the handler of %s failed", message.subject)  # our own bug; the next message is handled

    async def unsubscribe(self) -> None:
        self.lane.drop(self)

    def end(self) -> asyncio.Task[None]:
        self._task.cancel()
        return self._task


@dataclass(slots=True)
class _Waiting:
    subject: str
    answer: asyncio.Future[Message]


@dataclass(slots=True)
class _Buffer:
    """What is to be sent when the connection is back."""

    bytes: int = 0
    sends: list[tuple[str, int, Callable[[], None]]] = field(default_factory=list)


class Lane:
    """The client's half of one connection. `state` is what both halves see: neither waits for a ping to find out."""

    def __init__(self, server: Server, who: Who, inbox: str) -> None:
        self.who, self.state, self.losses = who, moved(State.NEW, State.CONNECTED), 0
        self.reconnected: list[Callable[[], None]] = []
        self._server = server
        self._outgoing, self._incoming = Pipe(), Pipe()
        self._inbox = Ear(self, f"{inbox}.*", self._on_answer)
        self._ears: dict[Ear, None] = {}  # in the order of subscription
        self._waiting: dict[str, _Waiting] = {}  # by reply subject
        self._asked = 0
        self._buffer = _Buffer()
        self._queue = Queue()  # of bulk
        self._silent = 0

    @property
    def up(self) -> bool:
        return self.state is State.CONNECTED

    @property
    def closed(self) -> bool:
        return self.state is State.CLOSED

    def _move(self, to: State) -> None:
        self.state = moved(self.state, to)

    # -- talking ---------------------------------------------------------------------------------------------------
    def publish(self, message: Message, kind: str) -> None:
        self._send(kind, message.size_bytes, partial(self._server.arrive, self, message))

    async def request(self, message: Message, kind: str, timeout_s: float, *, of_broker: bool = True) -> Message:
        """The first answer. Raises NoResponders, Unreachable, Denied; another error of JetStream's is its result.
        `of_broker`: it is the broker who answers, so that its silence says something about the connection."""
        loop = asyncio.get_running_loop()
        waiting = _Waiting(message.subject, loop.create_future())
        late = Unreachable(f"{message.subject}: no answer within {timeout_s:g} s")
        timer = loop.call_later(timeout_s, _fail, waiting, late)
        try:
            answer = await self._answer(waiting, message, kind)
        except Unreachable:
            self._silent += of_broker
            if self._silent >= SILENT_ANSWERS and not self.closed:
                self._begin_again()
            raise
        finally:
            timer.cancel()
        self._silent = 0
        return answer

    async def request_bulk(self, message: Message, kind: str, size_bytes: int) -> Message:
        """The same, of so many bytes there or back: it has the time that a thin link takes, and is not kept for later."""
        if not self.up:
            raise Unreachable(f"{message.subject}: the connection to the broker is lost")
        loop = asyncio.get_running_loop()
        waiting = _Waiting(message.subject, loop.create_future())

        def late(turn: Turn) -> None:
            why = Silent if turn.overtaken_at_s is None else Unreachable
            _fail(waiting, why(f"{message.subject}: no answer in time"))

        try:
            with in_turn(self._queue, size_bytes, late):
                return await self._answer(waiting, message, kind)
        except Silent:
            if not self.closed:
                self._begin_again()
            raise

    async def _answer(self, waiting: _Waiting, message: Message, kind: str) -> Message:
        self._asked += 1
        reply = self._inbox.pattern.removesuffix("*") + str(self._asked)
        self._waiting[reply] = waiting
        try:
            if self._inbox not in self._ears:  # with the first request: a mere listener may not have an inbox
                self._add(self._inbox)
            self.publish(message.answered_to(reply), kind)
            answer = await waiting.answer
        finally:
            del self._waiting[reply]
        if isinstance(answer.result, NoResponders):
            raise answer.result
        return answer

    def listen(self, pattern: str, handler: Handler, limit: int) -> Listener:
        self._check_open()
        listener = Listener(self, pattern, handler, limit)
        self._add(listener)
        return listener

    def _add(self, ear: Ear) -> None:
        self._check_open()
        self._ears[ear] = None
        if self.up:  # otherwise the broker is told when the connection is back
            self._send("subscribe", 0, partial(self._server.listen, ear))

    def drop(self, ear: Listener) -> None:
        if ear not in self._ears:
            return
        del self._ears[ear]
        ear.end()
        if self.up and not self.closed:
            self._send("unsubscribe", 0, partial(self._server.unlisten, ear))

    def _send(self, kind: str, size: int, arrive: Callable[[], None]) -> None:
        self._check_open()
        if not self.up:
            if self._buffer.bytes + size > PENDING_BYTES:
                raise Unreachable("no connection to the broker, and too much waits for it already")
            self._buffer.bytes += size
            self._buffer.sends.append((kind, size, arrive))
            return
        delay_s = self._server.network.delay(self.who.name, BROKER, kind, size)
        if delay_s is not None:
            self._outgoing.send(delay_s, arrive)

    def _check_open(self) -> None:
        if self.closed:
            raise Unreachable("the connection is closed")

    # -- hearing: what the broker calls --------------------------------------------------------------------------
    def receive(self, kind: str, size: int, arrive: Callable[[], None]) -> None:
        if not self.up:
            return
        delay_s = self._server.network.delay(BROKER, self.who.name, kind, size)
        if delay_s is not None:
            self._incoming.send(delay_s, arrive)

    def deliver(self, ear: Ear, message: Message) -> None:
        self.receive(ear.kind, message.size_bytes, partial(self._hear, ear, message))

    def refuse(self, what: Literal["publish", "subscribe"], subject: str) -> None:
        self.receive("refusal", len(subject), partial(self._on_refusal, what, subject))

    def _hear(self, ear: Ear, message: Message) -> None:
        if ear in self._ears:
            ear.hear(message)

    def _on_answer(self, message: Message) -> None:
        waiting = self._waiting.get(message.subject)
        if waiting is not None and not waiting.answer.done():
            waiting.answer.set_result(message)

    def _on_refusal(self, what: Literal["publish", "subscribe"], subject: str) -> None:
        denied = Denied(f"the broker's permissions forbid {what} on {subject!r}")
        deaf = what == "subscribe" and subject == self._inbox.pattern  # no answer will ever come
        if deaf:
            self._ears.pop(self._inbox, None)
        for waiting in self._waiting.values():
            if deaf or (what == "publish" and waiting.subject == subject):
                _fail(waiting, denied)

    # -- breaking and healing --------------------------------------------------------------------------------------
    def cut(self) -> None:
        self.losses += self.up
        if self.state in (State.CONNECTED, State.RECONNECTING):
            self._move(State.LOST)
        self._outgoing.cut()
        self._incoming.cut()
        self._server.forget(self)
        self._fail_all(Unreachable("the connection to the broker was lost"))

    def reconnect(self) -> None:
        if self.state is not State.LOST:
            return
        self._move(State.RECONNECTING)
        self._incoming.send(self._server.network.delay(BROKER, self.who.name, "connect", 0) or 0.0, self._connected)

    def _begin_again(self) -> None:
        """No answers come, and the connection looks alive."""
        self._silent = 0
        if self.up:
            self.cut()
            self.reconnect()

    def _connected(self) -> None:
        if self.closed:
            return
        self._move(State.CONNECTED)
        for ear in self._ears:
            self._send("subscribe", 0, partial(self._server.listen, ear))
        buffer, self._buffer = self._buffer, _Buffer()
        for kind, size, arrive in buffer.sends:
            self._send(kind, size, arrive)
        pong = partial(self._incoming.send, 0.0, self._back)
        self._outgoing.send(0.0, pong)  # the broker has all that was sent before

    def _back(self) -> None:
        for call in self.reconnected:
            call()

    def _fail_all(self, error: BusError) -> None:
        self._queue = Queue()
        for waiting in self._waiting.values():
            _fail(waiting, error)

    async def close(self) -> None:
        """What was published before still goes out; what waits for an answer fails."""
        if self.closed:
            return
        was_up = self.up
        self._move(State.CLOSED)
        self._fail_all(Unreachable("the connection is closed"))
        if was_up:
            self._outgoing.send(0.0, partial(self._server.forget, self))
        else:
            self._server.forget(self)
        ended = [ear.end() for ear in self._ears if isinstance(ear, Listener)]
        self._ears.clear()
        await asyncio.gather(*(t for t in ended if t is not asyncio.current_task()), return_exceptions=True)


def _fail(waiting: _Waiting, error: BusError) -> None:
    if not waiting.answer.done():
        waiting.answer.set_exception(error)
