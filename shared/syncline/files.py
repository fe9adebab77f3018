"""Atomic replacement of files: as a whole or not at all, and safe from a power failure once the call returns."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP)  # errors of file systems that cannot sync a directory


@contextmanager
def replacing(path: Path, beside: str) -> Iterator[Path]:
    """Replace a file by one that the body of the `with` statement writes.

    After the body, the new file is synced to the disk and takes the place of `path`. If the body or the disk fails, `path` is
    unchanged and the new file is removed.

    Args:
        path: the file to replace or create.
        beside: the name of the new file, in the directory of `path`. An existing file of this name is removed first.

    Yields:
        The path of the new file, for the body to write.

    Raises:
        OSError: the disk failed.
    """
    fresh = path.with_name(beside)
    try:
        fresh.unlink(missing_ok=True)
        yield fresh
        _sync(fresh, os.O_RDONLY)
        fresh.replace(path)
        sync_directory(path.parent)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def sync_directory(path: Path) -> None:
    """Sync the names in a directory to the disk, if the file system can. Raises OSError."""
    try:
        _sync(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _sync(path: Path, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
