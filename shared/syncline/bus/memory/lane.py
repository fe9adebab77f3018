"""One connection of the bus in memory: the client's half. Package-private; independent of streams and permissions.

A connection consists of two pipes, and a pipe keeps its order, as TCP does: no message overtakes another on one
connection, whatever delays its `Network` has. A `Lane` heals itself and fails as the NATS one does: requests under way
fail at once when the connection is lost; later requests wait in a bounded buffer *and are still sent*, even when the
caller has long got Unreachable. The module draws no random number, and its only clock is the event loop's.
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

PENDING_BYTES = 4 << 20  # of messages that wait for the reconnection of one lane


@dataclass(frozen=True, slots=True)
class ClientId:
    """A client: the name that tests use for it, and the owner of its key."""

    name: str
    account: Account
    identity: str


@dataclass(frozen=True, slots=True)
class Message:
    """A message on its way. Between a client and JetStream, arguments and results travel as objects and not as JSON."""

    subject: str
    data: bytes = b""
    reply: str = ""
    expected: int | None = None  # a compare-and-set: the last sequence number that the subject must have
    ask: Callable[[], object] | None = None  # a request to the JetStream API: the work that JetStream performs
    result: Any = None  # the answer of JetStream: a value or an error
    operation: Operation | None = None  # the bus operation, for the hooks

    def answered_to(self, reply: str) -> Message:
        """Return the message with another reply subject."""
        return Message(self.subject, self.data, reply, self.expected, self.ask, self.result, self.operation)

    @property
    def size_bytes(self) -> int:
        """Return the bytes of subject and content, without headers."""
        held = self.result if isinstance(self.result, list) else [self.result]
        return len(self.subject) + len(self.data) + sum(len(m.data) for m in held if isinstance(m, Stored))


class Server(Protocol):
    """The broker, as its connections use it."""

    network: Network

    def arrive(self, lane: Lane, message: Message) -> None:
        """Handle a message that has arrived from a client."""
        ...

    def add_interest(self, interest: Interest) -> None:
        """Add a subscription, or refuse it."""
        ...

    def remove_interest(self, interest: Interest) -> None:
        """Remove a subscription."""
        ...

    def forget(self, lane: Lane) -> None:
        """Remove the subscriptions of a connection that is lost or closed."""
        ...


class Pipe:
    """One direction of a connection. Messages arrive in the order in which they were sent."""

    def __init__(self) -> None:
        self._calls: deque[Callable[[], None]] = deque()
        self._busy_until_s = 0.0  # the arrival of the last message, by the event loop's clock
        self._life = 0  # number of cuts, so that a timer of a dropped message does nothing

    def send(self, delay_s: float, arrive: Callable[[], None]) -> None:
        """Call `arrive` after the delay, and not before the messages sent earlier have arrived."""
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
        """Drop all messages on their way."""
        self._calls.clear()
        self._busy_until_s = 0.0
        self._life += 1


class Interest:
    """A subscription as the broker knows it: a pattern, and the client's function for a message that matches."""

    kind = "answer"

    def __init__(self, lane: Lane, pattern: str, on_message: Callable[[Message], None]) -> None:
        self.lane = lane
        self.pattern = pattern
        self.on_message = on_message


class HandlerQueue(Interest):
    """A user's subscription: a bounded queue, and a task that calls the handler for one message after the other."""

    kind = "deliver"

    def __init__(self, lane: Lane, pattern: str, handler: Handler, limit: int) -> None:
        super().__init__(lane, pattern, self._push)
        self._handler = handler
        self._queue: asyncio.Queue[Message] = asyncio.Queue(limit)
        self._bytes = 0  # of the messages that wait
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
        """Stop the delivery of messages. A second call changes nothing."""
        self.lane.drop(self)

    def end(self) -> asyncio.Task[None]:
        """Cancel the task that calls the handler, and return the task."""
        self._task.cancel()
        return self._task


@dataclass(slots=True)
class _Waiting:
    """A request that waits for its answer."""

    subject: str
    answer: asyncio.Future[Message]


@dataclass(slots=True)
class _Buffer:
    """The messages to send when the connection is back."""

    bytes: int = 0
    sends: list[tuple[str, int, Callable[[], None]]] = field(default_factory=list)  # kind, bytes, arrival


class Lane:
    """The client's half of one connection. Both halves share `state`: neither needs a ping to notice a loss."""

    def __init__(self, server: Server, client: ClientId, inbox: str) -> None:
        self.client = client
        self.state = moved(State.NEW, State.CONNECTED)
        self.losses = 0
        self.reconnected: list[Callable[[], None]] = []
        self._server = server
        self._outgoing = Pipe()
        self._incoming = Pipe()
        self._inbox = Interest(self, f"{inbox}.*", self._on_answer)
        self._subscriptions: dict[Interest, None] = {}  # in the order of subscription
        self._waiting: dict[str, _Waiting] = {}  # by reply subject
        self._asked = 0  # number of requests, for their reply subjects
        self._buffer = _Buffer()
        self._queue = Queue()  # the bulk requests
        self._silent = 0  # requests without an answer, in a row

    @property
    def up(self) -> bool:
        """Whether the connection works."""
        return self.state is State.CONNECTED

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.state is State.CLOSED

    def _move(self, to: State) -> None:
        self.state = moved(self.state, to)

    # -- sending ---------------------------------------------------------------------------------------------------
    def publish(self, message: Message, kind: str) -> None:
        """Send a message. `kind`: the name of the bus operation, for the network.

        Raises:
            Unreachable: the connection is closed, or is lost and its buffer is full.
        """
        self._send(kind, message.size_bytes, partial(self._server.arrive, self, message))

    async def request(self, message: Message, kind: str, timeout_s: float, *, of_broker: bool = True) -> Message:
        """Ask, and return the first answer. An error of JetStream other than the ones below is a result.

        Args:
            of_broker: the broker itself answers, so that its silence counts as a sign of a dead connection.

        Raises:
            NoResponders: the subject has no subscriber.
            Unreachable: no answer came within `timeout_s`, or the connection was lost.
            Denied: the broker's permissions forbid the request.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(message.subject, loop.create_future())
        late = Unreachable(f"{message.subject}: no answer within {timeout_s:g} s")
        timer = loop.call_later(timeout_s, _fail, waiting, late)
        try:
            answer = await self._answer(waiting, message, kind)
        except Unreachable:
            self._silent += of_broker
            if self._silent >= SILENT_ANSWERS and not self.closed:
                self._force_reconnect()
            raise
        finally:
            timer.cancel()
        self._silent = 0
        return answer

    async def request_bulk(self, message: Message, kind: str, size_bytes: int) -> Message:
        """Ask over a possibly thin link, and return the answer. Fails at once while the connection is lost.

        Args:
            size_bytes: bytes of the question or its answer, which decide how long the answer may take.
        """
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
                self._force_reconnect()
            raise

    async def _answer(self, waiting: _Waiting, message: Message, kind: str) -> Message:
        self._asked += 1
        reply = self._inbox.pattern.removesuffix("*") + str(self._asked)
        self._waiting[reply] = waiting
        try:
            if self._inbox not in self._subscriptions:  # with the first request: a watcher may not have an inbox
                self._add(self._inbox)
            self.publish(message.answered_to(reply), kind)
            answer = await waiting.answer
        finally:
            del self._waiting[reply]
        if isinstance(answer.result, NoResponders):
            raise answer.result
        return answer

    def subscribe(self, pattern: str, handler: Handler, limit: int) -> HandlerQueue:
        """Subscribe a handler to a pattern."""
        self._check_open()
        listener = HandlerQueue(self, pattern, handler, limit)
        self._add(listener)
        return listener

    def _add(self, interest: Interest) -> None:
        self._check_open()
        self._subscriptions[interest] = None
        if self.up:  # otherwise the broker is told when the connection is back
            self._send("subscribe", 0, partial(self._server.add_interest, interest))

    def drop(self, interest: HandlerQueue) -> None:
        """Remove a subscription, if the connection has it."""
        if interest not in self._subscriptions:
            return
        del self._subscriptions[interest]
        interest.end()
        if self.up and not self.closed:
            self._send("unsubscribe", 0, partial(self._server.remove_interest, interest))

    def _send(self, kind: str, size: int, arrive: Callable[[], None]) -> None:
        """Send to the broker, or keep the message while the connection is lost."""
        self._check_open()
        if not self.up:
            if self._buffer.bytes + size > PENDING_BYTES:
                raise Unreachable(f"no connection to the broker, and the buffer of {PENDING_BYTES} bytes is full")
            self._buffer.bytes += size
            self._buffer.sends.append((kind, size, arrive))
            return
        delay_s = self._server.network.delay(self.client.name, BROKER, kind, size)
        if delay_s is not None:
            self._outgoing.send(delay_s, arrive)

    def _check_open(self) -> None:
        if self.closed:
            raise Unreachable("the connection is closed")

    # -- receiving: the broker calls these -----------------------------------------------------------------------
    def receive(self, kind: str, size: int, arrive: Callable[[], None]) -> None:
        """Let a message of the broker travel to the client, unless the connection is lost."""
        if not self.up:
            return
        delay_s = self._server.network.delay(BROKER, self.client.name, kind, size)
        if delay_s is not None:
            self._incoming.send(delay_s, arrive)

    def deliver(self, interest: Interest, message: Message) -> None:
        """Send a message to a subscription of this connection."""
        self.receive(interest.kind, message.size_bytes, partial(self._deliver, interest, message))

    def refuse(self, action: Literal["publish", "subscribe"], subject: str) -> None:
        """Tell the client that the permissions forbid an action on a subject."""
        self.receive("refusal", len(subject), partial(self._on_refusal, action, subject))

    def _deliver(self, interest: Interest, message: Message) -> None:
        if interest in self._subscriptions:
            interest.on_message(message)

    def _on_answer(self, message: Message) -> None:
        waiting = self._waiting.get(message.subject)
        if waiting is not None and not waiting.answer.done():
            waiting.answer.set_result(message)

    def _on_refusal(self, action: Literal["publish", "subscribe"], subject: str) -> None:
        denied = Denied(f"the broker's permissions forbid {action} on {subject!r}")
        no_inbox = action == "subscribe" and subject == self._inbox.pattern  # no answer can ever arrive
        if no_inbox:
            self._subscriptions.pop(self._inbox, None)
        for waiting in self._waiting.values():
            if no_inbox or (action == "publish" and waiting.subject == subject):
                _fail(waiting, denied)

    # -- breaking and healing --------------------------------------------------------------------------------------
    def cut(self) -> None:
        """Lose the connection: messages on their way are gone, and pending requests fail."""
        self.losses += self.up
        if self.state in (State.CONNECTED, State.RECONNECTING):
            self._move(State.LOST)
        self._outgoing.cut()
        self._incoming.cut()
        self._server.forget(self)
        self._fail_all(Unreachable("the connection to the broker was lost"))

    def reconnect(self) -> None:
        """Begin to connect again, if the connection is lost."""
        if self.state is not State.LOST:
            return
        self._move(State.RECONNECTING)
        self._incoming.send(self._server.network.delay(BROKER, self.client.name, "connect", 0) or 0.0, self._connected)

    def _force_reconnect(self) -> None:
        """Give up a connection that looks alive and on which no answers come."""
        self._silent = 0
        if self.up:
            self.cut()
            self.reconnect()

    def _connected(self) -> None:
        if self.closed:
            return
        self._move(State.CONNECTED)
        for interest in self._subscriptions:
            self._send("subscribe", 0, partial(self._server.add_interest, interest))
        buffer, self._buffer = self._buffer, _Buffer()
        for kind, size, arrive in buffer.sends:
            self._send(kind, size, arrive)
        pong = partial(self._incoming.send, 0.0, self._tell_reconnected)
        self._outgoing.send(0.0, pong)  # arrives when the broker has the subscriptions and the kept messages

    def _tell_reconnected(self) -> None:
        for call in self.reconnected:
            call()

    def _fail_all(self, error: BusError) -> None:
        self._queue = Queue()
        for waiting in self._waiting.values():
            _fail(waiting, error)

    async def close(self) -> None:
        """Close the connection. Messages that were sent before still arrive; pending requests fail."""
        if self.closed:
            return
        was_up = self.up
        self._move(State.CLOSED)
        self._fail_all(Unreachable("the connection is closed"))
        if was_up:
            self._outgoing.send(0.0, partial(self._server.forget, self))
        else:
            self._server.forget(self)
        ended = [interest.end() for interest in self._subscriptions if isinstance(interest, HandlerQueue)]
        self._subscriptions.clear()
        await asyncio.gather(*(t for t in ended if t is not asyncio.current_task()), return_exceptions=True)


def _fail(waiting: _Waiting, error: BusError) -> None:
    if not waiting.answer.done():
        waiting.answer.set_exception(error)
