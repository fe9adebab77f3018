"""Several optimisers, closures, warm-up and a task's own state: settings reach every step, and a restart changes no bit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from syncline.errors import ConfigError
from syncline.spec.sections import Local
from syncline.tasks.optimizers import inner_of
from syncline.tasks.quadratic import LinearRegression
from syncline_agent.inner_optimizers import restore_state
from unit.trainers import Child

TASKS = """
import torch
from torch import nn
from syncline.tasks.quadratic import LinearRegression

class Two(LinearRegression):
    def model(self):
        return nn.ModuleDict({n: nn.Linear(self.features, 1, bias=n == "a", dtype=self.dtype) for n in "ab"})
    def loss(self, model, batch):
        x, y = batch
        return (model["a"](x).squeeze(-1) + model["b"](x).squeeze(-1) ** 2 - y).square().mean()
    def optimizers(self, model):
        return {n: torch.optim.Adam(part.parameters(), lr=0.05) for n, part in model.items()}

class Apart(Two):
    def train(self, model, optimizers, batches, on_step):
        for batch in batches:
            for optimizer in optimizers.values():
                model.zero_grad()
                self.loss(model, batch).backward()
                optimizer.step()
            on_step(len(batch[0]))

class OnSelf(Two):
    kind = torch.optim.Adam
    def optimizers(self, model):
        return {}
    def optimizer(self, params):
        self.second = self.kind(list(params)[2:], lr=0.05)
        return self.kind(list(params)[:2], lr=0.05)
    def train(self, model, optimizer, batches, on_step):
        for batch in batches:
            model.zero_grad()
            self.loss(model, batch).backward()
            optimizer.step()
            self.second.step()
            on_step(len(batch[0]))

class OnSelfShared(OnSelf):
    def optimizer(self, params):
        super().optimizer(params)
        return self.kind(list(params), lr=0.05)

class OnSelfPlain(OnSelf):
    kind = torch.optim.SGD

class OnSelfKept(OnSelf):
    def state_dict(self):
        return {"second": self.second.state_dict()}
    def load_state_dict(self, state):
        self.second.load_state_dict(state["second"])

class EachPeriodAnew(OnSelf):
    def train(self, model, optimizer, batches, on_step):
        self.second = None
        fresh = torch.optim.Adam(model["b"].parameters(), lr=0.05)
        for batch in batches:
            model.zero_grad()
            self.loss(model, batch).backward()
            optimizer.step()
            fresh.step()
            on_step(len(batch[0]))

class Quasi(LinearRegression):
    def optimizer(self, params):
        return torch.optim.LBFGS(params, lr=0.5, max_iter=3, history_size=4)
    def train(self, model, optimizer, batches, on_step):
        for batch in batches:
            def closure():
                optimizer.zero_grad()
                loss = self.loss(model, batch)
                loss.backward()
                return loss
            optimizer.step(closure)
            on_step(len(batch[0]))

class Derived(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)

class DerivedTask(LinearRegression):
    kind = Derived
    def optimizer(self, params):
        torch.optim.SGD(params, lr=0.05)
        return self.kind(params, lr=0.05)

class PlainTask(DerivedTask):
    kind = torch.optim.SGD

class Scaled(LinearRegression):
    def __init__(self, **options):
        super().__init__(**options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    def model(self):
        return nn.Linear(self.features, 1)
    def loss(self, model, batch):
        return 1e4 * super().loss(model, [b.float() for b in batch])
    def train(self, model, optimizer, batches, on_step):
        for batch in batches:
            optimizer.zero_grad()
            self.scaler.scale(self.loss(model, batch)).backward()
            self.scaler.step(optimizer)
            self.scaler.update()
            optimizer.zero_grad()
            on_step(len(batch[0]))
    def state_dict(self):
        return self.scaler.state_dict()
    def load_state_dict(self, state):
        self.scaler.load_state_dict(state)

class Scheduled(LinearRegression):
    def optimizer(self, params):
        self.optim = torch.optim.SGD(params, lr=0.2, momentum=0.9)
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optim, [2, 4, 7], gamma=0.5)
        return self.optim
    def train(self, model, optimizer, batches, on_step):
        assert optimizer is self.optim
        loss = super().train(model, optimizer, batches, on_step)
        self.schedule.step()
        return loss
    def state_dict(self):
        return {"schedule": self.schedule.state_dict()}
    def load_state_dict(self, state):
        self.schedule.load_state_dict(state["schedule"])

class Reused(LinearRegression):
    made = None
    def optimizer(self, params):
        self.made = self.made or torch.optim.SGD(params, lr=0.1, momentum=0.9)
        return self.made

class HalfKept(LinearRegression):
    def state_dict(self):
        return {"x": 1}

class Unkeepable(LinearRegression):
    def state_dict(self):
        return {"rng": {"state": {1, 2}}}
    def load_state_dict(self, state):
        pass

class Broken(LinearRegression):
    mean, count = float("nan"), 0
    def train(self, model, optimizer, batches, on_step):
        self.count += 1
        loss = super().train(model, optimizer, batches, on_step)
        if self.count == 2:
            self.mean = float("nan")
            with torch.no_grad():
                model.weight.fill_(float("nan"))
        return loss
    def __init__(self, **options):
        super().__init__(**options)
        self.mean = 0.5
    def state_dict(self):
        return {"mean": self.mean, "count": self.count}
    def load_state_dict(self, state):
        self.mean, self.count = state["mean"], state["count"]

class OwnData(LinearRegression):
    def train(self, model, optimizer, batches, on_step):
        optimizer.step()

class OwnLoss(LinearRegression):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def optimizer(self, params):
        return torch.optim.SGD([*params, self.scale], lr=0.1)

class Accumulating(LinearRegression):
    def train(self, model, optimizer, batches, on_step):
        for k, batch in enumerate(batches):
            self.loss(model, batch).backward()
            if k % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
                on_step(4 * len(batch[0]))
"""


@pytest.fixture(autouse=True)
def own_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


Make = Callable[..., Child]


@pytest.fixture
def child(tmp_path: Path) -> Make:
    """Make a child of a task above; the same `file` means the same agent, restarted."""
    (tmp_path / "own.py").write_text(TASKS)

    def make(task: str, file: str = "a", parts: int = 1, **local: Any) -> Child:
        spec = {"task": f"{tmp_path / 'own.py'}:{task}", "local": {"steps": 3, "batch_size": 8, **local}}
        return Child(tmp_path / file / "a1.safetensors", spec, parts=parts)

    return make


def run(child: Child, periods: int, center_P: Tensor | None = None) -> Tensor:
    """Train some periods of one agent; each begins with the end of the one before."""
    center_P = child.initial_P if center_P is None else center_P
    for _ in range(periods):
        center_P = center_P + child.period(center_P).update_P
    return center_P


# -- several optimisers ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("task", "local"),
    [
        ("Two", {}),
        ("Apart", {"schedule": {"kind": "cosine", "T_max": 9, "per": "step"}, "clip_norm": 0.1, "prox_mu": 0.1}),
        ("OnSelfKept", {}),
        ("EachPeriodAnew", {}),
        ("Quasi", {}),
        ("Quasi", {"schedule": {"kind": "step", "step_size": 2}}),
        ("Quasi", {"schedule": {"kind": "step", "step_size": 2, "warmup": 3}}),
        ("Quasi", {"optimizer_state": "reset"}),
        ("Scaled", {"optimizer": {"kind": "sgd", "lr": 1e-6}, "schedule": {"kind": "step", "step_size": 2}}),
        ("Scheduled", {}),
        ("PlainTask", {"schedule": {"kind": "cosine", "T_max": 9, "warmup": 4}}),
        ("PlainTask", {"schedule": {"kind": "onecycle", "max_lr": 0.1, "total_steps": 9, "warmup": 4, "per": "step"}}),
    ],
    ids=str,
)
def test_an_agent_that_starts_again_goes_on_to_the_last_bit(child: Make, task: str, local: dict[str, Any]) -> None:
    steady = child(task, **local)
    middle_P = run(steady, 3)
    again = child(task, **local)
    assert again.clock == 3
    expected_P = run(steady, 3, middle_P)
    assert torch.equal(run(again, 3, middle_P), expected_P)
    assert not torch.equal(expected_P, middle_P)


def test_settings_act_on_every_optimizer(child: Make) -> None:
    """Each optimiser is clipped by itself, pulled once a step and scheduled by its own steps, as in a loop written by hand."""
    schedule = {"kind": "exponential", "gamma": 0.5, "per": "step"}
    agent = child("Apart", prox_mu=0.3, clip_norm=0.1, schedule=schedule)
    plain = child("Apart", "b")
    task, net = plain.trainer._local.task, plain.trainer._local.flat.model
    optimizers = task.optimizers(net)
    rates = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in optimizers.values()]
    begin = [p.detach().clone() for p in net.parameters()]
    plain.trainer._take_part(0, 1)
    from syncline.tasks.base import batches

    stream = batches(plain.trainer._dataset, 8, 3, 0, 0)
    for _ in range(3):
        batch = next(stream)
        for optimizer, rate, part in zip(optimizers.values(), rates, net.children(), strict=True):
            net.zero_grad()
            task.loss(net, batch).backward()
            nn.utils.clip_grad_norm_(part.parameters(), 0.1)
            for p, x in zip(net.parameters(), begin, strict=True):
                if p.grad is not None:
                    p.grad.add_(p.detach() - x, alpha=0.3)
            optimizer.step()
            rate.step()
    assert torch.allclose(run(agent, 1), plain.trainer._local.flat.flat_P, rtol=1e-12, atol=1e-14)


def test_an_optimizer_that_is_kept_on_self_is_refused_by_name_in_the_first_period(child: Make) -> None:
    with pytest.raises(
        ConfigError, match=r"^task: `train` steps an optimiser that the task keeps to itself \(Adam\): a re"
    ):
        run(child("OnSelf"), 1)
    run(child("OnSelfPlain"), 2)  # has no state that could be lost


@pytest.mark.parametrize(
    "setting", [{"clip_norm": 1.0}, {"prox_mu": 0.1}, {"schedule": {"kind": "exponential", "gamma": 0.5}}]
)
def test_a_setting_that_would_miss_an_optimizer_is_refused_by_name(child: Make, setting: dict[str, Any]) -> None:
    [name] = setting
    with pytest.raises(
        ConfigError, match=rf"^local.{name}: would miss b.weight, which is averaged and which no optimiser"
    ):
        child("OnSelfKept", **setting)
    with pytest.raises(
        ConfigError, match=rf"^local.{name}: would miss a step of Adam, an optimiser that the task keeps to"
    ):
        run(child("OnSelfShared", **setting), 1)


def test_control_variates_want_one_optimizer(child: Make) -> None:
    with pytest.raises(
        ConfigError, match=r"^local.control_variates: counts the steps of one optimiser, and the task has 2"
    ):
        child("Two", control_variates="scaffold")


def test_an_optimizer_that_is_derived_from_another_is_corrected_once_a_step(child: Make) -> None:
    """Torch calls the hooks twice: in the step, and in the step of the base class."""
    local = {"prox_mu": 0.7, "schedule": {"kind": "exponential", "gamma": 0.5, "per": "step"}}
    assert torch.equal(*(run(child(task, task, **local), 2) for task in ("DerivedTask", "PlainTask")))


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1], "`optimizers` returned a list. Return optimisers by name"),
        ({"a": 3}, "`optimizers` returned a int for 'a'. Return"),
        ({"": 3}, "`optimizers` returned a int for ''. Return"),
    ],
)
def test_optimizers_returns_optimizers_by_name(returned: Any, words: str) -> None:
    class Odd(LinearRegression):
        def optimizers(self, model: nn.Module) -> Any:
            return returned

    with pytest.raises(ConfigError, match=words):
        inner_of(Odd(), Odd().model(), Local())


def test_a_task_gets_its_parameters_with_their_names() -> None:
    class Groups(LinearRegression):
        def optimizer(self, params: Any) -> torch.optim.Optimizer:
            assert [id(p) for p in params] == [id(p) for _, p in params.named()] and len(params) == 2
            decayed = [p for name, p in params.named() if name.endswith("weight")]
            others = [p for name, p in params.named() if not name.endswith("weight")]
            groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
            return torch.optim.AdamW(groups, weight_decay=0.1)

    model = Groups().model()
    given, _, _ = inner_of(Groups(), model, Local())
    assert isinstance(given, torch.optim.AdamW)
    assert [(g["params"][0] is p, g["weight_decay"]) for g, p in zip(given.param_groups, model.parameters(), strict=True)] == [
        (True, 0.1), (True, 0.0)
    ]  # fmt: skip


# -- closures ----------------------------------------------------------------------------------------------------------
def test_what_cannot_reach_into_a_closure_is_refused_by_name(child: Make) -> None:
    with pytest.raises(
        ConfigError, match=r"^local.clip_norm: LBFGS computes gradients inside its own step \(a closure\)"
    ):
        run(child("Quasi", clip_norm=1.0), 1)


def test_curvature_is_forgotten_at_every_period_where_that_is_set(child: Make) -> None:
    kept, reset = (child("Quasi", state, optimizer_state=state) for state in ("keep", "reset"))
    assert torch.equal(run(kept, 1), run(reset, 1))
    for agent in (kept, reset):
        run(agent, 2)
    iterations = [
        next(iter(cast(Any, agent.trainer._local.inner.given).state.values()))["n_iter"] for agent in (kept, reset)
    ]
    assert iterations[0] == 3 * iterations[1]


def test_curvature_that_is_kept_between_several_agents_is_advised_against_once(child: Make) -> None:
    agent = child("Quasi", parts=2)
    advice = [agent.period(agent.initial_P).report.advice for _ in range(2)]
    assert len(advice[0]) == 1 and advice[0][0].startswith("local.optimizer_state: LBFGS keeps") and not advice[1]
    assert not child("Quasi", "b").period(agent.initial_P).report.advice


# -- steps that are skipped, or not told -------------------------------------------------------------------------------
def test_periods_in_which_a_scaler_skips_every_step_are_no_mistake(child: Make) -> None:
    agent = child("Scaled", schedule={"kind": "step", "step_size": 50}, optimizer={"kind": "sgd", "lr": 1e-6})
    assert not agent.period(agent.initial_P).update_P.any()
    assert run(agent, 30).sub(agent.initial_P).any()


def test_a_loop_that_draws_no_batch_and_tells_of_no_step_is_refused(child: Make) -> None:
    with pytest.raises(ConfigError, match=r"^task: `train` drew 0 batches and never called `on_step`. Call `on_step"):
        run(child("OwnData"), 1)


def test_a_loop_that_tells_of_fewer_steps_than_it_draws_batches_is_advised_once(child: Make) -> None:
    agent = child("Accumulating", steps=8)
    answers = [agent.period(agent.initial_P) for _ in range(2)]
    assert [len(answer.report.advice) for answer in answers] == [1, 0] and answers[0].report.steps == 2
    assert "drew 8 batches and called `on_step` 2 times" in answers[0].report.advice[0]


def test_gradients_do_not_go_over_into_the_next_period_or_restart(child: Make) -> None:
    """Of 7 batches the last 3 make no step."""
    steady = child("Accumulating", steps=7)
    middle_P = run(steady, 2)
    assert torch.equal(run(child("Accumulating", steps=7), 2, middle_P), run(steady, 2, middle_P))


# -- a task's own state ------------------------------------------------------------------------------------------------
def test_a_state_that_cannot_be_kept_is_refused_by_name(child: Make) -> None:
    words = r"^task: state_dict\(\).rng.state is a set, which an agent cannot keep on its disk. Hold numbers"
    with pytest.raises(ConfigError, match=words):
        child("Unkeepable")
    with pytest.raises(ConfigError, match=r"^task: has `state_dict` and no `load_state_dict`. Add it"):
        child("HalfKept")


def test_a_task_s_state_that_is_not_finite_becomes_that_of_a_new_task(child: Make) -> None:
    agent = child("Broken")
    broken = [agent.period(agent.initial_P).update.broken for _ in range(2)]
    assert broken == [False, True] and agent.trainer._local.task.state_dict() == {"mean": 0.5, "count": 0}


def test_an_own_schedule_acts_on_the_optimizer_also_after_a_broken_period(child: Make) -> None:
    """The new optimiser only provides an empty state; the task keeps the optimiser that trains."""
    agent = child("Scheduled")
    agent.trainer._local.inner.forget()
    run(agent, 3)
    assert math.isclose(cast(Any, agent.trainer._local.inner.given).param_groups[0]["lr"], 0.1)


def test_a_schedule_goes_on_where_a_task_returns_one_optimizer_again_and_again(child: Make) -> None:
    agent = child(
        "Reused", optimizer_state="reset", schedule={"kind": "linear", "start_factor": 0.5, "total_iters": 10}
    )
    run(agent, 3)
    assert math.isclose(cast(Any, agent.trainer._local.inner.given).param_groups[0]["lr"], 0.1 * (0.5 + 0.5 * 3 / 10))


def test_a_trained_parameter_outside_the_model_is_refused(child: Make) -> None:
    with pytest.raises(ConfigError, match="SGD trains a parameter that is no part of the model"):
        child("OwnLoss")


def test_what_is_restored_stays_shared_with_an_optimizer_around_it() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    base = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    base.step()
    kept = {"kind": "SGD", **copy.deepcopy(base.state_dict())}
    state, (group,) = base.state, base.param_groups
    state.clear()
    restore_state(base, kept)
    assert base.state is state and base.param_groups[0] is group
    assert torch.equal(state[weight]["momentum_buffer"], torch.ones(2))
