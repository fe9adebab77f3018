"""Reading idx files, and refusing other files."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from syncline.data.idx import read_idx


def header(*shape: int, kind: int = 8) -> bytes:
    return bytes((0, 0, kind, len(shape))) + struct.pack(f">{len(shape)}I", *shape)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=4), packed=st.booleans())
def test_what_was_written_is_read(shape: list[int], packed: bool, tmp_path: Path) -> None:
    values = np.arange(math.prod(shape), dtype=np.uint8).reshape(shape)
    file = tmp_path / ("x.gz" if packed else "x")
    data = header(*shape) + values.tobytes()
    file.write_bytes(gzip.compress(data) if packed else data)
    found = read_idx(file, len(shape), 5**4)
    assert found.dtype == np.uint8 and found.flags.writeable and np.array_equal(found, values)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "no idx file of bytes in 2 dimensions"),
        (header(1, 1)[:-1], "no idx file of bytes in 2 dimensions"),
        (header(4), "no idx file of bytes in 2 dimensions"),
        (header(1, 1, kind=13) + b"xxxx", "no idx file of bytes in 2 dimensions"),
        (header(2, 2) + b"abc", "its header says 4 bytes, it has fewer"),
        (header(2, 2) + b"abcde", "its header says 4 bytes, it has more"),
        (header(101, 1) + bytes(101), "its header says 101 bytes, more than the 100 that are read"),
        (header(0xFFFFFFFF, 0xFFFFFFFF), "more than the 100 that are read"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_no_such_file_is_refused(data: bytes, problem: str, packed: bool, tmp_path: Path) -> None:
    file = tmp_path / ("x.gz" if packed else "x")
    file.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(ValueError, match=problem):
        read_idx(file, 2, 100)


def test_a_file_that_is_not_or_not_wholly_gzip_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(header(9, 9) + bytes(range(81)))
    broken = bytearray(whole)
    broken[20] ^= 0xFF
    for name, data in (("plain.gz", header(1, 1) + b"x"), ("cut.gz", whole[:-20]), ("broken.gz", bytes(broken))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match="it is no complete gzip file"):
            read_idx(tmp_path / name, 2, 100)


def test_a_file_that_is_not_there_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_idx(tmp_path / "none", 1, 1)
