"""Merge rules and outer optimisers through the real bus: under attack, and over the death of the coordinator."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch

from syncline.averaging.merge import RULES
from syncline.averaging.outer import OUTERS
from syncline.runtime.nursery import Nursery
from syncline_cli.local_fleet.fleet import LocalFleet
from syncline_sim.reference_merge import outer_step
from system.harness import Fleet, settings, task
from system.tasks import Liar

pytestmark = pytest.mark.asyncio(loop_scope="module")

NEEDED: dict[str, dict[str, Any]] = {"norm_clip": {"max_norm": 0.2}, "centred_clip": {"tau": 0.2}}
ROUNDS = 10


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def seven(nursery: Nursery) -> AsyncIterator[Fleet]:
    async with LocalFleet(settings(7), nursery) as local:
        fleet = await Fleet.open(local)
        yield fleet
        await fleet.close()


@pytest.mark.parametrize("rule", sorted(RULES))
async def test_one_of_seven_agents_that_lies_breaks_the_mean_and_no_other_rule(seven: Fleet, rule: str) -> None:
    """It sends −10 times its update: with the mean the center runs away from where all the others go."""
    head = await seven.run(
        task=task("Liar"),
        agents={"min": 7, "max": 7},
        local={"steps": 1},
        merge={"rule": rule, **NEEDED.get(rule, {})},
        stop={"versions": ROUNDS},
    )
    honest = torch.stack([Liar().place(i) for i in range(7) if i != Liar().liar]).mean(0)
    away = float((await seven.center(head) - honest).norm())
    if rule == "mean":
        assert away > 3
    else:
        assert away < 0.15
    records = await seven.log(head.run)
    lied = [record.norms[2] / sorted(record.norms)[3] for record in records]
    assert lied[0] > 5, "the record tells who sent ten times as much as the others"


@pytest.mark.parametrize(
    "outer", [{"kind": "nesterov"}, {"kind": "yogi", "lr": 0.05}, {"kind": "delayed_nesterov", "every": 3}]
)
async def test_a_coordinator_that_is_killed_goes_on_with_its_outer_state(fleet: Fleet, outer: dict[str, Any]) -> None:
    """The center is the formula's after every version, whoever made it."""
    versions = 150
    run = await fleet.start(
        task=task("Liar"),
        task_options={"liar": -1},
        agents={"min": 4, "lost_after_s": 30},
        local={"steps": 1},
        outer=outer,
        stop={"versions": versions},
    )
    await fleet.version(run, 20)
    await fleet.local.kill("coordinator")
    await fleet.local.start_coordinator()
    head = await fleet.ended(run)
    assert head.phase == "done" and head.term == 2, head
    records = await fleet.log(run)
    assert [len(r.plan.merged) for r in records] == [4] * versions and {r.term for r in records} == {1, 2}
    optimiser, w = OUTERS[outer["kind"]](**outer), np.zeros(8)
    kept = [np.zeros(8) for _ in range(optimiser.state_vectors)]
    middle = torch.stack([Liar().place(i) for i in range(4)]).mean(0).numpy()
    for version in range(versions):
        w, kept = outer_step(optimiser, w, 0.5 * (middle - w), kept, version)
    assert np.allclose((await fleet.center(head)).numpy(), w, rtol=1e-10, atol=1e-12)
