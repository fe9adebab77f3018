"""Bulk over the bus: a blob is put chunk by chunk with a window of acknowledgements in flight, and got the same way.

The window follows the link. A transfer begins with a few chunks in flight, reaches the full window on a fast link, and
falls to a single chunk on a link that needs seconds for one, so that a lost connection costs little and small messages
do not wait long.

Bulk is never pushed. A writer repeats a chunk until the bus holds the chunk; a reader asks again for a missing one. A
chunk that exists already counts as put, because the subject of a chunk is written once.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import TypeVar

from syncline.bus.base import Bus, Stored
from syncline.chance import new_id
from syncline.errors import AlreadyPut, BusError, Denied, PeerError, StreamFull, Unavailable, Unreachable
from syncline.wire.chunks import BlobDigest, chunk_digest, content_bytes, pack_chunk, unpack_chunk
from syncline.wire.messages import RAW, BlobRef

RETRY_S = (0.05, 0.2, 1.0, 2.0, 4.0)  # pauses; the last one repeats until `patience_s` is over
PATIENCE_S = 60.0
UNOFFERED_S = 120.0  # after this time without a new chunk, the blob of an agent that was not offered is purged
FIRST_CHUNKS = 2  # in flight at first
QUICK_S = 1.0  # a chunk that took less widens the window by one, a slower one narrows the window by one
RECORD_CHUNK_BYTES = 512 * 1024  # of a chunk of a record that is too large for one message, at most
STALE_S = 0.7 * UNOFFERED_S  # after this time a writer begins again, under another name
T = TypeVar("T")
Prefix = Callable[[str], str]  # blob id → the subject of its chunks, without the chunk number


class BlobGone(PeerError):
    """A chunk of the blob is not on the bus: never put, or purged since. Read head again."""


class Stale(Unreachable):
    """The first chunks of the blob may be purged by now: put the blob again, under another name."""


class Growth:
    """The progress of putting a blob, and the time of its last growth. A chunk that existed before does not count as
    growth.
    """

    def __init__(self) -> None:
        self._at_s = _now()
        self.digests: dict[int, bytes] = {}  # of the chunks that are on the bus

    @property
    def left_s(self) -> float:
        """Return for how many seconds it is safe to go on with the blob, and to offer the blob."""
        return self._at_s + STALE_S - _now()

    def put(self, k: int, digest: bytes, new: bool) -> None:
        """Note that a chunk is on the bus. Raises Stale if earlier chunks may be purged."""
        if self.left_s < 0:
            raise Stale(f"no new chunk for more than {STALE_S:g} s")
        self.digests[k] = digest
        if new:
            self._at_s = _now()


async def put_blob(
    bus: Bus,
    prefix: Prefix,
    data: memoryview,
    chunk_bytes: int,
    *,
    blob: str = "",
    codec: str = RAW,
    window: int = 8,
    sections: int = 1,
    growth: Growth | None = None,
) -> tuple[BlobRef, bytes]:
    """Put all of `data` under `prefix(blob)`.k, and return the blob's reference and digest once the bus holds every
    chunk.

    Args:
        prefix: the function from a blob's id to the subject of its chunks, without the chunk number.
        data: `sections` payloads of the same size; no chunk reaches from one into the next.
        chunk_bytes: bytes of a chunk; the last one of each section may be shorter.
        blob: the blob's id; empty: a new one.
        codec: the codec that made the bytes.
        window: chunks in flight at once, at most.
        growth: for the blob of an agent: the progress of an earlier try, from which this one goes on.

    Raises:
        Stale: the blob has not grown for so long that the coordinator may have purged it.
        StreamFull: the stream has no room.
        Unreachable: the bus did not answer within PATIENCE_S.
    """
    blob = blob or new_id()
    data = data.cast("B")
    places = _places(len(data), chunk_bytes, sections)
    n = len(places)
    whole, before = BlobDigest(), growth.digests if growth is not None else {}
    for k, digest in before.items():
        whole.add(k, digest)
    todo = [k for k in range(n) if k not in before]

    async def put(i: int) -> None:
        k = todo[i]
        part = data[places[k]]
        digest = chunk_digest(part)
        new = await put_chunk(bus, f"{prefix(blob)}.{k}", pack_chunk(blob, k, n, codec, part))
        whole.add(k, digest)
        if growth is not None:
            growth.put(k, digest, new)

    await paced(len(todo), window, put)
    return BlobRef(id=blob, size=len(data), chunks=n, codec=codec), whole.digest()


async def get_blob(
    bus: Bus,
    stream: str,
    prefix: Prefix,
    ref: BlobRef,
    into: memoryview,
    chunk_bytes: int,
    *,
    codec: str = RAW,
    window: int = 8,
    sections: int = 1,
) -> None:
    """Fill `into` with the payloads of a blob, one behind the other.

    Args:
        into: exactly `ref.size` bytes.
        chunk_bytes: bytes of a payload; the last one of each section may be shorter.
        codec: the codec that the caller can decode.
        window: chunks in flight at once, at most.
        sections: vectors in the blob; no chunk reaches from one into the next.

    Raises:
        BlobGone: a chunk is missing.
        PeerError: the blob has another size or codec, or a chunk is bad.
    """
    into = into.cast("B")
    if ref.codec != codec:
        raise PeerError(f"blob {ref.id[:8]}: codec is {ref.codec!r}, expected {codec!r}")
    places = _places(len(into), chunk_bytes, sections)
    if len(into) != ref.size or ref.chunks != len(places):
        raise PeerError(f"blob {ref.id[:8]}: {ref.size} bytes in {ref.chunks} chunks, expected {len(into)} bytes")

    async def get(k: int) -> None:
        place = into[places[k]]
        place[:] = await get_chunk(bus, stream, prefix, ref, k, len(place), codec)

    await paced(ref.chunks, window, get)


def _places(size: int, chunk_bytes: int, sections: int) -> list[slice]:
    """Return the place of each chunk in the bytes of a blob."""
    each = size // sections
    return [
        slice(begin + offset, begin + min(offset + chunk_bytes, each))
        for begin in range(0, sections * each or 1, each or 1)
        for offset in range(0, each or 1, chunk_bytes)
    ]


async def put_record(bus: Bus, prefix: Prefix, data: bytes, *, blob: str = "") -> BlobRef:
    """Put a record as a blob of equal chunks, each of which fits into a message of this bus.

    Size and number of chunks tell a reader the borders of the chunks, independently of the limits of its own
    connection.
    """
    most = min(RECORD_CHUNK_BYTES, content_bytes(bus.max_payload))
    chunks = max(1, -(-len(data) // most))
    return (await put_blob(bus, prefix, memoryview(data), _cut(len(data), chunks), blob=blob))[0]


async def get_record(bus: Bus, stream: str, prefix: Prefix, ref: BlobRef, limit: int) -> bytes:
    """Return a record that was put by `put_record`. Raises PeerError if the record is larger than `limit` bytes."""
    if ref.size > limit:
        raise PeerError(f"blob {ref.id[:8]}: {ref.size} bytes are more than the {limit} allowed")
    into = bytearray(ref.size)
    await get_blob(bus, stream, prefix, ref, memoryview(into), _cut(ref.size, ref.chunks))
    return bytes(into)


def _cut(size: int, chunks: int) -> int:
    """Return the bytes in each of so many equal chunks; the last one may be shorter."""
    return max(1, -(-size // chunks))


async def get_chunk(bus: Bus, stream: str, prefix: Prefix, ref: BlobRef, k: int, size: int, codec: str = RAW) -> bytes:
    """Return the payload of chunk k.

    Raises:
        BlobGone: the chunk is missing.
        PeerError: the chunk has not `size` bytes, or another codec.
    """
    stored = await get_frame(bus, stream, prefix, ref, k)
    return unpack_chunk(stored.data, blob=ref.id, k=k, n=ref.chunks, codec=codec, size=size)


async def get_frame(bus: Bus, stream: str, prefix: Prefix, ref: BlobRef, k: int) -> Stored:
    """Return chunk k as the stream holds the frame. Raises BlobGone."""
    stored = await with_retries(lambda: bus.get(stream, f"{prefix(ref.id)}.{k}", bulk=True))
    if stored is None:
        raise BlobGone(f"chunk {k} of blob {ref.id[:8]} is not on the bus")
    return stored


async def put_chunk(bus: Bus, subject: str, frame: bytes) -> bool:
    """Put one frame. Returns False if the bus has the frame already, from an earlier try."""
    try:
        await with_retries(lambda: bus.put(subject, frame, bulk=True))
    except AlreadyPut:
        return False
    return True


async def with_retries(ask: Callable[[], Awaitable[T]], *, patience_s: float = PATIENCE_S) -> T:
    """Repeat a request with growing pauses while the bus is out of reach.

    Raises:
        Unreachable: the bus did not answer within `patience_s`.
        BusError: the request failed for a reason that a repetition does not change; raised at once.
    """
    deadline = _now() + patience_s
    for attempt in itertools.count():
        try:
            return await ask()
        except (AlreadyPut, Denied, StreamFull, Unavailable):
            raise
        except BusError as error:
            pause = RETRY_S[min(attempt, len(RETRY_S) - 1)]
            if _now() + pause > deadline:
                raise Unreachable(f"gave up after {patience_s:g} s: {error}") from error
            await asyncio.sleep(pause)
    raise AssertionError("unreachable")


async def windowed(n: int, window: int, work: Callable[[int], Awaitable[None]]) -> None:
    """Run `work(0)` … `work(n − 1)`, at most `window` at once. The first error cancels the rest."""
    if n == 1:
        await work(0)
        return
    todo = iter(range(n))

    async def worker() -> None:
        for k in todo:
            await work(k)

    tasks = [asyncio.create_task(worker()) for _ in range(min(window, n))]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def paced(n: int, most: int, work: Callable[[int], Awaitable[None]]) -> None:
    """Run like `windowed`, with as many at once as the link carries quickly, and at most `most`."""
    width = min(FIRST_CHUNKS, most)
    room = asyncio.Semaphore(width)

    async def one(k: int) -> None:
        nonlocal width
        await room.acquire()
        began = _now()
        await work(k)
        before, quick = width, _now() - began < QUICK_S
        width = min(most, width + 1) if quick else max(1, width - 1)
        for _ in range(1 + width - before):
            room.release()

    await windowed(n, most, one)


def _now() -> float:
    return asyncio.get_running_loop().time()
