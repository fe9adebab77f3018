"""Both buses keep the contract, and the contract notices a bus that does not. And what only the bus in memory can do."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from bus.contract import TESTS, Contract
from bus.contract_kit import MAX_STORE_BYTES, B, Heard, MemoryBackend, S, VirtualLoop, outcome, settled, until
from bus.mutants import MUTANTS
from syncline.bus.base import Bus, Delivery
from syncline.bus.memory.bus import MemoryBroker
from syncline.bus.memory.faults import Instant, Operation, Seeded
from syncline.bus.nats.bus import NatsBus
from syncline.bus.nats.lane import Connection
from syncline.bus.server.embedded import EmbeddedBroker
from syncline.bus.server.violations import Violation
from syncline.errors import Conflict, NoResponders, Unreachable

T = TypeVar("T")


class NatsBackend:
    def __init__(self, broker: EmbeddedBroker) -> None:
        self._broker, self._log = broker, broker.violations()
        self._violations: list[Violation] = []
        self.buses: list[NatsBus] = []

    async def connect(self, who: str, name: str = "") -> Bus:
        key = self._broker.keyring.identity(who)
        self.buses.append(await NatsBus.connect(Connection(self._broker.url, name or who, key.seed)))
        return self.buses[-1]

    async def stop(self) -> None:
        await self._broker.kill()

    async def start(self) -> None:
        await self._broker.restart()

    async def hang(self) -> None:
        os.kill(self._broker.pid, signal.SIGSTOP)
        threads = Path(
            f"/proc/{self._broker.pid}/task"
        )  # where there is one: the signal takes a moment to reach them all

        def stopped() -> bool:
            return all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in threads.glob("*/stat"))

        await until(stopped, "every thread of the server has stopped")

    async def wake(self) -> None:
        os.kill(self._broker.pid, signal.SIGCONT)

    def violations(self) -> list[Violation]:
        self._violations += self._log.read()
        return self._violations


class TestNats(Contract):
    @pytest.fixture
    async def backend(self) -> AsyncIterator[NatsBackend]:
        async with EmbeddedBroker(agents=["a1", "a2"], max_file_store_bytes=MAX_STORE_BYTES) as broker:
            backend = NatsBackend(broker)
            yield backend
            for bus in backend.buses:
                await bus.close()


class TestMemory(Contract):
    @pytest.fixture
    async def backend(self) -> AsyncIterator[MemoryBackend]:
        backend = MemoryBackend(MemoryBroker(max_store_bytes=MAX_STORE_BYTES))
        yield backend
        await backend.close()


# -- in virtual time ---------------------------------------------------------------------------------------------------
def virtually(work: Coroutine[object, object, T]) -> T:
    """Its result. Whatever goes wrong besides, in a callback say, is raised too."""
    wrong: list[dict[str, Any]] = []
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.get_loop().set_exception_handler(lambda _, context: wrong.append(context))
        result = runner.run(work)
    assert not wrong
    return result


def broken(test: str, broker: MemoryBroker) -> BaseException | None:
    """How the contract is broken, or None."""

    async def run() -> None:
        backend = MemoryBackend(broker)
        try:
            await getattr(Contract(), test)(backend)
        finally:
            await backend.close()

    try:
        virtually(run())
    except (Exception, pytest.fail.Exception) as error:
        return error
    return None


@pytest.mark.parametrize("seed", range(10))
def test_the_contract_holds_whatever_the_delays(seed: int) -> None:
    for test in TESTS:
        network = Seeded(random.Random(seed), longest_s=0.02)
        error = broken(test, MemoryBroker(network, max_store_bytes=MAX_STORE_BYTES))
        assert error is None, f"seed {seed}, {test}: {error!r}"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_contract_notices_a_bus_that_is_wrong(mutant: type[MemoryBroker], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    failed = [test for test in TESTS if broken(test, mutant(max_store_bytes=MAX_STORE_BYTES))]
    assert MUTANTS[mutant] in failed


# -- what only the bus in memory can do --------------------------------------------------------------------------------
def seeded_run(seed: int) -> list[object]:
    """All that three clients do at once, and hear of each other, with the times at which it happens."""
    seen: list[object] = []

    async def run() -> None:
        now = asyncio.get_running_loop().time
        broker = MemoryBroker(Seeded(random.Random(seed), longest_s=0.05, lost=0.2))
        broker.before_op(lambda op: seen.append((now(), op.number, op.client, op.name, op.phase)))

        async def note(delivery: Delivery) -> None:
            seen.append((now(), delivery))

        async def work(bus: Bus, me: str) -> None:
            await bus.subscribe("s.*", note)
            await bus.ensure_stream(S)
            for i in range(5):
                await bus.publish(f"s.{me}", b"%d" % i)
                await bus.put(f"s.{me}", b"put %d" % i, bulk=i % 2 == 0)

        buses = {name: broker.connect(name) for name in "xyz"}
        await asyncio.gather(*(work(bus, name) for name, bus in buses.items()))
        seen.append(await buses["x"].read("S", 1, 99))

    virtually(run())
    return seen


def test_the_same_seed_makes_the_same_run() -> None:
    assert seeded_run(1) == seeded_run(1)
    assert seeded_run(1) != seeded_run(2)


def test_a_connection_keeps_its_order_whatever_the_delays() -> None:
    async def run() -> list[bytes]:
        broker, heard = MemoryBroker(Seeded(random.Random(1), longest_s=1.0)), Heard()
        x, y = broker.connect("x"), broker.connect("y")
        await y.subscribe("q", heard)
        await settled(y)
        for i in range(50):
            await x.publish("q", b"%d" % i)
        await asyncio.sleep(100)
        return heard.data

    assert virtually(run()) == [b"%d" % i for i in range(50)]


async def test_a_hook_sees_each_operation_before_it_when_it_is_done_and_after_it() -> None:
    broker, seen = MemoryBroker(), list[Operation]()
    bus = broker.connect("x")
    broker.before_op(seen.append)
    await bus.ensure_bucket(B)
    assert await outcome(bus.kv_update("b", "k", b"1", 7)) is Conflict
    assert [(op.number, op.client, op.name, op.phase) for op in seen] == [
        (number, "x", name, phase)
        for number, name in ((1, "ensure_bucket"), (2, "kv_update"))
        for phase in ("before", "done", "after")
    ]
    assert seen[3].arguments == ("b", "k", b"1", 7) and isinstance(seen[5].error, Conflict)


async def test_what_a_hook_raises_stops_the_operation_before_anything_is_sent() -> None:
    broker = MemoryBroker()
    bus = broker.connect("x")
    await bus.ensure_stream(S)

    def crash(op: Operation) -> None:
        if op.number == 3 and op.phase == "before":
            raise asyncio.CancelledError

    broker.before_op(crash)
    assert await bus.put("s.a", b"") == 1
    with pytest.raises(asyncio.CancelledError):
        await bus.put("s.a", b"")
    assert await bus.put("s.a", b"") == 2


async def test_a_connection_cut_between_the_deed_and_the_answer_leaves_the_caller_in_doubt() -> None:
    broker, back = MemoryBroker(), list[int]()
    bus, other = broker.connect("x"), broker.connect("y")
    bus.when_reconnected(lambda: back.append(1))
    await bus.ensure_bucket(B)
    broker.before_op(lambda op: broker.cut("x") if (op.name, op.phase) == ("kv_create", "done") else None)
    assert await outcome(bus.kv_create("b", "k", b"done")) is Unreachable
    assert await other.kv_keys("b") == ["k"]
    broker.reconnect("x")
    assert await bus.kv_keys("b") == ["k"]
    assert await bus.kv_update("b", "k", b"2", 1) == 2 and back == [1]


async def test_a_client_that_is_cut_off_is_not_there_and_the_others_go_on() -> None:
    broker, heard = MemoryBroker(), Heard()
    bus, other = broker.connect("x"), broker.connect("y")
    await bus.subscribe("q", heard)
    await settled(bus)
    broker.cut("x")
    await other.publish("q", b"lost")
    assert await outcome(other.request("q", b"", 5.0)) is NoResponders
    with pytest.raises(Unreachable):
        broker.connect("x")
    broker.restart()  # which does not hint the cut
    await bus.publish("q", b"to itself")
    await settled(other)
    broker.reconnect("x")
    broker.cut("x")  # again, before it is back
    broker.reconnect("x")
    await settled(bus)
    await other.publish("q", b"heard")
    await settled(other, bus)
    assert heard.data == [b"to itself", b"heard"]


async def test_a_power_failure_takes_back_what_was_acknowledged_since_the_last_fsync() -> None:
    broker = MemoryBroker()
    bus = broker.connect("x")
    await bus.ensure_stream(S)
    await bus.ensure_bucket(B)
    await bus.put("s.a", b"synced")
    revision = await bus.kv_create("b", "k", b"synced")
    fsync = broker.snapshot()
    await bus.put("s.a", b"lost")
    later = await bus.kv_update("b", "k", b"lost", revision)
    for _ in range(2):
        broker.roll_back(fsync)
        assert [m.data for m in await bus.read("S", 1, 9)] == [b"synced"]
        assert await outcome(bus.kv_update("b", "k", b"3", later)) is Conflict
        assert await bus.kv_update("b", "k", b"another", revision) == later
        assert await bus.put("s.b", b"another") == 2


class Kind(Instant):
    """Takes its time for one kind of message, or loses it."""

    def __init__(self, kind: str, delay_s: float | None) -> None:
        self._kind, self._delay_s = kind, delay_s

    def delay(self, source: str, target: str, kind: str, size_bytes: int) -> float | None:
        return self._delay_s if kind == self._kind else 0.0


def test_a_subscriber_may_be_told_before_the_stream_holds_the_message() -> None:
    async def run() -> None:
        broker, held = MemoryBroker(Kind("store", 1.0)), list[bool]()
        bus = broker.connect("x")
        await bus.ensure_stream(S)

        async def look(delivery: Delivery) -> None:
            held.append(await bus.get("S", "s.a") is not None)

        await bus.subscribe("s.a", look)
        await bus.put("s.a", b"")
        assert held == [False] and await bus.get("S", "s.a") is not None

    virtually(run())


def test_a_lost_answer_is_waited_for_and_the_deed_is_done() -> None:
    async def run() -> None:
        broker = MemoryBroker()
        bus, loop = broker.connect("x"), asyncio.get_running_loop()
        await bus.ensure_stream(S)
        broker.network = Kind("answer", None)
        began = loop.time()
        assert await outcome(bus.put("s.a", b"")) is Unreachable and loop.time() - began == 5.0
        broker.network = Instant()
        assert (await bus.state("S")).messages == 1

    virtually(run())


async def test_time_is_the_loops_unless_a_clock_is_given() -> None:
    for broker, least, most in ((MemoryBroker(clock=lambda: 5.0), 5.0, 5.0), (MemoryBroker(), 1.7e9, 1.8e9)):
        bus = broker.connect("x")
        await bus.ensure_stream(S)
        await bus.put("s.a", b"")
        assert least <= (await bus.read("S", 1, 1))[0].time_s <= most
