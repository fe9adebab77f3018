"""Frames: what comes out is what went in, or a PeerError that says what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgpack
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from syncline.errors import PeerError
from syncline.wire.chunks import FRAME_OVERHEAD_BYTES, BlobDigest, checksum, chunk_digest, pack_chunk, unpack_chunk
from syncline.wire.messages import DIGEST_BYTES

BLOB = "0123456789abcdef" * 2
DATA = bytes(range(40))


def unpacked(frame: bytes, **expected: Any) -> bytes:
    return unpack_chunk(frame, **{"blob": BLOB, "k": 2, "n": 5, "codec": "fp32", "size": len(DATA), **expected})


def refused(frame: bytes, **expected: Any) -> str:
    with pytest.raises(PeerError) as error:
        unpacked(frame, **expected)
    return str(error.value)


def frame(**fields: Any) -> bytes:
    """A good frame, but for these fields; a field that is None is left out."""
    good = {"t": "chunk", "v": 1, "blob": BLOB, "k": 2, "n": 5, "codec": "fp32", "crc": checksum(DATA), "data": DATA}
    packed: bytes = msgpack.packb({k: v for k, v in {**good, **fields}.items() if v is not None})
    return packed


blob_ids = st.from_regex("[0-9a-f]{32}", fullmatch=True)


@given(
    st.binary(max_size=5000),
    st.integers(0, 1 << 24),
    st.integers(1, 1 << 24),
    st.sampled_from(["fp32", "raw", ""]),
    blob_ids,
)
def test_what_is_packed_comes_out_again(data: bytes, k: int, n: int, codec: str, blob: str) -> None:
    packed = pack_chunk(blob, k, n, codec, memoryview(data))
    assert unpack_chunk(packed, blob=blob, k=k, n=n, codec=codec, size=len(data)) == data
    assert len(packed) <= len(data) + FRAME_OVERHEAD_BYTES


def test_the_frame_is_the_documented_map() -> None:
    assert pack_chunk(BLOB, 2, 5, "fp32", DATA) == frame()
    assert unpacked(frame()) == DATA


def test_fields_of_a_newer_minor_version_are_ignored() -> None:
    assert unpacked(frame(hint="sparse")) == DATA


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"t": "head"}, "not a chunk"),
        ({"t": None}, "not a chunk"),
        ({"v": 2}, "version 2, this Syncline reads version 1"),
        ({"v": None}, "version None, this Syncline reads version 1"),
        ({"blob": "f" * 32}, f"blob is '{'f' * 32}', expected '{BLOB}'"),
        ({"blob": BLOB.encode()}, f"blob is b'{BLOB}', expected '{BLOB}'"),
        ({"k": 3}, "k is 3, expected 2"),
        ({"k": "2"}, "k is '2', expected 2"),
        ({"k": None}, "k is None, expected 2"),
        ({"n": 4}, "n is 4, expected 5"),
        ({"codec": "int8"}, "codec is 'int8', expected 'fp32'"),
        ({"codec": {"a": 1}}, "codec is a dict, expected 'fp32'"),
        ({"data": DATA[:-1]}, "39 bytes of data, expected 40"),
        ({"data": "x" * 40}, "no bytes of data, expected 40"),
        ({"data": None}, "no bytes of data, expected 40"),
        ({"data": DATA[::-1]}, "the checksum does not match"),
        ({"crc": 0}, "the checksum does not match"),
        ({"crc": None}, "the checksum does not match"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], problem: str) -> None:
    assert refused(frame(**fields)) == f"chunk 2 of blob 01234567: {problem}"


@pytest.mark.parametrize(
    "junk", [b"", b"\xc1", b"\xc0", b"hello", b"\x90", b"\x81\xa1t", frame()[:-1], frame() + b"\x00"]
)
def test_what_is_no_frame_is_refused(junk: bytes) -> None:
    assert "not msgpack" in refused(junk) or "not a chunk" in refused(junk)


def test_a_frame_longer_than_agreed_is_not_even_looked_at() -> None:
    assert "for 40 bytes of content" in refused(frame(data=b"\x00" * (41 + FRAME_OVERHEAD_BYTES)))
    assert "longer than agreed" in refused(frame(data=DATA + b"\x00"))


@pytest.mark.parametrize("depth", [900, 1000, 1023, 5000])
def test_nesting_too_deep_to_print_is_refused_like_anything_else(depth: int) -> None:
    nested = b"\x81\xa1a" * depth + b"\xc0"
    assert refused(b"\x82\xa1t\xa5chunk\xa1v" + nested).startswith("chunk 2 of blob 01234567: ")


def test_a_flipped_bit_never_passes() -> None:
    good = frame()
    for place in range(8 * len(good)):
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        refused(bytes(bad))


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(junk: bytes) -> None:
    refused(junk)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 120), st.binary(max_size=4)), min_size=1, max_size=4))
def test_a_mutated_frame_gives_the_same_bytes_or_none(cuts: list[tuple[int, bytes]]) -> None:
    mutated = frame()
    for place, instead in cuts:
        mutated = mutated[:place] + instead + mutated[place + 2 :]
    try:
        assert unpacked(mutated) == DATA
    except PeerError:
        pass


# -- digests -----------------------------------------------------------------------------------------------------------
def digest_of(chunks: Sequence[bytes], order: Iterable[int] | None = None) -> bytes:
    whole = BlobDigest()
    for k in range(len(chunks)) if order is None else order:
        whole.add(k, chunk_digest(chunks[k]))
    return whole.digest()


def test_the_digest_of_a_blob_is_the_documented_one() -> None:
    assert digest_of([b"one", b"two"]) == blake3(blake3(b"one").digest() + blake3(b"two").digest()).digest()
    assert len(digest_of([])) == DIGEST_BYTES


@given(st.lists(st.binary(max_size=8), min_size=1, max_size=8).flatmap(lambda c: st.tuples(st.just(c), orders_of(c))))
def test_chunks_may_come_in_any_order_and_twice(drawn: tuple[list[bytes], list[int]]) -> None:
    chunks, order = drawn
    assert digest_of(chunks, order) == digest_of(chunks) == digest_of(chunks, [*order, order[0]])


def orders_of(chunks: list[bytes]) -> st.SearchStrategy[list[int]]:
    return st.permutations(range(len(chunks)))


def test_the_digest_of_a_blob_depends_on_every_chunk_their_order_and_their_borders() -> None:
    blobs: tuple[list[bytes], ...] = (
        [],
        [b""],
        [b"a"],
        [b"a", b"b"],
        [b"b", b"a"],
        [b"ab"],
        [b"a", b"b", b""],
        [chunk_digest(b"a")],
    )
    assert len({digest_of(chunks) for chunks in blobs}) == len(blobs)


def test_a_digest_with_a_gap_is_none() -> None:
    whole = BlobDigest()
    whole.add(1, chunk_digest(b"late"))
    with pytest.raises(AssertionError, match="chunk 0 is missing"):
        whole.digest()
