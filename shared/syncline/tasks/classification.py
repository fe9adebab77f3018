"""Base classes of classification tasks: loss and metrics, and a small network for grey images."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from syncline.data.partition import Part
from syncline.tasks.base import Task

SIDE = 28  # pixels


class Classification(Task):
    """Cross-entropy and accuracy. Batch: inputs, integer labels (B,); the model returns scores (B, classes).

    Sequences are classified at each position: labels (B, T), scores (B, T, classes).
    """

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        inputs, labels = batch
        return _cross_entropy(model(inputs), labels)

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, float]:
        inputs, labels = batch
        scores = model(inputs)
        right = (scores.argmax(dim=-1) == labels).double().mean()
        return {"loss": float(_cross_entropy(scores, labels)), "accuracy": float(right)}


def _cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(scores.flatten(0, -2), labels.flatten().long())


@dataclass(frozen=True)
class Labelled:
    """Rows of a data set: images (N, 28, 28) uint8, labels (N,) int64 in 0 … 9."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


class Pixels(nn.Module):
    """Scale grey values (B, H, W) uint8 to (B, 1, H, W) float32 with about zero mean and unit deviation.

    Rows stay bytes until their batch is on the device. The result is in channels-last format, which halves the time of
    convolutions on a CPU.
    """

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__()
        self.mean, self.deviation = mean, deviation  # of a pixel in 0 … 1

    def forward(self, pixels: Tensor) -> Tensor:
        standard = (pixels.to(torch.float32) - 255.0 * self.mean) / (255.0 * self.deviation)
        return standard.unsqueeze(1).to(memory_format=torch.channels_last)


class GreyImages(Classification):
    """28 × 28 grey images in ten classes, and a small convolutional network.

    Batch: images (B, 28, 28) uint8, labels (B,) int64. A part is a copy of its rows, 792 bytes each.
    """

    MEAN: ClassVar[float]  # of a pixel in 0 … 1
    DEVIATION: ClassVar[float]

    def __init__(self, channels: int = 32) -> None:
        if channels < 2:
            raise ValueError(f"channels is {channels}, and the layers need at least 2")
        self.channels = channels

    @property
    @abc.abstractmethod
    def train_rows(self) -> Labelled:
        """The rows to split. Implementations keep them, so that a new part needs no reading when the roster grows."""

    @property
    @abc.abstractmethod
    def test_rows(self) -> Labelled:
        """The held-out rows."""

    def model(self) -> nn.Module:
        """Return two 3 × 3 convolutions, the second of `channels` channels, and a linear layer.

        The default has 20,490 parameters; a training step takes 6 MFLOP per image. Pooling comes before the rectifier, which
        then processes a quarter of the values.
        """
        half = self.channels // 2
        return nn.Sequential(
            Pixels(self.MEAN, self.DEVIATION),
            *(nn.Conv2d(1, half, kernel_size=3, padding=1), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Conv2d(half, self.channels, kernel_size=3, padding=1), nn.MaxPool2d(2), nn.ReLU()),
            nn.Flatten(),
            nn.Linear(self.channels * (SIDE // 4) ** 2, 10),
        )

    def dataset(self, part: Part) -> TensorDataset:
        if part.held_out:
            rows = self.test_rows
            return TensorDataset(torch.from_numpy(rows.images), torch.from_numpy(rows.labels))
        rows = self.train_rows
        own = part.rows(len(rows.labels), label=rows.labels)
        return TensorDataset(torch.from_numpy(rows.images[own]), torch.from_numpy(rows.labels[own]))
