"""Local settings through the real bus and real processes: what the services compute is what the formulas say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from syncline.wire.messages import Committed
from system.harness import Fleet, task
from system.tasks import Bowls

pytestmark = pytest.mark.asyncio(loop_scope="module")

CURVATURES = [0.5, 1.0, 2.0, 3.0]
H = torch.tensor(CURVATURES, dtype=torch.float64)[:, None]
CENTRES = torch.stack([Bowls(CURVATURES).centre(i) for i in range(4)])
OPTIMUM = (H * CENTRES).sum(0) / H.sum()
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-14}
UNEVEN = [1, 2, 4, 8]  # rows of the parts, and local steps where a batch is one row


def bowls(lr: float, **changes: Any) -> dict[str, Any]:
    local = {"optimizer": {"kind": "sgd", "lr": lr}, **changes.pop("local", {"steps": 4})}
    options = {"curvatures": CURVATURES, **changes.pop("task_options", {})}
    return {"task": task("Bowls"), "task_options": options, "agents": {"min": 4}, "local": local, **changes}


def rounds(versions: int, step: Callable[[Tensor, int], Tensor], weights: list[float], steps: list[int]) -> Tensor:
    """Local steps y ← step(y, i) from the center, then W ← W + Σ w_i (y_i − W); by hand."""
    w = torch.zeros(3, dtype=torch.float64)
    for _ in range(versions):
        moved = []
        for i, count in enumerate(steps):
            y = w
            for _ in range(count):
                y = step(torch.stack([y, w]), i)
            moved.append(y - w)
        w = w + sum(p * d for p, d in zip(weights, moved, strict=True))
    return w


@pytest.mark.parametrize("steps", [1, 4])
async def test_fedprox_is_its_formula(fleet: Fleet, steps: int) -> None:
    """w ← w − η (g + μ (w − x)) (arXiv:1812.06127)."""
    head = await fleet.run(**bowls(0.1, local={"steps": steps, "prox_mu": 0.7}, stop={"versions": 5}))

    def step(yx: Tensor, i: int) -> Tensor:
        y, x = yx
        moved: Tensor = y - 0.1 * (CURVATURES[i] * (y - CENTRES[i]) + 0.7 * (y - x))
        return moved

    assert torch.allclose(await fleet.center(head), rounds(5, step, [0.25] * 4, [steps] * 4), **EXACT)


async def test_what_is_not_set_or_has_nothing_to_do_is_fedavg_bit_for_bit(fleet: Fleet) -> None:
    """μ = 0; a clipping bound that nothing reaches; FedNova where all make the same number of steps."""
    digests = set()
    for local, merge in (
        ({}, {}),
        ({"prox_mu": 0.0}, {}),
        ({"clip_norm": 1e9, "clip_value": 1e9}, {}),
        ({}, {"normalize": "fednova"}),
        ({}, {"weights": "steps"}),
    ):
        head = await fleet.run(**bowls(0.1, local={"steps": 3, **local}, merge=merge, stop={"versions": 4}))
        digests.add(head.digest)
    assert len(digests) == 1


async def test_with_unequal_steps_fedavg_misses_the_optimum_and_fednova_finds_it(fleet: Fleet) -> None:
    """Σ K_i h_i c_i / Σ K_i h_i against Σ h_i c_i / Σ h_i, as η → 0 (Wang et al., arXiv:2007.07481)."""
    found, eta = {}, 0.02
    for name, merge in (("fedavg", {}), ("fednova", {"normalize": "fednova"})):
        run = bowls(eta, local={"epochs": 1, "batch_size": 1}, task_options={"rows": UNEVEN}, stop={"versions": 100})
        head = await fleet.run(**run, merge=merge)
        found[name] = await fleet.center(head)
        records = await fleet.log(head.run)
        assert [e.steps for e in records[0].plan.merged] == UNEVEN
    k = torch.tensor(UNEVEN, dtype=torch.float64)[:, None]
    a = 1 - (1 - eta * H) ** k  # how far K steps go
    for name, weights in (("fedavg", a), ("fednova", a / k)):
        assert torch.allclose(found[name], (weights * CENTRES).sum(0) / weights.sum(), rtol=1e-4), name
    surrogate = (k * H * CENTRES).sum(0) / (k * H).sum()
    assert (found["fednova"] - OPTIMUM).norm() < 0.2 * (found["fedavg"] - OPTIMUM).norm()
    assert (found["fedavg"] - surrogate).norm() < 0.2 * (found["fedavg"] - OPTIMUM).norm()


async def test_a_period_of_seconds_takes_so_long_and_counts_by_its_steps(fleet: Fleet) -> None:
    run = await fleet.start(
        task="syncline.tasks.quadratic:LinearRegression",
        agents={"min": 4},
        local={"seconds": 0.4, "batch_size": 8, "max_steps": 100_000},
        merge={"weights": "steps"},
        stop={"versions": 3},
    )
    head = await fleet.ended(run)
    assert head.phase == "done", head.reason
    for record in await fleet.log(run):
        steps = [e.steps for e in record.plan.merged]
        assert len(steps) == 4 and all(1 < s < 100_000 for s in steps)
        assert [e.weight for e in record.plan.merged] == pytest.approx([s / sum(steps) for s in steps], rel=1e-12)
    seen = [m for who, what, m in fleet.said.metrics if m["run"] == run and what == "round"]
    assert all(0.35 < m["collect_s"] < 20 for m in seen), [m["collect_s"] for m in seen]
    shown = [
        m for who, what, m in fleet.said.metrics if m["run"] == run and what == "train" and m["state"] == "training"
    ]
    assert any(0 < m["step"] <= m["steps"] for m in shown), "a progress display needs the steps to expect"


@pytest.mark.parametrize(
    ("local", "setting", "problem", "hint"),
    [
        ({"optimizer": {"kind": "adamm"}}, "local.optimizer.kind", "'adamm' is not known", "Did you mean `adam`?"),
        (
            {"optimizer": {"kind": "adam", "momentum": 0.9}},
            "local.optimizer.momentum",
            "torch's Adam has no such argument",
            "Known here: lr, betas, ",
        ),
        (
            {"optimizer": {"kind": "sgd", "momentum": -1}},
            "local.optimizer.momentum",
            "-1 is not accepted by torch's SGD",
            "Correct it, or leave it out",
        ),
        ({"schedule": {"kind": "cosine"}}, "local.schedule.T_max", "is missing", "Add it"),
    ],
)
async def test_a_wrong_setting_is_refused_before_anything_trains(
    fleet: Fleet, local: dict[str, Any], setting: str, problem: str, hint: str
) -> None:
    answer = await fleet.submit(**bowls(0.1, local={"steps": 1, **local}))
    assert (answer.run, answer.setting) == ("", setting)
    assert answer.problem.startswith(problem) and answer.hint.startswith(hint)


async def test_adam_with_a_schedule_is_torch_s_own(fleet: Fleet) -> None:
    """Inner state and schedule are kept across periods, whatever the center does."""
    head = await fleet.run(
        **bowls(
            0.1,
            local={
                "steps": 3,
                "optimizer": {"kind": "AdamW", "lr": 0.2, "weight_decay": 0.3},
                "schedule": {"kind": "cosine", "T_max": 4, "per": "period"},
                "clip_norm": 0.8,
            },
            stop={"versions": 4},
        )
    )
    ws = [torch.zeros(3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    optimizers = [torch.optim.AdamW([w], lr=0.2, weight_decay=0.3) for w in ws]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=4) for o in optimizers]
    center = torch.zeros(3, dtype=torch.float64)
    for _ in range(4):
        for i, (w, optimizer, schedule) in enumerate(zip(ws, optimizers, schedules, strict=True)):
            w.data.copy_(center)
            for _ in range(3):
                optimizer.zero_grad()
                (0.5 * CURVATURES[i] * ((w - CENTRES[i]) ** 2).sum()).backward()
                torch.nn.utils.clip_grad_norm_([w], 0.8)
                optimizer.step()
            schedule.step()
        center = torch.stack([w.detach() for w in ws]).mean(0)
    assert torch.allclose(await fleet.center(head), center, **EXACT)


# -- SCAFFOLD --------------------------------------------------------------------------------------------------------------
SCAFFOLD = {"control_variates": "scaffold"}


def scaffold(log: list[Committed], lr: float, steps: int) -> tuple[Tensor, Tensor]:
    """arXiv:1910.06378, algorithm 1, option II, with those sampled who were merged: x and c after the last version."""
    x, c, own = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), torch.zeros(4, 3).double()
    for record in log:
        sampled, before = [int(e.agent[1:]) - 1 for e in record.plan.merged], own.clone()
        moved = []
        for i in sampled:
            y = x
            for _ in range(steps):
                y = y - lr * (CURVATURES[i] * (y - CENTRES[i]) - before[i] + c)
            own[i] = before[i] - c + (x - y) / (steps * lr)
            moved.append(y - x)
        x = x + torch.stack(moved).mean(0)
        c = c + len(sampled) / 4 * (own - before)[sampled].mean(0)
        assert torch.allclose(c, own.mean(0), **EXACT)
    return x, c


@pytest.mark.parametrize("steps", [1, 4])
async def test_scaffold_is_the_paper_s_algorithm_and_finds_the_optimum(fleet: Fleet, steps: int) -> None:
    for versions in (5, 40):
        head = await fleet.run(**bowls(0.3, local={"steps": steps, **SCAFFOLD}, stop={"versions": versions}))
        w, controls = await fleet.sections(head)
        x, c = scaffold(await fleet.log(head.run), 0.3, steps)
        assert torch.allclose(w, x, **EXACT) and torch.allclose(controls / 4, c, **EXACT)
    assert torch.allclose(w, OPTIMUM, rtol=1e-3)


async def test_scaffold_with_updates_that_were_dropped_keeps_c_the_mean_of_what_was_committed(fleet: Fleet) -> None:
    """Three of four close a round at once; the fourth is late, and its variate stays what it was."""
    sync = {"quorum": 3, "grace_s": 0}
    head = await fleet.run(**bowls(0.2, local={"steps": 3, **SCAFFOLD}, sync=sync, stop={"versions": 40}))
    log = await fleet.log(head.run)
    assert {d.reason[:4] for record in log for d in record.dropped} == {"late"}, "nothing was dropped"
    assert {len(record.plan.merged) for record in log} >= {3}
    w, controls = await fleet.sections(head)
    x, c = scaffold(log, 0.2, 3)
    assert torch.allclose(w, x, **EXACT) and torch.allclose(controls / 4, c, **EXACT)


async def test_scaffold_with_an_agent_killed_goes_on_with_the_variates_it_had(fleet: Fleet) -> None:
    run = await fleet.start(
        **bowls(0.2, local={"steps": 3, **SCAFFOLD}, sync={"quorum": 3, "grace_s": 0.02}, stop={"versions": 150})
    )
    await fleet.version(run, 20)
    await fleet.local.kill("a2")
    await fleet.local.start_agent("a2")
    head = await fleet.ended(run)
    log = await fleet.log(run)
    assert head.phase == "done", head.reason
    merged = ["a2" in [e.agent for e in record.plan.merged] for record in log]
    assert any(merged[:20]) and any(merged[-50:]), merged
    w, controls = await fleet.sections(head)
    x, c = scaffold(log, 0.2, 3)
    assert torch.allclose(w, x, **EXACT) and torch.allclose(controls / 4, c, **EXACT)


async def test_scaffold_beside_a_weighting_is_refused(fleet: Fleet) -> None:
    answer = await fleet.submit(**bowls(0.1, local={"steps": 1, **SCAFFOLD}, merge={"weights": "samples"}))
    assert (answer.run, answer.setting) == ("", "merge.weights")
    assert "the plain mean of all c_i" in answer.problem and "Leave merge.weights at 'uniform'" in answer.hint


async def test_scaffold_finds_the_optimum_where_periods_overlap_too(fleet: Fleet) -> None:
    sync = {"kind": "async", "buffer": 2, "staleness": {"kind": "constant"}}
    head = await fleet.run(**bowls(0.1, local={"steps": 4, **SCAFFOLD}, sync=sync, stop={"versions": 250}))
    w, controls = await fleet.sections(head)
    assert max(e.lag for record in await fleet.log(head.run) for e in record.plan.merged) > 0
    assert (w - OPTIMUM).norm() < 0.02 * OPTIMUM.norm()
    gradients = H * (w - CENTRES)
    assert (controls - gradients.sum(0)).norm() < 0.05 * gradients.norm(), "the sum of the gradients of all"
