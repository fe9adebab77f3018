"""Optimisers and schedules by name: all of torch's work, and arguments that torch refuses are reported by their setting."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from syncline.errors import ConfigError
from syncline.spec.sections import Local
from syncline.tasks.optimizers import OPTIMIZERS, OPTIMIZERS_OF_A_TASK, SCHEDULES, Rate, check_inner, inner_of
from syncline.tasks.quadratic import LinearRegression

NEEDED: dict[str, dict[str, Any]] = {
    "step": {"step_size": 3},
    "multistep": {"milestones": [2, 5]},
    "exponential": {"gamma": 0.9},
    "cosine": {"T_max": 8},
    "cosineannealing": {"T_max": 8},
    "cosineannealingwarmrestarts": {"T_0": 3},
    "cyclic": {"base_lr": 0.01, "max_lr": 0.1},
    "onecycle": {"max_lr": 0.1, "total_steps": 6},
}


class Grid(LinearRegression):
    """With two-dimensional parameters alone, as muon wants them."""

    def model(self) -> nn.Module:
        return nn.Linear(self.features, 1, bias=False, dtype=self.dtype)


def made(**local: Any) -> tuple[torch.optim.Optimizer, Rate | None]:
    task = Grid()
    given, _, rates = inner_of(task, task.model(), Local(**local))
    assert isinstance(given, torch.optim.Optimizer)
    return given, rates.get("")


def refused(**local: Any) -> str:
    with pytest.raises(ConfigError) as error:
        made(**local)
    return str(error.value)


def step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize("kind", sorted(set(OPTIMIZERS) - set(OPTIMIZERS_OF_A_TASK)))
def test_every_optimizer_of_torch_makes_a_step(kind: str) -> None:
    optimizer, schedule = made(optimizer={"kind": kind})
    before = optimizer.param_groups[0]["params"][0].detach().clone()
    step(optimizer)
    assert type(optimizer).__name__.lower() == kind and schedule is None
    assert not torch.equal(optimizer.param_groups[0]["params"][0], before)


@pytest.mark.parametrize("kind", ["AdamW", "ADAMW", "adamw"])
def test_case_does_not_matter(kind: str) -> None:
    optimizer, _ = made(optimizer={"kind": kind, "betas": [0.8, 0.9], "weight_decay": 0.1})
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9) and optimizer.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        ({"kind": "adamww"}, "local.optimizer.kind: 'adamww' is not known. Did you mean `adamw`?"),
        ({"kind": "zzz"}, "local.optimizer.kind: 'zzz' is not known. Use one of adadelta, adafactor, "),
        ({"kind": "sgd", "momentun": 0.9}, "local.optimizer.momentun: torch's SGD has no such argument. Did you mean "
         "`momentum`?"),
        ({"kind": "sgd", "params": 3}, "local.optimizer.params: torch's SGD has no such argument. Known here: lr, momentum, "),
        ({"kind": "sgd", "weight_decay": 0.1, "momentum": -1}, "local.optimizer.momentum: -1 is not accepted by torch's SGD: "
         "Invalid momentum value: -1. Correct it, or leave it out"),
        ({"kind": "adam", "betas": 3}, "local.optimizer.betas: 3 is not accepted by torch's Adam: "),
        ({"kind": "adam", "betas": "much"}, "local.optimizer.betas: 'much' is not accepted by torch's Adam: "),
        ({"kind": "LBFGS"}, "local.optimizer.kind: 'LBFGS' computes its gradients anew in each step. Return it from "),
        ({"kind": "sparseadam"}, "local.optimizer.kind: 'sparseadam' takes sparse gradients alone. Return it from "),
    ],
)  # fmt: skip
def test_a_mistake_about_the_optimizer_is_told(optimizer: dict[str, Any], words: str) -> None:
    assert refused(optimizer=optimizer).startswith(words)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"kind": "cosin", "T_max": 9}, "local.schedule.kind: 'cosin' is not known. Did you mean `cosine`?"),
        ({"kind": "lambda"}, "local.schedule.kind: 'lambda' is not known. Use one of "),
        ({"kind": "cosine"}, "local.schedule.T_max: is missing: torch's CosineAnnealingLR needs it. Add it"),
        ({"kind": "step", "step_size": 3, "gama": 2}, "local.schedule.gama: torch's StepLR has no such argument. Did you mean "
         "`gamma`?"),
        ({"kind": "linear", "start_factor": 7}, "local.schedule.start_factor: 7 is not accepted by torch's LinearLR: "),
        ({"kind": "onecycle", "max_lr": 1}, "local.schedule: {'max_lr': 1} is not accepted by torch's OneCycleLR: You must"),
    ],
)  # fmt: skip
def test_a_mistake_about_the_schedule_is_told(schedule: dict[str, Any], words: str) -> None:
    assert refused(schedule=schedule).startswith(words)


def test_parameters_that_an_optimizer_cannot_take_are_told_of_with_its_name() -> None:
    task = LinearRegression()  # its bias has one dimension
    with pytest.raises(ConfigError, match=r"^local.optimizer.*torch's Muon: Muon only supports 2D parameters"):
        check_inner(task, task.model(), Local(optimizer={"kind": "muon"}))


@pytest.mark.parametrize(
    ("local", "words"),
    [
        ({"optimizer": {"kind": "adamw", "eps": "1e-8"}},
         "local.optimizer.eps: '1e-8' is a text, not a number. Write 1e-8 without quotes"),
        ({"optimizer": {"kind": "adamw", "betas": [0.9, "0.99"]}}, "local.optimizer.betas: '0.99' is a text"),
        ({"optimizer": {"kind": "asgd", "alpha": [0.75]}}, "local.optimizer.alpha: (0.75,) is not accepted by torch's ASGD"),
        ({"optimizer": {"kind": "adam", "betas": [0.9, 0.99, 0.999]}}, "local.optimizer.betas: (0.9, 0.99, 0.999) is not "),
        ({"schedule": {"kind": "cosine", "T_max": 10, "eta_min": "1e-5"}}, "local.schedule.eta_min: '1e-5' is a text"),
        ({"schedule": {"kind": "step", "step_size": 50, "gamma": "0.5"}}, "local.schedule.gamma: '0.5' is a text"),
        ({"schedule": {"kind": "cosine", "T_max": 0}}, "local.schedule: {'T_max': 0} is not accepted by torch's Cosine"),
        ({"schedule": {"kind": "cosine", "T_max": 9, "eta_min": [1]}}, "local.schedule.eta_min: (1,) is not accepted by torch"),
        ({"schedule": {"kind": "step", "step_size": 0}}, "local.schedule: {'step_size': 0} is not accepted by torch's StepLR"),
    ],
)  # fmt: skip
def test_a_value_that_fails_in_the_first_steps_is_refused_before_the_run(local: dict[str, Any], words: str) -> None:
    task = LinearRegression()
    with pytest.raises(ConfigError) as error:
        check_inner(task, task.model(), Local(**local))
    assert str(error.value).startswith(words)


@pytest.mark.parametrize("kind", sorted(SCHEDULES))
def test_the_check_accepts_every_schedule_and_leaves_the_model_alone(kind: str) -> None:
    task, local = LinearRegression(), {"optimizer": {"kind": "sgd", "momentum": 0.9}}
    model = task.model()
    before = [p.detach().clone() for p in model.parameters()]
    check_inner(task, model, Local(**local, schedule={"kind": kind, **NEEDED.get(kind, {})}))
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", sorted(set(OPTIMIZERS) - set(OPTIMIZERS_OF_A_TASK)))
def test_the_check_accepts_every_optimizer(kind: str) -> None:
    check_inner(Grid(), Grid().model(), Local(optimizer={"kind": kind}))


@pytest.mark.parametrize("schedule", [None, {"kind": "step", "step_size": 1}])
def test_the_check_does_not_judge_the_agents_devices(schedule: Any) -> None:
    adam: Any = {"kind": "adam", "capturable": True}
    check_inner(Grid(), Grid().model(), Local(optimizer=adam, schedule=schedule))


def test_a_task_s_own_optimizer_is_not_asked_for_where_nobody_trains() -> None:
    class Own(LinearRegression):
        def optimizer(self, params: Any) -> torch.optim.Optimizer:
            raise AssertionError("needs the agent's device")

    check_inner(Own(), Own().model(), Local())
    with pytest.raises(AssertionError, match="device"):
        inner_of(Own(), Own().model(), Local())


@pytest.mark.parametrize("kind", sorted(SCHEDULES))
def test_every_schedule_moves_the_rate_and_can_go_on_beyond_its_end(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer, schedule = made(
            optimizer={"kind": "sgd", "momentum": 0.9}, schedule={"kind": kind, **NEEDED.get(kind, {})}
        )
        assert schedule is not None
        rates = []
        for _ in range(12):
            step(optimizer)
            schedule.advance()
            rates.append(optimizer.param_groups[0]["lr"])
    assert len(set(rates)) > 1


@pytest.mark.parametrize("kind", ["cosine", "CosineAnnealingLR", "cosine_annealing", "cosineannealing"])
def test_a_schedule_goes_by_several_names(kind: str) -> None:
    _, schedule = made(schedule={"kind": kind, "T_max": 5})
    assert schedule is not None
    assert isinstance(schedule._schedule, torch.optim.lr_scheduler.CosineAnnealingLR)


@pytest.mark.parametrize("kind", sorted(SCHEDULES))
def test_a_warm_up_goes_before_every_schedule(kind: str) -> None:
    """The rates equal those of torch's SequentialLR of LinearLR and the schedule."""
    arguments, lr = NEEDED.get(kind, {}), {"kind": "sgd", "lr": 0.1, "momentum": 0.9}
    plain, rate = made(optimizer=lr, schedule={"kind": kind, **arguments})
    warmed, warm_rate = made(optimizer=lr, schedule={"kind": kind, "warmup": 4, **arguments})
    assert rate is not None and warm_rate is not None
    rates: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(14):
        for optimizer, schedule in ((plain, rate), (warmed, warm_rate)):
            rates[optimizer is warmed].append(optimizer.param_groups[0]["lr"])
            step(optimizer)
            schedule.advance()
    assert rates[True][:4] == pytest.approx([rates[False][0] * k / 5 for k in (1, 2, 3, 4)])
    assert rates[True][4:] == rates[False][:10]


def test_a_warm_up_is_that_of_torch() -> None:
    warmed, rate = made(schedule={"kind": "step", "step_size": 3, "warmup": 4})
    torchs = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    parts = [
        torch.optim.lr_scheduler.LinearLR(torchs, 1 / 5, total_iters=4),
        torch.optim.lr_scheduler.StepLR(torchs, 3),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sequence = torch.optim.lr_scheduler.SequentialLR(torchs, parts, [4])
        for _ in range(12):
            assert warmed.param_groups[0]["lr"] == pytest.approx(torchs.param_groups[0]["lr"], rel=1e-12)
            step(warmed)
            torchs.step()
            sequence.step()
            assert rate is not None
            rate.advance()


class Around(Grid):
    """Two optimisers over one group, as SAM has them."""

    def optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        base, outer = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
        outer.param_groups = base.param_groups
        return {"outer": outer, "base": base}


def test_optimizers_that_share_a_group_have_one_schedule() -> None:
    task = Around()
    _, _, rates = inner_of(task, task.model(), Local(schedule={"kind": "exponential", "gamma": 0.9}))
    assert rates["outer"] is rates["base"]
