"""A run whose center is unusable at its end has failed, even if its updates were usable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from syncline.errors import ConfigError
from syncline.spec.run_spec import RunSpec, parse
from syncline_sim.fleet import FleetResult, run_fleet
from syncline_sim.settings import SimSettings

TASK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

class Falling:
    \"\"\"Training moves w from 1 downwards, by the learning rate each step; its held-out loss is the logarithm of w.\"\"\"

    def model(self):
        return nn.ParameterList([nn.Parameter(torch.ones(1))])

    def dataset(self, part):
        return TensorDataset(torch.ones(8, 1))

    def loss(self, model, batch):
        return model[0].sum()

    def metrics(self, model, batch):
        return {"loss": model[0].log().item(), "other": float("nan")}

class Unset(Falling):
    def model(self):
        return nn.ParameterList([nn.Parameter(torch.full((3,), float("nan")))])
"""


def run_of(directory: Path, task: str = "Falling", lr: float = 0.1) -> FleetResult:
    (directory / "task.py").write_text(TASK)
    spec: dict[str, Any] = {
        "name": "r",
        "task": f"task.py:{task}",
        "agents": {"min": 2},
        "local": {"steps": 1, "batch_size": 4, "optimizer": {"kind": "sgd", "lr": lr}},
        "stop": {"versions": 4},
    }
    return run_fleet(parse(RunSpec, spec), SimSettings(step_s=0.01), task_dir=directory)


def test_a_run_whose_held_out_loss_is_nan_at_its_end_has_failed_and_says_so_once_before(tmp_path: Path) -> None:
    result = run_of(tmp_path, lr=0.4)
    assert (result.phase, result.versions) == ("failed", 4)
    assert result.reason == (
        "the held-out loss of version 4 is not a finite number: the training diverged. Lower local.optimizer.lr or outer.lr, "
        "or look for a division by zero in the task's loss. Before that: 4 versions"
    )
    told = [text for _, text in result.warnings if text.startswith("the held-out loss")]
    assert len(told) == 1 and "of version 3 is not" in told[0]


def test_a_metric_of_another_name_may_be_nan(tmp_path: Path) -> None:
    assert run_of(tmp_path, lr=0.1).phase == "done"


def test_a_model_that_holds_nan_before_any_training_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the model's 0 holds NaN or infinite values before any training"):
        run_of(tmp_path, "Unset")


@pytest.mark.parametrize("sync", [{"kind": "rounds"}, {"kind": "async", "buffer": 1}, {"kind": "async", "buffer": 3}])
def test_an_agent_too_many_for_elastic_averaging_is_refused_and_the_run_goes_on(sync: dict[str, Any]) -> None:
    """Ten agents of one speed, and an alpha that is stable for three: with all of them |W| grew without bound."""
    spec: dict[str, Any] = {
        "name": "r",
        "task": "syncline.tasks.quadratic:LinearRegression",
        "agents": {"min": 2},
        "local": {"steps": 5, "batch_size": 4, "optimizer": {"kind": "sgd", "lr": 0.05}},
        "sync": sync,
        "mix": {"kind": "elastic", "alpha": 0.45},
        "stop": {"versions": 30 if sync["kind"] == "rounds" else 120},
    }
    result = run_fleet(parse(RunSpec, spec), SimSettings(agents=10, step_s=0.01))
    assert result.phase == "done", result.reason
    trained = [agent.agent for agent in result.agents if agent.merged]
    assert len(trained) == 3
    loss = result.metrics["loss"]
    assert loss is not None and loss < 1.0
    assert not [text for _, text in result.warnings if "drift apart" in text or "pull against" in text]
