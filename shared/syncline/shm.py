"""Memory that a service and its child process share. It has no name that a crash could leave behind.

On Linux the memory is a memfd. /dev/shm (64 MB in a container by default) does not bound its size, and the system frees
the memory with the last process that holds the descriptor. Other systems get an unlinked temporary file. The memory is
created before the child is forked, when its size is not known yet, and is grown later.
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
        """Set the size in bytes. The other process sees the new size with its next `view`."""
        os.ftruncate(self.fd, size_bytes)

    def view(self) -> memoryview:
        """Return the whole memory, writable. Call this method again after the other process has grown the memory."""
        size_bytes = os.fstat(self.fd).st_size
        if self._map is None or len(self._map) != size_bytes:
            self._map = mmap.mmap(self.fd, size_bytes)  # an older map goes when its last view does
        return memoryview(self._map)

    def discard(self, begin: int, end: int) -> None:
        """Give the whole pages between two offsets back to the system. They read as zeros afterwards."""
        first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if self._map is not None and first < last and hasattr(mmap, "MADV_REMOVE"):
            try:
                self._map.madvise(mmap.MADV_REMOVE, first, last - first)
            except OSError:
                pass  # a file system that cannot

    def close(self) -> None:
        """Close the descriptor. Views that are still in use stay valid."""
        self._map = None
        os.close(self.fd)


def _new() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("syncline")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
