"""Reader of idx files, the format of MNIST and its successors.

An idx file is two zero bytes, the element type (8: unsigned byte), the number of dimensions, each dimension as a big-endian
32-bit number, and the elements (http://yann.lecun.com/exdb/mnist/).
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

_UNSIGNED_BYTE = 8


def read_idx(file: Path, dimensions: int, most_bytes: int) -> NDArray[np.uint8]:
    """Return the array in a file of unsigned bytes, gzipped or not.

    Args:
        file: the file; it is gzipped if its name ends in .gz.
        dimensions: number of dimensions that the file must have.
        most_bytes: bound of the array's size; larger files are not unpacked.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no idx file of bytes with these dimensions, is incomplete or too large.
    """
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as source:
            return _read(source, dimensions, most_bytes)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"it is no complete gzip file: {error}") from None


def _read(source: BinaryIO | gzip.GzipFile, dimensions: int, most_bytes: int) -> NDArray[np.uint8]:
    header = source.read(4 + 4 * dimensions)
    if header[:4] != bytes((0, 0, _UNSIGNED_BYTE, dimensions)) or len(header) != 4 + 4 * dimensions:
        raise ValueError(f"it is no idx file of bytes in {dimensions} dimensions")
    shape = struct.unpack(f">{dimensions}I", header[4:])
    size = math.prod(shape)
    if size > most_bytes:
        raise ValueError(f"its header says {size:,} bytes, more than the {most_bytes:,} that are read")
    data = bytearray(source.read(size))
    if len(data) != size or source.read(1):
        raise ValueError(f"its header says {size:,} bytes, it has {'fewer' if len(data) < size else 'more'}")
    return np.frombuffer(data, np.uint8).reshape(shape)
