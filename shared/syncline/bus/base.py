"""The bus port: the operations that Syncline asks of a message bus. This module knows no broker and no message format.

Two implementations pass one contract suite (`tests/bus/`): `syncline.bus.nats` on a real nats-server, and the deterministic
`syncline.bus.memory`. The operations form three groups:

* **Key-value**: small records with revisions. Every change is a compare-and-set.
* **Streams**: subjects stored in the order of arrival. Bulk data is *put* with an acknowledgement and *got* by subject. The
  broker never pushes a tensor, so no subscriber is too slow for one and no queue overflows.
* **Core**: publish, subscribe and request, each at most once. Heartbeats, notifies, metrics and events may be lost.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from syncline.errors import Unavailable

# One answer to `read` ends once it has this many bytes: a broker disconnects a client that falls far behind with reading.
READ_BYTES = 8 << 20
# Messages of this many bytes in total may wait for one handler.
WAITING_BYTES = 128 << 20
# A broker disconnects a client that sends a protocol line of more than 4 KiB, and a line holds more than the subject.
LONGEST_SUBJECT_BYTES = 3 << 10
_INVALID_SUBJECT = re.compile("[ \t\r\n\x7f\ud800-\udfff]|^$")


def checked_subject(subject: str) -> str:
    """Return the subject if a broker can handle it.

    nats-server disconnects a client that sends too long a subject. Its streams neither find nor purge a message whose subject
    contains a DEL character.

    Raises:
        Unavailable: the subject is empty, too long, or contains white space, DEL or a surrogate.
    """
    if _INVALID_SUBJECT.search(subject) or len(subject.encode()) > LONGEST_SUBJECT_BYTES:
        raise Unavailable(f"{subject[:200]!r} is not a valid subject")
    return subject


@dataclass(frozen=True, slots=True)
class Stored:
    """A message in a stream."""

    subject: str
    data: bytes
    seq: int  # position in the stream, from 1
    time_s: float  # time of storing by the broker's clock, seconds since the Unix epoch


@dataclass(frozen=True, slots=True)
class Entry:
    """The value of a key. A compare-and-set names its `revision`."""

    value: bytes
    revision: int


@dataclass(frozen=True, slots=True)
class Delivery:
    """A core message as a subscriber receives it. `reply` is the subject of the answer, empty if the sender wants no answer."""

    subject: str
    data: bytes
    reply: str = ""


@dataclass(frozen=True, slots=True)
class StreamConfig:
    """The wanted configuration of a stream."""

    name: str
    subjects: tuple[str, ...]  # patterns of the subjects that the stream stores
    max_bytes: int  # every stream is bounded
    max_per_subject: int = -1  # messages kept for each subject; -1: no limit
    full: Literal["drop oldest", "refuse"] = "drop oldest"  # reaction to a put that exceeds `max_bytes`
    write_once: bool = False  # a subject keeps its first message; a second put raises AlreadyPut


@dataclass(frozen=True, slots=True)
class BucketConfig:
    """The wanted configuration of a key-value bucket, which keeps one revision of each key."""

    name: str
    max_bytes: int
    max_value_bytes: int
    ttl_s: float = 0.0  # a key expires after this time without a write; 0: never


@dataclass(frozen=True, slots=True)
class StreamState:
    """Counts of a stream at one moment."""

    messages: int
    bytes: int
    first_seq: int
    last_seq: int
    subjects: dict[str, int] = field(default_factory=dict)  # messages of each subject that a filter selected


Handler = Callable[[Delivery], Awaitable[None]]


class Subscription(Protocol):
    """A subscription made by `Bus.subscribe`."""

    async def unsubscribe(self) -> None:
        """Stop the delivery of messages. A second call changes nothing."""
        ...


class Bus(Protocol):
    """A client's connection to a message bus.

    Every method may raise `Unreachable` (no connection, or no answer in time: the operation may or may not have happened) and
    `Denied` (the broker's permissions forbid the operation). `syncline.bus.blobs.with_retries` repeats a call after the errors
    that may pass.

    While the connection is lost, small messages (`put`, `get`, core messages and read-only questions) wait in a bounded buffer
    and are sent after the reconnection, even if the caller has already received `Unreachable`. Two groups of operations do not
    wait and raise `Unreachable` at once:

    * `kv_create`, `kv_update`, `purge`, `delete_stream`, `fit_stream` and `check_store`: the broker may return with an older
      state, in which the change would be wrong.
    * `put` and `get` with `bulk`: the data would travel for a caller that has already repeated the call.
    """

    @property
    def max_payload(self) -> int:
        """The size of the largest message that the broker accepts, in bytes, with headers."""
        ...

    # -- key-value -------------------------------------------------------------------------------------------------
    async def ensure_bucket(self, config: BucketConfig) -> None:
        """Create a bucket, or verify that an existing one has this configuration. Idempotent.

        Raises:
            Unavailable: a bucket of this name has another configuration.
            StreamFull: the broker has no room to reserve `max_bytes`.
        """
        ...

    async def kv_get(self, bucket: str, key: str) -> Entry | None:
        """Return the entry of a key, or None if the key does not exist.

        Raises:
            NoResponders: the bucket does not exist.
        """
        ...

    async def kv_create(self, bucket: str, key: str, value: bytes) -> int:
        """Write a key that does not exist yet.

        Returns:
            The revision of the new entry.

        Raises:
            Conflict: the key exists, perhaps by an earlier call of the same caller whose answer was lost.
            StreamFull: the bucket is full.
            Unavailable: the value is too large for the bucket or for the broker.
            Unreachable: unknown whether the value was written; read the key.
        """
        ...

    async def kv_update(self, bucket: str, key: str, value: bytes, revision: int) -> int:
        """Write a key if its entry still has `revision`: a compare-and-set.

        Returns:
            The revision of the new entry.

        Raises:
            Conflict: the key has another revision, perhaps by an earlier call of the same caller whose answer was lost.
            StreamFull: the bucket is full.
            Unavailable: the value is too large for the bucket or for the broker.
            Unreachable: unknown whether the value was written; read the key.
        """
        ...

    async def kv_keys(self, bucket: str) -> list[str]:
        """Return the existing keys, sorted.

        Raises:
            Unavailable: the bucket does not exist.
        """
        ...

    # -- streams ---------------------------------------------------------------------------------------------------
    async def ensure_stream(self, config: StreamConfig) -> None:
        """Create a stream, or verify that an existing one has this configuration. Idempotent.

        Raises:
            Unavailable: a stream of this name has another configuration, or another stream stores one of the subjects.
            StreamFull: the broker has no room to reserve `max_bytes`.
        """
        ...

    async def delete_stream(self, stream: str) -> None:
        """Delete a stream with all its messages. Idempotent: no error if the stream does not exist."""
        ...

    async def fit_stream(self, stream: str) -> None:
        """Lower the byte limit of a stream to the bytes that it holds, so that other streams can reserve the rest. Idempotent.

        Raises:
            Unavailable: the stream does not exist.
        """
        ...

    async def put(self, subject: str, data: bytes, *, bulk: bool = False) -> int:
        """Store one message in the stream of its subject, and wait for the acknowledgement.

        A repeated put stores the message again, except in a write-once stream. A message that is larger than a whole
        drop-oldest stream is acknowledged and dropped at once.

        Args:
            subject: a subject of a stream.
            data: the content, at most `max_payload` bytes.
            bulk: send over the second connection, so that no small message waits behind this one. The time limit then allows
                for a slow link (`syncline.bus.silence`).

        Returns:
            The message's sequence number in the stream.

        Raises:
            AlreadyPut: the stream is write-once and has a message of this subject.
            StreamFull: the stream refuses messages beyond its byte limit.
            NoResponders: no stream stores the subject.
            Unavailable: the message is too large for the broker.
        """
        ...

    async def get(self, stream: str, subject: str, *, bulk: bool = False) -> Stored | None:
        """Return the last message of a subject, or None if the stream holds none.

        Args:
            stream: name of the stream.
            subject: a subject of the stream.
            bulk: as in `put`.

        Raises:
            NoResponders: the stream does not exist.
        """
        ...

    async def read(self, stream: str, from_seq: int, limit: int) -> list[Stored]:
        """Return messages in stream order, starting with sequence number `from_seq`.

        Returns:
            At most `limit` messages and about `READ_BYTES`. Only an empty list means that the stream has no more messages; a
            list shorter than `limit` does not.

        Raises:
            NoResponders: the stream does not exist.
        """
        ...

    async def state(self, stream: str, subjects: str = "") -> StreamState:
        """Return the counts of a stream.

        Args:
            stream: name of the stream.
            subjects: a pattern; the result has the messages per subject for the subjects that match. Empty: for no subject.

        Raises:
            Unavailable: the stream does not exist.
        """
        ...

    async def purge(self, stream: str, subject: str) -> None:
        """Remove all messages whose subject matches, wildcards allowed. Idempotent.

        Raises:
            Unavailable: the stream does not exist.
        """
        ...

    async def check_store(self, *streams: str) -> None:
        """Check that the broker can write to the streams. Changes nothing, and takes the permission to purge.

        nats-server does not answer a put while its disk is full, so that a put raises only `Unreachable`.

        Raises:
            BrokerFull: the disk is full, or the account has reached its limit.
            Unavailable: a stream does not exist.
        """
        ...

    # -- core ------------------------------------------------------------------------------------------------------
    async def publish(self, subject: str, data: bytes) -> None:
        """Send a message to the current subscribers, at most once and without acknowledgement.

        The broker does not report a forbidden subject to the caller; the broker's log records the refusal.

        Raises:
            Unavailable: the message is too large for the broker.
            Unreachable: the connection is closed, or is lost and its buffer is full.
        """
        ...

    async def subscribe(self, subject: str, handler: Handler, *, limit: int = 4096) -> Subscription:
        """Call the handler for each message, one after the other. The subscription outlives a lost connection.

        A subscription that the permissions forbid receives no message; the broker's log records the refusal.

        Args:
            subject: a subject or a pattern.
            handler: its errors are logged, and the next message is handled.
            limit: messages that may wait for the handler. New messages are dropped while so many wait, or `WAITING_BYTES`.
        """
        ...

    async def request(self, subject: str, data: bytes, timeout_s: float) -> bytes:
        """Send a question to a subscriber and return the first answer.

        Raises:
            NoResponders: the subject has no subscriber; raised at once.
            Unreachable: no answer within `timeout_s`.
            Unavailable: the message is too large for the broker.
        """
        ...

    @property
    def losses(self) -> int:
        """The number of connections lost so far. It grows before any message arrives over the next connection."""
        ...

    def when_reconnected(self, call: Callable[[], None]) -> None:
        """Register a function to call after every reconnection. Core messages sent during the interruption are lost."""
        ...

    async def close(self) -> None:
        """Close the connections for good. Messages published before are still sent; open requests raise Unreachable.
        A second call changes nothing."""
        ...
