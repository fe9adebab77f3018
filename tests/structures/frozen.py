"""Tasks with frozen tensors: some that they update themselves, and some that they train later."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from syncline.data.partition import Part
from syncline.tasks.base import Task


class Points(Task):
    """Three classes of points in six dimensions."""

    def dataset(self, part: Part) -> TensorDataset:
        x = torch.randn(300, 6, generator=torch.Generator().manual_seed(3))
        y = x[:, :3].argmax(dim=1)
        if part.held_out:
            return TensorDataset(x[200:], y[200:])
        rows = part.rows(200, label=y[:200])
        return TensorDataset(x[rows], y[rows])

    def loss(self, model: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])


class StudentAndTeacher(nn.Module):
    """The student learns; the teacher, a moving mean of the student, makes the predictions (arXiv:1703.01780)."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return self.student(x) if self.training else self.teacher(x)


class LocalTeacher(Points):
    """Of a teacher that each agent keeps, the center holds the first one."""

    local: Sequence[str] = ("teacher.*",)

    def model(self) -> nn.Module:
        return StudentAndTeacher()

    def train(self, model: Any, optimizer: Any, batches: Iterator[Any], on_step: Callable[[int], bool]) -> None:
        model.train()
        for batch in batches:
            optimizer.zero_grad()
            known = model.teacher(batch[0]).softmax(dim=1)
            guess = model.student(batch[0])
            (
                nn.functional.cross_entropy(guess, batch[1]) + nn.functional.mse_loss(guess.softmax(dim=1), known)
            ).backward()
            optimizer.step()
            self.follow(model)
            if not on_step(len(batch[0])):
                break

    def follow(self, model: Any) -> None:
        with torch.no_grad():
            for mean, p in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
                mean.mul_(0.8).add_(p, alpha=0.2)

    def metrics(self, model: Any, batch: Any) -> dict[str, float]:
        if self.local:  # the teacher of the center has learned nothing
            model = model.student
        return {"loss": self.loss(model, batch).item()}


class MeanTeacher(LocalTeacher):
    local: Sequence[str] = ()
    shared: Sequence[str] = ("teacher.*",)


class TeacherByData(MeanTeacher):
    def follow(self, model: Any) -> None:
        for mean, p in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
            mean.data = 0.8 * mean.data + 0.2 * p.data


class UnnamedTeacher(MeanTeacher):
    shared = ()


class Unfrozen(Points):
    """The head first; after eight steps the backbone too."""

    def __init__(self) -> None:
        self.steps = 0

    def model(self) -> nn.Module:
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        net[0].requires_grad_(False)
        return net

    def loss(self, model: Any, batch: Any) -> Tensor:
        if model.training:
            self.steps += 1
            model[0].requires_grad_(self.steps > 8)
        return super().loss(model, batch)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


class FrozenFirst(Unfrozen):
    """The same, with a backbone that model() returns trainable."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
