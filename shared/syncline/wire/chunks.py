"""Frames: the bytes of a tensor on the wire, one msgpack map for each chunk. This module knows neither bus nor tensor.

Frame: `{t: "chunk", v, blob, k, n, codec, crc, data}`; `crc` is xxh3-64 over `data`. A frame names its blob and its
place, so that a frame under a wrong subject is refused. Blobs have random ids, so that two writers never use the same
subject.

A checksum finds corruption in one frame. It does not resist forgery: anybody can compute the checksum of other bytes.
The content of an update is bound by its *digest*: BLAKE3 over the BLAKE3 digests of its chunks, in their order. An
offer carries the digest, and the signature of the offer covers it. The digest of a list, not of the bytes in one
stream, lets a reader take the chunks in any order and hash them in several threads, and keep one hash state for each
update instead of its bytes.
"""

from __future__ import annotations

import threading

import msgpack
import xxhash
from blake3 import blake3

from syncline.errors import PeerError
from syncline.wire.messages import VERSION, shown

FRAME_OVERHEAD_BYTES = 16 * 1024  # at most, of a message beside the tensor bytes: frame, subject, headers, slack
LEAST_PAYLOAD_BYTES = 16 * 1024  # that a broker must allow: a head or 1,024 float64 numbers travel in one message


def content_bytes(max_payload: int) -> int:
    """Return the most bytes of content in a chunk, for a broker whose messages have at most `max_payload` bytes."""
    return max_payload - min(FRAME_OVERHEAD_BYTES, max_payload // 2)


def pack_chunk(blob: str, k: int, n: int, codec: str, data: bytes | memoryview) -> bytes:
    """Return the frame of chunk k of n."""
    frame = {"t": "chunk", "v": VERSION, "blob": blob, "k": k, "n": n, "codec": codec}
    packed: bytes = msgpack.packb({**frame, "crc": checksum(data), "data": data}, use_bin_type=True)
    return packed


def unpack_chunk(frame: bytes, *, blob: str, k: int, n: int, codec: str, size: int) -> bytes:
    """Return the content of chunk k of a blob.

    Args:
        frame: the message as it came from the bus.
        blob, k, n, codec: values that the frame has to have.
        size: bytes of content.

    Raises:
        PeerError: the frame is another one, or damaged. Names the field.
    """
    what = f"chunk {k} of blob {blob[:8]}"
    if len(frame) > size + FRAME_OVERHEAD_BYTES:
        raise PeerError(f"{what}: a frame of {len(frame)} bytes for {size} bytes of content")
    try:
        fields = msgpack.unpackb(
            frame, raw=False, max_str_len=200, max_bin_len=size, max_array_len=0, max_map_len=32, max_ext_len=0
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise PeerError(f"{what}: not msgpack, or longer than agreed: {str(error) or type(error).__name__}") from None
    if not isinstance(fields, dict) or fields.get("t") != "chunk":
        raise PeerError(f"{what}: not a chunk")
    if fields.get("v") != VERSION:
        raise PeerError(f"{what}: version {shown(fields.get('v'))}, this Syncline reads version {VERSION}")
    for field, expected in (("blob", blob), ("k", k), ("n", n), ("codec", codec)):
        if fields.get(field) != expected:
            raise PeerError(f"{what}: {field} is {shown(fields.get(field))}, expected {expected!r}")
    data = fields.get("data")
    if not isinstance(data, bytes) or len(data) != size:
        raise PeerError(f"{what}: {len(data) if isinstance(data, bytes) else 'no'} bytes of data, expected {size}")
    if checksum(data) != fields.get("crc"):
        raise PeerError(f"{what}: the checksum does not match")
    return data


def checksum(data: bytes | memoryview) -> int:
    """Return xxh3-64 of the bytes: finds corruption, and is no protection against forgery."""
    return xxhash.xxh3_64_intdigest(data)


def chunk_digest(data: bytes | memoryview) -> bytes:
    """Return BLAKE3 of a chunk's content, 32 bytes: other content with the same digest cannot be made."""
    return blake3(data).digest()


class BlobDigest:
    """The digest of a blob, from the digests of its chunks, which may come in any order and from any thread.

    The object keeps the state of one hash, and the digests of chunks that came before an earlier one.
    """

    def __init__(self) -> None:
        self._hash = blake3()
        self._next = 0
        self._early: dict[int, bytes] = {}
        self._lock = threading.Lock()

    def add(self, k: int, digest: bytes) -> None:
        """Take the digest of chunk k. A chunk that was taken before is left out."""
        with self._lock:
            if k < self._next:
                return
            self._early[k] = digest
            while self._next in self._early:
                self._hash.update(self._early.pop(self._next))
                self._next += 1

    def digest(self) -> bytes:
        """Return the digest over all chunks taken, which are the first ones of the blob without a gap."""
        assert not self._early, f"chunk {self._next} is missing"
        return self._hash.digest()
