"""Bulk over the bus: windows, retries and everything that can be wrong with a blob. Time is simulated where it passes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from syncline.bus.blobs import (
    FIRST_CHUNKS,
    PATIENCE_S,
    QUICK_S,
    RETRY_S,
    STALE_S,
    BlobGone,
    Growth,
    Stale,
    get_blob,
    get_chunk,
    get_record,
    paced,
    put_blob,
    put_chunk,
    put_record,
    windowed,
    with_retries,
)
from syncline.errors import (
    AlreadyPut,
    BusError,
    Denied,
    NoResponders,
    PeerError,
    StreamFull,
    Unavailable,
    Unreachable,
)
from syncline.wire.chunks import LEAST_PAYLOAD_BYTES, BlobDigest, chunk_digest
from syncline.wire.messages import BlobRef

CHUNK = 100
DATA = bytes(range(256)) * 4  # 1,024 bytes: ten chunks and a short one
STREAM = "STREAM"
Simulated = Callable[[Coroutine[Any, Any, Any]], tuple[Any, float]]


def prefix(blob: str) -> str:
    return f"model.{blob}"


async def put(bus: Any, data: bytes = DATA, **options: Any) -> BlobRef:
    ref, _ = await put_blob(bus, prefix, memoryview(data), CHUNK, **options)
    return ref


async def got(bus: Any, ref: BlobRef, size: int = len(DATA), **options: Any) -> bytes:
    into = bytearray(size)
    await get_blob(bus, STREAM, prefix, ref, memoryview(into), CHUNK, **options)
    return bytes(into)


def spoil(bus: Any, ref: BlobRef, k: int, change: Callable[[bytearray], None]) -> None:
    frame = bytearray(bus.held[f"{prefix(ref.id)}.{k}"])
    change(frame)
    bus.held[f"{prefix(ref.id)}.{k}"] = bytes(frame)


# -- put and got -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 1024])
async def test_what_is_put_is_got(bus: Any, size: int) -> None:
    ref = await put(bus, DATA[:size])
    assert (ref.size, ref.chunks, len(bus.held)) == (size, max(1, -(-size // CHUNK)), max(1, -(-size // CHUNK)))
    assert await got(bus, ref, size) == DATA[:size]


@pytest.mark.parametrize(("size", "chunks"), [(512, 6), (100, 1), (99, 1), (101, 2), (1, 1)])
async def test_no_chunk_reaches_from_one_section_into_the_next(bus: Any, size: int, chunks: int) -> None:
    data = DATA[: 2 * size]
    ref = await put(bus, data, sections=2)
    assert (ref.size, ref.chunks) == (2 * size, 2 * chunks)
    assert await got(bus, ref, 2 * size, sections=2) == data
    first = [await get_chunk(bus, STREAM, prefix, ref, k, min(CHUNK, size - CHUNK * k), "raw") for k in range(chunks)]
    assert b"".join(first) == data[:size]


async def test_a_blob_of_other_sections_is_refused(bus: Any) -> None:
    ref = await put(bus, DATA, sections=2)
    with pytest.raises(PeerError, match="1024 bytes in 12 chunks, expected 1024 bytes"):
        await got(bus, ref)


async def test_the_digest_is_that_of_the_chunks_in_order(bus: Any) -> None:
    expected = BlobDigest()
    for k, begin in enumerate(range(0, len(DATA), CHUNK)):
        expected.add(k, chunk_digest(DATA[begin : begin + CHUNK]))
    assert (await put_blob(bus, prefix, memoryview(DATA), CHUNK))[1] == expected.digest()


async def test_a_blob_lies_under_its_own_random_name(bus: Any) -> None:
    first, second = await put(bus), await put(bus)
    assert first.id != second.id and await got(bus, first) == await got(bus, second) == DATA
    assert sorted(bus.held)[0].rpartition(".")[0] in (prefix(first.id), prefix(second.id))


async def test_a_blob_may_be_given_its_name(bus: Any) -> None:
    assert (await put(bus, blob="f" * 32)).id == "f" * 32


async def test_memory_of_other_elements_than_bytes_is_put_and_filled(bus: Any) -> None:
    words = memoryview(bytearray(DATA)).cast("I")
    ref, _ = await put_blob(bus, prefix, words, CHUNK)
    into = memoryview(bytearray(len(DATA))).cast("I")
    await get_blob(bus, STREAM, prefix, ref, into, CHUNK)
    assert into == words


async def test_a_chunk_is_asked_for_in_its_stream_by_its_subject(bus: Any) -> None:
    ref = await put(bus)
    bus.calls.clear()
    assert await get_chunk(bus, STREAM, prefix, ref, 10, 24, "raw") == DATA[1000:]
    assert bus.calls == [("get", f"{STREAM} {prefix(ref.id)}.10")]


@pytest.mark.parametrize("window", [1, 3, 8])
async def test_no_more_than_the_window_is_under_way_and_soon_as_much(bus: Any, window: int) -> None:
    ref = await put(bus, DATA * 4, window=window)
    assert bus.most_under_way == window
    bus.most_under_way = 0
    await got(bus, ref, 4 * len(DATA), window=window)
    assert bus.most_under_way == window


# -- what can be wrong with a blob -------------------------------------------------------------------------------------
async def test_a_chunk_that_is_gone_is_named(bus: Any) -> None:
    ref = await put(bus)
    del bus.held[f"{prefix(ref.id)}.3"]
    with pytest.raises(BlobGone, match=rf"^chunk 3 of blob {ref.id[:8]} is not on the bus$"):
        await got(bus, ref)


async def test_a_bad_chunk_is_named(bus: Any) -> None:
    ref = await put(bus)
    spoil(bus, ref, 7, lambda frame: frame.__setitem__(-1, frame[-1] ^ 1))
    with pytest.raises(PeerError, match=rf"^chunk 7 of blob {ref.id[:8]}: the checksum does not match$"):
        await got(bus, ref)


async def test_chunks_in_each_others_places_are_refused(bus: Any) -> None:
    ref = await put(bus)
    bus.held[f"{prefix(ref.id)}.1"] = bus.held[f"{prefix(ref.id)}.2"]
    with pytest.raises(PeerError, match="k is 2, expected 1"):
        await got(bus, ref)


async def test_chunks_of_another_blob_are_refused(bus: Any) -> None:
    ref, other = await put(bus), await put(bus)
    bus.held[f"{prefix(ref.id)}.1"] = bus.held[f"{prefix(other.id)}.1"]
    with pytest.raises(PeerError, match=f"blob is '{other.id}'"):
        await got(bus, ref)


async def test_another_codec_is_refused(bus: Any) -> None:
    ref = await put(bus, codec="fp32")
    assert await got(bus, ref, codec="fp32") == DATA
    with pytest.raises(PeerError, match="codec is 'fp32', expected 'raw'"):
        await got(bus, ref)


@pytest.mark.parametrize(
    "change", [{"size": 1023}, {"size": 1 << 40}, {"chunks": 10}, {"chunks": 12}, {"chunks": 1 << 24}]
)
async def test_a_reference_that_does_not_fit_asks_the_bus_for_nothing(bus: Any, change: dict[str, int]) -> None:
    ref = (await put(bus)).model_copy(update=change)
    bus.calls.clear()
    with pytest.raises(PeerError, match=rf"^blob {ref.id[:8]}: {ref.size} bytes in {ref.chunks} chunks, expected 1024"):
        await got(bus, ref)
    assert bus.calls == []


async def test_a_record_kept_as_a_blob_is_got_whole(bus: Any) -> None:
    ref = await put_record(bus, prefix, DATA)
    assert ref.chunks == 1 and await get_record(bus, STREAM, prefix, ref, limit=1024) == DATA


@pytest.mark.parametrize("payload", [LEAST_PAYLOAD_BYTES, 64 << 10, 1 << 20, 64 << 20])
@pytest.mark.parametrize("size", [0, 1, 8191, 8192, 8193, 100_003, 600_000])
async def test_a_record_is_cut_by_the_payload_of_its_writer_and_got_over_any_other(
    bus: Any, payload: int, size: int
) -> None:
    data = bytes(i % 251 for i in range(size))
    bus.max_payload = payload
    ref = await put_record(bus, prefix, data)
    assert max(map(len, bus.held.values())) < payload - 4096, "no room for subject and headers"
    bus.max_payload = 32 << 10
    assert await get_record(bus, STREAM, prefix, ref, limit=size) == data


@pytest.mark.parametrize("chunks", [2, 1000])
async def test_a_record_whose_reference_counts_wrongly_is_a_peers_fault(bus: Any, chunks: int) -> None:
    ref = (await put_record(bus, prefix, DATA)).model_copy(update={"chunks": chunks})
    with pytest.raises(PeerError):
        await get_record(bus, STREAM, prefix, ref, limit=1024)


async def test_a_record_larger_than_allowed_is_refused_before_memory_is_taken(bus: Any) -> None:
    huge = BlobRef(id="f" * 32, size=1 << 60, chunks=1)
    with pytest.raises(PeerError, match="are more than the 1000 allowed"):
        await get_record(bus, STREAM, prefix, huge, limit=1000)
    assert bus.calls == []


# -- trying again ------------------------------------------------------------------------------------------------------
def test_what_is_out_of_reach_is_asked_for_again_with_growing_pauses(bus: Any, simulated: Simulated) -> None:
    bus.fail("get", *[Unreachable("no answer")] * 6, NoResponders("not yet"))
    bus.held["s"] = b"data"
    stored, took_s = simulated(with_retries(lambda: bus.get(STREAM, "s")))
    assert stored.data == b"data" and took_s == pytest.approx(sum(RETRY_S) + 2 * RETRY_S[-1])


def test_after_a_while_it_gives_up_and_says_why(bus: Any, simulated: Simulated) -> None:
    bus.fail("get", *[Unreachable("no connection")] * 100)

    async def ask() -> float:
        with pytest.raises(Unreachable, match=r"^gave up after 60 s: no connection$"):
            await with_retries(lambda: bus.get(STREAM, "s"))
        return asyncio.get_running_loop().time()

    at_s, _ = simulated(ask())
    assert PATIENCE_S - RETRY_S[-1] <= at_s <= PATIENCE_S


@pytest.mark.parametrize(
    "error", [Denied("no"), StreamFull("full"), Unavailable("no such stream"), AlreadyPut("there")]
)
def test_what_will_not_pass_is_raised_at_once(bus: Any, simulated: Simulated, error: BusError) -> None:
    bus.fail("get", error)

    async def ask() -> None:
        with pytest.raises(type(error)):
            await with_retries(lambda: bus.get(STREAM, "s"))

    assert simulated(ask())[1] == 0.0 and len(bus.calls) == 1


def test_our_own_bugs_are_not_tried_again(bus: Any, simulated: Simulated) -> None:
    bus.fail("get", KeyError("bug"))
    with pytest.raises(KeyError):
        simulated(with_retries(lambda: bus.get(STREAM, "s")))
    assert len(bus.calls) == 1


def test_blobs_survive_a_bus_that_fails_now_and_then(bus: Any, simulated: Simulated) -> None:
    async def there_and_back() -> bytes:
        bus.fail("put", None, Unreachable("lost"), None, NoResponders("restarting"))
        ref = await put(bus)
        bus.fail("get", Unreachable("lost"), None, Unreachable("lost"))
        return await got(bus, ref)

    assert simulated(there_and_back())[0] == DATA


def test_a_chunk_that_is_there_already_was_put_by_an_earlier_try(bus: Any, simulated: Simulated) -> None:
    bus.lose_answer("put")
    ref, took_s = simulated(put(bus))
    assert took_s == RETRY_S[0] and len(bus.calls) == 12, "eleven chunks, one of them twice"
    assert simulated(got(bus, ref))[0] == DATA


async def test_a_chunk_put_twice_is_no_error_and_the_first_one_stays(bus: Any) -> None:
    await put_chunk(bus, "s", b"first")
    await put_chunk(bus, "s", b"second")
    assert bus.held == {"s": b"first"}


def test_a_full_stream_stops_the_whole_blob(bus: Any, simulated: Simulated) -> None:
    bus.fail("put", None, None, StreamFull("limit reached"))
    with pytest.raises(StreamFull):
        simulated(put(bus, window=2))
    assert len(bus.calls) < 11, "the rest is not begun"


def test_a_blob_that_stands_still_too_long_is_stale_and_chunks_that_are_there_already_do_not_count(
    bus: Any, simulated: Simulated
) -> None:
    async def grow() -> list[float]:
        growth, left = Growth(), []
        for new, pause in ((True, 60.0), (True, 60.0), (False, STALE_S - 60.0)):
            growth.put(0, b"", new)
            await asyncio.sleep(pause)
            left.append(growth.left_s)
        await asyncio.sleep(0.1)
        with pytest.raises(Stale):
            growth.put(0, b"", True)
        return left

    assert simulated(grow())[0] == pytest.approx([STALE_S - 60.0, STALE_S - 60.0, 0.0], abs=1e-6)


def test_a_blob_goes_on_where_it_got(bus: Any, simulated: Simulated) -> None:
    async def twice() -> None:
        growth = Growth()
        bus.fail("put", None, None, None, StreamFull("limit reached"))
        with pytest.raises(StreamFull):
            await put(bus, blob="f" * 32, growth=growth)
        there = len(bus.held)
        bus.calls.clear()
        ref, digest = await put_blob(bus, prefix, memoryview(DATA), CHUNK, blob="f" * 32, growth=growth)
        assert len(bus.calls) == 11 - there < 11 and await got(bus, ref) == DATA
        assert digest == (await put_blob(bus, prefix, memoryview(DATA), CHUNK))[1]

    simulated(twice())


def test_a_blob_put_across_an_outage_is_stale(bus: Any, simulated: Simulated) -> None:
    async def put_late() -> None:
        bus.fail("put", *[Unreachable("lost")] * 20)
        growth = Growth()
        await asyncio.sleep(STALE_S - 10.0)
        await put(bus, growth=growth)

    with pytest.raises(Stale):
        simulated(put_late())


# -- windows -----------------------------------------------------------------------------------------------------------
async def test_work_is_done_once_each_and_in_order_of_starting() -> None:
    started: list[int] = []

    async def work(k: int) -> None:
        started.append(k)
        await asyncio.sleep(0)

    await windowed(20, 4, work)
    assert started == list(range(20))


async def test_the_first_error_cancels_the_rest_and_waits_for_it() -> None:
    ended: list[int] = []

    async def work(k: int) -> None:
        try:
            if k == 2:
                raise ValueError("bad chunk")
            await asyncio.Event().wait()
        finally:
            ended.append(k)

    with pytest.raises(ValueError, match="bad chunk"):
        await windowed(100, 4, work)
    assert sorted(ended) == [0, 1, 2, 3]


def widths(simulated: Simulated, seconds: Callable[[int], float], n: int = 60, most: int = 8) -> list[int]:
    """How many are under way when each of `n` begins, if number k then takes so many seconds."""
    seen: list[int] = []
    under_way = 0

    async def work(k: int) -> None:
        nonlocal under_way
        under_way += 1
        seen.append(under_way)
        await asyncio.sleep(seconds(k))
        under_way -= 1

    simulated(paced(n, most, work))
    assert len(seen) == n
    return seen


def test_what_is_done_quickly_is_done_as_often_at_once_as_may_be(simulated: Simulated) -> None:
    seen = widths(simulated, lambda k: 0.1)
    assert seen[:4] == [1, 2, 1, 2] and max(seen[:20]) == max(seen) == 8


def test_over_a_thin_link_one_is_done_after_the_other(simulated: Simulated) -> None:
    free_at_s = 0.0

    def seconds(_: int) -> float:
        """Each takes twice as long as is quick, behind those that are under way."""
        nonlocal free_at_s
        now = asyncio.get_running_loop().time()
        free_at_s = max(free_at_s, now) + 2 * QUICK_S
        return free_at_s - now

    assert widths(simulated, seconds) == [*range(1, FIRST_CHUNKS + 1), *[1] * (60 - FIRST_CHUNKS)]


def test_a_link_that_was_slow_for_a_while_is_filled_again(simulated: Simulated) -> None:
    seen = widths(simulated, lambda k: 2 * QUICK_S if 20 <= k < 40 else 0.1)
    assert max(seen[:20]) == 8 and seen[40] <= 2 and seen[-1] > 4


@pytest.mark.parametrize("n", [1, 5])
async def test_cancelling_cancels_what_is_under_way(n: int) -> None:
    ended: list[int] = []
    running = asyncio.Event()

    async def work(k: int) -> None:
        running.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(k)

    task = asyncio.create_task(windowed(n, 2, work))
    await running.wait()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == list(range(min(n, 2)))
    assert asyncio.all_tasks() == {asyncio.current_task()}
