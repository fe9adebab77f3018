"""Replacement of files: a file is replaced whole or not at all, and the new content survives a power failure."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CANNOT = (errno.EINVAL, errno.ENOTSUP)  # errors of file systems that cannot sync a directory


@contextmanager
def replacing(path: Path, beside: str) -> Iterator[Path]:
    """Replace a file by the one that the body of the `with` statement writes.

    If the body or the disk fails, `path` keeps its content and the new file is removed.

    Args:
        path: the file to replace.
        beside: name of the new file, in the same directory, until it takes the place of `path`.

    Raises:
        OSError: the disk cannot be written.
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
    """Flush the directory's list of names to the disk. File systems that cannot do so are skipped."""
    try:
        _sync(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise


def _sync(path: Path, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
