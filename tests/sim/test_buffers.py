"""BatchNorm in whole runs: the center keeps a usable variance with every outer optimiser and kind of synchronisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from syncline.spec.run_spec import RunSpec, parse
from syncline_sim.fleet import FleetResult, run_fleet
from syncline_sim.settings import SimSettings

TASK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

class Normalised:
    def model(self):
        return nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))

    def dataset(self, part):
        x = torch.randn(600, 6, generator=torch.Generator().manual_seed(1))
        y = x[:, :3].argmax(1)
        x = 0.1 * x + 5  # its variance is far below that of a new model, 1
        return TensorDataset(x[400:], y[400:]) if part.held_out else TensorDataset(x[part.rows(400)], y[part.rows(400)])

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def metrics(self, model, batch):
        right = model(batch[0]).argmax(1) == batch[1]
        return {
            "loss": self.loss(model, batch).item(),
            "accuracy": right.double().mean().item(),
            "least_variance": model[0].running_var.min().item(),
        }
"""


def run_of(directory: Path, agents: int = 4, **changes: Any) -> FleetResult:
    (directory / "task.py").write_text(TASK)
    base: dict[str, Any] = {
        "name": "r",
        "task": "task.py:Normalised",
        "agents": {"min": agents},
        "local": {"steps": 10, "optimizer": {"kind": "sgd", "lr": 0.1}},
        "stop": {"versions": 12},
    }
    step_s = [0.01, 0.01, 0.013, 0.05]
    return run_fleet(parse(RunSpec, {**base, **changes}), SimSettings(step_s=step_s), task_dir=directory)


ASYNC = {"kind": "async"}
WAYS: dict[str, dict[str, Any]] = {
    "rounds": {},
    "momentum": {"outer": {"kind": "momentum", "momentum": 0.9}},
    "nesterov": {"outer": {"kind": "nesterov", "lr": 1.0}},
    "adam": {"outer": {"kind": "adam", "lr": 0.3}},
    "partial mix": {"mix": {"alpha": 0.5}},
    "over-relaxed mix": {"mix": {"alpha": 1.5}},
    "fednova": {"merge": {"normalize": "fednova"}, "local": {"seconds": 0.2, "optimizer": {"kind": "sgd", "lr": 0.1}}},
    "median": {"merge": {"rule": "median"}},
    "norm clipping": {"merge": {"rule": "norm_clip", "max_norm": 0.5}},
    "scaffold": {"local": {"steps": 10, "optimizer": {"kind": "sgd", "lr": 0.1}, "control_variates": "scaffold"}},
    "async": {"sync": ASYNC, "stop": {"versions": 30}},
    "fedasync": {"sync": {**ASYNC, "buffer": 1}, "stop": {"versions": 60}},
    "elastic": {"mix": {"kind": "elastic", "alpha": 0.2}, "stop": {"versions": 30}},
    "elastic async": {
        "sync": {**ASYNC, "buffer": 1},
        "mix": {"kind": "elastic", "alpha": 0.2},
        "stop": {"versions": 80},
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_the_statistics_of_the_center_are_those_of_the_data(tmp_path: Path, way: str) -> None:
    result = run_of(tmp_path, **WAYS[way])
    assert result.phase == "done", result.reason
    variances = [p.metrics["least_variance"] for p in result.timeline]
    assert all(v is not None and 0 < v <= 1.001 for v in variances), variances
    assert result.metrics["least_variance"] == pytest.approx(0.01, rel=0.5)
    accuracy = result.metrics["accuracy"]
    assert accuracy is not None and accuracy > 0.6
