"""Handwritten digits: real data included in scikit-learn, so that a first run needs no network.

1,797 images of 8 × 8 pixels in ten classes (E. Alpaydin, C. Kaynak, UCI, 1998); a fixed fifth of each class is held out.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from syncline.data.once import read_once
from syncline.data.partition import Part
from syncline.extras import missing_extra
from syncline.tasks.classification import Classification

_SPLIT_SEED = 1998  # of the held-out rows; not the run's, so that runs can be compared
_BRIGHTEST = 16.0
_MEAN, _DEVIATION = 0.3, 0.4  # of a pixel in 0 … 1


class Centred(nn.Module):
    """Scale pixels (B, 64) in 0 … 1 to images (B, 1, 8, 8) with about zero mean and unit deviation, which train faster."""

    def forward(self, pixels: Tensor) -> Tensor:
        return ((pixels - _MEAN) / _DEVIATION).view(-1, 1, 8, 8)


class Digits(Classification):
    """A small convolutional network. Batch: pixels (B, 64) float32 in 0 … 1, labels (B,) int64."""

    def __init__(self, hidden: int = 32) -> None:
        if hidden < 2:
            raise ValueError(f"hidden is {hidden}, and the layers need at least 2 channels")
        self.hidden = hidden

    def model(self) -> nn.Module:
        """Return two convolutions, the second of `hidden` channels, and a linear layer: 9,930 parameters by default."""
        return nn.Sequential(
            Centred(),
            nn.Conv2d(1, self.hidden // 2, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(self.hidden // 2, self.hidden, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * self.hidden, 10),
        )

    def dataset(self, part: Part) -> TensorDataset:
        images_train, images_test, labels_train, labels_test = self._data
        if part.held_out:
            return _tensors(images_test, labels_test)
        rows = part.rows(len(labels_train), label=labels_train)
        return _tensors(images_train[rows], labels_train[rows])

    @cached_property
    def _data(self) -> tuple[NDArray[Any], ...]:
        return _read()


@read_once
def _read() -> tuple[NDArray[Any], ...]:
    """Return images and labels: (train images, test images, train labels, test labels)."""
    try:
        from sklearn.datasets import (
            load_digits,
        )  # imported here because it takes a second, and only agents and evaluators need it
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError:
        raise missing_extra("task syncline.tasks.digits:Digits", "sklearn", "local") from None

    images, labels = load_digits(return_X_y=True)
    return tuple(train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=_SPLIT_SEED))


def _tensors(images: NDArray[Any], labels: NDArray[Any]) -> TensorDataset:
    return TensorDataset(
        torch.from_numpy((images / _BRIGHTEST).astype(np.float32)), torch.from_numpy(labels.astype(np.int64))
    )
