"""A whole run over a nats-server that takes messages of 16 KiB at most, the least that works."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import torch

from syncline.runtime.nursery import Nursery
from syncline.wire.chunks import LEAST_PAYLOAD_BYTES
from syncline_cli.local_fleet.fleet import LocalFleet
from system.harness import Fleet, settings, task

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def thin(nursery: Nursery) -> AsyncIterator[Fleet]:
    async with LocalFleet(settings(3, max_payload_bytes=LEAST_PAYLOAD_BYTES), nursery) as local:
        fleet = await Fleet.open(local)
        yield fleet
        await fleet.close()


async def test_models_and_records_are_cut_to_fit(thin: Fleet) -> None:
    """The manifest and each model take several messages; a record of a commit is a blob."""
    head = await thin.run(
        task=task("Many"), agents={"min": 3}, stop={"versions": 3}, local={"steps": 1}, task_options={"count": 700}
    )
    assert thin.bus.max_payload == LEAST_PAYLOAD_BYTES
    assert head.manifest is not None and head.manifest.chunks > 4
    assert head.model is not None and head.model.chunks > 1
    assert [len(record.plan.merged) for record in await thin.log(head.run)] == [3, 3, 3]
    small = await thin.center(head)
    assert torch.equal(small[3:], torch.arange(700, dtype=torch.float64).repeat_interleave(2))
    assert small[:3].abs().min() > 0, "what trains has moved"
