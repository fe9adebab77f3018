"""A diverged period: its update is offered, no result of it is saved, and the next period begins as that of a new agent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from syncline.runtime.child_messages import UpdateReport
from unit.trainers import Child

TASK = """
import torch
from torch import nn
from syncline.tasks.quadratic import LinearRegression

class Breaks(LinearRegression):
    broken = False  # a test says when
    def loss(self, model, batch):
        loss = super().loss(model, batch)
        return loss * float("nan") if self.broken else loss

class Half(Breaks):
    def model(self):
        return nn.Linear(self.features, 1, dtype=torch.bfloat16)
    def loss(self, model, batch):
        return super().loss(model, [numbers.bfloat16() for numbers in batch])

class Grows(Breaks):
    def model(self):
        model = super().model()
        model.register_buffer("seen", torch.zeros(0), persistent=False)
        return model
    def loss(self, model, batch):
        loss = super().loss(model, batch)
        model.seen.resize_(2).fill_(float(loss.detach()))
        model.register_buffer("peak", loss.detach().clone(), persistent=False)
        return loss

class Personal(Breaks):
    local = ("0.*",)
    def model(self):
        one, two = nn.Linear(self.features, 4, dtype=self.dtype), nn.Linear(4, 1, dtype=self.dtype)
        return nn.Sequential(one, nn.BatchNorm1d(4, dtype=self.dtype), two)
"""
SPECS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"local": {"optimizer": {"kind": "sgd", "momentum": 0.9}}},
    "adam": {"local": {"optimizer": {"kind": "adam"}}},
    "adagrad": {"local": {"optimizer": {"kind": "adagrad", "lr": 0.1}}},
    "a part of the way": {"mix": {"alpha": 0.5}, "local": {"optimizer": {"kind": "sgd", "momentum": 0.9}}},
    "prox": {"local": {"prox_mu": 0.1}},
    "async": {"sync": {"kind": "async"}},
}


@pytest.fixture(autouse=True)
def own_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


def child(folder: Path, name: str, spec: dict[str, Any], task: str = "Breaks") -> Child:
    (folder / "own.py").write_text(TASK)
    local = {"steps": 3, **spec.get("local", {})}
    return Child(folder / f"{name}.safetensors", {**spec, "task": f"{folder / 'own.py'}:{task}", "local": local})


def broken_period(it: Child, *sums: Any) -> None:
    it.trainer._local.task.broken = True  # type: ignore[attr-defined]
    answer = it.period(it.initial_P, *sums)
    it.trainer._local.task.broken = False  # type: ignore[attr-defined]
    assert answer.update.broken and not answer.update_P.isfinite().all()


@pytest.mark.parametrize("task", ["Breaks", "Personal", "Half"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_next_period_is_that_of_a_new_agent(tmp_path: Path, spec: dict[str, Any], task: str) -> None:
    agent, new = (child(tmp_path, name, spec, task) for name in ("agent", "new"))
    broken_period(agent)
    new.clock = 1
    for _ in range(3):
        found, expected = agent.period(agent.initial_P), new.period(new.initial_P)
        assert not found.update.broken and torch.equal(found.update_P, expected.update_P)


def test_the_disk_keeps_what_was_before(tmp_path: Path) -> None:
    agent = child(tmp_path, "agent", {"mix": {"alpha": 0.5}})
    agent.period(agent.initial_P)
    kept = (tmp_path / "agent.safetensors").read_bytes()
    broken_period(agent)
    assert (tmp_path / "agent.safetensors").read_bytes() == kept
    again = child(tmp_path, "agent", {"mix": {"alpha": 0.5}})
    assert again.clock == 1 and again.period(again.initial_P).update_P.isfinite().all()


def test_a_buffer_that_training_has_made_is_made_again(tmp_path: Path) -> None:
    it = child(tmp_path, "a", {}, "Grows")
    broken_period(it)
    answer = it.period(it.initial_P)
    assert not answer.update.broken and bool(torch.isfinite(it.trainer._local.flat.model.seen).all())  # type: ignore[arg-type]


def test_a_schedule_goes_on(tmp_path: Path) -> None:
    schedule = {"kind": "exponential", "gamma": 0.5}
    agent = child(tmp_path, "agent", {"local": {"optimizer": {"kind": "sgd", "lr": 0.1}, "schedule": schedule}})
    broken_period(agent)
    assert cast(Any, agent.trainer._local.inner.given).param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("overlap", [True, False])
def test_a_control_variate_stays_what_it_was(tmp_path: Path, overlap: bool) -> None:
    """A dropped update leaves no trace, also if its verdict is unknown when the next period ends."""
    sync = {"sync": {"kind": "async", "overlap": overlap}}
    agent = child(tmp_path, "agent", {**sync, "local": {"control_variates": "scaffold"}})
    sums = torch.zeros_like(agent.initial_P)
    agent.period(agent.initial_P, sums)
    broken_period(agent, sums)
    answer = agent.period(agent.initial_P, sums, {1: True})
    assert answer.control_P.isfinite().all() and answer.update_P.isfinite().all()


def test_an_elastic_difference_that_broke_is_not_given_back(tmp_path: Path) -> None:
    agent = child(tmp_path, "agent", {"mix": {"kind": "elastic", "alpha": 0.5}})
    for clock in range(1, 5):
        agent.trainer._local.task.broken = clock == 2  # type: ignore[attr-defined]
        agent.period(agent.initial_P, verdicts={c: c != 2 for c in range(1, clock)})
        assert agent.make_elastic_update() == UpdateReport(broken=clock == 2)
    assert agent._box(1).isfinite().all()
