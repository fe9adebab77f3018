"""The contract: what happens when the broker goes and comes back, and when a bus is closed."""

from __future__ import annotations

import asyncio
from functools import partial

from bus.contract_kit import (
    HEAD,
    MODEL,
    PATIENCE_S,
    Backend,
    Heard,
    a_run,
    outcome,
    outcomes,
    settled,
    until,
)
from syncline.bus.base import Bus
from syncline.errors import NoResponders, Unreachable
from syncline.wire.subjects import RUNS_BUCKET


class Failures:
    """The broker goes and comes back; a bus is closed."""

    async def test_after_a_restart_all_that_was_acknowledged_is_there_and_all_are_back(self, backend: Backend) -> None:
        core, agent = await a_run(backend), await backend.connect("a1")
        heard = Heard()
        back: list[Bus] = []
        await agent.subscribe("syncline.v1.*.notify", heard)
        dropped = await agent.subscribe("syncline.v1.*.notify", heard)
        await settled(agent)
        for bus in (core, agent):
            bus.when_reconnected(partial(back.append, bus))
        before = [await core.state(stream, ">") for stream in (MODEL, f"KV_{RUNS_BUCKET}")]
        losses = core.losses
        await backend.stop()
        await dropped.unsubscribe()
        for not_kept in (  # the broker may come back with an older store
            core.purge(MODEL, ">"),
            core.fit_stream(MODEL),
            core.delete_stream(MODEL),
            core.check_store(MODEL),
        ):
            assert await outcome(not_kept) is Unreachable
        assert await outcome(core.put("syncline.v1.r.model.b.bulk", b"", bulk=True)) is Unreachable
        assert await outcome(core.get(MODEL, "syncline.v1.r.model.b.0", bulk=True)) is Unreachable
        added = Heard()
        await core.subscribe("syncline.v1.r.agent.*.heartbeat", added)
        await backend.start()
        assert await core.put("syncline.v1.r.model.b.1", b"more") == 2
        assert core.losses > losses
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

    async def test_what_is_asked_without_a_connection_waits_for_it_as_far_as_there_is_room(
        self, backend: Backend
    ) -> None:
        core, back = await a_run(backend), []
        core.when_reconnected(lambda: back.append(1))
        await backend.stop()
        assert (
            await outcome(core.request("noticed", b"", 0.5)) is Unreachable
        )  # what is written to a dead socket is lost
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

    async def test_a_change_of_a_key_is_not_kept_until_the_connection_is_back(self, backend: Backend) -> None:
        core, back = await a_run(backend), []
        core.when_reconnected(lambda: back.append(1))
        await backend.stop()
        assert await outcome(core.request("noticed", b"", 0.5)) is Unreachable
        async with asyncio.timeout(1):
            assert await outcome(core.kv_create("syncline-runs", "r.new", b"")) is Unreachable
            assert await outcome(core.kv_update(*HEAD, b"", 1)) is Unreachable
        await backend.start()
        await until(lambda: bool(back), "the connection is back")
        head = await core.kv_get(*HEAD)
        assert head is not None and head.value == b"HEAD" and await core.kv_keys("syncline-runs") == ["r.head"]

    async def test_a_connection_on_which_the_broker_is_silent_begins_again(self, backend: Backend) -> None:
        core, heard, back = await a_run(backend), Heard(), []
        core.when_reconnected(lambda: back.append(1))
        await core.subscribe("syncline.v1.r.notify", heard)
        await settled(core)
        losses = core.losses
        await backend.hang()
        silent = [outcome(core.put("syncline.v1.r.model.b.1", b"")) for _ in range(3)]
        assert await asyncio.gather(*silent) == [Unreachable] * 3
        await backend.wake()
        await until(lambda: bool(back), "the connection is another one")
        assert core.losses > losses
        await core.publish("syncline.v1.r.notify", b"")
        await until(lambda: bool(heard), "it listens again")
        assert await core.get(MODEL, "syncline.v1.r.model.b.0", bulk=True) is not None

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
            assert await outcomes(*calls) == [Unreachable] * 4 and closed.losses == 0

        async def nobody_listens() -> bool:
            return await outcome(core.request("own", b"", 0.5)) is NoResponders

        await until(nobody_listens, "the broker has noticed")
