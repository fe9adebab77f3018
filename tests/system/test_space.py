"""Space on the bus is reserved at submit: a run that does not fit is refused with the figures, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

import pytest
import pytest_asyncio
from harness import Fleet, eventually, settings

from syncline.errors import Unavailable
from syncline.nursery import Nursery
from syncline.wire import subjects
from syncline_cli.local import LocalFleet

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
    assert "max_file_store" in answer.mend
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
