"""The bus port over NATS JetStream.

A process has two connections, control and bulk, so that a heartbeat never waits behind a tensor. The modules of this package
are the only ones that import nats.
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
    BusError,
    Conflict,
    NoResponders,
    StoreDown,
    StreamFull,
    Unavailable,
    Unreachable,
)

_NO_JETSTREAM = "the broker has no JetStream for this account. Start nats-server with JetStream enabled (`-js`)"


class _Subscription:
    def __init__(self, lane: Lane, i: int) -> None:
        self._lane, self._i = lane, i

    async def unsubscribe(self) -> None:
        await self._lane.unsubscribe(self._i)


class NatsBus:
    """The bus port on a nats-server with JetStream. Make one with `NatsBus.connect`."""

    def __init__(self, to: Connection) -> None:
        outage = Outage(masked(to.url))
        self._control, self._bulk = Lane(to, "control", outage), Lane(to, "bulk", outage)

    @classmethod
    async def connect(cls, to: Connection) -> NatsBus:
        """Connect. Raises Denied for an unknown key, and Unreachable if no broker answers within `patience_s`."""
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
        there = await self._api(f"STREAM.INFO.{stream}")
        config = {**there["config"], "max_bytes": max(1, there["state"]["bytes"])}
        await self._api_now(f"STREAM.UPDATE.{stream}", config)

    async def put(self, subject: str, data: bytes, *, bulk: bool = False) -> int:
        if bulk:
            return _seq(subject, await self._bulk.request_bulk(subject, data))
        return await self._put(subject, data)

    async def get(self, stream: str, subject: str, *, bulk: bool = False) -> Stored | None:
        where = f"$JS.API.DIRECT.GET.{stream}.{subject}"
        if bulk:
            answer = await self._bulk.request_bulk(where, b"", self.max_payload)
        else:
            answer = (await self._control.request(where, b"", ANSWER_S))[0]
        return None if status_of(answer) == "404" else _stored(answer)

    async def read(self, stream: str, from_seq: int, limit: int) -> list[Stored]:
        what = {"seq": max(1, from_seq), "batch": limit, "next_by_subj": ">", "max_bytes": READ_BYTES}
        ask = json.dumps(what).encode()
        answers = await self._control.request(f"$JS.API.DIRECT.GET.{stream}", ask, ANSWER_S, many=True)
        return [_stored(a) for a in answers if not status_of(a)]

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

    async def purge(self, stream: str, subject: str) -> None:
        await self._api_now(f"STREAM.PURGE.{stream}", {"filter": subject})

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
        return _seq(subject, (await self._control.request(subject, data, ANSWER_S, headers))[0])

    async def _ensure(self, config: dict[str, Any]) -> None:
        wanted = {"retention": "limits", "storage": "file", "num_replicas": 1, "allow_direct": True, **config}
        try:
            await self._api(f"STREAM.CREATE.{config['name']}", wanted)
        except (_Refused, StreamFull) as error:
            if isinstance(error, _Refused) and error.code != _NAME_IN_USE:
                raise
            try:  # without room for another such stream, the broker refuses even one that is there
                there = (await self._api(f"STREAM.INFO.{config['name']}"))["config"]
            except _Refused:
                raise error from None
            differ = [
                f"{k} is {there.get(k)!r}, wanted {v!r}"
                for k, v in wanted.items()
                if there.get(k) != v and (there.get(k) or v)
            ]
            if not differ and isinstance(error, StreamFull):
                return
            raise Unavailable(
                f"stream {config['name']} exists with another configuration: {'; '.join(differ)}. "
                "Delete it with `nats stream rm`, or use another name"
            ) from None

    async def _api_now(self, what: str, ask: dict[str, Any] | None = None) -> dict[str, Any]:
        self._must_be_up(what)
        return await self._api(what, ask)

    def _must_be_up(self, what: str) -> None:
        """Raise Unreachable if the connection is lost.

        nats-py would keep the request until the connection is back, and the broker may come back with an older store.
        """
        if not self._control.up:
            raise Unreachable(f"{what}: the connection to the broker is lost")

    async def _api(self, what: str, ask: dict[str, Any] | None = None) -> dict[str, Any]:
        data = json.dumps(ask).encode() if ask else b""
        try:
            answers = await self._control.request(f"$JS.API.{what}", data, ANSWER_S)
        except NoResponders:
            raise StoreDown(_NO_JETSTREAM) from None
        answer: dict[str, Any] = json.loads(answers[0].data)
        if "error" in answer:
            raise _error(what, answer["error"])
        return answer


_NAME_IN_USE = 10058
_STREAM_NOT_FOUND = 10059
_WRONG_LAST_SEQUENCE = (10071, 10164)
_NO_SPACE = (10023, 10028, 10047)
_JETSTREAM_OFF = (10039, 10076)
_NO_LEADER = (10008, 10009)  # a cluster elects one just now: this passes within seconds


class _Refused(Unavailable):
    """An error of JetStream, with its number."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def _at(revision: int) -> dict[str, str]:
    """Return the header of a compare-and-set. Padded, so that every revision takes the same room in a bucket."""
    return {"Nats-Expected-Last-Subject-Sequence": f"{revision:020}"}


def _error(what: str, error: dict[str, Any]) -> BusError:
    """Return an error of JetStream as one of the bus."""
    code, text = error.get("err_code", 0), str(error.get("description", error))
    if code in _WRONG_LAST_SEQUENCE:
        return Conflict(f"{what}: {text}")
    if "per subject exceeded" in text:
        return AlreadyPut(f"{what}: {text}")
    if code in _NO_SPACE or "exceeded" in text or "no space" in text:
        return StreamFull(f"{what}: {text}")
    if code in _JETSTREAM_OFF:
        return StoreDown(_NO_JETSTREAM)
    if code in _NO_LEADER:
        return Unreachable(f"{what}: {text}")
    return _Refused(f"{what}: {text}", code)


def _seq(subject: str, acknowledgement: Msg) -> int:
    """Return the sequence number in an acknowledgement. Raises the error that the stream reports instead."""
    try:
        answer = json.loads(acknowledgement.data)
        if "error" in answer:
            raise _error(subject, answer["error"])
        return int(answer["seq"])
    except (ValueError, TypeError, KeyError):
        raise Unavailable(f"{subject}: the answer is not an acknowledgement of a stream") from None


def _stored(message: Msg) -> Stored:
    """Return the message in the answer to a direct get."""
    headers = message.headers or {}
    try:
        time_s = datetime.fromisoformat(headers["Nats-Time-Stamp"]).timestamp()
        return Stored(headers["Nats-Subject"], message.data, int(headers["Nats-Sequence"]), time_s)
    except (KeyError, ValueError):
        raise Unavailable(f"direct get answered {dict(headers)}") from None
