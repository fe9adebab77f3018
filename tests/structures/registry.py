"""Training structures of widely used programs, each a small task, and the plain PyTorch loop that they are compared with.

To add one: write its task into a file of this directory, and add a line to STRUCTURES. `tests/unit/test_structures.py` trains
each of them with one agent, without and with a kill after the first period, and compares the center with what the plain loop
has learned.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from syncline.data.partition import Iid, Part
from syncline.seeding import seed_all, seed_of
from syncline.tasks.base import Task, batches, load_task, make_model

HERE = Path(__file__).parent
SEED = 3
BATCH_SIZE = 20
SGD = {"kind": "sgd", "lr": 0.1}


@dataclass(frozen=True)
class Structure:
    """A task and the settings of its run.

    Attributes:
        task: `file.py:Class`, of a file in this directory.
        settings: of `local`, beside the steps and the batch size.
        refused: a part of the message, where the product says by name that it cannot do this.
        remembers: whether the task keeps something on itself that a killed process loses.
    """

    task: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 6  # of a period
    refused: str = ""
    remembers: bool = False

    @property
    def path(self) -> str:
        """Return the task's name, for a service that may be started anywhere."""
        return f"{HERE}/{self.task}"

    @property
    def spec(self) -> dict[str, Any]:
        """Return the settings of a run with one agent."""
        local = {"steps": self.steps, "batch_size": BATCH_SIZE, "optimizer": SGD, **self.settings}
        return {"task": self.path, "seed": SEED, "agents": {"min": 1}, "local": local}

    def load(self) -> Task:
        return load_task(self.path, {}, ["*"], Path("/"), seed=SEED)


def plain_loop(structure: Structure, periods: int) -> tuple[Task, nn.Module]:
    """Train as a script without Syncline does: one model, one optimiser of all its parameters, one loop.

    The random numbers and the order of the rows are those of the first agent.
    """
    task = structure.load()
    model = make_model(task, SEED)
    optimizer = _optimizer(structure, task, model)
    data = task.dataset(Part(0, 1, Iid(), SEED))
    for period in range(periods):
        seed_all(seed_of(SEED, 0, period + 1))
        stream = batches(data, BATCH_SIZE, SEED, 0, period * structure.steps)
        task.train(model, optimizer, _limited(stream, structure.steps), lambda rows: True)
    return task, model


def _optimizer(structure: Structure, task: Task, model: nn.Module) -> torch.optim.Optimizer:
    own = task.optimizer(model.parameters())
    if own is not None:
        return own
    kind, *arguments = structure.spec["local"]["optimizer"].items()
    makers = {name.lower(): made for name, made in vars(torch.optim).items() if inspect.isclass(made)}
    made: torch.optim.Optimizer = makers[kind[1]](model.parameters(), **dict(arguments))
    return made


def _limited(stream: Iterator[Any], steps: int) -> Iterator[Any]:
    yield from islice(stream, steps)


STRUCTURES: dict[str, Structure] = {
    "plain": Structure("replaced.py:Classifier"),
    "SAM, which points the weights back (`p.data = old`)": Structure("replaced.py:Sam"),
    "EMA of a statistic, assigned (`self.mean = …`)": Structure("replaced.py:AssignedMean"),
    "VQ-VAE, a codebook assigned as a new parameter": Structure("replaced.py:Codebook"),
    "a parameter that is replaced while it is trained": Structure(
        "replaced.py:ReplacedInTraining", refused="another parameter in the place of the model's 0.weight"
    ),
    "load_state_dict(assign=True)": Structure("replaced.py:LoadedByAssigning", refused="which gets gradients"),
    "vector_to_parameters": Structure("replaced.py:FromVector"),
    "model.to(memory_format=…)": Structure("replaced.py:ChannelsLast"),
    "tied weights": Structure("replaced.py:Tied"),
    "tied weights that training unties": Structure("replaced.py:Untied", refused="2.weight became trainable"),
    "mean teacher (`shared`)": Structure("frozen.py:MeanTeacher"),
    "mean teacher, by .data (`shared`)": Structure("frozen.py:TeacherByData"),
    "mean teacher that no pattern names": Structure(
        "frozen.py:UnnamedTeacher", refused="the model's teacher.0.weight is frozen, and the task has changed it"
    ),
    "mean teacher of each agent (`local`)": Structure("frozen.py:LocalTeacher"),
    "layers that are unfrozen": Structure("frozen.py:Unfrozen", refused="the model's 0.weight became trainable"),
    "layers that are frozen first": Structure("frozen.py:FrozenFirst", remembers=True),
    "truncated backpropagation through time": Structure("replaced.py:TruncatedBptt", remembers=True),
}
