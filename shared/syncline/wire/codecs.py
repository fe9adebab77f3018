"""How a slice of the flat vector becomes bytes and back. A codec is three methods; knows nothing of frames or blobs.

`fp32` and `fp64` are exact. A run uses the one of its center's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Codec(Protocol):
    @property
    def name(self) -> str: ...

    def nbytes(self, elements: int) -> int:
        """Coded bytes of so many elements."""
        ...

    def encode(self, x_E: Tensor, out: memoryview) -> None:
        """Writes `nbytes(E)` bytes. E: elements of the slice, on the CPU."""
        ...

    def decode(self, data: bytes | memoryview, out_E: Tensor) -> None:
        """Reads `nbytes(E)` bytes into `out_E`."""
        ...


@dataclass(frozen=True)
class Exact:
    """The tensor's own little-endian bytes."""

    name: str
    dtype: torch.dtype
    array_dtype: str

    def nbytes(self, elements: int) -> int:
        return elements * self.dtype.itemsize

    def encode(self, x_E: Tensor, out: memoryview) -> None:
        np.frombuffer(out, dtype=self.array_dtype)[:] = x_E.numpy()

    def decode(self, data: bytes | memoryview, out_E: Tensor) -> None:
        out_E.numpy()[:] = np.frombuffer(data, dtype=self.array_dtype)


CODECS: dict[str, Codec] = {
    "fp32": Exact("fp32", torch.float32, "<f4"),
    "fp64": Exact("fp64", torch.float64, "<f8"),
}
