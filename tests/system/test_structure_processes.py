"""Training structures in real processes: the center is that of a plain PyTorch loop, or the run is refused by name.

The training child of each is killed once. `make test` runs the chosen ones, and `make soak` all others.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio
import torch
from safetensors import safe_open

from structures.registry import HERE, STRUCTURES, plain_loop
from syncline.bus.base import Delivery
from syncline.model.flat import manifest_of
from syncline.model.tensors import tensors_of
from syncline.runtime.nursery import Nursery
from syncline.tasks.base import make_model
from syncline.wire import subjects
from syncline.wire.messages import Head, Notify, decode
from syncline_cli.local_fleet.fleet import LocalFleet
from system.harness import Fleet, eventually, settings

pytestmark = pytest.mark.asyncio(loop_scope="module")

VERSIONS = 6  # more of them make too much of rounding: LBFGS, GANs
KILLED_FROM = 2  # version: the file of the first period is saved at once, and what comes next is held back
FEW_VERSIONS = 3  # of runs that are refused
CHOSEN = (
    "SAM, which points the weights back (`p.data = old`)",
    "EMA of a statistic, assigned (`self.mean = …`)",
    "mean teacher of each agent (`local`)",
    "GAN, two optimisers from `optimizers`",
    "own scheduler",
    "spectral norm",
)
TRAINED = [
    pytest.param(name, marks=() if name in CHOSEN else pytest.mark.soak)
    for name, structure in STRUCTURES.items()
    if not structure.refused
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one(nursery: Nursery) -> AsyncIterator[Fleet]:
    base = settings(1)
    async with LocalFleet(replace(base, allow_task=(*base.allow_task, f"{HERE}/*")), nursery) as local:
        fleet = await Fleet.open(local)
        yield fleet
        await fleet.close()


@pytest.mark.parametrize("name", TRAINED)
async def test_a_killed_child_goes_on_to_what_a_plain_loop_learns(one: Fleet, name: str) -> None:
    run = await start(one, name, VERSIONS)
    async with coordinator_stopped(one, run, KILLED_FROM):
        await state_on_disk(one, run)
        os.kill(one.trainer_pid("a1"), signal.SIGKILL)
    head = await one.ended(run)
    assert head.phase == "done", head.reason
    await one.event(run, "trainer-died", "a1")
    await compare(one, name, head)


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


@asynccontextmanager
async def coordinator_stopped(fleet: Fleet, run: str, from_version: int) -> AsyncIterator[None]:
    """Stop the coordinator as soon as a run has so many versions, and continue it afterwards: no agent gets an order."""
    pid, stopped = fleet.local.workers[subjects.COORDINATOR].pid, asyncio.Event()

    async def on_notify(delivery: Delivery) -> None:
        head = decode(Head, decode(Notify, delivery.data).head)
        if head.version >= from_version and not stopped.is_set():
            os.kill(pid, signal.SIGSTOP)
            stopped.set()

    subscription = await fleet.bus.subscribe(subjects.notify(run), on_notify)
    try:
        async with asyncio.timeout(60):
            await stopped.wait()
        head = await fleet.head(run)
        assert head is not None and head.version < VERSIONS, "the run has ended before its coordinator was stopped"
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
        await subscription.unsubscribe()


async def state_on_disk(fleet: Fleet, run: str) -> None:
    """Wait until the agent's file is of the period after the newest version: the agent can do no further one."""
    path = fleet.local.broker.directory / "state" / run / "a1.safetensors"

    async def look() -> bool:
        head = await fleet.head(run)
        with safe_open(path, framework="pt") as file:
            return head is not None and int(file.metadata()["clock"]) == head.version + 1

    await eventually(look, f"the state of the last period of {run} on the disk")


async def compare(fleet: Fleet, name: str, head: Head) -> None:
    """Compare the center, tensor by tensor, with what the plain loop has learned in as many periods."""
    structure = STRUCTURES[name]
    _, model = plain_loop(structure, head.version)
    expected = {name: tensor.detach() for name, tensor in tensors_of(model)}
    center_P = await fleet.center(head)
    task = structure.load()
    for entry in manifest_of(make_model(task, 0), 4096, task.local, shared=task.shared).tensors:
        found = center_P[entry.offset : entry.offset + entry.elements].view(entry.shape).to(expected[entry.name].dtype)
        torch.testing.assert_close(found, expected[entry.name], rtol=1e-5, atol=1e-5)


async def test_a_frozen_layer_that_is_unfrozen_ends_the_run_by_name(one: Fleet) -> None:
    head = await one.ended(await one.start(**STRUCTURES["layers that are unfrozen"].spec, stop={"versions": VERSIONS}))
    assert head.phase == "failed" and "a1: task: the model's 0.weight became trainable during training" in head.reason
