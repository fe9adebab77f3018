"""Random numbers of a task follow from the run's seed: equal after a restart, on every machine and in every call."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from syncline.data.partition import Part
from syncline.runtime.child_messages import EvaluateCenter, MakeModel
from syncline.shm import SharedMemory
from syncline.spec.run_spec import RunSpec, parse
from syncline.spec.sections import Iid
from syncline.tasks.base import load_task, make_dataset, make_model
from syncline.tasks.seeding import generators_restored, seed_all, seed_of
from syncline_coordinator.evaluator import Evaluator
from syncline_sim.determinism import deterministic
from unit.trainers import Child

DRAWING = """
import random
import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset, random_split
from syncline.tasks.quadratic import LinearRegression

def draw():
    return [random.random(), np.random.rand(), torch.rand(()).item()]

class Drawing(LinearRegression):
    def __init__(self, **options):
        super().__init__(**options)
        self.drawn = draw()

    def model(self):
        model = super().model()
        with torch.no_grad():
            model.bias.add_(sum(draw()))
        return model

    def train(self, model, optimizer, batches, on_step):
        for _ in batches:
            with torch.no_grad():
                model.bias.add_(sum(draw()))
            if not on_step(1):
                return None

    def metrics(self, model, batch):
        return dict(zip("rnt", draw()))

class Splitting(LinearRegression):
    def dataset(self, part):
        rows = torch.arange(100.0)
        order = np.random.permutation(100)
        random.shuffle(order)
        train, test = random_split(TensorDataset(rows[order], rows[order]), [80, 20])
        if part.held_out:
            return test
        return torch.utils.data.Subset(train, part.rows(80).tolist())
"""


@pytest.fixture(autouse=True)
def own_random_numbers() -> Iterator[None]:
    with generators_restored():
        yield


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(DRAWING)
    return f"{tmp_path / 'own.py'}:"


def drawn_elsewhere() -> None:
    """Somebody else in the process draws: a library, or another agent of a simulation."""
    seed_all(random.SystemRandom().getrandbits(62))


def evaluator_of(spec: RunSpec) -> Evaluator:
    evaluator = Evaluator(SharedMemory(), ["*"], Path("/"))
    evaluator.make_model(MakeModel(spec=spec, chunk_bytes=4096))
    return evaluator


def test_one_seed_seeds_all_three_generators_also_inside_a_simulation() -> None:
    def draw() -> list[float]:
        return [random.random(), np.random.rand(), torch.rand(()).item()]

    for seed in (0, 7, (1 << 32) - 1, 1 << 32, (1 << 63) - 1):
        with deterministic():
            seed_all(seed)
        drawn = draw()
        seed_all(seed, torch.device("cpu"))
        assert draw() == drawn != draw()
    torch.manual_seed(7)
    as_torch_does = torch.rand(()).item()
    seed_all(7)
    assert torch.rand(()).item() == as_torch_does


def test_seeds_of_several_numbers_differ_and_fit_every_generator() -> None:
    seeds = [seed_of(*numbers) for numbers in ((0, 1), (1, 0), (0, 1, 0), (0, 0, 1), (1,))]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 1 << 56 for seed in seeds)


def test_a_period_that_draws_from_any_generator_is_the_same_bit_for_bit(tmp_path: Path, own: str) -> None:
    updates = []
    for name in ("a", "b"):
        child = Child(tmp_path / name / "a1.safetensors", {"task": own + "Drawing", "local": {"steps": 3}})
        for _ in range(2):
            drawn_elsewhere()
            updates.append(child.period(child.initial_P).update_P)
    assert torch.equal(updates[0], updates[2]) and torch.equal(updates[1], updates[3])
    assert not torch.equal(updates[0], updates[1]), "every period draws numbers of its own"


def test_a_restart_in_the_middle_changes_no_bit_of_what_is_drawn(tmp_path: Path, own: str) -> None:
    spec = {"task": own + "Drawing", "local": {"steps": 3}}
    whole, first = (Child(tmp_path / name / "a1.safetensors", spec) for name in ("a", "b"))
    expected = [whole.period(whole.initial_P).update_P for _ in range(2)][1]
    first.period(first.initial_P)
    drawn_elsewhere()
    second = Child(tmp_path / "b" / "a1.safetensors", spec)
    assert second.clock == 1
    assert torch.equal(second.period(second.initial_P).update_P, expected)


def test_init_and_model_draw_the_same_numbers_at_the_coordinator_and_at_every_agent(tmp_path: Path, own: str) -> None:
    spec = parse(RunSpec, {"task": own + "Drawing", "seed": 5})
    coordinator = evaluator_of(spec)
    drawn_elsewhere()
    agent = Child(tmp_path / "a1.safetensors", {"task": own + "Drawing", "seed": 5}).trainer
    assert coordinator._flat is not None
    assert torch.equal(agent._local.flat.flat_P, coordinator._flat.flat_P)
    assert vars(agent._local.task)["drawn"] == vars(coordinator._task)["drawn"]
    other = load_task(own + "Drawing", {}, ["*"], Path("/"), seed=6)
    assert vars(other)["drawn"] != vars(agent._local.task)["drawn"]
    first, again = (make_model(other, 6).bias for _ in range(2))
    assert torch.equal(first, again)  # type: ignore[arg-type]


def test_a_random_split_in_dataset_is_the_same_for_every_part_and_in_every_call(own: str) -> None:
    task = load_task(own + "Splitting", {}, ["*"], Path("/"), seed=5)

    def rows(part: Part) -> set[float]:
        drawn_elsewhere()
        data: Any = make_dataset(task, part)
        return {data[i][0].item() for i in range(len(data))}

    for parts in (2, 3):  # the roster grows, and it is asked again
        train = [rows(Part(i, parts, Iid(), seed=5)) for i in range(parts)]
        assert sum(map(len, train)) == 80 and len(set.union(*train)) == 80
        assert set.union(*train).isdisjoint(rows(Part.test(5))) and len(rows(Part.test(5))) == 20
    assert rows(Part.test(5)) != rows(Part.test(6)), "another run, another split"


def test_the_held_out_part_has_the_seed_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from syncline.tasks.quadratic import LinearRegression\n"
        "seeds = []\n"
        "class Own(LinearRegression):\n"
        "    def dataset(self, part):\n"
        "        seeds.append((part.held_out, part.seed))\n"
        "        return super().dataset(part)\n"
    )
    task = f"{tmp_path / 'own.py'}:Own"
    evaluator = evaluator_of(parse(RunSpec, {"task": task, "seed": 5}))
    child = Child(tmp_path / "a1.safetensors", {"task": task, "seed": 5, "evaluate": {"agents": True}})
    child.period(child.initial_P)
    tasks = (evaluator._task, child.trainer._local.task)
    asked = [cast(Any, type(task)).dataset.__globals__["seeds"] for task in tasks]
    assert set(asked[0]) == {(True, 5)} and set(asked[1]) == {(True, 5), (False, 5)}


def test_a_metric_that_draws_depends_on_the_version_and_not_on_how_often_it_is_evaluated(own: str) -> None:
    spec = parse(RunSpec, {"task": own + "Drawing", "seed": 5})
    every, second = evaluator_of(spec), evaluator_of(spec)
    often = [every.evaluate(EvaluateCenter(version=version)).metrics for version in range(4)]
    drawn_elsewhere()
    assert [second.evaluate(EvaluateCenter(version=version)).metrics for version in (0, 2)] == [often[0], often[2]]
    assert len({metrics["t"] for metrics in often}) == 4
