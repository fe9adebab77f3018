"""Element types of a flat vector, by the names that travel. The table needs neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Dtype:
    """One element type.

    Attributes:
        long_name: the attribute of `torch` and of `numpy` with this type.
        itemsize: bytes of an element.
        little_endian: numpy's code of the type in the byte order of the wire.
    """

    long_name: str
    itemsize: int
    little_endian: str


DTYPES = {
    "fp32": Dtype("float32", 4, "<f4"),
    "fp64": Dtype("float64", 8, "<f8"),
}
DTYPE_PATTERN = f"^({'|'.join(DTYPES)})$"
