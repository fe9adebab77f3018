"""Asynchronous and elastic runs through the real bus and real processes, beside reference code that knows the log alone."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from syncline.wire import subjects
from syncline.wire.messages import Committed, Offer, decode
from system.harness import Fleet, eventually, task
from system.tasks import Watched

pytestmark = pytest.mark.asyncio(loop_scope="module")

LR, STEPS = 0.1, 3
CURVATURES = [0.4, 0.9, 1.6, 2.5]
LOCAL = {"steps": STEPS, "optimizer": {"kind": "sgd", "lr": LR}}
AGENTS = ["a1", "a2", "a3", "a4"]
QUICK_LOSS = {"min": 4, "lost_after_s": 1.5}


def watched(**options: Any) -> dict[str, Any]:
    return {"task": task("Watched"), "task_options": {"curvatures": CURVATURES, **options}, "local": LOCAL}


def trained(w: Tensor, agent: str) -> Tensor:
    """What a period makes of these weights: K steps down a bowl."""
    number = AGENTS.index(agent)
    centre = Watched(curvatures=CURVATURES).centre(number)
    return centre + (1 - LR * CURVATURES[number]) ** STEPS * (w - centre)


def close(x: Tensor, y: Tensor) -> bool:
    return torch.allclose(x, y, rtol=1e-12, atol=1e-14)


def zeros() -> Tensor:
    return torch.zeros(3, dtype=torch.float64)


def bases(records: list[Committed]) -> dict[tuple[str, int], int]:
    """The version that each merged update was made from."""
    return {(e.agent, e.clock): r.version - 1 - e.lag for r in records for e in r.plan.merged}


def merged_once(records: list[Committed]) -> None:
    assert [r.version for r in records] == [*range(1, len(records) + 1)]
    updates = [(e.agent, e.clock) for r in records for e in r.plan.merged]
    dropped = [(d.agent, d.clock) for r in records for d in r.dropped]
    assert len({*updates, *dropped}) == len(updates + dropped), "an update was judged twice"


# -- the synchronous run as a special case -----------------------------------------------------------------------------
async def test_max_ahead_zero_is_the_synchronous_run_bit_for_bit(fleet: Fleet) -> None:
    spec = {
        "task": "syncline.tasks.digits:Digits",
        "agents": {"min": 4},
        "partition": {"kind": "dirichlet", "alpha": 0.5},
        "local": {"steps": 10, "optimizer": {"kind": "sgd", "lr": 0.1, "momentum": 0.9}},
        "merge": {"weights": "samples"},
        "stop": {"versions": 6},
        "seed": 11,
    }
    rounds = await fleet.run(**spec)
    bounded = await fleet.run(**spec, sync={"kind": "async", "max_ahead": 0})
    assert bounded.digest == rounds.digest and bounded.version == rounds.version == 6
    first, second = [
        [(r.plan.reason, [(e.agent, e.clock, e.lag, e.weight) for e in r.plan.merged]) for r in await fleet.log(run)]
        for run in (rounds.run, bounded.run)
    ]
    assert first == second
    free = await fleet.run(**spec, sync={"kind": "async", "buffer": 2})
    assert free.digest != rounds.digest, "a test that cannot fail"


# -- FedAsync by differences, FedBuff ----------------------------------------------------------------------------------
def recomputed(records: list[Committed]) -> list[Tensor]:
    """The centers: W ← W + Σ p s(τ) (W_end − W_start), every period from the center that its update names."""
    centers = [zeros()]
    for record in records:
        moved = zeros()
        for e in record.plan.merged:
            start = centers[record.version - 1 - e.lag]
            moved += e.weight * (trained(start, e.agent) - start)
        centers.append(centers[-1] + moved)
    return centers


async def test_fedasync_is_what_the_formulas_say_with_lags_a_straggler_and_drops(fleet: Fleet, tmp_path: Path) -> None:
    """Buffer 1, s(τ) = (1 + τ)^−0.7; a3 is held in its second period until its update is too stale."""
    gate = tmp_path / "gate"
    run = await fleet.start(
        **watched(pause_s=0.01, wait_in=2, wait_part=2, gate=str(gate)),
        agents={"min": 4},
        sync={
            "kind": "async", "buffer": 1, "overlap": False, "max_lag": 8,
            "staleness": {"kind": "polynomial", "a": 0.7},
        },
        stop={"versions": 60},
    )  # fmt: skip
    await fleet.version(run, 30)
    gate.touch()
    event = await fleet.event(run, "update-dropped", "a3")
    assert "> max_lag 8" in event["text"] and "clock 2" in event["text"]
    head = await fleet.ended(run)
    assert head.phase == "done", head.reason
    records = await fleet.log(run)
    merged_once(records)
    entries = [e for r in records for e in r.plan.merged]
    assert len(entries) == 60 and all(e.weight == (1 + e.lag) ** -0.7 for e in entries)
    assert {e.lag for e in entries} > {0, 1, 2} and max(e.lag for e in entries) <= 8
    drops = [(d.agent, d.clock) for r in records for d in r.dropped]
    assert ("a3", 2) in drops and ("a3", 2) not in bases(records)
    assert any(e.agent == "a3" and e.clock > 2 for e in entries), "it never came back"
    assert close(await fleet.center(head), recomputed(records)[-1])


async def test_a_buffer_divides_by_k_and_overlap_goes_on_from_the_newest_version(fleet: Fleet) -> None:
    """FedBuff without a lag to bend it: K = 4 of 4 agents that wait for their verdicts is federated averaging."""
    head = await fleet.run(
        **watched(), agents={"min": 4}, sync={"kind": "async", "buffer": 4, "overlap": False}, stop={"versions": 5}
    )
    records = await fleet.log(head.run)
    assert [[(e.agent, e.lag, e.weight) for e in r.plan.merged] for r in records] == [
        [(a, 0, 0.25) for a in AGENTS]
    ] * 5
    assert close(await fleet.center(head), recomputed(records)[-1])


# -- elastic averaging -------------------------------------------------------------------------------------------------
async def ends_of_periods(fleet: Fleet, run: str, records: list[Committed]) -> dict[tuple[str, int], Tensor]:
    """W_i at the end of every merged period, as the agents told it."""

    async def all_told() -> dict[tuple[str, int], Tensor] | None:
        told = {(who, clock): w for clock, own in fleet.weights(run).items() for who, w in own.items()}
        return told if told.keys() >= bases(records).keys() else None

    found: dict[tuple[str, int], Tensor] = await eventually(all_told, f"the weights of {run}")
    return found


async def test_asynchronous_elastic_averaging_is_what_the_formulas_say(fleet: Fleet, tmp_path: Path) -> None:
    """AEASGD, buffer 1: d = α (W_i − W), W_i ← W_i − d, W ← W + d; a2 is held while others make twenty versions."""
    gate, alpha = tmp_path / "gate", 0.3
    run = await fleet.start(
        **watched(pause_s=0.01, wait_in=3, wait_part=1, gate=str(gate)),
        agents={"min": 4},
        sync={"kind": "async", "buffer": 1, "max_lag": 50},
        mix={"kind": "elastic", "alpha": alpha},
        evaluate={"agents": True},
        stop={"versions": 60},
    )
    await fleet.version(run, 30)
    gate.touch()
    head = await fleet.ended(run)
    assert head.phase == "done", head.reason
    records = await fleet.log(run)
    merged_once(records)
    assert not [d for r in records for d in r.dropped]
    w_end, centers, given = await ends_of_periods(fleet, run, records), [zeros()], {}
    for record in records:
        (e,) = record.plan.merged
        given[e.agent, e.clock] = d = alpha * (w_end[e.agent, e.clock] - centers[record.version - 1 - e.lag])
        assert e.weight == 1.0
        centers.append(centers[-1] + d)
    assert close(await fleet.center(head), centers[-1])
    assert max(e.lag for r in records for e in r.plan.merged) > 0, "no update was late"
    for agent, clock in given:
        if clock == 1:
            begun = [trained(w, agent) for w in centers[: bases(records)[agent, 1] + 1]]
            assert any(close(w, w_end[agent, 1]) for w in begun), f"{agent} did not begin with a center"
        else:
            kept = w_end[agent, clock - 1] - given[agent, clock - 1]
            assert close(trained(kept, agent), w_end[agent, clock]), f"{agent} did not go on from what it kept"
    assert ("a2", 4) in given, "the straggler was never merged"


async def offered(fleet: Fleet, run: str) -> set[tuple[str, int]]:
    stored = await fleet.bus.read(subjects.offers_stream(run), 1, 1000)
    return {(subjects.agent_of(s.subject), decode(Offer, s.data).clock) for s in stored}


async def test_synchronous_elastic_averaging_over_crashes_gives_up_nothing_twice(fleet: Fleet, tmp_path: Path) -> None:
    """EASGD: W ← W + Σ α (W_i − W). a2 dies between its offer and the verdict, a3 in the middle of its period; both return.

    What a2 gave up for clock 3 goes back to it, because it sends another update of that round; the rest is merged once.
    """
    gate, alpha = tmp_path / "gate", 0.15
    run = await fleet.start(
        **watched(wait_in=3, wait_part=2, gate=str(gate)),
        agents=QUICK_LOSS,
        mix={"kind": "elastic", "alpha": alpha},
        evaluate={"agents": True},
        stop={"versions": 8},
    )

    async def all_but_one() -> bool:
        told = fleet.weights(run).get(3, {})
        return {*told} == {"a1", "a2", "a4"} <= {who for who, clock in await offered(fleet, run) if clock == 3}

    await eventually(all_but_one, "three offers of clock 3")
    await fleet.local.kill("a2")
    await fleet.local.start_agent("a2")
    event = await fleet.event(run, "update-dropped", "a2")
    assert event["text"] == "a2: update of clock 3 dropped: replaced by clock 4 of the same agent"
    await fleet.local.kill("a3")
    gate.touch()
    await fleet.local.start_agent("a3")
    head = await fleet.ended(run)
    assert head.phase == "done", head.reason
    records = await fleet.log(run)
    merged_once(records)
    w_end = await ends_of_periods(fleet, run, records)
    centers = [zeros()]
    for record in records:
        taken = [alpha * (w_end[e.agent, e.clock] - centers[-1]) for e in record.plan.merged]
        assert {(e.lag, e.weight) for e in record.plan.merged} == {(0, 1.0)}
        centers.append(centers[-1] + sum(taken, zeros()))
    assert close(await fleet.center(head), centers[-1])
    made_from = bases(records) | {(d.agent, d.clock): r.version - 1 for r in records for d in r.dropped}
    dropped = {(d.agent, d.clock): r.version for r in records for d in r.dropped}
    assert ("a2", 3) in dropped and ("a2", 4) in bases(records)
    assert any("a3" in {e.agent for e in r.plan.merged} for r in records[3:]), "a3 never came back"
    for agent in AGENTS:
        kept = zeros()
        back: dict[Any, Any] = {}
        for clock in sorted(c for who, c in made_from if who == agent):
            base = made_from[agent, clock]
            for late in [c for c in back if dropped[agent, c] <= base]:
                kept = kept + back.pop(late)
            assert close(w_end[agent, clock], trained(kept, agent)), (
                f"{agent} lost or doubled something by clock {clock}"
            )
            difference = alpha * (w_end[agent, clock] - centers[base])
            kept = w_end[agent, clock] - difference
            if (agent, clock) in dropped:
                back[clock] = difference


# -- failures ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("sync", "mix"),
    [
        ({"kind": "async", "buffer": 2, "overlap": False}, {}),
        ({"kind": "async", "buffer": 1, "max_ahead": 2}, {"kind": "elastic", "alpha": 0.2}),
    ],
    ids=["buffered", "elastic"],
)
async def test_a_coordinator_killed_in_an_asynchronous_run_goes_on_and_merges_nothing_twice(
    fleet: Fleet, sync: dict[str, Any], mix: dict[str, Any]
) -> None:
    run = await fleet.start(
        **watched(pause_s=0.05), agents={"min": 4}, sync=sync, mix=mix, evaluate={"agents": True}, stop={"versions": 40}
    )
    await fleet.version(run, 10)
    await fleet.local.kill("coordinator")
    await fleet.local.start_coordinator()
    head = await fleet.ended(run)
    assert head.phase == "done" and head.term == 2, head
    records = await fleet.log(run)
    merged_once(records)
    assert len(records) == 40 and {e.agent for r in records[-12:] for e in r.plan.merged} == {*AGENTS}
    if not mix:
        assert close(await fleet.center(head), recomputed(records)[-1])
        return
    w_end, centers = await ends_of_periods(fleet, run, records), [zeros()]
    for record in records:
        taken = [0.2 * (w_end[e.agent, e.clock] - centers[record.version - 1 - e.lag]) for e in record.plan.merged]
        centers.append(centers[-1] + sum(taken, zeros()))
    assert close(await fleet.center(head), centers[-1])


async def test_an_agent_that_leaves_and_one_that_is_killed_hold_up_nobody(fleet: Fleet) -> None:
    """With bounded clocks everybody waits for the slowest; whoever is gone is not the slowest any more."""
    run = await fleet.start(
        **watched(pause_s=0.05),
        agents=QUICK_LOSS,
        sync={"kind": "async", "buffer": 2, "max_ahead": 1},
        stop={"versions": 60},
    )
    await fleet.version(run, 5)
    fleet.local.signal("a4", signal.SIGTERM)
    await fleet.local.kill("a2")
    assert "not heard of" in (await fleet.event(run, "agent-lost", "a2"))["text"]
    before = await fleet.head(run)
    assert before is not None
    await fleet.version(run, before.version + 5)
    await fleet.local.start_agent("a2")
    await fleet.local.start_agent("a4")
    head = await fleet.ended(run)
    assert head.phase == "done", head.reason
    records, roster = await fleet.log(run), await fleet.roster(head)
    merged_once(records)
    assert roster.agents == AGENTS
    assert {e.agent for r in records[-8:] for e in r.plan.merged} == {*AGENTS}, "somebody never came back"
