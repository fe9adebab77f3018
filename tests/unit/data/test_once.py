"""Data are read once in a process, and no caller sees the writes of another one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from syncline.data.once import MAX_KEPT, Array, read_once


def test_a_file_is_read_once_and_every_caller_has_arrays_of_its_own() -> None:
    reads: list[int] = []

    @read_once
    def read(scale: int) -> tuple[Array, ...]:
        reads.append(scale)
        return scale * np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(3, dtype=np.uint8)

    (first, small), (second, _) = read(2), read(2)
    first[0, 1] = 7.0
    assert first.tolist() == [[0, 7, 4], [6, 8, 10]] and second.tolist() == [[0, 2, 4], [6, 8, 10]]
    assert read(2)[0].tolist() == second.tolist() and read(3)[0][1, 2] == 15
    assert reads == [2, 3] and small.dtype == np.uint8 and first.dtype == np.float32


@pytest.mark.parametrize(
    "array", [np.zeros((0, 3)), np.array(5), np.arange(12).reshape(3, 4).T, np.array([True])], ids=str
)
def test_arrays_of_any_shape_come_back(array: Array) -> None:
    [found] = read_once(lambda: (array,))()
    assert (found.shape, found.dtype) == (array.shape, array.dtype) and np.array_equal(found, array)


def test_many_callers_hold_no_descriptors() -> None:
    read = read_once(lambda k: (np.full(3, k),))
    before = len(list(Path("/dev/fd").iterdir()))
    held = [read(k % (2 * MAX_KEPT)) for k in range(10 * MAX_KEPT)]
    assert len(list(Path("/dev/fd").iterdir())) - before <= MAX_KEPT
    assert all(array.tolist() == [k % (2 * MAX_KEPT)] * 3 for k, [array] in enumerate(held))


def test_what_cannot_be_read_is_tried_again() -> None:
    tries: list[int] = []

    @read_once
    def read() -> tuple[Array, ...]:
        tries.append(1)
        raise OSError("no such file")

    for _ in range(2):
        with pytest.raises(OSError, match="no such file"):
            read()
    assert len(tries) == 2
