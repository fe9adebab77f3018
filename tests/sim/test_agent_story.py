"""The coordinator answers which of its recent decisions concern an agent, and why it made them."""

from __future__ import annotations

from sim.crowd import RUN, Crowd, head_when, in_virtual_time, start_coordinator, submit
from syncline.bus.memory.bus import MemoryBroker, MemoryBus
from syncline.wire import subjects
from syncline.wire.messages import Story, StoryTold, decode, encode
from syncline_sim.loop import VirtualLoop
from syncline_sim.scenario import small_spec


async def ask(bus: MemoryBus, run: str, agent: str) -> StoryTold:
    question = encode(Story(run=run, agent=agent))
    return decode(StoryTold, await bus.request(subjects.story(), question, 5))


def test_an_agent_whose_update_is_late_is_told_what_closed_the_round_without_it() -> None:
    async def play(_: VirtualLoop) -> tuple[StoryTold, StoryTold, StoryTold]:
        broker = MemoryBroker()
        await start_coordinator(broker)
        bus = broker.connect("cli")
        spec = small_spec(
            agents={"min": 3, "lost_after_s": 3600.0}, sync={"quorum": 2, "grace_s": 0.0}, task_options={"elements": 1}
        )
        assert (await submit(bus, spec)).run
        await head_when(bus, 0, "waiting")
        crowd = Crowd(bus, 3)
        await crowd.join()
        first = await head_when(bus, 0, "training")
        await crowd.offer(crowd.names[:2], 1, first)
        await head_when(bus, 1, "training")
        await crowd.offer(crowd.names[2:], 1, first)
        await crowd.offer(crowd.names[:1], 2, await head_when(bus, 1, "training"))
        while not any("drop" in line for line in (await ask(bus, RUN, crowd.names[2])).lines):
            pass
        return (
            await ask(bus, RUN, crowd.names[2]),
            await ask(bus, RUN, "agent-99999"),
            await ask(bus, "other", crowd.names[2]),
        )

    late, unknown, other = in_virtual_time(play)
    assert late.known and "start the round of version 0" in late.lines[0]
    closed = next(line for line in late.lines if "late: agent-00002" in line)
    assert "merge agent-00000 clock 1" in closed and "quorum 2 of 3" in closed
    assert "agent-00002 offered clock 1, trained from version 0 → drop clock 1" in late.lines[-1]
    assert unknown.known and not unknown.lines
    assert not other.known and not other.lines
