"""The formulas through the real bus and real processes: what the services compute is what the formulas say."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from syncline.data.partition import Part
from syncline.spec.sections import Iid
from syncline.tasks.base import batches
from syncline.tasks.quadratic import LinearRegression
from system.harness import Fleet, task
from system.tasks import Bowls

pytestmark = pytest.mark.asyncio(loop_scope="module")

LR = 0.1
SEED = 11
ROWS = 64
LEFT = ["a1", "a2", "a4"]


def whole_data() -> tuple[LinearRegression, torch.nn.Module, Tensor, Tensor]:
    """The task, its initial model under the seed, and all rows as one part."""
    regression = LinearRegression(rows=ROWS)
    torch.manual_seed(SEED)
    model = regression.model()
    data = regression.dataset(Part(index=0, parts=1, how=Iid(), seed=SEED))
    x, y = data.tensors
    return regression, model, x, y


def step_(regression: LinearRegression, model: torch.nn.Module, *batch: Tensor) -> None:
    """One step of gradient descent, by hand."""
    model.zero_grad()
    regression.loss(model, batch).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.sub_(LR * parameter.grad)


def flat(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize(
    "partition",
    [
        {"kind": "iid"},
        {"kind": "dirichlet", "alpha": 0.3},
        {"kind": "shards", "per_agent": 2},
        {"kind": "natural"},
    ],
    ids=lambda p: p["kind"],
)
async def test_one_full_batch_epoch_with_sample_weights_is_full_batch_gradient_descent(
    fleet: Fleet, partition: dict[str, object]
) -> None:
    """Σ (n_i / n) (W − η ∇F_i) = W − η ∇F, for any partition (McMahan et al., arXiv:1602.05629, §2)."""
    head = await fleet.run(
        task="syncline.tasks.quadratic:LinearRegression",
        task_options={"rows": ROWS},
        agents={"min": 4},
        partition=partition,
        local={"epochs": 1, "batch_size": "all", "optimizer": {"kind": "sgd", "lr": LR}},
        merge={"weights": "samples"},
        stop={"versions": 6},
        seed=SEED,
    )
    regression, model, *rows = whole_data()
    for _ in range(6):
        step_(regression, model, *rows)
    assert torch.allclose(await fleet.center(head), flat(model), rtol=1e-12, atol=1e-14)
    sizes = {e.samples for record in await fleet.log(head.run) for e in record.plan.merged}
    assert partition["kind"] != "dirichlet" or len(sizes) > 1, "parts of one size would not tell the weights apart"


async def test_one_step_at_alpha_one_is_one_step_on_the_large_batch(fleet: Fleet) -> None:
    head = await fleet.run(
        task="syncline.tasks.quadratic:LinearRegression",
        task_options={"rows": ROWS},
        agents={"min": 4},
        local={"steps": 1, "batch_size": 8, "optimizer": {"kind": "sgd", "lr": LR}},
        stop={"versions": 3},
        seed=SEED,
    )
    regression, model, *_ = whole_data()
    parts = [regression.dataset(Part(index=i, parts=4, how=Iid(), seed=SEED)) for i in range(4)]
    streams = [batches(part, 8, SEED, i, 0) for i, part in enumerate(parts)]
    for _ in range(3):
        large = [torch.cat(columns) for columns in zip(*(next(stream) for stream in streams), strict=True)]
        assert len(large[0]) == 32
        step_(regression, model, *large)
    assert torch.allclose(await fleet.center(head), flat(model), rtol=1e-12, atol=1e-14)


async def test_alpha_keeps_the_mean_and_shrinks_the_dispersion_by_one_minus_alpha_squared(fleet: Fleet) -> None:
    """W_i ← W_i + α (W − W_i), five rounds of it: mean kept, Σ‖W_i − W‖² × (1 − α)² each."""
    head = await fleet.run(
        task=task("Scattered"),
        agents={"min": 4},
        local={"steps": 1},
        mix={"alpha": 0.5},
        evaluate={"agents": True},
        stop={"versions": 6},
    )
    clocks = fleet.weights(head.run)
    assert sorted(clocks) == [1, 2, 3, 4, 5, 6] and all(len(w) == 4 for w in clocks.values())
    assert spread(clocks[1]) > 1e-2
    for clock in range(2, 7):
        assert torch.allclose(mean(clocks[clock]), mean(clocks[1]), rtol=1e-12)
        assert spread(clocks[clock]) == pytest.approx(0.25 * spread(clocks[clock - 1]), rel=1e-12)
    assert torch.allclose(await fleet.center(head), mean(clocks[1]), rtol=1e-12)


async def test_alpha_zero_leaves_every_agent_alone_bit_for_bit(fleet: Fleet) -> None:
    head = await fleet.run(
        task=task("Scattered"),
        agents={"min": 4},
        local={"steps": 1},
        mix={"alpha": 0},
        evaluate={"agents": True},
        stop={"versions": 3},
    )
    clocks = fleet.weights(head.run)
    for agent, own in clocks[1].items():
        assert torch.equal(clocks[3][agent], own)


async def test_alpha_with_an_agent_killed_in_round_two(fleet: Fleet, tmp_path: Path) -> None:
    """The round closes without it; from then on the formulas hold for the three that are left."""
    gate = tmp_path / "gate"
    run = await fleet.start(
        task=task("Scattered"),
        task_options={"wait_in": 2, "wait_part": 2, "gate": str(gate)},
        agents={"min": 4, "lost_after_s": 1.0},
        local={"steps": 1},
        mix={"alpha": 0.5},
        evaluate={"agents": True},
        stop={"versions": 6},
    )
    await fleet.version(run, 1)
    await fleet.local.kill("a3")
    gate.touch()
    head = await fleet.ended(run)
    assert head.phase == "done", head.reason
    records = await fleet.log(run)
    assert [len(r.plan.merged) for r in records] == [4, 3, 3, 3, 3, 3]
    assert "a3 not heard of" in records[1].plan.reason and records[1].plan.late == ["a3"]
    assert "not heard of" in (await fleet.event(run, "agent-lost", "a3"))["text"]
    clocks = fleet.weights(run)
    assert sorted(clocks[1]) == ["a1", "a2", "a3", "a4"] and all(sorted(clocks[k]) == LEFT for k in range(2, 7))
    for agent in LEFT:  # the round before was merged with the one that was killed
        assert torch.allclose(clocks[2][agent], 0.5 * (clocks[1][agent] + mean(clocks[1])), rtol=1e-12)
    for clock in range(3, 7):
        assert torch.allclose(mean(clocks[clock]), mean(clocks[2]), rtol=1e-12)
        assert spread(clocks[clock]) == pytest.approx(0.25 * spread(clocks[clock - 1]), rel=1e-12)
    assert torch.allclose(await fleet.center(head), mean(clocks[2]), rtol=1e-12)
    await fleet.local.start_agent("a3")


async def test_one_agent_alone_is_plain_gradient_descent_whatever_alpha(fleet: Fleet) -> None:
    head = await fleet.run(
        task="syncline.tasks.quadratic:LinearRegression",
        task_options={"rows": ROWS},
        agents={"min": 1, "max": 1},
        local={"steps": 3, "batch_size": "all", "optimizer": {"kind": "sgd", "lr": LR}},
        mix={"alpha": 0.3},
        stop={"versions": 4},
        seed=SEED,
    )
    regression, model, *rows = whole_data()
    for _ in range(12):
        step_(regression, model, *rows)
    assert torch.allclose(await fleet.center(head), flat(model), rtol=1e-12, atol=1e-14)


async def test_identical_agents_are_one_agent(fleet: Fleet) -> None:
    spec = {
        "task": task("Bowls"),
        "local": {"steps": 3, "optimizer": {"kind": "sgd", "lr": LR}},
        "stop": {"versions": 4},
    }
    options = {"curvatures": [0.7] * 4, "same": True}
    four = await fleet.run(**spec, task_options=options, agents={"min": 4})
    one = await fleet.run(**spec, task_options=options, agents={"min": 1, "max": 1})
    assert torch.allclose(await fleet.center(four), await fleet.center(one), rtol=1e-12)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
async def test_with_equal_curvature_the_mean_goes_its_way_whatever_alpha(fleet: Fleet, alpha: float) -> None:
    """W_t = c̄ + (1 − ηh)^{Kt} (W_0 − c̄)."""
    head = await fleet.run(
        task=task("Bowls"),
        task_options={"curvatures": [0.7] * 4},
        agents={"min": 4},
        local={"steps": 3, "optimizer": {"kind": "sgd", "lr": LR}},
        mix={"alpha": alpha},
        stop={"versions": 5},
    )
    centre = torch.stack([Bowls([0.7] * 4).centre(i) for i in range(4)]).mean(0)
    expected = centre - (1 - LR * 0.7) ** 15 * centre
    assert torch.allclose(await fleet.center(head), expected, rtol=1e-12)


async def test_with_several_local_steps_the_fixed_point_is_the_one_of_fedavg(fleet: Fleet) -> None:
    """Σ a_i c_i / Σ a_i with a_i = 1 − (1 − ηh_i)^K, and not the optimum Σ h_i c_i / Σ h_i."""
    curvatures, lr, steps = [0.5, 1.0, 2.0, 3.0], 0.3, 4
    head = await fleet.run(
        task=task("Bowls"),
        task_options={"curvatures": curvatures},
        agents={"min": 4},
        local={"steps": steps, "optimizer": {"kind": "sgd", "lr": lr}},
        stop={"versions": 40},
    )
    centres = torch.stack([Bowls(curvatures).centre(i) for i in range(4)])
    h = torch.tensor(curvatures, dtype=torch.float64)
    a = 1 - (1 - lr * h) ** steps
    center = await fleet.center(head)
    assert torch.allclose(center, (a[:, None] * centres).sum(0) / a.sum(), rtol=1e-10)
    assert not torch.allclose(center, (h[:, None] * centres).sum(0) / h.sum(), rtol=1e-2)


async def test_the_order_in_which_agents_start_changes_no_bit(fleet: Fleet) -> None:
    digests = []
    for order in (["a1", "a2", "a3", "a4"], ["a4", "a2", "a1", "a3"], ["a3", "a4", "a2", "a1"]):
        for agent in order:
            fleet.local.signal(agent, signal.SIGTERM)
            await fleet.local.workers[agent].exited
        run = await fleet.start(
            task="syncline.tasks.digits:Digits",
            agents={"min": 4},
            partition={"kind": "dirichlet", "alpha": 0.5},
            local={"steps": 10, "optimizer": {"kind": "sgd", "lr": 0.1, "momentum": 0.9}},
            stop={"versions": 5},
            seed=SEED,
        )
        for agent in order:
            await fleet.local.start_agent(agent)
            here = len([e for e in fleet.said.events if e["event"] == "agent-here" and e["agent"] == agent])
            await fleet.event("fleet", "agent-here", agent, after=max(0, here - 1))
        head = await fleet.ended(run)
        assert head.phase == "done", head.reason
        assert (await fleet.roster(head)).agents == ["a1", "a2", "a3", "a4"]
        merges = [[(e.agent, e.clock, e.samples) for e in record.plan.merged] for record in await fleet.log(run)]
        assert [len(merge) for merge in merges] == [4] * 5, merges
        digests.append(head.digest)
    assert len(set(digests)) == 1, digests


def mean(weights: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(weights.values())).mean(0)


def spread(weights: dict[str, Tensor]) -> float:
    w = torch.stack(list(weights.values()))
    return float(((w - w.mean(0)) ** 2).sum())
