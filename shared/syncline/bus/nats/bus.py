"""The bus port over NATS JetStream.

A process has two connections, control and bulk, so that no heartbeat waits behind a tensor. Only the modules of this package
import nats.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

from nats.aio.msg import Msg

from syncline.bus.address import masked
from syncline.bus.base import READ_BYTES, BucketConfig, Entry, Handler, Stored, StreamConfig, StreamState
from syncline.bus.nats.lane import Connection, Lane, size_of, status_of
from syncline.bus.nats.outage import Outage
from syncline.bus.silence import ANSWER_S
from syncline.errors import (
    AlreadyPut,
    BrokerFull,
    BusError,
    Conflict,
    DiskFull,
    NoResponders,
    StoreDown,
    StreamFull,
    Unavailable,
    Unreachable,
)

_NO_JETSTREAM = "the broker has no JetStream for this account. Start nats-server with JetStream enabled (`-js`)"


class _Subscription:
    """A subscription of the control connection, by its number there."""

    def __init__(self, lane: Lane, i: int) -> None:
        self._lane = lane
        self._i = i

    async def unsubscribe(self) -> None:
        await self._lane.unsubscribe(self._i)


class NatsBus:
    """The bus port on a nats-server with JetStream. `NatsBus.connect` makes one; `Bus` documents the methods."""

    def __init__(self, to: Connection) -> None:
        outage = Outage(masked(to.url))
        self._control = Lane(to, "control", outage)
        self._bulk = Lane(to, "bulk", outage)

    @classmethod
    async def connect(cls, to: Connection) -> NatsBus:
        """Connect to a broker.

        Args:
            to: the broker's address, and the name and key of this client.

        Raises:
            ConfigError: the address or a certificate file is not valid.
            Denied: the broker does not know the key, or asks for a key and none was given.
            Unfit: the broker is too old, or its TLS does not fit.
            Unreachable: no broker answered within `to.patience_s`.
        """
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

    @property
    def losses(self) -> int:
        return self._control.losses + self._bulk.losses

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
                "max_msg_size": config.max_value_bytes + size_of(_at(0)),
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
        self._must_be_up(key)
        return await self._put(f"$KV.{bucket}.{key}", value, _at(revision))

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
            await self._api_now(f"STREAM.DELETE.{stream}")
        except _Refused as error:
            if error.code != _STREAM_NOT_FOUND:
                raise

    async def fit_stream(self, stream: str) -> None:
        found = await self._api(f"STREAM.INFO.{stream}")
        config = {**found["config"], "max_bytes": max(1, found["state"]["bytes"])}
        await self._api_now(f"STREAM.UPDATE.{stream}", config)

    async def put(self, subject: str, data: bytes, *, bulk: bool = False) -> int:
        if bulk:
            return _seq(subject, await self._bulk.request_bulk(subject, data))
        return await self._put(subject, data)

    async def get(self, stream: str, subject: str, *, bulk: bool = False) -> Stored | None:
        api = f"$JS.API.DIRECT.GET.{stream}.{subject}"
        if bulk:
            answer = await self._bulk.request_bulk(api, b"", self.max_payload)
        else:
            answer = (await self._control.request(api, b"", ANSWER_S))[0]
        return None if status_of(answer) == "404" else _stored(answer)

    async def read(self, stream: str, from_seq: int, limit: int) -> list[Stored]:
        batch = {"seq": max(1, from_seq), "batch": limit, "next_by_subj": ">", "max_bytes": READ_BYTES}
        ask = json.dumps(batch).encode()
        answers = await self._control.request(f"$JS.API.DIRECT.GET.{stream}", ask, ANSWER_S, many=True)
        return [_stored(a) for a in answers if not status_of(a)]

    async def state(self, stream: str, subjects: str = "") -> StreamState:
        ask: dict[str, Any] = {"subjects_filter": subjects} if subjects else {}
        counts: dict[str, int] = {}
        while True:  # JetStream answers with the subjects page by page
            answer = await self._api(f"STREAM.INFO.{stream}", {**ask, "offset": len(counts)} if subjects else ask)
            state = answer["state"]
            page = state.get("subjects") or {}
            counts |= page
            if not page or len(counts) >= answer.get("total", 0):
                break
        return StreamState(state["messages"], state["bytes"], state["first_seq"], state["last_seq"], counts)

    async def purge(self, stream: str, subject: str) -> None:
        await self._api_now(f"STREAM.PURGE.{stream}", {"filter": subject})

    async def check_store(self, *streams: str) -> None:
        for stream in streams:  # a purge of no message writes nothing, and returns the error of an earlier write
            await self._api_now(f"STREAM.PURGE.{stream}", {"filter": _NO_SUBJECT})
        account = await self._api_now("INFO")
        used, most = account.get("storage", 0), account.get("limits", {}).get("max_storage", -1)
        if 0 < most < used + self.max_payload:
            raise BrokerFull(f"the account stores {used >> 20} MiB, and its max_file is {most >> 20} MiB")

    # -- core ------------------------------------------------------------------------------------------------------
    async def publish(self, subject: str, data: bytes) -> None:
        await self._control.publish(subject, data)

    async def subscribe(self, subject: str, handler: Handler, *, limit: int = 4096) -> _Subscription:
        return _Subscription(self._control, await self._control.subscribe(subject, handler, limit))

    async def request(self, subject: str, data: bytes, timeout_s: float) -> bytes:
        answer = (await self._control.request(subject, data, timeout_s, of_broker=False))[0]
        return bytes(answer.data)

    # -- the JetStream API -----------------------------------------------------------------------------------------
    async def _put(self, subject: str, data: bytes, headers: dict[str, str] | None = None) -> int:
        """Store a message over the control connection and return its sequence number."""
        return _seq(subject, (await self._control.request(subject, data, ANSWER_S, headers))[0])

    async def _ensure(self, config: dict[str, Any]) -> None:
        """Create a stream, or verify that an existing one has this configuration. `config`: as in JetStream's API."""
        wanted = {"retention": "limits", "storage": "file", "num_replicas": 1, "allow_direct": True, **config}
        try:
            await self._api(f"STREAM.CREATE.{config['name']}", wanted)
        except (_Refused, StreamFull) as error:
            if isinstance(error, _Refused) and error.code != _NAME_IN_USE:
                raise
            try:  # a broker without room for a second such stream refuses even a stream that exists
                actual = (await self._api(f"STREAM.INFO.{config['name']}"))["config"]
            except _Refused:
                raise error from None
            differ = [
                f"{k} is {actual.get(k)!r}, wanted {v!r}"
                for k, v in wanted.items()
                if actual.get(k) != v and (actual.get(k) or v)  # the server leaves out values such as 0 and false
            ]
            if not differ and isinstance(error, StreamFull):
                return
            raise Unavailable(
                f"stream {config['name']} exists with another configuration: {'; '.join(differ)}. "
                "Delete it with `nats stream rm`, or use another name"
            ) from None

    async def _api_now(self, method: str, ask: dict[str, Any] | None = None) -> dict[str, Any]:
        """Act as `_api`, but raise Unreachable at once while the connection is lost."""
        self._must_be_up(method)
        return await self._api(method, ask)

    def _must_be_up(self, operation: str) -> None:
        """Raise Unreachable if the connection is lost.

        nats-py would send the request after the reconnection, and the broker may return with an older store.
        """
        if not self._control.up:
            raise Unreachable(f"{operation}: the connection to the broker is lost")

    async def _api(self, method: str, ask: dict[str, Any] | None = None) -> dict[str, Any]:
        """Call a method of the JetStream API, such as `STREAM.INFO.<name>`, and return its answer."""
        data = json.dumps(ask).encode() if ask else b""
        try:
            answers = await self._control.request(f"$JS.API.{method}", data, ANSWER_S)
        except NoResponders:
            raise StoreDown(_NO_JETSTREAM) from None
        answer: dict[str, Any] = json.loads(answers[0].data)
        if "error" in answer:
            raise _error(method, answer["error"])
        return answer


# Numbers of JetStream's errors.
_NAME_IN_USE = 10058
_STREAM_NOT_FOUND = 10059
_WRONG_LAST_SEQUENCE = (10071, 10164)
_NO_SPACE = (10023, 10028, 10047)
_ACCOUNT_FULL = 10002
_NO_STORE = 10049  # the files of a stream cannot be created
_NO_SUBJECT = "_"  # a subject of no stream
_JETSTREAM_OFF = (10039, 10076)
_NO_LEADER = (10008, 10009)  # a cluster elects a leader at the moment, which takes seconds


class _Refused(Unavailable):
    """An error of JetStream for which the bus has no type of its own."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def _at(revision: int) -> dict[str, str]:
    """Return the header of a compare-and-set. The number is padded, so that every revision takes the same room in a bucket."""
    return {"Nats-Expected-Last-Subject-Sequence": f"{revision:020}"}


def _error(operation: str, error: dict[str, Any]) -> BusError:
    """Return the error of the bus port for an error of JetStream. `operation`: an API method or a subject, for the text."""
    code = error.get("err_code", 0)
    text = str(error.get("description", error))
    if code in _WRONG_LAST_SEQUENCE:
        return Conflict(f"{operation}: {text}")
    if "per subject exceeded" in text:
        return AlreadyPut(f"{operation}: {text}")
    if code == _NO_STORE or "no space" in text:
        return DiskFull(f"{operation}: {text}")
    if code == _ACCOUNT_FULL:
        return BrokerFull(f"{operation}: {text}")
    if code in _NO_SPACE or "exceeded" in text:
        return StreamFull(f"{operation}: {text}")
    if code in _JETSTREAM_OFF:
        return StoreDown(_NO_JETSTREAM)
    if code in _NO_LEADER:
        return Unreachable(f"{operation}: {text}")
    return _Refused(f"{operation}: {text}", code)


def _seq(subject: str, acknowledgement: Msg) -> int:
    """Return the sequence number in the acknowledgement of a put. Raises its error, or Unavailable for any other answer."""
    try:
        answer = json.loads(acknowledgement.data)
        if "error" in answer:
            raise _error(subject, answer["error"])
        return int(answer["seq"])
    except (ValueError, TypeError, KeyError):
        raise Unavailable(f"{subject}: a subscriber answered, not a stream") from None


def _stored(message: Msg) -> Stored:
    """Return the stored message in an answer to a direct get. Raises Unavailable if its headers are missing."""
    headers = message.headers or {}
    try:
        time_s = datetime.fromisoformat(headers["Nats-Time-Stamp"]).timestamp()
        return Stored(headers["Nats-Subject"], message.data, int(headers["Nats-Sequence"]), time_s)
    except (KeyError, ValueError):
        raise Unavailable(f"the answer to a direct get has unexpected headers {dict(headers)}") from None
