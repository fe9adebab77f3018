"""The queue as the bus holds it, and what it costs to look at it."""

from __future__ import annotations

from collections import Counter

from syncline.bus.memory.bus import MemoryBroker, MemoryBus
from syncline.bus.memory.faults import Operation
from syncline.wire import subjects
from syncline.wire.messages import Head, Phase, Submit, encode
from syncline_coordinator.head import HeadKeeper
from syncline_coordinator.reservation import RUNS
from syncline_coordinator.run_queue import RunQueue


class Place:
    """A bus with runs, and a count of what is asked of it."""

    def __init__(self) -> None:
        self.broker, self.asked = MemoryBroker(), Counter[str]()
        self.broker.before_op(self._count)
        self.bus: MemoryBus = self.broker.connect("coordinator")

    async def add(self, name: str, phase: Phase | None = None) -> None:
        spec = encode(Submit(spec={"name": name, "task": "m:T"}))
        await self.bus.kv_create(subjects.RUNS_BUCKET, subjects.spec_key(name), spec)
        if phase is not None:
            await HeadKeeper.create(self.bus, Head(run=name, term=1, version=3, phase=phase))

    async def end(self, name: str) -> None:
        keeper = await HeadKeeper.read(self.bus, name)
        assert keeper is not None
        await keeper.write(keeper.head.model_copy(update={"phase": "done"}))

    def _count(self, now: Operation) -> None:
        if now.phase == "before":
            self.asked[now.name] += 1


async def test_an_idle_look_costs_the_same_however_many_runs_have_ended() -> None:
    place = Place()
    await place.bus.ensure_bucket(RUNS)
    for i in range(300):
        await place.add(f"r{i}", "done")
    waiting = RunQueue(place.bus)
    assert await waiting.read() == []
    place.asked.clear()
    for _ in range(10):
        assert await waiting.read() == []
    assert place.asked == {"ensure_bucket": 10, "state": 10}
    await place.add("new", "waiting")
    place.asked.clear()
    assert await waiting.read() == ["new"] and place.asked["kv_get"] == 2


async def test_runs_come_and_go_in_the_order_of_their_specs() -> None:
    place = Place()
    waiting = RunQueue(place.bus)
    assert await waiting.read() == []
    for name in ("b", "a"):
        await place.add(name, "waiting")
    await place.add("c")  # its coordinator died before it made a head
    assert await waiting.read() == ["b", "a", "c"]
    await place.end("b")
    assert await waiting.read() == ["a", "c"] == await waiting.read()


async def test_after_a_loss_of_the_connection_everything_is_read_again() -> None:
    """The broker may be back with an older store, in which a run that had ended goes on."""
    place = Place()
    await place.bus.ensure_bucket(RUNS)
    await place.add("r", "training")
    older, waiting = place.broker.snapshot(), RunQueue(place.bus)
    await place.end("r")
    assert await waiting.read() == []
    place.broker.stop()
    place.broker.roll_back(older)
    place.broker.start()
    assert await waiting.read() == ["r"]


async def test_a_name_that_is_submitted_again_is_no_longer_an_ended_run() -> None:
    place = Place()
    await place.bus.ensure_bucket(RUNS)
    await place.add("r", "done")
    waiting = RunQueue(place.bus)
    assert await waiting.read() == []
    for key in (subjects.spec_key("r"), subjects.head_key("r")):
        await place.bus.purge(f"KV_{subjects.RUNS_BUCKET}", f"$KV.{subjects.RUNS_BUCKET}.{key}")
    await waiting.put("r", Submit(spec={}))
    assert await waiting.read() == ["r"]
