"""The coordinator service alone: its queue, the space that it reserves, and its behaviour after a pause of its process."""

from __future__ import annotations

import asyncio

import pytest

from sim.crowd import RUN, Crowd, head_when, in_virtual_time, start_coordinator, submit
from syncline.bus.base import Delivery
from syncline.bus.memory.bus import MemoryBroker
from syncline.observe.telemetry import Event
from syncline.runtime.child_messages import MakeModel, ModelLayout
from syncline.spec.run_spec import RunSpec
from syncline.wire import subjects
from syncline.wire.messages import Stop, encode
from syncline_coordinator.head import Deposed, HeadKeeper
from syncline_sim.inline_children import StubEvaluator
from syncline_sim.loop import VirtualLoop
from syncline_sim.scenario import small_spec

STORE_BYTES = 300 << 20


def tiny(name: str, elements: int = 4) -> RunSpec:
    return small_spec(name=name, agents={"min": 1, "max": 4}, task_options={"elements": elements})


def test_runs_wait_without_space_of_their_own_and_reserve_it_when_they_are_opened() -> None:
    async def play(_: VirtualLoop) -> None:
        broker = MemoryBroker(max_store_bytes=STORE_BYTES)
        await start_coordinator(broker)
        bus = broker.connect("cli")
        for name in ("r1", "r2", "r3", "r4", "r5"):
            answer = await submit(bus, tiny(name))
            assert answer.run == name, answer
        assert {s for s in broker.store.streams if "SYNCLINE" in s and "_r1" not in s} == set()
        await head_when(bus, 0, "waiting", "r1")
        await bus.publish(subjects.stop(), encode(Stop(run="r1")))
        await head_when(bus, 0, "waiting", "r2")
        assert subjects.updates_stream("r2") in broker.store.streams

    in_virtual_time(play)


def test_a_run_that_would_not_fit_into_an_empty_store_is_refused_behind_others_and_one_that_would_is_not() -> None:
    async def play(_: VirtualLoop) -> None:
        broker = MemoryBroker(max_store_bytes=STORE_BYTES)
        await start_coordinator(broker)
        bus = broker.connect("cli")
        assert (await submit(bus, tiny("r1"))).run
        await head_when(bus, 0, "waiting", "r1")
        large, largest = tiny("large", 1_000_000), tiny("largest", 4_000_000)
        assert (await submit(bus, large)).run == "large", "it fits when r1 has ended"
        refused = await submit(bus, largest)
        assert refused.setting == "agents.max" and "MiB on the bus" in refused.problem
        assert not [s for s in broker.store.streams if "large" in s]

    in_virtual_time(play)


def test_a_run_that_finds_no_space_when_it_is_opened_fails_with_the_figures() -> None:
    async def play(_: VirtualLoop) -> str:
        broker = MemoryBroker(max_store_bytes=STORE_BYTES)
        await start_coordinator(broker)
        bus = broker.connect("cli")
        for name, elements in (("r1", 4), ("large", 1_000_000)):
            assert (await submit(bus, tiny(name, elements))).run
        await head_when(bus, 0, "waiting", "r1")
        broker.store._max_bytes = 150 << 20
        await bus.publish(subjects.stop(), encode(Stop(run="r1")))
        return (await head_when(bus, 0, "failed", "large")).reason

    reason = in_virtual_time(play)
    assert reason.startswith("agents.max: the run needs") and "MiB" in reason


def test_the_optimisers_settings_are_tried_at_submit_and_not_in_the_child_that_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Modules loaded for the trial would stay in the child's memory as long as the run goes on."""
    tried, make_model = [], StubEvaluator.make_model

    def noted(self: StubEvaluator, question: MakeModel) -> ModelLayout:
        tried.append(question.check_optimizer)
        return make_model(self, question)

    monkeypatch.setattr(StubEvaluator, "make_model", noted)

    async def play(_: VirtualLoop) -> None:
        broker = MemoryBroker()
        await start_coordinator(broker)
        bus = broker.connect("cli")
        assert (await submit(bus, tiny("r1"))).run
        await head_when(bus, 0, "waiting", "r1")

    in_virtual_time(play)
    assert tried == [True, False]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_coordinator_that_stood_still_calls_no_agent_lost_and_looks_at_head_first(replaced: bool) -> None:
    said: list[str] = []

    async def hear(delivery: Delivery) -> None:
        said.append(Event.model_validate_json(delivery.data).text)

    async def play(loop: VirtualLoop) -> BaseException | None:
        broker = MemoryBroker()
        serving, bus = await start_coordinator(broker), broker.connect("cli")
        assert (await submit(bus, small_spec(agents={"min": 50, "max": 50, "lost_after_s": 10.0}))).run
        await head_when(bus, 0, "waiting")
        crowd = Crowd(bus, 50)
        await crowd.join()
        await head_when(bus, 0, "training")
        await bus.subscribe(f"{subjects.PREFIX}.*.events.*", hear)
        if replaced:
            keeper = await HeadKeeper.read(bus, RUN)
            assert keeper is not None
            await keeper.write(keeper.head.model_copy(update={"term": 2}))
        loop.hang(60.0)
        await asyncio.sleep(1.0)
        await crowd.join()
        await asyncio.sleep(5.0)
        return serving.exception() if serving.done() else None

    ended = in_virtual_time(play)
    assert said == [] and (isinstance(ended, Deposed) if replaced else ended is None)
