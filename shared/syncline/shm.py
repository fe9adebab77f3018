"""Memory that a service and its child process share. The memory has no name, so no process can leave a file behind.

On Linux the memory is a memfd, which the size of /dev/shm does not limit (64 MB in a container by default), and which ends with
the last process that uses it. Other systems use an unlinked temporary file. The service makes the memory before the fork of the
child, while the final size is unknown, and grows it later.
"""

from __future__ import annotations

import mmap
import os
import tempfile


class SharedMemory:
    """A growable piece of memory behind a file descriptor."""

    def __init__(self, fd: int | None = None) -> None:
        """Open the memory behind `fd`, which this object then owns; None makes new memory of size 0."""
        self.fd = _new() if fd is None else fd
        self._map: mmap.mmap | None = None

    def grow(self, size_bytes: int) -> None:
        """Set the size. The other process sees the new size at its next call of `view`."""
        os.ftruncate(self.fd, size_bytes)

    def view(self) -> memoryview:
        """Return the whole memory, writable. Call it again after the other process has grown the memory."""
        size_bytes = os.fstat(self.fd).st_size
        if self._map is None or len(self._map) != size_bytes:
            self._map = mmap.mmap(self.fd, size_bytes)  # an older map is freed with its last view
        return memoryview(self._map)

    def discard(self, begin: int, end: int) -> None:
        """Give the whole pages between two byte offsets back to the system; their bytes become zero.

        Nothing happens before the first `view`, and on systems that cannot free a part of a file.
        """
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        last = end // mmap.PAGESIZE * mmap.PAGESIZE
        if self._map is not None and first < last and hasattr(mmap, "MADV_REMOVE"):
            try:
                self._map.madvise(mmap.MADV_REMOVE, first, last - first)
            except OSError:
                pass  # the file system cannot free a part of a file

    def close(self) -> None:
        """Close the memory in this process. Views that are still in use stay valid."""
        self._map = None
        os.close(self.fd)


def _new() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("syncline")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
