"""Transfer of blobs: a blob is put chunk by chunk with several chunks in flight, and got in the same way.

The number of chunks in flight follows the speed of the link. The number starts small, grows up to a given limit while
answers are quick, and shrinks to one while a chunk takes seconds. So a lost connection loses few chunks, and no other
message waits long.

The broker never pushes a tensor. A writer repeats a chunk until the bus acknowledges it, and a reader repeats the request for a
chunk without an answer. The subject of a chunk is written once, so a chunk that exists already counts as put.
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

RETRY_S = (0.05, 0.2, 1.0, 2.0, 4.0)  # pauses between tries; the last one repeats until `patience_s` is over
PATIENCE_S = 60.0
UNOFFERED_S = 120.0  # an agent's blob without a new chunk for this time and without an offer is purged
FIRST_CHUNKS = 2  # chunks in flight at first
QUICK_S = 1.0  # a chunk that took less time adds one to the chunks in flight, a slower chunk removes one
RECORD_CHUNK_BYTES = 512 * 1024  # the largest chunk of a record that exceeds one message: rosters, plans, manifests
STALE_S = 0.7 * UNOFFERED_S  # after this time without a new chunk the writer starts again, before the purge
T = TypeVar("T")
Prefix = Callable[[str], str]  # blob id → the subject of its chunks, without the chunk number


class BlobGone(PeerError):
    """A chunk of the blob is not on the bus: never put, or purged. Read head again, which may name another blob."""


class Stale(Unreachable):
    """The chunks put so far may have been purged. Put the blob again under another id."""


class Growth:
    """The progress of a put: the digests of the chunks on the bus, and the time of the last new chunk.

    A chunk that existed already, from an earlier try, does not count as new: the janitor does not see the blob grow.
    """

    def __init__(self) -> None:
        self._at_s = _now()
        self.digests: dict[int, bytes] = {}  # of the chunks that are on the bus

    @property
    def left_s(self) -> float:
        """The seconds for which it is safe to continue the blob and to offer it; negative if the blob may be purged."""
        return self._at_s + STALE_S - _now()

    def put(self, k: int, digest: bytes, new: bool) -> None:
        """Note that a chunk is on the bus.

        Args:
            k: the number of the chunk.
            digest: the digest of its payload.
            new: whether this call of the writer stored the chunk.

        Raises:
            Stale: too much time has passed since the last new chunk.
        """
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
    """Put a blob and wait until the bus has acknowledged every chunk. Chunk k has the subject `prefix(blob).k`.

    Args:
        bus: the bus of the run.
        prefix: blob id → subject of the blob.
        data: the content, `sections` vectors of one size one behind the other.
        chunk_bytes: bytes of a chunk's payload; the last one of each section may be shorter.
        blob: the id; empty: a new random one.
        codec: the encoding of the content, as readers expect it.
        window: chunks in flight, at most.
        sections: vectors in the blob; no chunk reaches from one into the next.
        growth: the progress of an earlier try, whose chunks are not put again. None: no progress to keep.

    Returns:
        The reference of the blob, and the digest over all its chunks.

    Raises:
        Stale: the blob of `growth` did not grow for too long.
        StreamFull: the stream has no room for the blob.
        Unreachable: the bus did not answer for `PATIENCE_S`.
    """
    blob = blob or new_id()
    data = data.cast("B")
    places = _places(len(data), chunk_bytes, sections)
    n = len(places)
    whole = BlobDigest()
    before = growth.digests if growth is not None else {}
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
    """Return the range of bytes of each chunk."""
    each = size // sections
    return [
        slice(begin + offset, begin + min(offset + chunk_bytes, each))
        for begin in range(0, sections * each or 1, each or 1)
        for offset in range(0, each or 1, chunk_bytes)
    ]


async def put_record(bus: Bus, prefix: Prefix, data: bytes, *, blob: str = "") -> BlobRef:
    """Put a record as a blob of equal chunks, each of which fits into a message of this bus.

    A reader computes the chunk size from the size and the number of chunks, so the limits of its own connection do not matter.

    Args:
        bus: the bus of the run.
        prefix: blob id → subject of the blob.
        data: the record.
        blob: the id; empty: a new random one.

    Returns:
        The reference of the blob.
    """
    most = min(RECORD_CHUNK_BYTES, content_bytes(bus.max_payload))
    chunks = max(1, -(-len(data) // most))
    return (await put_blob(bus, prefix, memoryview(data), _cut(len(data), chunks), blob=blob))[0]


async def get_record(bus: Bus, stream: str, prefix: Prefix, ref: BlobRef, limit: int) -> bytes:
    """Return a record that `put_record` has put.

    Raises:
        BlobGone: a chunk is not on the bus.
        PeerError: the record is larger than `limit` bytes, or a chunk is not valid.
    """
    if ref.size > limit:
        raise PeerError(f"blob {ref.id[:8]}: {ref.size} bytes are more than the {limit} allowed")
    into = bytearray(ref.size)
    await get_blob(bus, stream, prefix, ref, memoryview(into), _cut(ref.size, ref.chunks))
    return bytes(into)


def _cut(size: int, chunks: int) -> int:
    """Return the bytes of each of `chunks` equal chunks; the last one may be shorter."""
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
    """Return the message with chunk k, not decoded. Raises BlobGone if the stream does not have it."""
    stored = await with_retries(lambda: bus.get(stream, f"{prefix(ref.id)}.{k}", bulk=True))
    if stored is None:
        raise BlobGone(f"chunk {k} of blob {ref.id[:8]} is not on the bus")
    return stored


async def put_chunk(bus: Bus, subject: str, frame: bytes) -> bool:
    """Put one chunk. Return False if the chunk exists already, from an earlier try of the same writer."""
    try:
        await with_retries(lambda: bus.put(subject, frame, bulk=True))
    except AlreadyPut:
        return False
    return True


async def with_retries(ask: Callable[[], Awaitable[T]], *, patience_s: float = PATIENCE_S) -> T:
    """Call a function of the bus, and repeat the call with growing pauses after errors that may pass.

    Args:
        ask: the call. An earlier call may have had its effect, so the operation must be idempotent, or the caller must expect
            the error of a second effect, such as AlreadyPut.
        patience_s: seconds for all tries together.

    Raises:
        AlreadyPut, Denied, StreamFull, Unavailable: at once, because another try does not help.
        Unreachable: no try succeeded within `patience_s`.
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
    """Run `work(0)` … `work(n − 1)`, at most `window` at a time. The first error cancels the rest and is raised."""
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
    """Run `work(0)` … `work(n − 1)` like `windowed`, with a window that follows the speed of the link.

    The window starts at `FIRST_CHUNKS`, grows by one after a call that took less than `QUICK_S`, and shrinks by one after a
    slower call; it stays between 1 and `most`.
    """
    width = min(FIRST_CHUNKS, most)
    room = asyncio.Semaphore(width)

    async def one(k: int) -> None:
        nonlocal width
        await room.acquire()
        began = _now()
        await work(k)
        before = width
        quick = _now() - began < QUICK_S
        width = min(most, width + 1) if quick else max(1, width - 1)
        for _ in range(1 + width - before):  # 0 after a slow call, 2 after a quick one, 1 at a limit
            room.release()

    await windowed(n, most, one)


def _now() -> float:
    return asyncio.get_running_loop().time()
