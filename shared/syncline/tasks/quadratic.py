"""Linear regression on synthetic rows: a quadratic loss in float64, for which tests can assert exact identities."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from syncline.data.partition import Part
from syncline.tasks.base import Task

_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_GROUPS = 4


class LinearRegression(Task):
    """Mean squared error. Batch: inputs (B, features), targets (B,), both of `dtype`.

    Row r has the label r mod 4, and its inputs are shifted by the label, so that parts split by label differ.
    """

    def __init__(self, rows: int = 64, features: int = 5, dtype: Literal["float32", "float64"] = "float64") -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype!r}, not one of {', '.join(_DTYPES)}")
        self.rows, self.features, self.dtype = rows, features, _DTYPES[dtype]

    def model(self) -> nn.Module:
        return nn.Linear(self.features, 1, dtype=self.dtype)

    def dataset(self, part: Part) -> TensorDataset:
        rng = np.random.default_rng([1 if part.held_out else 0, self.features])
        label = np.arange(self.rows) % _GROUPS
        inputs = rng.normal(size=(self.rows, self.features)) + label[:, None] / _GROUPS
        targets = inputs @ np.linspace(-1.0, 1.0, self.features) + 0.5 + 0.1 * rng.normal(size=self.rows)
        chosen = np.arange(self.rows) if part.held_out else part.rows(self.rows, label=label)
        return TensorDataset(*(torch.from_numpy(array[chosen]).to(self.dtype) for array in (inputs, targets)))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        return torch.nn.functional.mse_loss(model(inputs).squeeze(1), targets)
