"""A filesystem of a few MiB, made without root's rights, that a process can be started on and filled to the last byte.

It is a tmpfs in a mount namespace of its own, which a sleeping process holds: with that one it is gone, whatever happens.
"""

from __future__ import annotations

import errno
import shutil
import subprocess
from pathlib import Path
from typing import Self

import pytest

_HOLD = 'mount -t tmpfs -o size="$1" tmpfs "$2" && echo mounted && exec sleep infinity'
_BLOCK_BYTES = 4096


class SmallDisk:
    """`with SmallDisk(place, "8m") as disk:` mounts one at an empty directory, for the processes started by `enter`.

    Skips the test where this machine lets nobody mount it.
    """

    def __init__(self, at: Path, size: str) -> None:
        self.at, self._size = at, size

    def __enter__(self) -> Self:
        for tool in ("unshare", "nsenter"):
            if shutil.which(tool) is None:
                pytest.skip(f"{tool} (util-linux) is not installed here, and mounts the small disk")
        self.at.mkdir()
        command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", _HOLD, "sh", self._size, str(self.at)]
        self._holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self._holder.stdout is not None
        said = self._holder.stdout.readline()
        if said != "mounted\n":
            self.__exit__()
            pytest.skip(f"nobody may mount a tmpfs in a user namespace here: {said.strip()}")
        return self

    def __exit__(self, *_: object) -> None:
        self._holder.kill()
        self._holder.communicate()

    @property
    def enter(self) -> tuple[str, ...]:
        """The words before a command that is to see the disk. The command has the process id of the first word."""
        return ("nsenter", "--target", str(self._holder.pid), "--user", "--mount", "--preserve-credentials")

    def fill(self) -> None:
        """Write a file until there is no room for a byte."""
        with self._filler.open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(_BLOCK_BYTES))
            except OSError as error:
                assert error.errno == errno.ENOSPC

    def give_back(self) -> None:
        self._filler.unlink()

    @property
    def _filler(self) -> Path:
        return Path(f"/proc/{self._holder.pid}/root{self.at}", "filler")
