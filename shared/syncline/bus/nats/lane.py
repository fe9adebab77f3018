"""One connection to a NATS broker that heals itself, with a request multiplexer of its own.

This module adds the following to nats-py. Pending requests fail at once on a disconnect and on a permission error. A
client that a protocol error closed for ever is built anew. Answers that stop coming over a socket that looks alive
force a reconnect. A jitter precedes each reconnect. `flush` is not used: its PING overtakes pending messages and so
proves nothing.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsSubscription

from syncline.bus.address import address_of, masked
from syncline.bus.base import WAITING_BYTES, Delivery, Handler, checked_subject
from syncline.bus.connection_state import State, moved
from syncline.bus.nats.client import Client, Refused, next_server
from syncline.bus.nats.outage import Outage
from syncline.bus.silence import ANSWER_S, SILENT_ANSWERS, Queue, Silent, Turn, in_turn
from syncline.bus.tls import Tls
from syncline.errors import BusError, Denied, NoResponders, Unavailable, Unfit, Unreachable

log = logging.getLogger(__name__)

PING_S = 20
# Pings without an answer after which nats-py reconnects. A ping waits behind the chunks, two of which may take two minutes.
PINGS = {"control": 2, "bulk": 7}
PENDING_BYTES = 4 << 20  # of messages that wait for the reconnection of one lane
_VIOLATION = re.compile(r'permissions violation for (publish|subscription) (?:to|with reply) "([^"]*)"', re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Connection:
    """The address of a broker, and the identity to log in with."""

    url: str = field(repr=False)  # one server, or several of a cluster with commas between them
    name: str  # of the client; its inbox prefix is `_INBOX.<name>`
    seed: str = field(default="", repr=False)  # nkey seed; empty: no authentication
    patience_s: float = 5.0  # for the first connection
    tls: Tls = field(default_factory=Tls)


@dataclass(slots=True)
class _Waiting:
    """A request under way: the answers so far, and whether the caller wants several."""

    subject: str
    done: asyncio.Future[None]
    many: bool
    answers: list[Msg] = field(default_factory=list)

    def fail(self, error: BusError) -> None:
        """End the request with an error, unless it has ended already."""
        if not self.done.done():
            self.done.set_exception(error)


class Lane:
    """One connection that heals itself, with a request multiplexer of its own."""

    def __init__(self, to: Connection, lane: Literal["control", "bulk"], outage: Outage) -> None:
        """Prepare a connection, without connecting.

        Args:
            to: the address, and the identity to log in with.
            lane: the name of the connection.
            outage: collects the lost connections of all lanes of a bus, for the log.

        Raises:
            ConfigError: the address or a file with a certificate cannot be used.
        """
        self._address = address_of(to.url)
        if to.tls.given:
            to.tls.context()
        self._to = to
        self._lane = lane
        self._outage = outage
        self._queue = Queue()  # the bulk requests
        self._client = Client()
        self._inbox = f"_INBOX.{to.name}.{secrets.token_hex(8)}"
        self._waiting: dict[str, _Waiting] = {}  # by the last token of the reply subject
        self._handlers: dict[int, tuple[str, Handler, int]] = {}  # by number: subject, handler, limit
        self._live: dict[int, NatsSubscription] = {}  # by the same number, of the present client
        self._next_id = 0
        self._silent = 0  # requests without an answer, in a row
        self.losses = 0
        self._last_error = ""
        self._has_inbox = False  # subscribed with the first request: a reader's key may not have an inbox
        self._inbox_subscription: NatsSubscription | None = None
        self._state = State.NEW
        self._rebuild: asyncio.Task[None] | None = None
        self.reconnected: list[Callable[[], None]] = []

    # -- connecting ------------------------------------------------------------------------------------------------
    async def open(self) -> None:
        """Connect, trying for `patience_s`.

        Raises:
            Denied: the broker does not know the key.
            Unfit: the broker is too old, or its TLS does not match.
            Unreachable: no broker answered in time.
        """
        deadline = asyncio.get_running_loop().time() + self._to.patience_s
        pause = 0.05
        while True:
            try:
                await self._connect_once()
                return
            except (Denied, Unavailable):
                raise
            except BusError:
                if asyncio.get_running_loop().time() + pause > deadline:
                    raise
            await asyncio.sleep(pause)
            pause = min(1.0, 2 * pause)

    async def _connect_once(self) -> None:
        """Try once to make a client, connect it and renew all subscriptions. Raises errors as `open` does."""
        client = Client(self._to.tls)
        url = masked(self._to.url)
        self._last_error = ""
        try:
            await client.connect(
                servers=[server.url for server in self._address.servers],
                name=f"syncline {self._to.name} {self._lane}",
                inbox_prefix=f"_INBOX.{self._to.name}".encode(),
                allow_reconnect=False,  # the first attempt must report its error; later the client reconnects
                connect_timeout=max(1, round(min(self._to.patience_s, ANSWER_S))),
                max_reconnect_attempts=1,  # of one call: `open` tries again
                reconnect_time_wait=0,
                reconnect_to_server_handler=next_server,
                ping_interval=PING_S,
                max_outstanding_pings=PINGS[self._lane],
                pending_size=PENDING_BYTES,
                error_cb=self._on_error,
                disconnected_cb=self._on_disconnect,
                reconnected_cb=self._on_reconnect,
                closed_cb=self._on_closed,
                **self._login(),
            )
        except (TimeoutError, nats.errors.Error, OSError, ValueError) as error:
            await _give_up(client)
            if isinstance(error, Refused):
                raise Unfit(error.reason.problem, error.reason.hint) from None
            cause = self._last_error or str(error) or type(error).__name__
            if "authorization" in f"{cause} {error}".lower():
                raise Denied(f"the broker at {url} {self._denial()}") from None
            raise Unreachable(f"no broker answers at {url}: {cause}") from None
        if self._state is State.CLOSED:  # while nats-py connected, which may swallow a cancellation
            await _give_up(client)
            raise Unreachable("closed")
        client.options.update(allow_reconnect=True, max_reconnect_attempts=-1)
        self._has_inbox = False
        self._inbox_subscription = None
        self._live = {i: await self._subscribe_at_broker(client, i) for i in list(self._handlers)}
        self._client = client
        self._silent = 0
        if client.is_connected and self._state is not State.CONNECTED:
            self._move(State.CONNECTED)

    def _move(self, to: State) -> None:
        self._state = moved(self._state, to)

    def _denial(self) -> str:
        """Return the end of the sentence about a refused login."""
        if self._to.seed:
            return "does not know this key"
        if self._address.user or self._address.token:
            return "does not know the user or token of its address"
        return "asks for a key, and none was given"

    def _login(self) -> dict[str, Any]:
        """Return nats-py's options for the login. nats-py neither decodes a login in a URL nor uses it at other servers
        of the cluster.
        """
        if self._to.seed:
            return {"nkeys_seed_str": self._to.seed}
        if self._address.token:
            return {"token": self._address.token}
        return {"user": self._address.user, "password": self._address.password} if self._address.user else {}

    async def _subscribe_at_broker(self, client: Client, i: int) -> NatsSubscription:
        """Subscribe handler number i at the broker."""
        subject, handler, limit = self._handlers[i]

        async def deliver(message: Msg) -> None:
            try:
                await handler(Delivery(message.subject, message.data, message.reply))
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                log.exception("the handler of %s was cancelled", message.subject)  # nats-py would end the subscription
            except Exception:
                log.exception("the handler of %s failed", message.subject)  # our own bug; the next message is handled

        return await client.subscribe(subject, cb=deliver, pending_msgs_limit=limit, pending_bytes_limit=WAITING_BYTES)

    async def _on_disconnect(self) -> None:
        self._on_loss()
        self._fail_all(Unreachable("the connection to the broker was lost"))

    async def _on_reconnect(self) -> None:
        if self._state is State.CLOSED:
            return
        if self._state is not State.CONNECTED:
            self._move(State.CONNECTED)
        self._tell_reconnected()

    def _tell_reconnected(self) -> None:
        self._outage.back(self._lane, asyncio.get_running_loop().time())
        for call in self.reconnected:
            call()

    async def _on_closed(self) -> None:
        """Build a new client. nats-py closes for good on most protocol errors, and a service must outlive them."""
        self._on_loss()
        self._fail_all(Unreachable("the broker closed the connection"))
        if self._state is not State.CLOSED and (self._rebuild is None or self._rebuild.done()):
            self._rebuild = asyncio.create_task(self._rebuild_client())

    def _on_loss(self) -> None:
        if self._state is not State.CLOSED:
            self.losses += 1
            if self._state is not State.LOST:
                self._move(State.LOST)
            now_s = asyncio.get_running_loop().time()
            if self._client.last_error is not None:  # the broker's last error, such as a refused key
                self._outage.error(self._lane, str(self._client.last_error), now_s)
            self._outage.lost(self._lane, now_s)

    async def _rebuild_client(self) -> None:
        """Try to connect a new client until an attempt succeeds or the lane is closed."""
        pause = 0.1
        while self._state is not State.CLOSED:
            if self._state is State.LOST:
                self._move(State.RECONNECTING)
            try:
                await self._connect_once()
                self._tell_reconnected()
                return
            except BusError as error:
                self._outage.error(self._lane, str(error), asyncio.get_running_loop().time())
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(5.0, 2 * pause)

    async def _on_error(self, error: Exception) -> None:
        """Log an error that nats-py reports. A permission error fails the requests on its subject."""
        text = str(error) or type(error).__name__
        self._last_error = text
        found = _VIOLATION.search(text)
        if found is None:
            log.debug("%s connection: %s", self._lane, text)
            self._outage.error(self._lane, text, asyncio.get_running_loop().time())
            return
        log.warning("%s connection: %s", self._lane, text)
        denied = Denied(f"the broker's permissions forbid {found[1]} on {found[2]!r}")
        if found[2].lower() == f"{self._inbox}.*".lower():
            await self._on_inbox_denied()
            return
        for waiting in self._waiting.values():
            if waiting.subject.lower() == found[2].lower():
                waiting.fail(denied)

    async def _on_inbox_denied(self) -> None:
        """Fail all requests, because no answer can arrive. The next request subscribes again: permissions may change."""
        subscription = self._inbox_subscription
        self._inbox_subscription = None
        self._has_inbox = False
        self._fail_all(
            Denied(
                f"the broker's permissions forbid answers to {self._to.name!r}: the key belongs to another name or to a watcher"
            )
        )
        if subscription is not None:
            try:
                await subscription.unsubscribe()
            except nats.errors.Error:
                pass  # the subscription is gone with the connection

    def _fail_all(self, error: BusError) -> None:
        """Fail all open requests."""
        self._queue = Queue()
        for waiting in self._waiting.values():
            waiting.fail(error)

    async def close(self) -> None:
        """Close the connection for good. Pending requests fail."""
        if self._state is not State.CLOSED:
            self._move(State.CLOSED)
        if self._rebuild is not None:
            self._rebuild.cancel()
            await asyncio.gather(self._rebuild, return_exceptions=True)
        self._fail_all(Unreachable("closed"))
        if not self._client.is_connected and not self._client.is_reconnecting:
            return
        try:
            async with asyncio.timeout(2.0):
                await self._client.close()
        except (TimeoutError, nats.errors.Error, OSError):
            pass

    @property
    def max_payload(self) -> int:
        """The size of the largest message in bytes, headers included."""
        return int(self._client.max_payload)

    @property
    def up(self) -> bool:
        """Whether nats-py is connected at this moment."""
        return bool(self._client.is_connected)

    # -- messages --------------------------------------------------------------------------------------------------
    async def publish(self, subject: str, data: bytes, reply: str = "", headers: dict[str, str] | None = None) -> None:
        """Send a message.

        Args:
            subject: subject of the message.
            data: the content.
            reply: the subject for answers; empty: no answer.
            headers: name → value.

        Raises:
            Unavailable: the subject is not valid, or the message is too large for the broker.
            Unreachable: the connection is closed, or is lost and its buffer is full.
        """
        checked_subject(subject)
        if len(data) + size_of(headers) > self.max_payload:  # nats-py ignores the headers, and the server disconnects
            raise Unavailable(f"{subject}: {len(data)} bytes exceed the broker's max_payload of {self.max_payload}")
        try:
            await self._client.publish(subject, data, reply=reply, headers=headers)
        except (nats.errors.Error, OSError) as error:
            raise Unreachable(f"{subject}: {str(error) or type(error).__name__}") from None
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError  # nats-py drops a cancellation during its flush

    async def request(
        self,
        subject: str,
        data: bytes,
        timeout_s: float,
        headers: dict[str, str] | None = None,
        *,
        many: bool = False,
        of_broker: bool = True,
    ) -> list[Msg]:
        """Ask, and return the answers: one, or with `many` all up to a status message.

        Args:
            of_broker: the broker itself answers, so that its silence counts as a sign of a dead connection.

        Raises:
            NoResponders: the subject has no subscriber.
            Unreachable: no answer came within `timeout_s`, or the connection was lost.
            Denied: the broker's permissions forbid the request.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(subject, loop.create_future(), many)
        timer = loop.call_later(timeout_s, waiting.fail, Unreachable(f"{subject}: no answer within {timeout_s:g} s"))
        try:
            await self._ask(waiting, data, headers)
        except Unreachable:
            self._silent += of_broker
            # nats-py's read loop can end while the socket stays open.
            if self._silent >= SILENT_ANSWERS and self._state is not State.CLOSED:
                await self._force_reconnect()
            raise
        finally:
            timer.cancel()
        self._silent = 0
        self._outage.answered(self._lane)
        return waiting.answers

    async def request_bulk(self, subject: str, data: bytes, answer_bytes: int = 0) -> Msg:
        """Ask over a possibly thin link, and return the answer.

        The request fails at once while the connection is lost. If it were kept, it would travel for a caller who has
        repeated it.

        Args:
            answer_bytes: bytes of the answer, at most; with those of the question they decide how long the answer may
                take.

        Raises:
            Unreachable: the connection is lost, or the answer is late.
        """
        if not self.up:
            raise Unreachable(f"{subject}: the connection to the broker is lost")
        loop = asyncio.get_running_loop()
        waiting = _Waiting(subject, loop.create_future(), many=False)

        def late(turn: Turn) -> None:
            kind = Silent if turn.overtaken_at_s is None else Unreachable
            waiting.fail(kind(f"{subject}: no answer within {loop.time() - turn.asked_at_s:.0f} s"))

        try:
            with in_turn(self._queue, len(data) + answer_bytes, late):
                await self._ask(waiting, data, None)
        except Silent:
            if self._state is not State.CLOSED:
                await self._force_reconnect()
            raise
        self._outage.answered(self._lane)
        return waiting.answers[0]

    async def _ask(self, waiting: _Waiting, data: bytes, headers: dict[str, str] | None) -> None:
        """Send a request and wait until it has its answers or fails."""
        token = secrets.token_hex(8)
        self._waiting[token] = waiting
        try:
            if not self._has_inbox:
                await self._subscribe_inbox()
            await self.publish(waiting.subject, data, f"{self._inbox}.{token}", headers)
            await waiting.done
        finally:
            del self._waiting[token]

    async def _force_reconnect(self) -> None:
        """Give up a connection that looks alive and on which no answers come."""
        self._silent = 0
        self._outage.unanswered(self._lane, asyncio.get_running_loop().time())
        await self._client.force_reconnect()

    async def _subscribe_inbox(self) -> None:
        self._has_inbox = True  # before the first await: with two subscriptions every answer would come twice
        try:
            self._inbox_subscription = await self._client.subscribe(
                f"{self._inbox}.*", cb=self._on_answer, pending_msgs_limit=0, pending_bytes_limit=0
            )
        except nats.errors.Error as error:
            self._has_inbox = False
            raise Unreachable(f"no connection to the broker: {error}") from None

    async def _on_answer(self, message: Msg) -> None:
        """Give an answer to its request."""
        waiting = self._waiting.get(message.subject.rpartition(".")[2])
        if waiting is None or waiting.done.done():
            return
        status = status_of(message)
        if status == "503" and not message.data:
            waiting.done.set_exception(NoResponders(f"{waiting.subject}: the subject has no subscriber"))
            return
        waiting.answers.append(message)
        if not waiting.many or status:
            waiting.done.set_result(None)

    async def subscribe(self, subject: str, handler: Handler, limit: int) -> int:
        """Subscribe a handler. `limit`: messages that may wait for the handler.

        Returns:
            The number of the subscription, for `unsubscribe`.

        Raises:
            Unavailable: the subject is not valid.
            Unreachable: the lane is closed.
        """
        if self._state is State.CLOSED:
            raise Unreachable("closed")
        checked_subject(subject)
        self._next_id += 1
        i = self._next_id
        self._handlers[i] = (subject, handler, limit)
        try:
            self._live[i] = await self._subscribe_at_broker(self._client, i)
        except nats.errors.BadSubjectError:
            del self._handlers[i]
            raise Unavailable(f"{subject!r} is not a valid subject") from None
        except nats.errors.Error:
            pass  # a new client is being made, and will subscribe all handlers
        return i

    async def unsubscribe(self, i: int) -> None:
        """End subscription number i. A second call changes nothing."""
        self._handlers.pop(i, None)
        live = self._live.pop(i, None)
        if live is not None:
            try:
                await live.unsubscribe()
            except nats.errors.Error:
                pass  # the subscription is gone with the connection


async def _give_up(client: Client) -> None:
    """Close a client that did not get to the end of its login.

    nats-py leaves the socket of a refused login open, and its public `close` would call back.
    """
    try:
        async with asyncio.timeout(1.0):
            await client._close(Client.CLOSED, do_cbs=False)
    except (TimeoutError, nats.errors.Error, OSError):
        pass


def status_of(message: Msg) -> str:
    """Return the status that the broker sends in place of a message, or "".

    A stored message has a sequence number, which the broker writes behind all headers of its sender. A `Status` among
    those headers says nothing.
    """
    headers = message.headers or {}
    return "" if "Nats-Sequence" in headers else str(headers.get("Status", ""))


def size_of(headers: dict[str, str] | None) -> int:
    """Return the bytes of headers on the wire and in a stream."""
    return sum(len(name) + len(value) + 4 for name, value in headers.items()) + 12 if headers else 0
