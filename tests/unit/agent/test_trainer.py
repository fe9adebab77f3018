"""The agent's training child, inline: the effects of settings on a local period, and bit-equal restarts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from syncline.data.partition import Part
from syncline.errors import ConfigError
from syncline.spec.sections import Iid
from syncline.tasks.base import batches
from syncline.tasks.quadratic import LinearRegression
from unit.trainers import Child, Ticking

LR = 0.05
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-14}
SGD = {"kind": "sgd", "lr": LR}

OWN_TASKS = '''
import torch
from torch import nn
from syncline.tasks.quadratic import LinearRegression

class OwnLoop(LinearRegression):
    """Trains its own way, and does not listen to anybody."""
    def train(self, model, optimizer, batches, on_step):
        for batch in batches:
            optimizer.zero_grad()
            self.loss(model, batch).backward()
            optimizer.step()
            on_step(len(batch[0]))

class NoOptimizer(LinearRegression):
    def train(self, model, optimizer, batches, on_step):
        next(batches)
        on_step(1)

class Silent(LinearRegression):
    def train(self, model, optimizer, batches, on_step):
        for batch in batches:
            pass

class Empty(LinearRegression):
    def dataset(self, part):
        return torch.utils.data.TensorDataset(torch.zeros(0, 5), torch.zeros(0))

class Endless(LinearRegression):
    def dataset(self, part):
        class Rows(torch.utils.data.IterableDataset):
            def __iter__(self):
                yield torch.zeros(5), torch.zeros(())
        return Rows()

class Normed(LinearRegression):
    def model(self):
        return nn.Sequential(nn.BatchNorm1d(self.features, dtype=self.dtype), nn.Linear(self.features, 1, dtype=self.dtype))

class Noisy(LinearRegression):
    """Draws random numbers in every step."""
    def model(self):
        return nn.Sequential(nn.Dropout(0.5), nn.Linear(self.features, 1, dtype=self.dtype))
'''


@pytest.fixture(autouse=True)
def own_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "a1.safetensors"


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(OWN_TASKS)
    return f"{tmp_path / 'own.py'}:"


def gradient(flat_P: Tensor, batch: Any) -> Tensor:
    """Return the gradient of the regression's loss at the flat vector."""
    task = LinearRegression()
    model: Any = task.model()
    with torch.no_grad():
        model.weight.copy_(flat_P[:-1].view(1, -1))
        model.bias.copy_(flat_P[-1:])
    task.loss(model, batch).backward()
    assert model.weight.grad is not None and model.bias.grad is not None
    return torch.cat([model.weight.grad.reshape(-1), model.bias.grad])


def drawn(first: int, count: int, batch_size: int = 32) -> list[Any]:
    data = LinearRegression().dataset(Part(index=0, parts=1, how=Iid(), seed=3))
    stream = batches(data, batch_size, 3, 0, first)
    return [next(stream) for _ in range(count)]


# -- settings --------------------------------------------------------------------------------------------------------------
def test_fedprox_over_two_periods_from_moving_centers(path: Path) -> None:
    child = Child(path, {"local": {"steps": 3, "optimizer": SGD, "prox_mu": 0.4}, "mix": {"alpha": 0.5}})
    w = centers = child.initial_P
    for period in range(2):
        center = centers + period * 0.25
        w = w + 0.5 * (center - w) if period else center.clone()
        for batch in drawn(3 * period, 3):
            w = w - LR * (gradient(w, batch) + 0.4 * (w - center))
        assert torch.allclose(child.period(center).update_P, w - center, **EXACT)


def test_asynchronous_fedprox_pulls_to_the_center_received_last_also_where_there_is_no_newer_one(path: Path) -> None:
    """The second and third period continue the one before; x stays the first period's center."""
    mu, local = 0.4, {"steps": 3, "optimizer": SGD, "prox_mu": 0.4}
    child = Child(path, {"local": local, "sync": {"kind": "async"}})
    w = center = child.initial_P + 0.25
    for period in range(3):
        before = w
        for batch in drawn(3 * period, 3):
            w = w - LR * (gradient(w, batch) + mu * (w - center))
        update = child.period(center, fresh=not period).update_P
        assert torch.allclose(update, w - before, **EXACT), f"period {period}"


def test_fedprox_without_a_pull_is_fedavg_bit_for_bit(path: Path) -> None:
    plain, prox = (
        Child(path.with_name(name), {"local": {"steps": 5, "optimizer": SGD, **local}})
        for name, local in (("a", {}), ("b", {"prox_mu": 0.0}))
    )
    assert torch.equal(plain.period(plain.initial_P).update_P, prox.period(prox.initial_P).update_P)


def test_a_task_s_own_loop_is_clipped_and_pulled_too(path: Path, own: str) -> None:
    local = {"steps": 4, "optimizer": SGD, "prox_mu": 0.4, "clip_norm": 0.7}
    ours, theirs = (
        Child(path.with_name(name), {"task": task, "local": local})
        for name, task in (("a", own + "OwnLoop"), ("b", "syncline.tasks.quadratic:LinearRegression"))
    )
    assert torch.equal(ours.period(ours.initial_P).update_P, theirs.period(theirs.initial_P).update_P)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("prox_mu", 0.1), ("clip_norm", 1.0), ("clip_value", 1.0), ("schedule", {"kind": "step", "step_size": 2})],
)
def test_a_setting_that_has_no_effect_is_told_of(path: Path, own: str, setting: str, value: Any) -> None:
    child = Child(path, {"task": own + "NoOptimizer", "local": {"steps": 4, setting: value}})
    with pytest.raises(ConfigError, match=f"^local.{setting}: has no effect: the task's `train` makes no step"):
        child.period(child.initial_P)


@pytest.mark.parametrize("local", [{"steps": 5}, {"epochs": 1, "batch_size": 8}, {"seconds": 3.5, "max_steps": 5}])
def test_a_loop_that_tells_of_no_step_is_refused_with_the_mend(path: Path, own: str, local: dict[str, Any]) -> None:
    child = Child(path, {"task": own + "Silent", "local": local})
    with pytest.raises(
        ConfigError, match=r"^task: `train` drew \d+ batches and never called `on_step`\. Call `on_step"
    ):
        child.period(child.initial_P)


@pytest.mark.parametrize("local", [{"steps": 5}, {"epochs": 1}, {"steps": 0}])
@pytest.mark.parametrize(
    ("task", "problem"), [("Empty", "returned no rows for part 0"), ("Endless", "returned Rows, an IterableDataset")]
)
def test_a_part_without_rows_or_without_a_length_is_refused(
    path: Path, own: str, task: str, problem: str, local: dict[str, Any]
) -> None:
    child = Child(path, {"task": own + task, "local": local})
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"^task: dataset\\(\\) {problem}"):
            child.period(child.initial_P)


@pytest.mark.parametrize("per", ["step", "period"])
def test_a_schedule_counts_steps_or_periods(path: Path, per: str) -> None:
    schedule = {"kind": "exponential", "gamma": 0.5, "per": per}
    child = Child(path, {"local": {"steps": 2, "optimizer": SGD, "schedule": schedule}})
    for period in range(3):
        w = child.initial_P
        for k, batch in enumerate(drawn(2 * period, 2)):
            w = w - LR * 0.5 ** (2 * period + k if per == "step" else period) * gradient(w, batch)
        assert torch.allclose(child.period(child.initial_P).update_P, w - child.initial_P, **EXACT)


def test_a_period_without_a_step_leaves_the_schedule_alone(path: Path) -> None:
    schedule = {"kind": "exponential", "gamma": 0.5}
    child = Child(path, {"local": {"steps": 0, "optimizer": SGD, "schedule": schedule}})
    assert not child.period(child.initial_P).update_P.any()


@pytest.mark.parametrize("scaffold", [None, {"kind": "scaffold", "option": 1}])
def test_batch_norm_trains_where_one_row_is_left_over(path: Path, own: str, scaffold: Any) -> None:
    """64 rows in batches of 9; 513 rows in those of the gradient at the center."""
    for rows, steps in ((64, 7), (513, 57)):
        local = {"epochs": 1, "batch_size": 9, "control_variates": scaffold}
        child = Child(path, {"task": own + "Normed", "task_options": {"rows": rows}, "local": local})
        sums = torch.zeros_like(child.initial_P) if scaffold else None
        assert child.period(child.initial_P, sums).report.steps == steps


# -- seconds ---------------------------------------------------------------------------------------------------------------
def test_a_period_of_seconds_makes_the_steps_that_fit_and_the_next_one_goes_on_in_the_data(path: Path) -> None:
    """The trainer reads the clock once a step, so that a step takes one tick."""
    clock = Ticking(0.5)
    child = Child(path, {"local": {"seconds": 3.5, "batch_size": 8, "optimizer": SGD}}, clock=clock)
    w, first = child.initial_P, 0
    for tick_s, steps in ((0.5, 7), (1.0, 3), (9.0, 1)):
        clock.tick_s = tick_s
        answer = child.period(child.initial_P)
        w = child.initial_P
        for batch in drawn(first, steps, batch_size=8):
            w = w - LR * gradient(w, batch)
        assert (answer.report.steps, child.progress.step, child.progress.steps) == (steps, steps, steps)
        assert torch.allclose(answer.update_P, w - child.initial_P, **EXACT)
        first += steps


def test_a_loop_that_does_not_listen_gets_no_more_batches(path: Path, own: str) -> None:
    local = {"seconds": 3.5, "batch_size": 8, "optimizer": SGD}
    child = Child(path, {"task": own + "OwnLoop", "local": local}, clock=Ticking(0.5))
    assert child.period(child.initial_P).report.steps == 7


def test_the_steps_of_a_period_of_seconds_are_bounded(path: Path) -> None:
    child = Child(path, {"local": {"seconds": 3.5, "max_steps": 4}}, clock=Ticking(0.0))
    assert child.period(child.initial_P).report.steps == 4


def test_a_simulation_says_how_many_steps_fit(path: Path) -> None:
    asked: list[float] = []

    def six(seconds: float) -> int:
        asked.append(seconds)
        return 6

    child = Child(path, {"local": {"seconds": 3.5}}, fitting=six)
    assert (child.period(child.initial_P).report.steps, asked) == (6, [3.5])
    none = Child(path.with_name("b"), {"local": {"seconds": 3.5}}, fitting=lambda s: 0)
    assert none.period(none.initial_P).report.steps == 1


# -- restarts --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "local",
    [
        {"steps": 3, "optimizer": {"kind": "sgd", "momentum": 0.9, "nesterov": True}},
        {"steps": 3, "optimizer": {"kind": "adamw", "amsgrad": True}},
        {"steps": 3, "optimizer": {"kind": "nadam"}},
        {"steps": 3, "optimizer": {"kind": "asgd"}},
        {"steps": 3, "optimizer": {"kind": "rprop"}},
        {"steps": 3, "schedule": {"kind": "cosine", "T_max": 4}},
        {"steps": 3, "schedule": {"kind": "cosine_annealing_warm_restarts", "T_0": 2, "T_mult": 2, "per": "step"}},
        {"steps": 3, "schedule": {"kind": "onecycle", "max_lr": 0.2, "total_steps": 14, "per": "step"}},
        {"steps": 3, "optimizer": {"kind": "adam"}, "schedule": {"kind": "cyclic", "base_lr": 0.01, "max_lr": 0.1}},
        {"steps": 3, "schedule": {"kind": "multistep", "milestones": [1, 2, 4, 5], "gamma": 0.7}},
        {"steps": 3, "schedule": {"kind": "polynomial", "total_iters": 9, "per": "step"}},
        {"seconds": 2.0, "batch_size": 8, "prox_mu": 0.1, "clip_norm": 0.5},
        {"epochs": 1, "batch_size": 8},
    ],
    ids=lambda local: " ".join(str(v.get("kind")) if isinstance(v, dict) else str(k) for k, v in local.items()),
)
def test_an_agent_that_starts_again_goes_on_to_the_last_bit(path: Path, own: str, local: dict[str, Any]) -> None:
    """The task draws random numbers too; the agent keeps some of its own at alpha = 0.5."""
    spec = {"task": own + "Noisy", "local": local, "mix": {"alpha": 0.5}}
    steady = Child(path, spec, fitting=lambda s: 3)
    for _ in range(3):
        steady.period(steady.initial_P)
    restarted = Child(path, spec, fitting=lambda s: 3)
    assert restarted.clock == 3
    for _ in range(3):
        expected, found = steady.period(steady.initial_P), restarted.period(steady.initial_P)
        assert torch.equal(found.update_P, expected.update_P)
        assert (found.report.steps, found.report.loss) == (expected.report.steps, expected.report.loss)


# -- progress ----------------------------------------------------------------------------------------------------------
def test_progress_is_reported_while_an_update_is_encoded_and_saved(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reporting: list[Callable[[], None]] = []
    moved: list[int] = []

    @contextmanager
    def background_progress(tick: Callable[[], None], nbytes: int) -> Iterator[None]:
        assert nbytes >= child.layout.nbytes
        reporting.append(tick)
        yield
        reporting.pop()

    def save(*_: Any) -> None:
        before = child.progress.steps_ever
        reporting[-1]()
        moved.append(child.progress.steps_ever - before)

    child = Child(path, {"local": {"steps": 3}})
    child.trainer._background_progress = background_progress
    monkeypatch.setattr("syncline_agent.state_saver.save_state", save)
    child.period(child.initial_P)
    assert moved == [1] and not reporting
