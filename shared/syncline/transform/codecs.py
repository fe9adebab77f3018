"""How a slice of the flat vector becomes bytes and back. A codec is three methods; knows nothing of frames or blobs.

`fp32` and `fp64` are exact. A run uses the one of its center's dtype.
"""

from __future__ import annotations

import sys
import warnings
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


def tensor_of(codec: Codec, data: bytes, elements: int) -> Tensor:
    """The elements in `data`, to be read only: the very bytes where the codec's are those of the tensor, else decoded."""
    if isinstance(codec, Exact) and sys.byteorder == "little":
        return torch.frombuffer(data, dtype=codec.dtype, count=elements)
    x_E = torch.empty(elements, dtype=torch.float32)
    codec.decode(data, x_E)
    return x_E


def bytes_of(codec: Codec, x_E: Tensor) -> memoryview:
    """The coded elements: the tensor's own memory where the codec's bytes are those, so use them before it changes."""
    if isinstance(codec, Exact) and sys.byteorder == "little":
        return x_E.numpy().data.cast("B")
    coded = memoryview(bytearray(codec.nbytes(x_E.numel())))
    codec.encode(x_E, coded)
    return coded


with (
    warnings.catch_warnings()
):  # torch warns once in a process that it would not notice a write to bytes; nobody writes
    warnings.simplefilter("ignore")
    torch.frombuffer(bytes(4), dtype=torch.float32)
