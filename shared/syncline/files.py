"""A file is replaced whole or not at all, and once it is replaced no power failure brings the old one back."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CANNOT = (errno.EINVAL, errno.ENOTSUP)  # what file systems say that cannot sync a directory


@contextmanager
def replacing(path: Path, beside: str) -> Iterator[Path]:
    """Gives the name of a file of the same directory, called `beside`, to be written in the body; then it takes the place of
    `path`. Where the body or the disk fails, `path` is as it was and the other file is gone. Raises OSError."""
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
    """Which names the directory holds is on the disk when this returns."""
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
