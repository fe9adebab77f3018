"""What every bus does: the one definition of the port, run against a real nats-server and against the one in memory.

Each test gets a broker of its own with the accounts of `syncline.bus.accounts`: a coordinator in CORE, the agents `a1` and
`a2`, and a watcher. Where the two buses once differed, what the server does decided.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

import pytest

from syncline.bus.base import BucketConfig, Bus, Delivery, StreamConfig
from syncline.bus.blobs import BlobGone, get_blob, put_blob, windowed
from syncline.bus.violations import Violation
from syncline.errors import AlreadyPut, BusError, Conflict, Denied, NoResponders, StreamFull, Unavailable, Unreachable
from syncline.wire.subjects import RUNS_BUCKET

PATIENCE_S = 10.0
QUIET_S = 0.1  # how long to listen for what should not come
ROOM = 1 << 20
MAX_STORE_BYTES = 4 << 30  # of the broker under test
HEAD = ("syncline-runs", "r.head")
MODEL, OFFERS, UPDATES = "SYNCLINE_MODEL_r", "SYNCLINE_OFFERS_r", "SYNCLINE_UPDATES_r"
S = StreamConfig("S", ("s.>",), ROOM)
B = BucketConfig("b", ROOM, 1000)


class Backend(Protocol):
    """A broker under test."""

    async def connect(self, who: str, name: str = "") -> Bus:
        """`who` holds the key; `name` is what it calls itself, by default the same."""
        ...

    async def stop(self) -> None: ...

    async def start(self) -> None: ...

    def violations(self) -> list[Violation]:
        """All so far."""
        ...


class Heard(list[Delivery]):
    async def __call__(self, delivery: Delivery) -> None:
        self.append(delivery)

    @property
    def data(self) -> list[bytes]:
        return [delivery.data for delivery in self]


async def until(true: Callable[[], bool | Awaitable[bool]], what: str) -> None:
    deadline = asyncio.get_running_loop().time() + PATIENCE_S
    while True:
        answer = true()
        if answer if isinstance(answer, bool) else await answer:
            return
        assert asyncio.get_running_loop().time() < deadline, f"not within {PATIENCE_S:g} s: {what}"
        await asyncio.sleep(0.01)


async def settled(*buses: Bus) -> None:
    """The broker knows what each bus said before: what is asked behind it is answered."""
    for bus in buses:
        try:
            await bus.kv_get(RUNS_BUCKET, "settled")
        except NoResponders:
            pass


async def a_run(backend: Backend) -> Bus:
    """The coordinator of a run `r` that has a head, a model of one chunk, and streams for offers and updates."""
    core = await backend.connect("coordinator")
    await core.ensure_bucket(BucketConfig(RUNS_BUCKET, ROOM, 4096))
    await core.kv_create(*HEAD, b"HEAD")
    await core.ensure_stream(StreamConfig(MODEL, ("syncline.v1.r.model.>", "syncline.v1.r.outer.>"), 64 * ROOM))
    await core.ensure_stream(StreamConfig(OFFERS, ("syncline.v1.r.agent.*.offer",), ROOM))
    await core.ensure_stream(StreamConfig(UPDATES, ("syncline.v1.r.agent.*.update.>",), ROOM, write_once=True))
    await core.put("syncline.v1.r.model.b.0", b"MODEL")
    return core


async def outcome(call: Awaitable[object]) -> object:
    """What it returns, or the type of the error that it raises."""
    try:
        return await call
    except BusError as error:
        return type(error)


async def outcomes(*calls: Awaitable[object]) -> list[object]:
    return [await outcome(call) for call in calls]


class Contract:
    # -- key-value -------------------------------------------------------------------------------------------------
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

    async def test_a_deleted_key_is_gone_and_may_be_created_anew(self, backend: Backend) -> None:
        bus = await backend.connect("coordinator")
        await bus.ensure_bucket(B)
        revision = await bus.kv_create("b", "k", b"1")
        await bus.kv_create("b", "kk", b"another")
        await bus.kv_delete("b", "k")
        await bus.kv_delete("b", "never")
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
        calls = (bus.kv_get("b", "k"), bus.kv_create("b", "k", b""), bus.kv_keys("b"), bus.kv_delete("b", "k"))
        assert await outcomes(*calls) == [NoResponders, NoResponders, Unavailable, Unavailable]
        await bus.ensure_bucket(B)
        await bus.kv_create("b", "k", b"kept")
        await bus.ensure_bucket(B)
        for other in (BucketConfig("b", ROOM, 999), BucketConfig("b", 2 * ROOM, 1000), BucketConfig("b", ROOM, 1000, 9)):
            with pytest.raises(Unavailable, match="exists with another configuration"):
                await bus.ensure_bucket(other)
        assert await outcome(bus.ensure_bucket(BucketConfig("c", ROOM, 10, ttl_s=0.05))) is Unavailable
        assert await bus.kv_keys("b") == ["k"]

    # -- streams ---------------------------------------------------------------------------------------------------
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

        async def left(subject: str, up_to_seq: int | None = None) -> list[int]:
            await bus.purge("S", subject, up_to_seq=up_to_seq)
            return [m.seq for m in await bus.read("S", 1, 99)]

        for i in range(9):
            await bus.put(f"s.{'abc'[i % 3]}.{i}", b"")
        assert await left("s.a", up_to_seq=0) == await left("s.>", up_to_seq=0) == list(range(1, 10))
        assert await left("s.>", up_to_seq=1) == await left("s.z") == await left("elsewhere.>") == list(range(1, 10))
        assert await left("s.b.4") == [1, 2, 3, 4, 6, 7, 8, 9]
        assert await left("s.a.*", up_to_seq=7) == [2, 3, 6, 7, 8, 9]
        assert await left("s.*.8") == [2, 3, 6, 7, 8]
        assert await left("s.>", up_to_seq=7) == [7, 8]
        assert await bus.get("S", "s.a.0") is None
        assert await bus.put("s.a.9", b"") == 10
        assert await left("s.a.>") == [8]

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
        assert await outcome(bus.ensure_stream(StreamConfig("Y", ("y",), half))) is StreamFull
        await bus.delete_stream("X")
        await bus.ensure_stream(StreamConfig("Y", ("y",), half))

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
        calls = (bus.put("s.a", large), bus.publish("s.a", large), bus.request("q", large, 1), bus.kv_create("b", "k", large))
        assert await outcomes(*calls) == [Unavailable] * 4
        assert await outcome(bus.kv_create("b", "k", large[:-1])) is Unavailable  # a revision travels in headers
        await bus.kv_create("b", "k", large[:-100])
        assert not back  # and the connection lives

    async def test_an_answer_to_read_is_bounded_in_bytes_too(self, backend: Backend) -> None:
        bus = await backend.connect("coordinator")
        await bus.ensure_stream(StreamConfig("S", ("s.>",), 100 * ROOM))
        await windowed(66, 8, lambda k: _ignored(bus.put("s.a", bytes(1 << 20), bulk=True)))
        assert len(await bus.read("S", 1, 99)) == 64  # fewer than asked for is not the end

    # -- blobs -----------------------------------------------------------------------------------------------------
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

    # -- core ------------------------------------------------------------------------------------------------------
    async def test_a_message_reaches_whoever_listens_in_order(self, backend: Backend) -> None:
        speaker, listener = await backend.connect("coordinator"), await backend.connect("coordinator")
        patterns = ["q.>", "q.*", "q.a", "*.a", ">", "q.*.b", "r.>"]
        heard = {pattern: Heard() for pattern in patterns}
        for pattern in patterns[::-1]:
            if pattern != ">":
                await listener.subscribe(pattern, heard[pattern])
        twice, own = Heard(), Heard()
        await listener.subscribe("q.a", twice)
        await speaker.subscribe("q.a", own)
        await settled(listener, speaker)
        for i in range(200):
            await speaker.publish("q.a", b"%d" % i)
        await speaker.publish("q.a.b", b"")
        await speaker.publish("q", b"")
        await speaker.publish("r.last", b"")
        await until(lambda: len(heard["r.>"]) == 1, "the last one is heard")
        await until(lambda: len(own) == 200, "what one says oneself, too")
        numbers = [b"%d" % i for i in range(200)]
        assert heard["q.a"].data == heard["q.*"].data == heard["*.a"].data == twice.data == own.data == numbers
        assert heard["q.>"].data == [*numbers, b""] and heard["q.*.b"] == [Delivery("q.a.b", b"")]

    async def test_who_unsubscribes_hears_no_more_not_even_what_waits(self, backend: Backend) -> None:
        bus, heard, gate = await backend.connect("coordinator"), Heard(), asyncio.Event()

        async def slow(delivery: Delivery) -> None:
            await heard(delivery)
            await gate.wait()

        subscription = await bus.subscribe("q", slow)
        for i in range(3):
            await bus.publish("q", b"%d" % i)
        await until(lambda: bool(heard), "the first is heard")
        await settled(bus)
        await subscription.unsubscribe()
        await subscription.unsubscribe()
        gate.set()
        await bus.publish("q", b"late")
        assert await outcome(bus.request("q", b"", 1.0)) is NoResponders
        await asyncio.sleep(QUIET_S)
        assert heard.data == [b"0"]

    async def test_when_too_many_wait_the_newest_are_dropped(self, backend: Backend) -> None:
        bus, heard, gate = await backend.connect("coordinator"), Heard(), asyncio.Event()

        async def slow(delivery: Delivery) -> None:
            await heard(delivery)
            await gate.wait()

        await bus.subscribe("q", slow, limit=5)
        await bus.publish("q", b"0")
        await until(lambda: bool(heard), "the first is heard")
        for i in range(1, 20):
            await bus.publish("q", b"%d" % i)
        await settled(bus)
        gate.set()
        await until(lambda: len(heard) == 6, "what waited is heard")
        await bus.publish("q", b"next")
        await until(lambda: len(heard) > 6, "it goes on")
        assert heard.data == [b"0", b"1", b"2", b"3", b"4", b"5", b"next"]

    async def test_a_handler_takes_one_message_after_the_other_and_outlives_its_errors(self, backend: Backend) -> None:
        bus, heard = await backend.connect("coordinator"), Heard()
        busy, most = 0, 0

        async def clumsy(delivery: Delivery) -> None:
            nonlocal busy, most
            busy, most = busy + 1, max(most, busy + 1)
            try:
                await asyncio.sleep(0)
                if delivery.data == b"raise":
                    raise ValueError("a bug")
                if delivery.data == b"cancel":  # as when it awaits a task that somebody else has cancelled
                    raise asyncio.CancelledError
                await heard(delivery)
            finally:
                busy -= 1

        await bus.subscribe("q", clumsy)
        for data in (b"1", b"raise", b"2", b"cancel", b"3"):
            await bus.publish("q", data)
        await until(lambda: len(heard) == 3, "all that can be heard")
        assert heard.data == [b"1", b"2", b"3"] and most == 1

    async def test_the_first_answer_to_a_request_counts(self, backend: Backend) -> None:
        bus, other = await backend.connect("coordinator"), await backend.connect("coordinator")

        async def echo(delivery: Delivery) -> None:
            assert delivery.reply
            await other.publish(delivery.reply, delivery.data)
            await other.publish(delivery.reply, b"second")

        await other.subscribe("q", echo)
        await settled(other)
        assert [await bus.request("q", data, 5.0) for data in (b"a", b"", b"b")] == [b"a", b"", b"b"]
        answers = await asyncio.gather(*(bus.request("q", b"%d" % i, 5.0) for i in range(20)))
        assert answers == [b"%d" % i for i in range(20)]

    async def test_nobody_listening_is_known_at_once_and_silence_in_time(self, backend: Backend) -> None:
        bus, other, back = await backend.connect("coordinator"), await backend.connect("coordinator"), []
        bus.when_reconnected(lambda: back.append(1))
        async with asyncio.timeout(5):
            assert await outcome(bus.request("q", b"", 60.0)) is NoResponders
        await other.subscribe("q", Heard())
        await settled(other)
        for _ in range(5):
            assert await outcome(bus.request("q", b"", 0.05)) is Unreachable
        await other.close()  # a peer's silence says nothing about the connection
        await settled(bus)
        await asyncio.sleep(2 * QUIET_S)
        assert await outcome(bus.request("q", b"", 60.0)) is NoResponders
        assert not back

    async def test_what_is_published_on_a_streams_subject_is_stored_and_what_is_put_is_heard(self, backend: Backend) -> None:
        bus, heard = await backend.connect("coordinator"), Heard()
        await bus.ensure_stream(S)
        await bus.subscribe("s.*", heard)
        await bus.publish("s.a", b"published")

        async def stored() -> bool:
            return await bus.get("S", "s.a") is not None

        await until(stored, "it is stored")
        assert await bus.put("s.b", b"put") == 2
        acknowledged = json.loads(await bus.request("s.c", b"asked", 5.0))
        assert (acknowledged["stream"], acknowledged["seq"]) == ("S", 3)
        await until(lambda: len(heard) == 3, "all is heard")
        assert heard.data == [b"published", b"put", b"asked"]
        assert [bool(delivery.reply) for delivery in heard] == [False, True, True]

    async def test_a_put_that_no_stream_takes_is_no_put_whoever_answers(self, backend: Backend) -> None:
        bus = await backend.connect("coordinator")

        async def pong(delivery: Delivery) -> None:
            await bus.publish(delivery.reply, b"pong")

        await bus.subscribe("q", pong)
        assert await outcome(bus.put("q", b"")) is Unavailable

    async def test_what_is_no_subject_is_refused_and_harms_nothing(self, backend: Backend) -> None:
        bus, back = await backend.connect("coordinator"), []
        bus.when_reconnected(lambda: back.append(1))
        for bad in ("", "a b", "a\r\nb", "\ta"):
            calls = (bus.publish(bad, b""), bus.put(bad, b""), bus.request(bad, b"", 1.0), bus.subscribe(bad, Heard()))
            assert await outcomes(*calls) == [Unavailable] * 4
        for bad in ("a..b", ".a", "a.", "a.>.b", "*a", "a.b>"):
            assert await outcomes(bus.subscribe(bad, Heard()), bus.put(bad, b"")) == [Unavailable, NoResponders]
        await settled(bus)
        assert not back

    # -- accounts --------------------------------------------------------------------------------------------------
    async def test_an_agent_can_do_its_work(self, backend: Backend) -> None:
        core = await a_run(backend)
        agent, heard, notes = await backend.connect("a1"), Heard(), Heard()

        async def welcome(delivery: Delivery) -> None:
            await heard(delivery)
            await core.publish(delivery.reply, b"welcome")

        await core.subscribe("syncline.v1.*.agent.*.heartbeat", welcome)
        await agent.subscribe("syncline.v1.*.notify", notes)
        await settled(core, agent)
        assert await agent.request("syncline.v1.r.agent.a1.heartbeat", b"alive", 5.0) == b"welcome"
        assert heard[0].subject == "syncline.v1.r.agent.a1.heartbeat" and not heard[0].reply.startswith("_INBOX")
        head, model = await agent.kv_get(*HEAD), await agent.get(MODEL, "syncline.v1.r.model.b.0", bulk=True)
        assert head is not None and head.value == b"HEAD" and model is not None and model.data == b"MODEL"
        assert await agent.kv_get("syncline-runs", "none") is await agent.get(MODEL, "syncline.v1.r.model.b.9") is None
        assert await agent.put("syncline.v1.r.agent.a1.offer", b"offer") == 1
        assert await agent.put("syncline.v1.r.agent.a1.update.b.0", b"chunk", bulk=True) == 1
        assert await outcome(agent.put("syncline.v1.r.agent.a1.update.b.0", b"chunk", bulk=True)) is AlreadyPut
        assert await outcome(agent.put("syncline.v1.other.agent.a1.offer", b"")) is NoResponders
        assert await outcome(agent.request("syncline.v1.r.agent.a1.other", b"", 5.0)) is NoResponders
        assert await outcome(agent.get("SYNCLINE_MODEL_x", "syncline.v1.x.model.b.0")) is NoResponders
        await core.publish("syncline.v1.r.notify", b"committed")
        await until(lambda: bool(notes), "the notify is heard")
        assert notes == [Delivery("syncline.v1.r.notify", b"committed")] and backend.violations() == []

    @pytest.mark.parametrize("who", ["a1", "watch"])
    async def test_what_is_not_ones_own_is_denied_and_reported(self, backend: Backend, who: str = "a1") -> None:
        core, heard = await a_run(backend), Heard()
        bus = await backend.connect(who)
        for subject in ("syncline.v1.r.agent.a2.>", "syncline.v1.r.notify", "syncline.v1.r.metrics.>"):
            await core.subscribe(subject, heard)
        await settled(core)
        foreign = "syncline.v1.r.agent.a2.offer"
        tried: dict[str, Callable[[], Awaitable[object]]] = {
            "$KV.syncline-runs.r.head": partial(bus.kv_update, *HEAD, b"evil", 1),
            "$KV.syncline-runs.r.new": partial(bus.kv_create, "syncline-runs", "r.new", b"evil"),
            "$JS.API.STREAM.PURGE.KV_syncline-runs": partial(bus.kv_delete, *HEAD),
            "$JS.API.STREAM.INFO.KV_syncline-runs": partial(bus.kv_keys, "syncline-runs"),
            "$JS.API.STREAM.CREATE.KV_b": partial(bus.ensure_bucket, B),
            "$JS.API.STREAM.CREATE.S": partial(bus.ensure_stream, S),
            f"$JS.API.STREAM.DELETE.{MODEL}": partial(bus.delete_stream, MODEL),
            f"$JS.API.STREAM.INFO.{MODEL}": partial(bus.state, MODEL),
            f"$JS.API.STREAM.PURGE.{MODEL}": partial(bus.purge, MODEL, ">"),
            f"$JS.API.DIRECT.GET.{MODEL}": partial(bus.read, MODEL, 1, 9),
            f"$JS.API.DIRECT.GET.{MODEL}.syncline.v1.r.outer.b.0": partial(bus.get, MODEL, "syncline.v1.r.outer.b.0"),
            f"$JS.API.DIRECT.GET.{OFFERS}.{foreign}": partial(bus.get, OFFERS, foreign, bulk=True),
            "$JS.API.DIRECT.GET.KV_b.$KV.b.k": partial(bus.kv_get, "b", "k"),
            foreign: partial(bus.put, foreign, b"evil"),
            "syncline.v1.r.model.b.1": partial(bus.put, "syncline.v1.r.model.b.1", b"evil", bulk=True),
            "syncline.v1.r.agent.a2.heartbeat": partial(bus.request, "syncline.v1.r.agent.a2.heartbeat", b"evil", 5.0),
        }
        async with asyncio.timeout(PATIENCE_S):
            assert {subject: await outcome(call()) for subject, call in tried.items()} == dict.fromkeys(tried, Denied)
        silent = ["syncline.v1.r.notify", "syncline.v1.r.metrics.a2.loss", "_INBOX.a2.1.1", foreign]
        for subject in silent:
            await bus.publish(subject, b"evil")  # nobody is told at once
        expected = {Violation(who, "publish", subject) for subject in (*tried, *silent)}
        await until(lambda: expected <= set(backend.violations()), "every attempt is reported")
        await settled(core)
        assert heard == [] and [m.data for m in await core.read(MODEL, 1, 9)] == [b"MODEL"]
        assert (await core.state(OFFERS)).messages == 0 and await core.kv_keys("syncline-runs") == ["r.head"]

    async def test_listening_to_what_is_not_ones_own_hears_nothing_and_is_reported(self, backend: Backend) -> None:
        core, heard = await a_run(backend), Heard()
        forbidden = {
            "a1": ["syncline.v1.>", "_INBOX.a2.>", "_INBOX.>", "syncline.v1.r.agent.a1.>", "syncline.v1.r.metrics.>"],
            "watch": ["syncline.v1.>", "syncline.v1.r.notify", "syncline.v1.r.agent.>", "_INBOX.watch.>"],
        }
        for who, patterns in forbidden.items():
            bus = await backend.connect(who)
            for pattern in patterns:
                await bus.subscribe(pattern, heard)  # the broker says no, but only later, and to its log
        expected = {Violation(who, "subscribe", p) for who, patterns in forbidden.items() for p in patterns}
        await until(lambda: expected <= set(backend.violations()), "every attempt is reported")
        said = ["syncline.v1.r.notify", "syncline.v1.r.agent.a1.x", "_INBOX.a2.x", "_INBOX.watch.x", "syncline.v1.r.model.b.1"]
        for subject in said:
            await core.publish(subject, b"")
        await settled(core)
        await asyncio.sleep(QUIET_S)
        assert heard == []

    async def test_agents_hear_the_coordinator_and_not_each_other(self, backend: Backend) -> None:
        core, a1, a2 = await a_run(backend), await backend.connect("a1"), await backend.connect("a2")
        heard, core_heard = Heard(), Heard()
        for pattern in ("_INBOX.a2.>", "syncline.v1.*.notify"):
            await a2.subscribe(pattern, heard)
        await core.subscribe("syncline.v1.*.metrics.>", core_heard)
        await settled(core, a2)
        await a1.publish("_INBOX.a2.x", b"evil")
        await core.publish("_INBOX.a2.x", b"out of its account")
        await a1.publish("syncline.v1.r.metrics.a1.loss", b"for watchers only")
        await settled(a1)
        await core.publish("syncline.v1.r.notify", b"last")
        await until(lambda: bool(heard), "the notify is heard")
        await settled(core)
        assert heard.data == [b"last"] and core_heard == []

    async def test_watchers_hear_metrics_and_events_from_everywhere(self, backend: Backend) -> None:
        core, agent, watcher = await a_run(backend), await backend.connect("a1"), await backend.connect("watch")
        everything, some = Heard(), Heard()
        for pattern in ("syncline.v1.*.metrics.>", "syncline.v1.*.events.*"):
            await watcher.subscribe(pattern, everything)
        await watcher.subscribe("syncline.v1.r.metrics.a1.>", some)

        async def listens() -> bool:  # it can ask nothing, so that we know it by what it hears
            await agent.publish("syncline.v1.r.metrics.a1.first", b"")
            return bool(some)

        await until(listens, "the watcher listens")
        say = {"coordinator": core, "a1": agent}
        subjects = [f"syncline.v1.r.{what}" for who in say for what in (f"metrics.{who}.loss.train", f"events.{who}")]
        for subject in subjects:
            await say["a1" if "a1" in subject else "coordinator"].publish(subject, b"")
        wanted = set(subjects)
        await until(lambda: wanted <= {d.subject for d in everything}, "all of it is heard")
        assert {d.subject for d in some} == {"syncline.v1.r.metrics.a1.first", "syncline.v1.r.metrics.a1.loss.train"}

    async def test_a_key_under_another_name_is_denied_and_not_just_silent(self, backend: Backend) -> None:
        await a_run(backend)
        bus = await backend.connect("a1", name="a2")
        async with asyncio.timeout(3):
            for _ in range(2):
                assert await outcome(bus.kv_get(*HEAD)) is Denied

    # -- when the broker goes, and comes back ----------------------------------------------------------------------
    async def test_after_a_restart_all_that_was_acknowledged_is_there_and_all_are_back(self, backend: Backend) -> None:
        core, agent = await a_run(backend), await backend.connect("a1")
        heard, back = Heard(), []
        await agent.subscribe("syncline.v1.*.notify", heard)
        dropped = await agent.subscribe("syncline.v1.*.notify", heard)
        await settled(agent)
        for bus in (core, agent):
            bus.when_reconnected(partial(back.append, bus))
        before = [await core.state(stream, ">") for stream in (MODEL, f"KV_{RUNS_BUCKET}")]
        await backend.stop()
        await dropped.unsubscribe()
        added = Heard()
        await core.subscribe("syncline.v1.r.agent.*.heartbeat", added)
        await backend.start()
        assert await core.put("syncline.v1.r.model.b.1", b"more") == 2
        assert await core.kv_update(*HEAD, b"HEAD 2", 1) == 2
        await until(lambda: len(back) == 2 and set(back) == {core, agent}, "both are told that they are back")
        head = await agent.kv_get(*HEAD)
        assert head is not None and head.value == b"HEAD 2"
        await core.purge(MODEL, "syncline.v1.r.model.b.1")
        assert (await core.state(MODEL, ">")).subjects == before[0].subjects
        assert (await core.state(f"KV_{RUNS_BUCKET}", ">")).subjects == before[1].subjects
        await agent.publish("syncline.v1.r.agent.a1.heartbeat", b"")
        await core.publish("syncline.v1.r.notify", b"")
        await until(lambda: bool(heard and added), "both listen again")
        await settled(core, agent)
        assert len(heard) == len(added) == 1

    async def test_what_waits_for_an_answer_fails_when_the_connection_goes(self, backend: Backend) -> None:
        bus, heard = await backend.connect("coordinator"), Heard()
        await bus.subscribe("q", heard)
        asking = [asyncio.create_task(outcome(bus.request("q", b"", 60.0))) for _ in range(3)]
        await until(lambda: len(heard) == 3, "they wait")
        await backend.stop()
        async with asyncio.timeout(PATIENCE_S):
            assert [await task for task in asking] == [Unreachable] * 3
        await backend.start()

    async def test_what_is_asked_without_a_connection_waits_for_it_as_far_as_there_is_room(self, backend: Backend) -> None:
        core, back = await a_run(backend), []
        core.when_reconnected(lambda: back.append(1))
        await backend.stop()
        assert await outcome(core.request("syncline.v1.r.model.b.late", b"late", 0.05)) is Unreachable
        waiting = asyncio.create_task(core.put("syncline.v1.r.model.b.1", b"waited"))
        chunk = bytes(1 << 20)
        tries = [await outcome(core.publish("syncline.v1.r.model.b.2", chunk)) for _ in range(5)]
        assert tries[0] is None and tries[-1] is Unreachable
        await backend.start()
        assert await waiting > 1
        await until(lambda: bool(back), "the connection is back")
        late = await core.get(MODEL, "syncline.v1.r.model.b.late")
        assert late is not None and late.data == b"late"  # Unreachable means unknown: it was done after all

    async def test_a_closed_bus_does_nothing_more_but_what_was_said_is_said(self, backend: Backend) -> None:
        core, bus, heard = await a_run(backend), await backend.connect("coordinator"), Heard()
        await core.subscribe("q", heard)
        await settled(core)
        never_asked = await backend.connect("coordinator")
        await never_asked.close()
        asking = asyncio.create_task(outcome(bus.request("q", b"asked", 60.0)))
        await until(lambda: bool(heard), "it waits")
        await bus.subscribe("own", heard)
        await bus.publish("q", b"said")
        await bus.close()
        await bus.close()
        assert await asking is Unreachable
        await until(lambda: heard.data == [b"asked", b"said"], "what was said is heard")
        for closed in (bus, never_asked):
            calls = (closed.kv_get(*HEAD), closed.put("q", b""), closed.publish("q", b""), closed.subscribe("q", heard))
            assert await outcomes(*calls) == [Unreachable] * 4
        assert await outcome(core.request("own", b"", 5.0)) is NoResponders


async def _ignored(call: Awaitable[object]) -> None:
    await call
