"""Space on the bus is reserved at submit: a run that does not fit is refused with the figures, and leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial

import pytest
import pytest_asyncio

from syncline.bus.base import StreamConfig
from syncline.bus.blobs import UNOFFERED_S, put_blob
from syncline.errors import NoResponders, Unavailable
from syncline.observe.telemetry import Telemetry
from syncline.runtime.nursery import Nursery
from syncline.wire import subjects
from syncline_cli.local_fleet.fleet import LocalFleet
from syncline_coordinator.retention import LOOK_S, QUOTA_BLOBS, Janitor, Purger
from system.harness import Fleet, eventually, settings

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def small(nursery: Nursery) -> AsyncIterator[Fleet]:
    """One agent, and a broker with 256 MiB."""
    async with LocalFleet(settings(1, max_file_store_bytes=256 << 20), nursery) as local:
        fleet = await Fleet.open(local)
        yield fleet
        await fleet.close()


def noop(params: int) -> dict[str, object]:
    return {"task": "syncline.tasks.noop:Noop", "task_options": {"params": params}, "local": {"steps": 0}}


async def gone(fleet: Fleet, stream: str) -> bool:
    try:
        await fleet.bus.state(stream)
    except Unavailable:
        return True
    return False


async def test_a_run_that_does_not_fit_is_refused_with_the_figures_and_leaves_nothing(small: Fleet) -> None:
    answer = await small.submit(name="large", **noop(10_000_000), agents={"min": 1, "max": 4})
    assert answer.run == "" and answer.setting == "agents.max"
    for figure in ("MiB on the bus", "39062 KiB", "each of 4 agents", "3 models"):
        assert figure in answer.problem
    assert "max_file_store" in answer.hint
    for stream in (subjects.updates_stream, subjects.offers_stream, subjects.model_stream, subjects.log_stream):
        assert await gone(small, stream("large"))
    assert await small.bus.kv_keys(subjects.RUNS_BUCKET) == []


async def test_a_run_that_ended_gives_its_space_back_and_the_name_stays_taken(small: Fleet) -> None:
    for name in ("first", "second", "third"):
        head = await small.run(name=name, **noop(1000), stop={"versions": 3})
        assert head.version == 3
        await eventually(partial(gone, small, subjects.updates_stream(name)), f"{name} gives its space back")
        assert len(await small.center(head)) == 1000, "the model stays on the bus"
    again = await small.submit(name="first", **noop(1000))
    assert again.setting == "name" and "already" in again.problem


async def test_blobs_of_judged_updates_and_old_models_are_purged(small: Fleet) -> None:
    head = await small.run(name="purged", **noop(1000), stop={"versions": 60}, keep_models=2)
    state = await small.bus.state(subjects.model_stream("purged"), f"{subjects.PREFIX}.purged.model.>")
    assert head.version == 60 and state.messages < 60


async def test_a_stream_of_somebody_else_in_the_way_is_named_and_stays(small: Fleet) -> None:
    mine = StreamConfig(subjects.model_stream("taken"), ("mine.>",), 1 << 20)
    for theirs in (mine, StreamConfig("RECORDER", ("syncline.v1.taken.log.>",), 1 << 20)):
        await small.bus.ensure_stream(theirs)
        answer = await small.submit(name="taken", **noop(1000))
        assert answer.run == "" and answer.setting == "name", answer
        assert "another configuration" in answer.problem or "overlap" in answer.problem
        assert "nats stream ls" in answer.hint
        await small.bus.ensure_stream(theirs)
        assert await gone(small, subjects.updates_stream("taken")), "what was made for the run is still there"
        await small.bus.delete_stream(theirs.name)
    await small.run(name="taken", **noop(1000), stop={"versions": 1})


async def test_blobs_that_nobody_offers_go_after_a_time_and_who_keeps_putting_them_is_named(small: Fleet) -> None:
    """As the coordinator looks, but with the time as an argument."""
    run, stream = "hoarded", subjects.updates_stream("hoarded")
    await small.bus.ensure_stream(StreamConfig(stream, (subjects.every_update(run),), 1 << 20, write_once=True))
    hoarder, purger, offered = await small.local.connect("a1"), Purger(small.bus), set[str]()
    janitor = Janitor(small.bus, run, purger, Telemetry(small.bus, run, subjects.COORDINATOR), lambda: offered)

    async def verify_durable() -> None:
        """The broker has lost nothing."""

    purging = asyncio.create_task(purger.run(verify_durable))
    try:
        prefix = partial(subjects.update_prefix, run, "a1")
        for _ in range(QUOTA_BLOBS + 2):
            ref, _ = await put_blob(hoarder, prefix, memoryview(bytes(3000)), 1000)
        for no_chunk in ("lone", "too.deep.0"):
            with pytest.raises(NoResponders):
                await hoarder.put(prefix(no_chunk), b"")
        offered.add(ref.id)
        await janitor.look(0.0)
        assert small.events(run, "over-quota") == [], "they may all be on their way"
        await janitor.look(LOOK_S)
        assert "a1 holds more than 2 blobs" in (await small.event(run, "over-quota", "a1"))["text"]
        await janitor.look(UNOFFERED_S)
        assert (await small.bus.state(stream)).messages == 3 * (QUOTA_BLOBS + 2)
        await janitor.look(UNOFFERED_S + LOOK_S)

        async def purged() -> bool:
            left = (await small.bus.state(stream, ">")).subjects
            return set(left) == {f"{prefix(ref.id)}.{k}" for k in range(3)}

        await eventually(purged, "only the offered blob is left")
        assert len(small.events(run, "over-quota")) == 1, "once is enough"
    finally:
        purging.cancel()
        await asyncio.gather(purging, return_exceptions=True)
        await hoarder.close()
