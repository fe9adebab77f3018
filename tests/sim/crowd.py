"""The real coordinator on the memory bus, with agents that consist of messages only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any, TypeVar

import numpy as np

from syncline.bus.blobs import put_blob
from syncline.bus.memory.bus import MemoryBroker, MemoryBus
from syncline.chance import new_id
from syncline.client import runs
from syncline.shm import SharedMemory
from syncline.spec.run_spec import RunSpec
from syncline.wire import subjects
from syncline.wire.messages import Head, Heartbeat, Hello, Offer, Submit, Submitted, decode, encode
from syncline_coordinator.service import Coordinator, CoordinatorSettings
from syncline_sim.child_factories import StubChildFactory
from syncline_sim.inline_children import InlineChild
from syncline_sim.loop import VirtualLoop
from syncline_sim.rng import Rng
from syncline_sim.scenario import Scenario, small_spec

T = TypeVar("T")
RUN = "r"
AT_ONCE = 500  # messages, so that no subscription of the coordinator's overflows


def in_virtual_time(work: Callable[[VirtualLoop], Coroutine[Any, Any, T]]) -> T:
    """Return the result of the coroutine; cancel all tasks that it leaves behind."""
    loop = VirtualLoop(max_turns=10_000_000)
    try:
        return loop.run_until_complete(work(loop))
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.close()


async def start_coordinator(broker: MemoryBroker) -> asyncio.Task[None]:
    children = StubChildFactory(Scenario(small_spec()))

    async def child(memory: SharedMemory) -> InlineChild:
        return children.evaluator(memory)

    serving = asyncio.create_task(Coordinator(broker.connect("coordinator"), child, CoordinatorSettings()).serve())
    await asyncio.sleep(0.1)
    return serving


async def submit(bus: MemoryBus, spec: RunSpec) -> Submitted:
    question = encode(Submit(spec=spec.model_dump(mode="json")))
    return decode(Submitted, await bus.request(subjects.submit(), question, 60))


async def head_when(bus: MemoryBus, version: int, phase: str, run: str = RUN) -> Head:
    while True:
        head = await runs.head_of(bus, run)
        if (head.version, head.phase) == (version, phase) and (head.model is not None or phase == "failed"):
            return head
        assert head.phase != "failed", head.reason
        await asyncio.sleep(0.05)


class Crowd:
    """The messages of many agents, sent over one connection."""

    def __init__(self, bus: MemoryBus, count: int) -> None:
        self.bus, self.names = bus, [f"agent-{i:05}" for i in range(count)]
        self.sessions = {name: new_id() for name in self.names}

    async def join(self) -> None:
        for some in self._batches():
            for name in some:
                hello = Hello(session=self.sessions[name], tasks=["*"])
                await self.bus.publish(subjects.hello(name), encode(hello))
                beat = Heartbeat(session=self.sessions[name], clock=0, progress=0)
                await self.bus.publish(subjects.heartbeat(RUN, name), encode(beat))
            await asyncio.sleep(0.01)

    async def offer(self, names: list[str], clock: int, head: Head) -> None:
        update, names = memoryview(np.full(1, 0.5).tobytes()), [*names]
        Rng(f"order {clock}").shuffle(names)
        for name in names:
            prefix = partial(subjects.update_prefix, RUN, name)
            blob, digest = await put_blob(self.bus, prefix, update, 8192)
            offer = Offer(session=self.sessions[name], clock=clock, base=head.version, term=head.term, epoch=head.epoch,
                          samples=4, steps=4, blob=blob, digest=digest)  # fmt: skip
            await self.bus.put(subjects.offer(RUN, name), encode(offer))

    def _batches(self) -> Iterator[list[str]]:
        return (self.names[i : i + AT_ONCE] for i in range(0, len(self.names), AT_ONCE))
