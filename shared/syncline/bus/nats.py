"""The bus port over NATS JetStream: the only module that imports nats.

Two connections a process, control and bulk, so that a heartbeat never waits behind a tensor. What nats-py leaves to its
user is done here: its own request multiplexer (pending requests fail at once on a disconnect and on a permission error), a
client that is built anew when a protocol error closed it for ever, a forced reconnect when answers stop coming while the
socket looks alive, and a jitter before reconnecting. `flush` is not used: it proves nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsSubscription

from syncline.bus.base import BucketConfig, Delivery, Entry, Handler, Stored, StreamConfig, StreamState
from syncline.errors import (
    AlreadyPut,
    BusError,
    ConfigError,
    Conflict,
    Denied,
    NoResponders,
    StreamFull,
    Unavailable,
    Unreachable,
)

log = logging.getLogger(__name__)

ANSWER_S = 5.0  # how long the broker may take to acknowledge
SILENT_ANSWERS = 3  # unanswered requests in a row after which the connection counts as dead
PENDING_BYTES = 4 << 20
_VIOLATION = re.compile(r'permissions violation for (publish|subscription) (?:to|with reply) "([^"]*)"', re.IGNORECASE)
_NO_JETSTREAM = "the broker has no JetStream for this account. Start nats-server with JetStream enabled (`-js`)"


@dataclass(frozen=True, slots=True)
class Connection:
    """Where and as whom to connect."""

    url: str
    name: str  # the client's name, and its inbox prefix `_INBOX.<name>`
    seed: str = field(default="", repr=False)  # nkey seed; empty: no authentication
    patience_s: float = 5.0  # how long to try for the first connection


@dataclass(slots=True)
class _Waiting:
    """A request under way: the answers so far, and whether more than one is wanted."""

    subject: str
    done: asyncio.Future[None]
    many: bool
    answers: list[Msg] = field(default_factory=list)


class _Lane:
    """One connection that heals itself, with a request multiplexer of its own."""

    def __init__(self, to: Connection, lane: str) -> None:
        self._to, self._lane = to, lane
        self._client = Client()
        self._inbox = f"_INBOX.{to.name}.{secrets.token_hex(8)}"
        self._waiting: dict[str, _Waiting] = {}
        self._handlers: dict[int, tuple[str, Handler, int]] = {}
        self._live: dict[int, NatsSubscription] = {}
        self._next_id = 0
        self._silent = 0
        self._last_error = ""
        self._listening = False  # the inbox is subscribed with the first request: a mere listener may not have one
        self._ear: NatsSubscription | None = None  # and that is its subscription
        self._closing = False
        self._rebuild: asyncio.Task[None] | None = None
        self.reconnected: list[Callable[[], None]] = []

    # -- connecting ------------------------------------------------------------------------------------------------
    async def open(self) -> None:
        """Connects, trying for `patience_s`. Raises Denied for a key the broker does not know, else Unreachable."""
        deadline = asyncio.get_running_loop().time() + self._to.patience_s
        pause = 0.05
        while True:
            try:
                await self._connect_once()
                return
            except Denied:
                raise
            except BusError:
                if asyncio.get_running_loop().time() + pause > deadline:
                    raise
            await asyncio.sleep(pause)
            pause = min(1.0, 2 * pause)

    async def _connect_once(self) -> None:
        client, url = Client(), self._to.url
        self._last_error = ""
        options: dict[str, Any] = {"nkeys_seed_str": self._to.seed} if self._to.seed else {}
        try:
            await client.connect(
                servers=[url],
                name=f"syncline {self._to.name} {self._lane}",
                inbox_prefix=f"_INBOX.{self._to.name}".encode(),
                allow_reconnect=False,  # the first connection fails loudly; from then on it heals
                connect_timeout=max(1, round(min(self._to.patience_s, ANSWER_S))),
                reconnect_time_wait=0,
                reconnect_to_server_handler=_jittered,
                ping_interval=20,
                max_outstanding_pings=2,
                pending_size=PENDING_BYTES,
                error_cb=self._on_error,
                disconnected_cb=self._on_disconnect,
                reconnected_cb=self._on_reconnect,
                closed_cb=self._on_closed,
                **options,
            )
        except (TimeoutError, nats.errors.Error, OSError, ValueError) as error:
            why = self._last_error or str(error) or type(error).__name__
            if "authorization" in f"{why} {error}".lower():
                raise Denied(f"the broker at {url} does not know this key") from None
            raise Unreachable(f"no broker answers at {url}: {why}") from None
        client.options.update(allow_reconnect=True, max_reconnect_attempts=-1)
        self._listening, self._ear = False, None
        self._live = {i: await self._start(client, i) for i in list(self._handlers)}
        self._client, self._silent = client, 0

    async def _start(self, client: Client, i: int) -> NatsSubscription:
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

        return await client.subscribe(subject, cb=deliver, pending_msgs_limit=limit)

    async def _on_disconnect(self) -> None:
        self._fail_all(Unreachable("the connection to the broker was lost"))

    async def _on_reconnect(self) -> None:
        log.info("%s connection: back", self._lane)
        for call in self.reconnected:
            call()

    async def _on_closed(self) -> None:
        """nats-py closes for good on most protocol errors; a service must outlive them."""
        self._fail_all(Unreachable("the broker closed the connection"))
        if not self._closing and (self._rebuild is None or self._rebuild.done()):
            self._rebuild = asyncio.create_task(self._build_again())

    async def _build_again(self) -> None:
        pause = 0.1
        while not self._closing:
            try:
                await self._connect_once()
                await self._on_reconnect()
                return
            except BusError as error:
                log.warning("%s connection: %s", self._lane, error)
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(5.0, 2 * pause)

    async def _on_error(self, error: Exception) -> None:
        text = self._last_error = str(error) or type(error).__name__
        found = _VIOLATION.search(text)
        if found is None:
            log.debug("%s connection: %s", self._lane, text)
            return
        log.warning("%s connection: %s", self._lane, text)
        denied = Denied(f"the broker's permissions forbid {found[1]} on {found[2]!r}")
        if found[2].lower() == f"{self._inbox}.*".lower():
            await self._on_deaf()
            return
        for waiting in self._waiting.values():
            if waiting.subject.lower() == found[2].lower() and not waiting.done.done():
                waiting.done.set_exception(denied)

    async def _on_deaf(self) -> None:
        """No answer will ever come. The next request tries again, for permissions may be mended."""
        ear, self._ear, self._listening = self._ear, None, False
        self._fail_all(
            Denied(f"the broker lets this key hear no answers as {self._to.name!r}: it is another's, or a reader's")
        )
        if ear is not None:
            try:
                await ear.unsubscribe()
            except nats.errors.Error:
                pass  # the connection is gone, and the subscription with it

    def _fail_all(self, error: BusError) -> None:
        for waiting in self._waiting.values():
            if not waiting.done.done():
                waiting.done.set_exception(error)

    async def close(self) -> None:
        self._closing = True
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
        return int(self._client.max_payload)

    # -- talking ---------------------------------------------------------------------------------------------------
    async def publish(self, subject: str, data: bytes, reply: str = "", headers: dict[str, str] | None = None) -> None:
        if len(data) + _size(headers) > self.max_payload:  # nats-py forgets the headers, and the server then hangs up
            raise Unavailable(f"{subject}: {len(data)} bytes are more than the broker's max_payload")
        try:
            await self._client.publish(subject, data, reply=reply, headers=headers)
        except nats.errors.BadSubjectError:
            raise Unavailable(f"{subject!r} is no subject") from None
        except (nats.errors.Error, OSError) as error:
            raise Unreachable(f"{subject}: {str(error) or type(error).__name__}") from None
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError  # nats-py swallows a cancellation that meets its flush

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
        """The answers: one, or with `many` all up to a status message. Raises NoResponders, Unreachable, Denied.
        `of_broker`: it is the broker who answers, so that its silence says something about the connection."""
        token = secrets.token_hex(8)
        loop = asyncio.get_running_loop()
        waiting = _Waiting(subject, loop.create_future(), many)
        self._waiting[token] = waiting
        timer = loop.call_later(timeout_s, _time_out, waiting, f"{subject}: no answer within {timeout_s:g} s")
        try:
            if not self._listening:
                await self._hear_answers()
            await self.publish(subject, data, f"{self._inbox}.{token}", headers)
            await waiting.done
        except Unreachable:
            self._silent += of_broker
            if self._silent >= SILENT_ANSWERS and not self._closing:  # a read loop can die behind a live socket
                self._silent = 0
                await self._client.force_reconnect()
            raise
        finally:
            timer.cancel()
            del self._waiting[token]
        self._silent = 0
        return waiting.answers

    async def _hear_answers(self) -> None:
        self._listening = True  # before anything is awaited: heard twice, an answer would count twice
        try:
            self._ear = await self._client.subscribe(
                f"{self._inbox}.*", cb=self._on_answer, pending_msgs_limit=0, pending_bytes_limit=0
            )
        except nats.errors.Error as error:
            self._listening = False
            raise Unreachable(f"no connection to the broker: {error}") from None

    async def _on_answer(self, message: Msg) -> None:
        waiting = self._waiting.get(message.subject.rpartition(".")[2])
        if waiting is None or waiting.done.done():
            return
        status = message.headers.get("Status") if message.headers else None
        if status == "503" and not message.data:
            waiting.done.set_exception(NoResponders(f"{waiting.subject}: nobody listens"))
            return
        waiting.answers.append(message)
        if not waiting.many or status is not None:
            waiting.done.set_result(None)

    async def subscribe(self, subject: str, handler: Handler, limit: int) -> int:
        if self._closing:
            raise Unreachable("closed")
        self._next_id = i = self._next_id + 1
        self._handlers[i] = (subject, handler, limit)
        try:
            self._live[i] = await self._start(self._client, i)
        except nats.errors.BadSubjectError:
            del self._handlers[i]
            raise Unavailable(f"{subject!r} is no subject") from None
        except nats.errors.Error:
            pass  # the client is built anew just now, and subscribes to all that has a handler
        return i

    async def unsubscribe(self, i: int) -> None:
        self._handlers.pop(i, None)
        live = self._live.pop(i, None)
        if live is not None:
            try:
                await live.unsubscribe()
            except nats.errors.Error:
                pass  # the connection is gone, and the subscription with it


class _Subscription:
    def __init__(self, lane: _Lane, i: int) -> None:
        self._lane, self._i = lane, i

    async def unsubscribe(self) -> None:
        await self._lane.unsubscribe(self._i)


class NatsBus:
    """The bus port on a nats-server with JetStream. Make one with `NatsBus.connect`."""

    def __init__(self, to: Connection) -> None:
        self._control, self._bulk = _Lane(to, "control"), _Lane(to, "bulk")

    @classmethod
    async def connect(cls, to: Connection) -> NatsBus:
        """Raises Denied for an unknown key, Unreachable where no broker answers within `patience_s`."""
        bus = cls(to)
        try:
            await bus._control.open()
            await bus._bulk.open()
        except BaseException:
            await bus.close()
            raise
        return bus

    async def close(self) -> None:
        await asyncio.gather(self._control.close(), self._bulk.close())

    @property
    def max_payload(self) -> int:
        return self._control.max_payload

    def when_reconnected(self, call: Callable[[], None]) -> None:
        self._control.reconnected.append(call)

    # -- key-value -------------------------------------------------------------------------------------------------
    async def ensure_bucket(self, config: BucketConfig) -> None:
        await self._ensure(
            {
                "name": f"KV_{config.name}",
                "subjects": [f"$KV.{config.name}.>"],
                "max_msgs_per_subject": 1,
                "max_bytes": config.max_bytes,
                "max_msg_size": config.max_value_bytes + _size(_at(0)),
                "max_age": round(config.ttl_s * 1e9),
                "discard": "new",
                "deny_delete": True,
                "allow_rollup_hdrs": True,
            }
        )

    async def kv_get(self, bucket: str, key: str) -> Entry | None:
        stored = await self.get(f"KV_{bucket}", f"$KV.{bucket}.{key}")
        return None if stored is None else Entry(stored.data, stored.seq)

    async def kv_create(self, bucket: str, key: str, value: bytes) -> int:
        return await self.kv_update(bucket, key, value, 0)

    async def kv_update(self, bucket: str, key: str, value: bytes, revision: int) -> int:
        return await self._put(self._control, f"$KV.{bucket}.{key}", value, _at(revision))

    async def kv_delete(self, bucket: str, key: str) -> None:
        await self.purge(f"KV_{bucket}", f"$KV.{bucket}.{key}")

    async def kv_keys(self, bucket: str) -> list[str]:
        prefix = f"$KV.{bucket}."
        state = await self.state(f"KV_{bucket}", f"{prefix}>")
        return sorted(subject.removeprefix(prefix) for subject in state.subjects)

    # -- streams ---------------------------------------------------------------------------------------------------
    async def ensure_stream(self, config: StreamConfig) -> None:
        await self._ensure(
            {
                "name": config.name,
                "subjects": list(config.subjects),
                "max_bytes": config.max_bytes,
                "max_msgs_per_subject": 1 if config.write_once else config.max_per_subject,
                "discard": "new" if config.write_once or config.full == "refuse" else "old",
                "discard_new_per_subject": config.write_once,
            }
        )

    async def delete_stream(self, stream: str) -> None:
        try:
            await self._api(f"STREAM.DELETE.{stream}")
        except _Refused as error:
            if error.code != _STREAM_NOT_FOUND:
                raise

    async def put(self, subject: str, data: bytes, *, bulk: bool = False) -> int:
        return await self._put(self._bulk if bulk else self._control, subject, data)

    async def get(self, stream: str, subject: str, *, bulk: bool = False) -> Stored | None:
        lane = self._bulk if bulk else self._control
        answer = (await lane.request(f"$JS.API.DIRECT.GET.{stream}.{subject}", b"", ANSWER_S))[0]
        headers = answer.headers or {}
        if headers.get("Status") == "404":
            return None
        return _stored(answer)

    async def read(self, stream: str, from_seq: int, limit: int) -> list[Stored]:
        ask = json.dumps({"seq": max(1, from_seq), "batch": limit, "next_by_subj": ">"}).encode()
        answers = await self._control.request(f"$JS.API.DIRECT.GET.{stream}", ask, ANSWER_S, many=True)
        return [_stored(a) for a in answers if "Status" not in (a.headers or {})]

    async def state(self, stream: str, subjects: str = "") -> StreamState:
        ask: dict[str, Any] = {"subjects_filter": subjects} if subjects else {}
        counts: dict[str, int] = {}
        while True:
            answer = await self._api(f"STREAM.INFO.{stream}", {**ask, "offset": len(counts)} if subjects else ask)
            state = answer["state"]
            page = state.get("subjects") or {}
            counts |= page
            if not page or len(counts) >= answer.get("total", 0):
                break
        return StreamState(state["messages"], state["bytes"], state["first_seq"], state["last_seq"], counts)

    async def purge(self, stream: str, subject: str, *, up_to_seq: int | None = None) -> None:
        ask: dict[str, Any] = {"filter": subject}
        if up_to_seq is not None:
            ask["seq"] = max(1, up_to_seq)  # 0 would mean all
        await self._api(f"STREAM.PURGE.{stream}", ask)

    # -- core ------------------------------------------------------------------------------------------------------
    async def publish(self, subject: str, data: bytes) -> None:
        await self._control.publish(subject, data)

    async def subscribe(self, subject: str, handler: Handler, *, limit: int = 4096) -> _Subscription:
        return _Subscription(self._control, await self._control.subscribe(subject, handler, limit))

    async def request(self, subject: str, data: bytes, timeout_s: float) -> bytes:
        answer = (await self._control.request(subject, data, timeout_s, of_broker=False))[0]
        return bytes(answer.data)

    # -- the JetStream API -----------------------------------------------------------------------------------------
    async def _put(self, lane: _Lane, subject: str, data: bytes, headers: dict[str, str] | None = None) -> int:
        answered = (await lane.request(subject, data, ANSWER_S, headers))[0].data
        try:
            answer = json.loads(answered)
            if "error" in answer:
                raise _error(subject, answer["error"])
            return int(answer["seq"])
        except (ValueError, TypeError, KeyError):
            raise Unavailable(f"{subject}: somebody answers who is no stream") from None

    async def _ensure(self, config: dict[str, Any]) -> None:
        wanted = {"retention": "limits", "storage": "file", "num_replicas": 1, "allow_direct": True, **config}
        try:
            await self._api(f"STREAM.CREATE.{config['name']}", wanted)
        except _Refused as error:
            if error.code != _NAME_IN_USE:
                raise
            there = (await self._api(f"STREAM.INFO.{config['name']}"))["config"]
            differ = [
                f"{k} is {there.get(k)!r}, wanted {v!r}"
                for k, v in wanted.items()
                if there.get(k) != v and (there.get(k) or v)
            ]
            raise Unavailable(
                f"stream {config['name']} exists with another configuration: {'; '.join(differ)}. "
                "Delete it with `nats stream rm`, or use another name"
            ) from None

    async def _api(self, what: str, ask: dict[str, Any] | None = None) -> dict[str, Any]:
        data = json.dumps(ask).encode() if ask else b""
        try:
            answers = await self._control.request(f"$JS.API.{what}", data, ANSWER_S)
        except NoResponders:
            raise Unavailable(_NO_JETSTREAM) from None
        answer: dict[str, Any] = json.loads(answers[0].data)
        if "error" in answer:
            raise _error(what, answer["error"])
        return answer


_NAME_IN_USE = 10058
_STREAM_NOT_FOUND = 10059
_WRONG_LAST_SEQUENCE = (10071, 10164)
_NO_SPACE = (10023, 10028, 10047)
_JETSTREAM_OFF = (10039, 10076)


class _Refused(Unavailable):
    """JetStream's error, with its number."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def _at(revision: int) -> dict[str, str]:
    """Compare-and-set. Padded, so that it takes the same room in a bucket whatever the revision."""
    return {"Nats-Expected-Last-Subject-Sequence": f"{revision:020}"}


def _size(headers: dict[str, str] | None) -> int:
    """Bytes on the wire, and in a stream."""
    return sum(len(name) + len(value) + 4 for name, value in headers.items()) + 12 if headers else 0


def _error(what: str, error: dict[str, Any]) -> BusError:
    """JetStream's error as one of ours."""
    code, text = error.get("err_code", 0), str(error.get("description", error))
    if code in _WRONG_LAST_SEQUENCE:
        return Conflict(f"{what}: {text}")
    if "per subject exceeded" in text:
        return AlreadyPut(f"{what}: {text}")
    if code in _NO_SPACE or "exceeded" in text or "no space" in text:
        return StreamFull(f"{what}: {text}")
    if code in _JETSTREAM_OFF:
        return Unavailable(_NO_JETSTREAM)
    return _Refused(f"{what}: {text}", code)


def _stored(message: Msg) -> Stored:
    headers = message.headers or {}
    try:
        time_s = datetime.fromisoformat(headers["Nats-Time-Stamp"]).timestamp()
        return Stored(headers["Nats-Subject"], message.data, int(headers["Nats-Sequence"]), time_s)
    except (KeyError, ValueError):
        raise Unavailable(f"direct get answered {dict(headers)}") from None


def _time_out(waiting: _Waiting, why: str) -> None:
    if not waiting.done.done():
        waiting.done.set_exception(Unreachable(why))


def _jittered(_servers: Any, _info: Any) -> tuple[None, float]:
    return None, random.uniform(0.05, 0.5)


def mended(error: BusError, url: str) -> ConfigError:
    """What a person who typed `--connect` should read."""
    if isinstance(error, Denied):
        return ConfigError("--key", str(error), "Name the key file made for this broker with --key or SYNCLINE_KEY")
    if isinstance(error, Unavailable):
        return ConfigError("--connect", f"{url}: {error}", "")
    return ConfigError("--connect", str(error), "Start the broker, or name another with --connect or SYNCLINE_NATS_URL")
