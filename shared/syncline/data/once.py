"""A cache of data sets for all tasks of a process: a simulated fleet has many tasks and one copy of the data."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from syncline.shm import SharedMemory

Array = NDArray[Any]
MAX_KEPT = 8  # cached results of one function, for different arguments


def read_once(read: Callable[..., tuple[Array, ...]]) -> Callable[..., tuple[Array, ...]]:
    """Decorate a function that reads arrays from files, so that a process calls it once for the same arguments.

    Every caller gets arrays of its own, which share memory copy-on-write: only the pages that a caller writes to become its
    own. Arguments are given by position and must be hashable.
    """

    @functools.lru_cache(maxsize=MAX_KEPT)
    def kept(*args: Any) -> tuple[_Kept, ...]:
        return tuple(_Kept(array) for array in read(*args))

    @functools.wraps(read)
    def own(*args: Any) -> tuple[Array, ...]:
        return tuple(array.own() for array in kept(*args))

    setattr(own, "cache_clear", kept.cache_clear)  # noqa: B010 (an attribute, as functools has it)
    return own


class _Kept:
    """An array in an anonymous memory file."""

    def __init__(self, array: Array) -> None:
        self._dtype, self._shape, self._nbytes = array.dtype, array.shape, array.nbytes
        memory = SharedMemory()
        memory.grow(self._nbytes)
        if self._nbytes:
            np.frombuffer(memory.view(), array.dtype)[:] = array.reshape(-1)
        self._fd = memory.fd
        weakref.finalize(self, os.close, self._fd)

    def own(self) -> Array:
        """Return a private mapping. It is made with torch, whose mappings hold no descriptor: callers may be thousands."""
        if not self._nbytes:
            return np.empty(self._shape, self._dtype)
        private = torch.from_file(f"/dev/fd/{self._fd}", shared=False, size=self._nbytes, dtype=torch.uint8)
        return private.numpy().view(self._dtype).reshape(self._shape)
