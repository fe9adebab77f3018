"""The contract: key-value, streams and blobs."""

from __future__ import annotations

import asyncio

import pytest

from bus.contract_kit import MAX_STORE_BYTES, MODEL, ROOM, UPDATES, B, Backend, S, a_run, outcome, outcomes, until
from syncline.bus.base import READ_BYTES, BucketConfig, StreamConfig
from syncline.bus.blobs import BlobGone, get_blob, put_blob, windowed
from syncline.errors import AlreadyPut, Conflict, NoResponders, StreamFull, Unavailable


class KeyValue:
    """Small records, changed by compare-and-set."""

    async def test_a_key_is_changed_only_by_who_knows_its_revision(self, backend: Backend) -> None:
        bus = await backend.connect("coordinator")
        await bus.ensure_bucket(B)
        assert await bus.kv_get("b", "k") is None
        first = await bus.kv_create("b", "k", b"1")
        other = await bus.kv_create("b", "l", b"other")
        second = await bus.kv_update("b", "k", b"2", first)
        assert first < other < second  # the revisions of a bucket are one sequence
        for stale in (0, first, other, second + 1):
            with pytest.raises(Conflict):
                await bus.kv_update("b", "k", b"lost", stale)
        with pytest.raises(Conflict):
            await bus.kv_create("b", "k", b"lost")
        entry = await bus.kv_get("b", "k")
        assert entry is not None and (entry.value, entry.revision) == (b"2", second)

    async def test_of_many_who_change_a_key_at_once_one_wins(self, backend: Backend) -> None:
        buses = [await backend.connect("coordinator") for _ in range(2)]
        await buses[0].ensure_bucket(B)
        revision = await buses[0].kv_create("b", "k", b"")
        changes = [outcome(buses[i % 2].kv_update("b", "k", b"%d" % i, revision)) for i in range(8)]
        won = {i: r for i, r in enumerate(await asyncio.gather(*changes)) if r is not Conflict}
        ((winner, now),) = won.items()
        entry = await buses[1].kv_get("b", "k")
        assert entry is not None and (entry.value, entry.revision) == (b"%d" % winner, now)

    async def test_a_purged_key_is_gone_and_may_be_created_anew(self, backend: Backend) -> None:
        bus = await backend.connect("coordinator")
        await bus.ensure_bucket(B)
        revision = await bus.kv_create("b", "k", b"1")
        await bus.kv_create("b", "kk", b"another")
        await bus.purge("KV_b", "$KV.b.k")
        await bus.purge("KV_b", "$KV.b.never")
        assert await bus.kv_get("b", "k") is None and await bus.kv_keys("b") == ["kk"]
        assert await outcome(bus.kv_update("b", "k", b"2", revision)) is Conflict
        assert await bus.kv_create("b", "k", b"2") > revision

    async def test_keys_are_listed_in_order_and_may_be_any_text_of_subject_tokens(self, backend: Backend) -> None:
        bus = await backend.connect("coordinator")
        await bus.ensure_bucket(B)
        assert await bus.kv_keys("b") == []
        keys = ["run-2.spec", "run-1.head", "ü.ß", "a/b", "x" * 200]
        for key in keys:
            await bus.kv_create("b", key, key.encode())
        assert await bus.kv_keys("b") == sorted(keys)
        assert [(await bus.kv_get("b", key)).value for key in keys] == [key.encode() for key in keys]  # type: ignore[union-attr]
        assert await outcomes(bus.kv_create("b", "a b", b""), bus.kv_get("b", "a\r\nb")) == [Unavailable] * 2

    async def test_a_value_may_be_empty_and_as_large_as_the_bucket_allows(self, backend: Backend) -> None:
        bus = await backend.connect("coordinator")
        await bus.ensure_bucket(B)
        for key, value in (("empty", b""), ("full", b"v" * B.max_value_bytes)):
            entry = await bus.kv_create("b", key, value), value
            got = await bus.kv_get("b", key)
            assert got is not None and (got.revision, got.value) == entry
        before = await bus.state("KV_b")
        assert await outcome(bus.kv_update("b", "full", bytes(B.max_value_bytes + 1), 99)) is Unavailable
        assert await bus.state("KV_b") == before

    async def test_a_full_bucket_refuses_but_keeps_what_it_has(self, backend: Backend) -> None:
        bus = await backend.connect("coordinator")
        await bus.ensure_bucket(BucketConfig("b", 1000, 900))
        first = await bus.kv_create("b", "k", bytes(300))
        await bus.kv_create("b", "l", bytes(300))
        assert await outcome(bus.kv_create("b", "m", bytes(300))) is StreamFull
        assert await outcome(bus.kv_update("b", "k", bytes(301), first)) is StreamFull  # it would fit after the change
        await bus.kv_update("b", "k", b"\1" * 300, first)
        assert await bus.kv_keys("b") == ["k", "l"]

    async def test_a_bucket_forgets_what_is_not_renewed(self, backend: Backend) -> None:
        bus = await backend.connect("coordinator")
        await bus.ensure_bucket(BucketConfig("b", ROOM, 100, ttl_s=0.5))
        revision = await bus.kv_create("b", "lease", b"1")
        for _ in range(8):
            await asyncio.sleep(0.1)
            revision = await bus.kv_update("b", "lease", b"1", revision)

        async def gone() -> bool:
            return await bus.kv_get("b", "lease") is None

        await until(gone, "the lease is gone")
        assert await bus.kv_keys("b") == []
        assert await outcome(bus.kv_update("b", "lease", b"1", revision)) is Conflict
        assert await bus.kv_create("b", "lease", b"2") == revision + 1

    async def test_a_bucket_is_made_once(self, backend: Backend) -> None:
        bus = await backend.connect("coordinator")
        calls = (bus.kv_get("b", "k"), bus.kv_create("b", "k", b""), bus.kv_keys("b"))
        assert await outcomes(*calls) == [NoResponders, NoResponders, Unavailable]
        await bus.ensure_bucket(B)
        await bus.kv_create("b", "k", b"kept")
        await bus.ensure_bucket(B)
        for other in (
            BucketConfig("b", ROOM, 999),
            BucketConfig("b", 2 * ROOM, 1000),
            BucketConfig("b", ROOM, 1000, 9),
        ):
            with pytest.raises(Unavailable, match="exists with another configuration"):
                await bus.ensure_bucket(other)
        assert await outcome(bus.ensure_bucket(BucketConfig("c", ROOM, 10, ttl_s=0.05))) is Unavailable
        assert await bus.kv_keys("b") == ["k"]


class Streams:
    """Subjects kept in order of arrival."""

    async def test_what_is_put_is_got_by_subject_and_read_in_order(self, backend: Backend) -> None:
        bus = await backend.connect("coordinator")
        await bus.ensure_stream(S)
        assert await bus.read("S", 1, 10) == [] and await bus.get("S", "s.0") is None
        for i in range(6):
            assert await bus.put(f"s.{i % 2}", b"%d" % i, bulk=i > 3) == i + 1
        await bus.put("s.empty", b"")
        last = await bus.get("S", "s.0")
        assert last is not None and (last.subject, last.data, last.seq) == ("s.0", b"4", 5)
        assert await bus.get("S", "s.0", bulk=True) == last
        empty = await bus.get("S", "s.empty")
        assert empty is not None and empty.data == b""
        everything = await bus.read("S", 0, 99)
        assert [m.seq for m in everything] == [1, 2, 3, 4, 5, 6, 7]
        assert [m.data for m in everything] == [b"0", b"1", b"2", b"3", b"4", b"5", b""]
        assert everything[4] == last
        assert await bus.read("S", 1, 1) == everything[:1]
        assert await bus.read("S", 3, 2) == everything[2:4]
        assert await bus.read("S", 7, 5) == everything[6:] and await bus.read("S", 8, 5) == []

    async def test_a_message_bears_the_time_at_which_the_bus_took_it(self, backend: Backend) -> None:
        bus = await backend.connect("coordinator")
        await bus.ensure_stream(S)
        for pause in (0.1, 0.0, 0.0):
            await bus.put("s.a", b"")
            await asyncio.sleep(pause)
        times = [m.time_s for m in await bus.read("S", 1, 9)]
        assert times == sorted(times) and times[0] > 1e9 and 0.09 < times[1] - times[0] < 5

    async def test_subjects_are_matched_token_by_token(self, backend: Backend) -> None:
        bus = await backend.connect("coordinator")
        await bus.ensure_stream(StreamConfig("T", ("t.*.x", "u.>", "lone"), ROOM))
        taken = ["t.a.x", "t.ü.x", "u.a", "u.a.b.c", "lone"]
        left = ["t.x", "t.a.b.x", "t.a.y", "t.a.x.y", "u", "v", "lone.a", "u..a", "u.", ".u.a"]
        assert [await outcome(bus.put(s, b"")) for s in taken] == [1, 2, 3, 4, 5]
        assert [await outcome(bus.put(s, b"")) for s in left] == [NoResponders] * len(left)
        assert (await bus.state("T", ">")).subjects == dict.fromkeys(taken, 1)
        assert (await bus.state("T", "*.a.>")).subjects == {"t.a.x": 1, "u.a.b.c": 1}

    async def test_the_state_counts_as_the_store_does(self, backend: Backend) -> None:
        bus = await backend.connect("coordinator")
        await bus.ensure_stream(S)
        state = await bus.state("S", ">")
        assert (state.messages, state.bytes, state.first_seq, state.last_seq, state.subjects) == (0, 0, 0, 0, {})
        for subject, size in (("s.a", 10), ("s.b", 0), ("s.a", 1000)):
            await bus.put(subject, bytes(size))
        state = await bus.state("S", "s.*")
        assert (state.messages, state.bytes) == (3, 3 * (30 + len("s.a")) + 1010)
        assert (state.first_seq, state.last_seq, state.subjects) == (1, 3, {"s.a": 2, "s.b": 1})
        assert (await bus.state("S")).subjects == (await bus.state("S", "s.c")).subjects == {}
        await bus.purge("S", ">")
        state = await bus.state("S", ">")
        assert (state.messages, state.bytes, state.first_seq, state.last_seq, state.subjects) == (0, 0, 4, 3, {})

    async def test_a_purge_removes_what_it_names_and_no_more(self, backend: Backend) -> None:
        bus = await backend.connect("coordinator")
        await bus.ensure_stream(S)

        async def left(subject: str) -> list[int]:
            await bus.purge("S", subject)
            return [m.seq for m in await bus.read("S", 1, 99)]

        for i in range(9):
            await bus.put(f"s.{'abc'[i % 3]}.{i}", b"")
        assert await left("s.z") == await left("s.a") == await left("elsewhere.>") == list(range(1, 10))
        assert await left("s.b.4") == [1, 2, 3, 4, 6, 7, 8, 9]
        assert await left("s.*.8") == [1, 2, 3, 4, 6, 7, 8]
        assert await left("s.a.*") == [2, 3, 6, 8]
        assert await bus.get("S", "s.a.0") is None
        assert await bus.put("s.a.9", b"") == 10
        assert await left("s.>") == []
        assert await bus.put("s.a.9", b"") == 11

    async def test_a_write_once_subject_keeps_its_first_message(self, backend: Backend) -> None:
        bus = await backend.connect("coordinator")
        await bus.ensure_stream(StreamConfig("W", ("w.>",), 400, write_once=True))
        puts = [outcome(bus.put("w.a", b"%d" % i, bulk=True)) for i in range(4)]
        assert sorted(await asyncio.gather(*puts), key=str) == [1, *[AlreadyPut] * 3]
        held = await bus.get("W", "w.a")
        assert held is not None and await outcome(bus.put("w.a", bytes(999))) is AlreadyPut
        assert await bus.put("w.b", bytes(300)) == 2
        assert await outcome(bus.put("w.c", bytes(300))) is StreamFull
        assert await bus.get("W", "w.a") == held
        await bus.purge("W", "w.a")
        assert await bus.put("w.a", b"again") == 3

    async def test_a_full_stream_drops_its_oldest_or_refuses(self, backend: Backend) -> None:
        bus = await backend.connect("coordinator")
        await bus.ensure_stream(StreamConfig("D", ("d.>",), 400))
        await bus.ensure_stream(StreamConfig("R", ("r.>",), 400, full="refuse"))
        for i in range(4):
            await bus.put(f"d.{i}", bytes(67))  # and 33 for the record and its subject
            await bus.put(f"r.{i}", bytes(67))
        assert await bus.put("d.4", bytes(67)) == 5 and await outcome(bus.put("r.4", b"")) is StreamFull
        assert [m.seq for m in await bus.read("D", 1, 9)] == [2, 3, 4, 5]
        assert [m.seq for m in await bus.read("R", 1, 9)] == [1, 2, 3, 4]
        assert await bus.put("d.5", bytes(368)) == 6  # larger than the stream: acknowledged, and gone with all others
        state = await bus.state("D")
        assert (state.messages, state.first_seq, state.last_seq) == (0, 7, 6)

    async def test_a_subject_may_be_kept_to_its_newest(self, backend: Backend) -> None:
        bus = await backend.connect("coordinator")
        await bus.ensure_stream(StreamConfig("N", ("n.>",), 400, max_per_subject=2, full="refuse"))
        for i in range(6):
            await bus.put(f"n.{i % 2}", bytes(67))
        assert [m.seq for m in await bus.read("N", 1, 9)] == [3, 4, 5, 6]  # and it is full
        assert await outcomes(bus.put("n.2", b""), bus.put("n.0", bytes(68)), bus.put("n.0", bytes(67))) == [
            *[StreamFull] * 2,
            7,
        ]

    async def test_a_stream_is_made_once_and_deleted_with_all_it_holds(self, backend: Backend) -> None:
        bus = await backend.connect("coordinator")
        calls = (bus.put("s.a", b""), bus.get("S", "s.a"), bus.read("S", 1, 1), bus.state("S"), bus.purge("S", ">"))
        assert await outcomes(*calls) == [NoResponders] * 3 + [Unavailable] * 2
        for _ in range(2):
            await bus.ensure_stream(S)
            await bus.put("s.a", b"")
        for other in (StreamConfig("S", ("s.>", "t"), ROOM), StreamConfig("S", S.subjects, ROOM, write_once=True)):
            with pytest.raises(Unavailable, match="exists with another configuration"):
                await bus.ensure_stream(other)
        for subjects in (("s.a",), ("*.a",), (">",), ("x.*", "x.a")):
            assert await outcome(bus.ensure_stream(StreamConfig("O", subjects, ROOM))) is Unavailable
        assert (await bus.state("S")).messages == 2
        await bus.delete_stream("S")
        await bus.delete_stream("S")
        assert await outcome(bus.put("s.a", b"")) is NoResponders
        await bus.ensure_stream(StreamConfig("S", ("s.a",), ROOM))
        assert await bus.put("s.a", b"") == 1

    async def test_streams_reserve_their_room(self, backend: Backend) -> None:
        bus = await backend.connect("coordinator")
        half = MAX_STORE_BYTES // 2 + 1
        assert await outcome(bus.ensure_stream(StreamConfig("X", ("x",), 2 * half))) is StreamFull
        await bus.ensure_stream(StreamConfig("X", ("x",), half))
        for subjects in (("y",), ("x",)):  # that there is no room is said before what else is wrong
            assert await outcome(bus.ensure_stream(StreamConfig("Y", subjects, half))) is StreamFull
        await bus.delete_stream("X")
        await bus.ensure_stream(StreamConfig("Y", ("y",), half))

    async def test_a_stream_that_is_fitted_gives_its_room_back_and_keeps_what_it_holds(self, backend: Backend) -> None:
        bus = await backend.connect("coordinator")
        half = MAX_STORE_BYTES // 2 + 1
        await bus.ensure_stream(StreamConfig("X", ("x.>",), half, full="refuse"))
        await bus.put("x.a", b"a" * 1000)
        await bus.fit_stream("X")
        await bus.ensure_stream(StreamConfig("Y", ("y",), half))
        held = await bus.get("X", "x.a")
        assert held is not None and held.data == b"a" * 1000
        assert await outcome(bus.put("x.b", b"b")) is StreamFull
        assert await outcome(bus.fit_stream("nowhere")) is Unavailable

    async def test_a_store_that_works_is_found_working_and_left_as_it_is(self, backend: Backend) -> None:
        bus = await backend.connect("coordinator")
        await bus.ensure_stream(S)
        await bus.ensure_bucket(B)
        await bus.put("s.a", b"1")
        await bus.check_store("S", "KV_b")
        assert (await bus.state("S", ">")).subjects == {"s.a": 1} and await bus.put("s.b", b"2") == 2
        assert await outcome(bus.check_store("S", "nowhere")) is Unavailable

    async def test_a_message_may_be_as_large_as_the_broker_allows(self, backend: Backend) -> None:
        bus, back = await backend.connect("coordinator"), []
        bus.when_reconnected(lambda: back.append(1))
        await bus.ensure_stream(StreamConfig("S", ("s.>",), 100 * ROOM))
        await bus.ensure_bucket(BucketConfig("b", 100 * ROOM, 9 * ROOM))
        most = bus.max_payload
        assert most > ROOM
        await bus.put("s.a", b"x" * most, bulk=True)
        got = await bus.get("S", "s.a", bulk=True)
        assert got is not None and got.data == b"x" * most
        large = b"x" * (most + 1)
        calls = (
            bus.put("s.a", large),
            bus.publish("s.a", large),
            bus.request("q", large, 1),
            bus.kv_create("b", "k", large),
        )
        assert await outcomes(*calls) == [Unavailable] * 4
        assert await outcome(bus.kv_create("b", "k", large[:-1])) is Unavailable  # a revision travels in headers
        await bus.kv_create("b", "k", large[:-100])
        assert not back  # and the connection lives

    async def test_an_answer_to_read_is_bounded_in_bytes_too(self, backend: Backend) -> None:
        bus = await backend.connect("coordinator")
        await bus.ensure_stream(StreamConfig("S", ("s.>",), 100 * ROOM))

        async def put(_: int) -> None:
            await bus.put("s.a", bytes(1 << 20), bulk=True)

        await windowed(10, 4, put)
        assert len(await bus.read("S", 1, 99)) == READ_BYTES >> 20  # fewer than asked for is not the end


class Blobs:
    """Bulk in chunks, on top of streams."""

    async def test_a_blob_comes_back_whole_through_any_window(self, backend: Backend) -> None:
        core = await a_run(backend)
        agent = await backend.connect("a1")
        prefix = "syncline.v1.r.model.{}".format
        for size in (0, 1, 999, 1000, 1001, 10_500):
            data = bytes(i % 251 for i in range(size))
            for window in (1, 3, 64):
                ref, digest = await put_blob(core, prefix, memoryview(data), 1000, window=window)
                again = await put_blob(core, prefix, memoryview(data), 1000, blob=ref.id)  # as after a lost answer
                assert again == (ref, digest)
                into = bytearray(size)
                await get_blob(agent, MODEL, prefix, ref, memoryview(into), 1000, window=window)
                assert into == data
        await core.purge(MODEL, f"{prefix(ref.id)}.7")
        with pytest.raises(BlobGone, match="chunk 7"):
            await get_blob(agent, MODEL, prefix, ref, memoryview(into), 1000)

    async def test_a_blob_gets_through_though_the_broker_restarts(self, backend: Backend) -> None:
        core = await a_run(backend)
        agent = await backend.connect("a1")
        prefix = "syncline.v1.r.agent.a1.update.{}".format
        data = bytes(range(256)) * 400
        putting = asyncio.create_task(put_blob(agent, prefix, memoryview(data), 400, window=2))

        async def begun() -> bool:
            return (await core.state(UPDATES)).messages > 3

        await until(begun, "some chunks are there")
        await backend.stop()
        await backend.start()
        ref, _ = await putting
        into = bytearray(len(data))
        await get_blob(core, UPDATES, prefix, ref, memoryview(into), 400)
        assert into == data
