"""Whole runs of tasks with unusual held-out data or metrics: their end, and the number of events about the fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from syncline.errors import ConfigError
from syncline.spec.run_spec import RunSpec, parse
from syncline_sim.fleet import FleetResult, run_fleet
from syncline_sim.settings import SimSettings

TASKS = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

class Sites:
    '''Data lie at the sites only.'''
    held_out = True

    def model(self):
        return nn.Linear(6, 1)

    def dataset(self, part):
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(1400, 6, generator=generator)
        y = (x[:, 0] + 0.7 * torch.randn(1400, generator=generator) > 1).long()
        if part.held_out:
            return self.test(x[200:], y[200:])
        rows = part.rows(200)
        return TensorDataset(x[:200][rows], y[:200][rows])

    def loss(self, model, batch):
        x, y = batch
        return nn.functional.binary_cross_entropy_with_logits(model(x)[:, 0], y.float())

    def test(self, x, y):
        raise FileNotFoundError("/data/site/test.csv")

class NoTest(Sites):
    def test(self, x, y):
        return None

class Ordered(Sites):
    '''The held-out rows lie in the order of their labels, so most batches have one class only.'''
    def test(self, x, y):
        order = y.argsort()
        return TensorDataset(x[order], y[order])

def auc(scores, labels):
    positive, negative = scores[labels == 1], scores[labels == 0]
    if not len(positive) or not len(negative):
        return float("nan")
    return (positive[:, None] > negative[None, :]).double().mean().item()

class ByBatch(Ordered):
    def metrics(self, model, batch):
        x, y = batch
        return {"loss": self.loss(model, batch), "auc": auc(model(x)[:, 0], y)}

class Whole(Ordered):
    def evaluate(self, model, dataset):
        x, y = dataset.tensors
        return {"loss": self.loss(model, (x, y)), "auc": auc(model(x)[:, 0], y)}

class Never(Ordered):
    def metrics(self, model, batch):
        return {"loss": self.loss(model, batch), "auc": float("nan"), "ppl": float("inf")}

class Nested(Ordered):
    def metrics(self, model, batch):
        return {"loss": self.loss(model, batch), "per_class": {"a": 0.1}}

class Sloped(Ordered):
    def metrics(self, model, batch):
        x = batch[0].requires_grad_()
        return {"slope": torch.autograd.grad(model(x).sum(), x)[0].mean()}
"""

CENTER, AGENTS, BOTH = {"center": True}, {"center": False, "agents": True}, {"center": True, "agents": True}


class Ran:
    """A run of five versions by two agents, with its events."""

    def __init__(self, place: Path, task: str, evaluate: dict[str, bool]) -> None:
        (place / "own.py").write_text(TASKS)
        self.events: list[dict[str, Any]] = []
        settings = {"name": "r", "task": f"own.py:{task}", "agents": {"min": 2}, "local": {"steps": 5}}
        spec = parse(RunSpec, {**settings, "evaluate": evaluate, "stop": {"versions": 5}})
        self.result: FleetResult = run_fleet(spec, SimSettings(), task_dir=place, follow=self._follow)
        assert (self.result.phase, self.result.versions) == ("done", 5)

    def _follow(self, subject: str, data: bytes) -> None:
        if ".events." in subject:
            self.events.append(json.loads(data))

    def told(self, kind: str) -> list[str]:
        return [event["text"] for event in self.events if event["event"] == kind]

    @property
    def warned(self) -> list[str]:
        return [event["text"] for event in self.events if event["level"] != "info"]


@pytest.mark.parametrize("task", ["Sites", "NoTest"])
def test_a_run_without_held_out_data_never_asks_for_them(tmp_path: Path, task: str) -> None:
    assert Ran(tmp_path, task, {"center": False}).warned == []


@pytest.mark.parametrize(
    ("task", "why"), [("Sites", r"FileNotFoundError: /data/site/test\.csv"), ("NoTest", "returned None")]
)
def test_a_run_that_is_to_be_evaluated_without_held_out_data_is_refused(tmp_path: Path, task: str, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"{why}.*`evaluate: \{{center: false, agents: false\}}`"):
        Ran(tmp_path, task, CENTER)


def test_agents_without_held_out_data_say_so_once_each_and_train(tmp_path: Path) -> None:
    told = Ran(tmp_path, "NoTest", AGENTS).told("evaluation-failed")
    assert sorted(text[:3] for text in told) == ["a1:", "a2:"] and all(
        "returned None for the held-out set" in t for t in told
    )


def test_a_metric_over_the_whole_held_out_set_is_what_a_person_computes(tmp_path: Path) -> None:
    ran = Ran(tmp_path, "Whole", CENTER)
    assert ran.warned == [] and 0.8 < (ran.result.metrics["auc"] or 0.0) < 1.0


def test_a_mean_over_some_batches_only_is_advised_on_and_keeps_its_value(tmp_path: Path) -> None:
    ran = Ran(tmp_path, "ByBatch", CENTER)
    assert ran.result.metrics["auc"] is not None
    assert ["'auc' was NaN in" in text for text in ran.warned] == [True]


@pytest.mark.parametrize(
    ("evaluate", "names"), [(CENTER, ["", ""]), (BOTH, ["", ""]), (AGENTS, ["a1", "a1", "a2", "a2"])]
)
def test_a_metric_that_never_has_a_value_is_advised_on_once(
    tmp_path: Path, evaluate: dict[str, bool], names: list[str]
) -> None:
    ran = Ran(tmp_path, "Never", evaluate)
    assert all("was never finite in 3 evaluations" in text for text in ran.warned)
    assert sorted(event["agent"] for event in ran.events if event["event"] == "advice") == names


@pytest.mark.parametrize(
    ("task", "why"),
    [("Nested", "`metrics` returned for 'per_class' a dict"), ("Sloped", "`with torch.enable_grad():`")],
)
def test_metrics_that_fail_at_every_version_are_told_once_and_the_run_goes_on(
    tmp_path: Path, task: str, why: str
) -> None:
    ran = Ran(tmp_path, task, BOTH)
    told = ran.told("evaluation-failed")
    assert ran.warned == told and sorted(text.split()[0] for text in told) == ["a1:", "a2:", "version"]
    assert all(why in text and text.endswith("(told once)") for text in told)
