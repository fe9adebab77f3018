"""The bus port: the few operations that Syncline asks of a message bus. Knows no broker and no message format.

Two implementations pass one contract suite (`tests/bus/`): a real nats-server, and a deterministic one in memory.

* **Key-value**: small records with revisions, changed by compare-and-set.
* **Streams**: subjects kept in order of arrival. Bulk is *put* (acknowledged) and *got* by subject; nobody is pushed a
  tensor, so there is no slow consumer and nothing overflows.
* **Core**: at-most-once publish, subscribe and request, for what may be lost: heartbeats, notifies, metrics, events.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from syncline.errors import Unavailable

READ_BYTES = (
    8 << 20
)  # one answer to `read` ends when it has so much: a broker cuts off whoever is far behind with reading
WAITING_BYTES = 128 << 20  # so much may wait for one handler
LONGEST_SUBJECT_BYTES = 3 << 10  # a broker hangs up on a line of 4 KiB, in which more stands than a subject
_NO_SUBJECT = re.compile("[ \t\r\n\x7f\ud800-\udfff]|^$")


def checked_subject(subject: str) -> str:
    """The subject itself. Raises Unavailable for one that no broker takes, or that it does not take well: nats-server hangs up
    on one that is too long, and a stream of its neither finds nor purges a message whose subject has a DEL."""
    if _NO_SUBJECT.search(subject) or len(subject.encode()) > LONGEST_SUBJECT_BYTES:
        raise Unavailable(f"{subject[:200]!r} is no subject")
    return subject


@dataclass(frozen=True, slots=True)
class Stored:
    """A message as a stream holds it."""

    subject: str
    data: bytes
    seq: int
    time_s: float  # when the bus took it, seconds since the epoch, by the bus's own clock


@dataclass(frozen=True, slots=True)
class Entry:
    """A key's value. `revision` is what a compare-and-set must name."""

    value: bytes
    revision: int


@dataclass(frozen=True, slots=True)
class Delivery:
    """A core message as a subscriber gets it; `reply` is empty when no answer is wanted."""

    subject: str
    data: bytes
    reply: str = ""


@dataclass(frozen=True, slots=True)
class StreamConfig:
    """What a stream must look like. Ensuring it twice changes nothing; another configuration under the name is an error."""

    name: str
    subjects: tuple[str, ...]
    max_bytes: int  # every stream is bounded
    max_per_subject: int = -1
    full: Literal["drop oldest", "refuse"] = "drop oldest"
    write_once: bool = False  # a subject holds one message for ever; a second put raises AlreadyPut


@dataclass(frozen=True, slots=True)
class BucketConfig:
    """A key-value bucket with one revision kept per key. `ttl_s`: a key not written for so long vanishes; 0 keeps it."""

    name: str
    max_bytes: int
    max_value_bytes: int
    ttl_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StreamState:
    messages: int
    bytes: int
    first_seq: int
    last_seq: int
    subjects: dict[str, int] = field(default_factory=dict)  # messages per subject, where a filter asked for it


Handler = Callable[[Delivery], Awaitable[None]]


class Subscription(Protocol):
    async def unsubscribe(self) -> None: ...


class Bus(Protocol):
    """Every method may raise Unreachable (no connection or no answer in time) and Denied (the broker's permissions).

    While the connection is lost, `kv_create`, `kv_update`, `purge`, `delete_stream` and `fit_stream` raise
    Unreachable at once and are not kept until it is back: the broker may come back with an older store, and what was right to
    change is right no more. So do `put` and `get` of bulk, which would travel for a caller who has long asked again.
    """

    @property
    def max_payload(self) -> int:
        """The largest message in bytes, headers included."""
        ...

    # -- key-value -------------------------------------------------------------------------------------------------
    async def ensure_bucket(self, config: BucketConfig) -> None:
        """Creates the bucket, or finds it as configured. Raises Unavailable where it exists with another configuration."""
        ...

    async def kv_get(self, bucket: str, key: str) -> Entry | None: ...

    async def kv_create(self, bucket: str, key: str, value: bytes) -> int:
        """Writes a key that does not exist; returns its revision. Raises Conflict where it does."""
        ...

    async def kv_update(self, bucket: str, key: str, value: bytes, revision: int) -> int:
        """Compare-and-set: writes if the key is still at `revision`. Raises Conflict where it is not.
        Unreachable means *unknown*: read again."""
        ...

    async def kv_keys(self, bucket: str) -> list[str]: ...

    # -- streams ---------------------------------------------------------------------------------------------------
    async def ensure_stream(self, config: StreamConfig) -> None:
        """Creates the stream, or finds it as configured. Raises Unavailable where it exists with another configuration."""
        ...

    async def delete_stream(self, stream: str) -> None:
        """Deletes it with all it holds; a stream that is not there is no error."""
        ...

    async def fit_stream(self, stream: str) -> None:
        """Lowers its byte limit to what it holds: the rest of its reservation is free for others.
        Raises Unavailable where there is no such stream."""
        ...

    async def put(self, subject: str, data: bytes, *, bulk: bool = False) -> int:
        """Stores one message and returns its sequence number once the bus holds it.
        Raises AlreadyPut (write-once), StreamFull, NoResponders (no stream takes the subject), Unavailable (too large for
        the bus). Larger than a drop-oldest stream as a whole, it is acknowledged and gone. `bulk` travels on a
        connection of its own, so that nothing small waits behind it; its answer has the time that a thin link takes
        (`syncline.bus.silence`)."""
        ...

    async def get(self, stream: str, subject: str, *, bulk: bool = False) -> Stored | None:
        """The last message of a subject, or None."""
        ...

    async def read(self, stream: str, from_seq: int, limit: int) -> list[Stored]:
        """Up to `limit` messages in stream order, from sequence `from_seq` on; fewer is not the end, none is."""
        ...

    async def state(self, stream: str, subjects: str = "") -> StreamState:
        """Counts; with a filter also the messages per subject. Raises Unavailable where there is no such stream."""
        ...

    async def purge(self, stream: str, subject: str) -> None:
        """Removes all messages of a subject (wildcards allowed)."""
        ...

    # -- core ------------------------------------------------------------------------------------------------------
    async def publish(self, subject: str, data: bytes) -> None: ...

    async def subscribe(self, subject: str, handler: Handler, *, limit: int = 4096) -> Subscription:
        """Calls the handler for one message after the other; when `limit` wait, or WAITING_BYTES, the newest are dropped. A
        subject that the permissions forbid stays silent: the broker's log says so."""
        ...

    async def request(self, subject: str, data: bytes, timeout_s: float) -> bytes:
        """One question, one answer. Raises NoResponders at once where nobody listens."""
        ...

    @property
    def losses(self) -> int:
        """How often a connection was lost by now: counted before anything is heard over the next one."""
        ...

    def when_reconnected(self, call: Callable[[], None]) -> None:
        """`call()` after every reconnect: whatever was sent by core messages meanwhile is lost."""
        ...

    async def close(self) -> None: ...
