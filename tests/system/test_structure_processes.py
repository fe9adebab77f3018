"""Training structures in real processes: the center is that of a plain PyTorch loop, or the run is refused by name.

The chosen ones have their training child killed once. `make soak` runs all others, without a kill: what stays at home, and an
optimiser's state, reach the disk once a second at most, so that a child that is killed sooner repeats some periods.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio
import torch
from harness import Fleet, settings

from structures.registry import HERE, STRUCTURES, plain_loop
from syncline.model.flat import manifest_of
from syncline.model.tensors import tensors_of
from syncline.runtime.nursery import Nursery
from syncline.tasks.base import make_model
from syncline.wire.messages import Head
from syncline_cli.local_fleet.fleet import LocalFleet

pytestmark = pytest.mark.asyncio(loop_scope="module")

VERSIONS = 30  # enough for a kill to come in the middle
FEW_VERSIONS = 3
CHOSEN = (
    "SAM, which points the weights back (`p.data = old`)",
    "EMA of a statistic, assigned (`self.mean = …`)",
    "mean teacher (`shared`)",
    "spectral norm",
    "state-dict hooks that rename keys",
    "quantisation-aware training by channel, after one batch",
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one(nursery: Nursery) -> AsyncIterator[Fleet]:
    base = settings(1)
    async with LocalFleet(replace(base, allow_task=(*base.allow_task, f"{HERE}/*")), nursery) as local:
        fleet = await Fleet.open(local)
        yield fleet
        await fleet.close()


@pytest.mark.parametrize("name", CHOSEN)
async def test_a_killed_child_goes_on_to_what_a_plain_loop_learns(one: Fleet, name: str) -> None:
    run = await start(one, name, VERSIONS)
    await one.version(run, 2)
    os.kill(one.trainer_pid("a1"), signal.SIGKILL)
    head = await one.ended(run)
    assert head.phase == "done" and one.events(run, "trainer-died"), head.reason
    await compare(one, name, head, VERSIONS)


@pytest.mark.soak
@pytest.mark.parametrize("name", [n for n, s in STRUCTURES.items() if not s.refused and n not in CHOSEN])
async def test_it_learns_what_a_plain_loop_learns(one: Fleet, name: str) -> None:
    head = await one.ended(await start(one, name, FEW_VERSIONS))
    assert head.phase == "done", head.reason
    await compare(one, name, head, FEW_VERSIONS)


@pytest.mark.soak
@pytest.mark.parametrize("name", [n for n, s in STRUCTURES.items() if s.refused])
async def test_it_is_refused_by_name(one: Fleet, name: str) -> None:
    head = await one.ended(await start(one, name, FEW_VERSIONS))
    assert head.phase == "failed" and STRUCTURES[name].refused in head.reason


async def start(fleet: Fleet, name: str, versions: int) -> str:
    spec: dict[str, Any] = {
        **STRUCTURES[name].spec,
        "stop": {"versions": versions},
        "evaluate": {"every": versions},
    }
    return await fleet.start(**spec)


async def compare(fleet: Fleet, name: str, head: Head, versions: int) -> None:
    """Compare the center, tensor by tensor, with what the plain loop has learned in as many periods."""
    structure = STRUCTURES[name]
    _, model = plain_loop(structure, versions)
    expected = {name: tensor.detach() for name, tensor in tensors_of(model)}
    center_P = await fleet.center(head)
    task = structure.load()
    for entry in manifest_of(make_model(task, 0), 4096, task.local, shared=task.shared).tensors:
        found = center_P[entry.offset : entry.offset + entry.elements].view(entry.shape).to(expected[entry.name].dtype)
        torch.testing.assert_close(found, expected[entry.name], rtol=1e-4, atol=1e-4)  # 180 steps of float32


async def test_a_frozen_layer_that_is_unfrozen_ends_the_run_by_name(one: Fleet) -> None:
    head = await one.ended(await one.start(**STRUCTURES["layers that are unfrozen"].spec, stop={"versions": VERSIONS}))
    assert head.phase == "failed" and "a1: task: the model's 0.weight became trainable during training" in head.reason
