"""Values returned by a task's code are checked: any single number is accepted, and no other value."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from syncline.data.partition import Part
from syncline.errors import ConfigError
from syncline.runtime.child_messages import PeriodReport
from syncline.tasks.base import evaluate
from syncline.tasks.quadratic import LinearRegression
from unit.trainers import Child

ONE_NUMBER = [torch.tensor(0.5), torch.tensor([0.5], requires_grad=True), np.float32(0.5), 0.5]
TASK = """
from syncline.tasks.quadratic import LinearRegression

class Returns(LinearRegression):
    returned, told = None, 1  # a test says otherwise
    def train(self, model, optimizer, batches, on_step):
        for batch in batches:
            if not on_step(self.told):
                return self.returned
"""


class Metrics(LinearRegression):
    def __init__(self, returned: Any) -> None:
        super().__init__()
        self.returned = returned

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, float]:
        return self.returned  # type: ignore[no-any-return]


def evaluated(returned: Any) -> dict[str, float]:
    task = Metrics(returned)
    return evaluate(task, task.model(), task.dataset(Part.test()), 7, "cpu")


@pytest.fixture(autouse=True)
def own_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


def trained(folder: Path, **says: Any) -> PeriodReport:
    (folder / "own.py").write_text(TASK)
    child = Child(folder / "a1.safetensors", {"task": f"{folder / 'own.py'}:Returns", "local": {"steps": 2}})
    vars(child.trainer._local.task).update(says)
    return child.period(child.initial_P).report


@pytest.mark.parametrize("value", ONE_NUMBER)
def test_a_metric_may_be_anything_that_is_one_number(value: Any) -> None:
    found = evaluated({"mean": value})
    assert found == {"mean": pytest.approx(0.5)} and type(found["mean"]) is float


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        (torch.zeros(()), "a Tensor"),
        (None, "a NoneType"),
        ({0: 1.0}, "a metric by the name of 0"),
        ({"caf\udce9": 1.0}, r"a metric by the name of 'caf\\udce9'"),
        ({"loss": torch.zeros(2)}, r"for 'loss' a Tensor of shape \(2,\)"),
        ({"loss": {"mse": 1.0}}, "for 'loss' a dict"),
        ({"loss": "0.5"}, "for 'loss' a str"),
        ({"loss": 1j}, "for 'loss' a complex"),
    ],
)
def test_metrics_that_are_no_numbers_by_name_are_refused_with_the_mend(returned: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"^task: `metrics` returned {problem}. Return numbers by name"):
        evaluated(returned)


@pytest.mark.parametrize("value", ONE_NUMBER)
def test_a_loss_may_be_anything_that_is_one_number(tmp_path: Path, value: Any) -> None:
    loss = trained(tmp_path, returned=value).loss
    assert loss == 0.5 and type(loss) is float


@pytest.mark.parametrize("value", [torch.zeros(2), {"mse": 0.5}, (0.5, 3), "0.5"])
def test_a_loss_that_is_no_number_is_refused_with_the_mend(tmp_path: Path, value: Any) -> None:
    what = rf"^task: `train` returned a {type(value).__name__}.*\. Return the mean loss as a number, or None$"
    with pytest.raises(ConfigError, match=what):
        trained(tmp_path, returned=value)


@pytest.mark.parametrize(
    ("value", "what"), [(0.5, "float"), (None, "NoneType"), (torch.zeros(3, 2), r"tensor of shape \(3, 2\)")]
)
def test_a_batch_s_loss_that_is_no_tensor_of_one_element_is_refused(value: Any, what: str) -> None:
    task = LinearRegression()
    model = task.model()
    vars(task)["loss"] = lambda model, batch: value
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ConfigError, match=rf"^task: `loss` returned a {what}\. Return a tensor of one element"):
        task.train(model, optimizer, iter([(torch.zeros(2, 3),)]), lambda rows: True)


def test_rows_may_be_told_as_a_tensor(tmp_path: Path) -> None:
    assert type(trained(tmp_path, told=torch.tensor(32)).samples_per_s) is float


@pytest.mark.parametrize("value", [None, [32], -1, 0.5, float("nan")])
def test_rows_that_are_no_count_are_refused_with_the_mend(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^task: `train` called `on_step` with .*\. Call `on_step\(rows\)`"):
        trained(tmp_path, told=value)
