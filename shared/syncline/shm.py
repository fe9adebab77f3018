"""Memory that a service and its child process share, without a name that could be left behind.

On Linux it is a memfd: not bounded by /dev/shm (64 MB in a container by default), and gone with the last process that holds
it. Elsewhere it is an unlinked temporary file. It is made before the child is forked, when its size is not known yet, and
grown later.
"""

from __future__ import annotations

import mmap
import os
import tempfile


class SharedMemory:
    """A growable piece of memory behind a file descriptor."""

    def __init__(self, fd: int | None = None) -> None:
        self.fd = _new() if fd is None else fd
        self._map: mmap.mmap | None = None

    def grow(self, size_bytes: int) -> None:
        """Makes room. The other side sees it after its own `view`."""
        os.ftruncate(self.fd, size_bytes)

    def view(self) -> memoryview:
        """All of it, writable. Call it again after the other side has grown it."""
        size_bytes = os.fstat(self.fd).st_size
        if self._map is None or len(self._map) != size_bytes:
            self._map = mmap.mmap(self.fd, size_bytes)  # an older map goes when its last view does
        return memoryview(self._map)

    def discard(self, begin: int, end: int) -> None:
        """Nobody needs these bytes any more: whole pages of them go back to the system, and are zero then."""
        first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if self._map is not None and first < last and hasattr(mmap, "MADV_REMOVE"):
            try:
                self._map.madvise(mmap.MADV_REMOVE, first, last - first)
            except OSError:
                pass  # a file system that cannot

    def close(self) -> None:
        """Lets go of it here; views that are still in use stay valid."""
        self._map = None
        os.close(self.fd)


def _new() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("syncline")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
