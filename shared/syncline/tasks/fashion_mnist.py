"""Fashion-MNIST: 70,000 real pictures of clothes and shoes in ten classes (H. Xiao, K. Rasul, R. Vollgraf, arXiv:1708.07747).

60,000 pictures are split among the agents and 10,000 are held out, as by the authors. They are read from four idx files in a
directory, by default that of Debian's package. A coordinator reads only the held-out files, an agent only the others.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from syncline.data.idx import read_idx
from syncline.data.once import read_once
from syncline.errors import ConfigError
from syncline.tasks.classification import SIDE, GreyImages, Labelled

DEBIAN = "/usr/share/datasets/fashion-mnist"  # of the package dataset-fashion-mnist
MOST_ROWS = 1_000_000
_HINT = (
    "On Debian or Ubuntu: `apt-get install dataset-fashion-mnist`. Elsewhere: take the four files from "
    "github.com/zalandoresearch/fashion-mnist, and name their directory in `task_options: {directory: ...}`"
)


class FashionMnist(GreyImages):
    """Batch: images (B, 28, 28) uint8, labels (B,) int64. The rows take 48 MB in an agent, 8 MB in the coordinator.

    Args:
        directory: holds train-images-idx3-ubyte and the others, with or without .gz; default: that of Debian's package.
        channels: output channels of the second convolution.
    """

    MEAN, DEVIATION = 0.286, 0.353

    def __init__(self, directory: str = DEBIAN, channels: int = 32) -> None:
        super().__init__(channels)
        self.directory = Path(directory).expanduser().absolute()

    @cached_property
    def train_rows(self) -> Labelled:
        return self._read("train")

    @cached_property
    def test_rows(self) -> Labelled:
        return self._read("t10k")

    def _read(self, which: str) -> Labelled:
        """Return the images and labels of a file pair. Raises ConfigError."""
        images_file, labels_file = self._find(f"{which}-images-idx3-ubyte"), self._find(f"{which}-labels-idx1-ubyte")
        images, labels = _read_pair(images_file, labels_file)
        return Labelled(images, labels)

    def _find(self, name: str) -> Path:
        for file in (self.directory / f"{name}.gz", self.directory / name):
            if file.is_file():
                return file
        raise ConfigError("task_options.directory", f"there is no file {name}.gz in {self.directory}", _HINT)


@read_once
def _read_pair(images_file: Path, labels_file: Path) -> tuple[NDArray[Any], ...]:
    """Return images and labels of the same length. Raises ConfigError for files that cannot be used."""
    images = _checked(images_file, 3, MOST_ROWS * SIDE**2)
    labels = _checked(labels_file, 1, MOST_ROWS)
    if images.shape[1:] != (SIDE, SIDE):
        raise _unusable(images_file, f"its images are {images.shape[1]} × {images.shape[2]}, not {SIDE} × {SIDE}")
    if len(labels) != len(images) or len(labels) == 0:
        raise _unusable(labels_file, f"it has {len(labels):,} labels for {len(images):,} images")
    if labels.max() > 9:
        raise _unusable(labels_file, f"it has a label {labels.max()}, and the classes are 0 to 9")
    return images, labels.astype(np.int64)


def _checked(file: Path, dimensions: int, most_bytes: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    try:
        return read_idx(file, dimensions, most_bytes)
    except (OSError, ValueError) as error:
        raise _unusable(file, str(error)) from None


def _unusable(file: Path, why: str) -> ConfigError:
    return ConfigError("task_options.directory", f"{file} cannot be used: {why}", _HINT)
