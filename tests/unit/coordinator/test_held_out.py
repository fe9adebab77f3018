"""Held-out evaluation: metrics over the whole set, metrics without a value, and runs that have no held-out set."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from syncline.data.partition import Part
from syncline.errors import ConfigError
from syncline.observe.telemetry import MOST_KNOWN, Once
from syncline.policy.advice import METRICS_WATCHED, MetricsAdviser
from syncline.runtime.child_messages import EvaluateCenter, MakeModel
from syncline.shm import SharedMemory
from syncline.spec.run_spec import RunSpec, parse
from syncline.tasks.base import Task, evaluate, make_held_out
from syncline_coordinator.evaluator import Evaluator
from unit.trainers import Child

OWN_TASKS = """
import torch
from torch.utils.data import TensorDataset
from syncline.tasks.quadratic import LinearRegression

class Asked(LinearRegression):
    held_out = None
    def __init__(self, **options):
        super().__init__(**options)
        self.asked = []

    def dataset(self, part):
        self.asked.append(part.held_out)
        return self.held_out if part.held_out else super().dataset(part)

class Empty(Asked):
    held_out = TensorDataset(torch.zeros(0, 5, dtype=torch.float64), torch.zeros(0, dtype=torch.float64))

class Missing(Asked):
    def dataset(self, part):
        if part.held_out:
            raise FileNotFoundError("/data/site/test.csv")
        return super().dataset(part)

class Whole(LinearRegression):
    def evaluate(self, model, dataset):
        inputs, targets = dataset.tensors
        return {"median": (model(inputs)[:, 0] - targets).abs().median()}

class Listing(LinearRegression):
    def metrics(self, model, batch):
        return {"recall": [0.1, 0.2]}
"""


@pytest.fixture(autouse=True)
def own_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(OWN_TASKS)
    return f"{tmp_path / 'own.py'}:"


def evaluator_of(task: str, **changes: Any) -> Evaluator:
    evaluator = Evaluator(SharedMemory(), ["*"], Path("/"))
    evaluator.make_model(MakeModel(spec=parse(RunSpec, {"task": task, **changes}), chunk_bytes=4096))
    return evaluator


class Numbers(Task):
    """Rows 0 … 9; a subclass says what their metrics are."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 1), nn.Dropout())

    def dataset(self, part: Part) -> Dataset[Any]:
        return TensorDataset(torch.arange(10.0))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = model(batch[0][:, None]).mean()
        return loss


def found(task: Task, batch_size: int = 4, skipped: Counter[str] | None = None) -> dict[str, float]:
    return evaluate(task, task.model(), task.dataset(Part.test()), batch_size, "cpu", skipped=skipped)


# -- metrics over the whole set --------------------------------------------------------------------------------------------
class Median(Numbers):
    def evaluate(self, model: nn.Module, dataset: Any) -> dict[str, float] | None:
        assert not model.training and not torch.is_grad_enabled()
        for rows in dataset.tensors[0].split(5):
            model(rows[:, None])
        return {"median": dataset.tensors[0].median()}


def test_a_metric_over_the_whole_set_takes_the_place_of_means_whatever_the_batch_size() -> None:
    for batch_size in (1, 4, 100):
        assert found(Median(), batch_size) == {"median": 4.0}


def test_every_call_of_the_model_by_a_tasks_own_evaluation_is_a_sign_of_progress() -> None:
    signs, task = list[int](), Median()
    model = task.model().train()
    evaluate(task, model, task.dataset(Part.test()), 4, "cpu", lambda: signs.append(1))
    assert len(signs) == 2 and model.training
    model(torch.ones(1, 1))
    assert len(signs) == 2, "a call outside of the evaluation counts for nothing"


def test_an_evaluation_of_the_tasks_own_may_leave_it_to_the_means() -> None:
    class Neither(Numbers):
        def evaluate(self, model: nn.Module, dataset: Any) -> dict[str, float] | None:
            return None

        def metrics(self, model: nn.Module, batch: Any) -> dict[str, float]:
            return {"mean": batch[0].mean()}

    assert found(Neither()) == {"mean": 4.5}


@pytest.mark.parametrize("returned", [[0.5], {"auc": [0.5]}, {0: 0.5}])
def test_what_an_evaluation_of_the_tasks_own_returns_is_checked(returned: Any) -> None:
    class Odd(Numbers):
        def evaluate(self, model: nn.Module, dataset: Any) -> dict[str, float] | None:
            return returned  # type: ignore[no-any-return]

    with pytest.raises(ConfigError, match=r"^task: `evaluate` returned .* Return numbers by name"):
        found(Odd())


def test_the_coordinator_and_the_agents_ask_the_tasks_own_evaluation(tmp_path: Path, own: str) -> None:
    center = evaluator_of(own + "Whole", seed=3)
    child = Child(
        tmp_path / "a1.safetensors", {"task": own + "Whole", "evaluate": {"agents": True}, "local": {"steps": 0}}
    )
    answer = child.period(child.initial_P)
    metrics = answer.evaluation.metrics
    assert metrics == center.evaluate(EvaluateCenter(version=0)).metrics and list(metrics) == ["median"]


# -- metrics without a value -----------------------------------------------------------------------------------------------
class Holed(Numbers):
    """`auc` is NaN in the first batch, `none` in all, `some` is there in the last only, `inf` is infinite in the first."""

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, float]:
        first, last = bool(batch[0][0] == 0), bool(batch[0][-1] == 9)
        mean = batch[0].mean().item()
        odd = {"auc": math.nan if first else mean, "none": math.nan, "inf": math.inf if first else mean}
        return {"mean": mean, **odd, **({"some": mean} if last else {})}


def test_a_batch_in_which_a_metric_is_nan_is_left_out_of_its_mean_and_counted() -> None:
    skipped = Counter[str]()
    metrics = found(Holed(), 4, skipped)  # 0 … 3, 4 … 7, 8 and 9
    assert list(metrics) == ["mean", "auc", "none", "inf", "some"]
    assert (
        metrics["mean"] == 4.5 and metrics["auc"] == pytest.approx((4 * 5.5 + 2 * 8.5) / 6) and metrics["some"] == 8.5
    )
    assert math.isnan(metrics["none"]) and metrics["inf"] == math.inf
    assert skipped == {"auc": 1, "none": 3}


def test_of_a_metric_with_holes_and_of_one_that_was_never_finite_there_is_advice_once() -> None:
    adviser = MetricsAdviser()
    metrics = {"loss": 0.5, "auc": 0.7, "none": math.nan, "ppl": math.inf}
    said = [adviser.evaluated(metrics, {"auc": 3, "none": 8}) for _ in range(5)]
    assert [len(advice) for advice in said] == [1, 0, 2, 0, 0]
    assert "'auc' was NaN in 3 of the batches" in said[0][0] and "`evaluate(model, dataset)`" in said[0][0]
    assert "'none' has no value: it was never finite in 3 evaluations, the last time nan" in said[2][0]
    assert "'ppl'" in said[2][1] and adviser.ended() == []


def test_of_a_short_run_it_is_said_at_the_end_and_of_a_metric_that_was_finite_once_never() -> None:
    adviser = MetricsAdviser()
    assert (
        adviser.evaluated({"auc": math.nan, "f1": 0.5}, {})
        == adviser.evaluated({"auc": math.nan, "f1": math.nan}, {})
        == []
    )
    assert ["'auc'" in text for text in adviser.ended()] == [True] and adviser.ended() == []
    later = MetricsAdviser()
    assert not any(later.evaluated({"ppl": value}, {}) for value in (math.inf, math.inf, 7.0, math.inf, math.inf))


def test_a_task_that_names_its_metrics_anew_each_time_fills_no_memory() -> None:
    adviser = MetricsAdviser()
    for step in range(3 * METRICS_WATCHED):
        adviser.evaluated({f"loss {step}": math.nan}, {f"loss {step}": 1})
    assert len(adviser._known) <= METRICS_WATCHED and len(adviser._given) <= 2 * METRICS_WATCHED


def test_a_text_is_let_through_once_also_with_other_figures() -> None:
    once = Once()
    assert [once.is_new(t) for t in ("lost 3 of 0.5", "lost 4 of 1e-7", "lost all", "lost all")] == [
        True,
        False,
        True,
        False,
    ]
    assert sum(once.is_new("x" * n) for n in range(2 * MOST_KNOWN)) == MOST_KNOWN - 2


# -- gradients -------------------------------------------------------------------------------------------------------------
class Slope(Numbers):
    """Its metric is the slope of the model, by a gradient."""

    grad = False

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, float]:
        with torch.set_grad_enabled(self.grad):
            x = batch[0][:, None].requires_grad_()
            (slope,) = torch.autograd.grad(model(x).sum(), x)
        return {"slope": slope.mean().item()}


def test_metrics_that_need_gradients_are_told_how_to_get_them() -> None:
    with pytest.raises(ConfigError, match=r"^task: `metrics` needs gradients, .*does not require grad") as error:
        found(Slope())
    assert "`with torch.enable_grad():`" in error.value.hint
    task = Slope()
    task.grad = True
    model: Any = task.model()
    (slope,) = evaluate(task, model, task.dataset(Part.test()), 4, "cpu").values()
    assert slope == pytest.approx(model[0].weight.item())


def test_another_error_of_torch_stays_what_it_is() -> None:
    class Broken(Numbers):
        def metrics(self, model: nn.Module, batch: Any) -> dict[str, float]:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        found(Broken())


# -- no held-out set -------------------------------------------------------------------------------------------------------
def test_a_held_out_set_that_is_missing_or_empty_is_refused_with_the_setting() -> None:
    class Gives(Numbers):
        def __init__(self, given: Any) -> None:
            self.given = given

        def dataset(self, part: Part) -> Dataset[Any]:
            return self.given  # type: ignore[no-any-return]

    for given, what in (
        (None, "None"),
        (TensorDataset(torch.zeros(0)), "TensorDataset without a row"),
        ([], "list without a row"),
    ):
        with pytest.raises(ConfigError, match=rf"^task: dataset\(\) returned {what} for the held-out set\.") as error:
            make_held_out(Gives(given), 0)
        assert "`evaluate: {center: false, agents: false}`" in error.value.hint

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    with pytest.raises(ConfigError, match="Stream, an IterableDataset"):
        make_held_out(Gives(Stream()), 0)


def test_the_coordinator_asks_for_a_held_out_set_only_where_it_evaluates(own: str) -> None:
    for name in ("Asked", "Empty", "Missing"):
        without = evaluator_of(own + name, evaluate={"center": False})
        assert vars(without._task)["asked"] == []
    for name, what in (("Asked", "None"), ("Empty", "TensorDataset without a row")):
        with pytest.raises(ConfigError, match=rf"dataset\(\) returned {what} for the held-out set"):
            evaluator_of(own + name)
    with pytest.raises(FileNotFoundError) as error:
        evaluator_of(own + "Missing")
    assert "evaluate: {center: false" in error.value.__notes__[0]


@pytest.mark.parametrize(
    ("task", "why"),
    [
        ("Asked", "dataset() returned None for the held-out set"),
        (
            "Missing",
            "FileNotFoundError: /data/site/test.csv (own.py:22). It was asked for the held-out set. Return rows",
        ),
        ("Listing", "`metrics` returned for 'recall' a list"),
    ],
)
def test_an_agent_that_cannot_evaluate_itself_trains_and_says_why(
    tmp_path: Path, own: str, task: str, why: str
) -> None:
    child = Child(
        tmp_path / "a1.safetensors", {"task": own + task, "evaluate": {"agents": True}, "local": {"steps": 3}}
    )
    for _ in range(2):
        answer = child.period(child.initial_P)
        assert answer.report.steps == 3 and why in answer.report.evaluation_problem and answer.report.evaluation is None
        assert answer.update_P.abs().sum() > 0


def test_an_agent_that_does_not_evaluate_asks_for_no_held_out_set(tmp_path: Path, own: str) -> None:
    child = Child(tmp_path / "a1.safetensors", {"task": own + "Asked"})
    child.period(child.initial_P)
    assert vars(child.trainer._local.task)["asked"] == [False]


def test_a_target_for_a_center_that_is_not_evaluated_is_refused() -> None:
    spec: dict[str, Any] = {"task": "t:T", "stop": {"versions": 3, "target": {"metric": "auc", "at_least": 0.9}}}
    parse(RunSpec, spec)
    with pytest.raises(ConfigError, match=r"^stop\.target: 'auc' is a metric of the center"):
        parse(RunSpec, {**spec, "evaluate": {"center": False, "agents": True}})
