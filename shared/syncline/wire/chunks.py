"""A tensor's bytes on the wire: frames of one msgpack map each. Knows no bus and no tensor, only bytes.

Frame: `{t: "chunk", v, blob, k, n, codec, crc, data}`; `crc` is xxh3-64 over `data`. A frame names its blob and its place,
so that a frame under a wrong subject is refused; blobs have random ids, so that no two writers meet.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgpack
import xxhash

from syncline.errors import PeerError
from syncline.wire.messages import VERSION, shown

FRAME_OVERHEAD_BYTES = 16 * 1024  # what a message may need beside the tensor bytes: frame, subject, headers, slack
LEAST_PAYLOAD_BYTES = 16 * 1024  # of a broker: a head, a heartbeat and 1,024 float64 numbers each travel in one message
DIGEST_BYTES = 16


def content_bytes(max_payload: int) -> int:
    """Return the bytes of content that a chunk may have where a message has at most `max_payload` bytes."""
    return max_payload - min(FRAME_OVERHEAD_BYTES, max_payload // 2)


def pack_chunk(blob: str, k: int, n: int, codec: str, data: bytes | memoryview) -> bytes:
    """The frame of chunk k of n."""
    frame = {"t": "chunk", "v": VERSION, "blob": blob, "k": k, "n": n, "codec": codec}
    packed: bytes = msgpack.packb({**frame, "crc": checksum(data), "data": data}, use_bin_type=True)
    return packed


def unpack_chunk(frame: bytes, *, blob: str, k: int, n: int, codec: str, size: int) -> bytes:
    """The `size` bytes of chunk k of blob, or a PeerError that says what is wrong with the frame."""
    return unpack_checked(frame, blob=blob, k=k, n=n, codec=codec, size=size)[0]


def unpack_checked(frame: bytes, *, blob: str, k: int, n: int, codec: str, size: int) -> tuple[bytes, int]:
    """The same, with the checksum of those bytes."""
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
    found = checksum(data)
    if found != fields.get("crc"):
        raise PeerError(f"{what}: the checksum does not match")
    return data, found


def checksum(data: bytes | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(data)


def blob_digest(checksums: Iterable[int]) -> bytes:
    """xxh3-128 over the checksums of a blob's chunks, in their order."""
    return xxhash.xxh3_128_digest(b"".join(c.to_bytes(8, "little") for c in checksums))
