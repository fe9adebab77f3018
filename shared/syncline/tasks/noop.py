"""A task that learns nothing: a parameter vector of any size, to measure everything except training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from syncline.data.partition import Part
from syncline.tasks.base import Task


class Vector(nn.Module):
    """One parameter, `vector`, of shape (params,) float32."""

    def __init__(self, params: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.randn(params))

    def forward(self) -> Tensor:
        return self.vector.sum()


class Noop(Task):
    """A task with zero loss and zero gradients; use `local.steps: 0` to make no step. Batch: one row, (1, 1) float32."""

    def __init__(self, params: int = 10_000) -> None:
        if params < 1:
            raise ValueError(f"params is {params}, and a model needs at least one")
        self.params = params

    def model(self) -> nn.Module:
        return Vector(self.params)

    def dataset(self, part: Part) -> TensorDataset:
        return TensorDataset(torch.zeros(1, 1))  # the same row for every part

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        total: Tensor = model()
        return 0.0 * total
