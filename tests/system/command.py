"""The command `syncline` as a user runs it: a process of its own, watched for what it leaves behind."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SYNCLINE = (sys.executable, "-m", "syncline_cli")
LONG_S = 100.0  # a slow machine imports torch and trains a little
_MARK = "SYNCLINE_TEST_MARK"


@dataclass
class Command:
    """One `syncline …`. Its output goes to files, so that it never waits for us, and can be read while it runs."""

    place: Path
    args: tuple[str, ...]
    program: tuple[str, ...] = SYNCLINE
    process: subprocess.Popen[bytes] = field(init=False)
    mark: str = field(init=False)

    def __post_init__(self) -> None:
        self.mark = secrets.token_hex(8)  # in the environment of every process that comes of it
        self.temporary = self.place / f"tmp-{self.mark}"
        self.temporary.mkdir()
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SYNCLINE_")}
        caches = {"XDG_CACHE_HOME": str(self.place / "cache")}
        environment |= {_MARK: self.mark, "TMPDIR": str(self.temporary), **caches}
        with self._path("out").open("wb") as out, self._path("err").open("wb") as err:
            self.process = subprocess.Popen(
                [*self.program, *self.args],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=self.place,
                env=environment,
            )

    def _path(self, which: str) -> Path:
        return self.place / f"{which}-{self.mark}"

    @property
    def out(self) -> str:
        return self._path("out").read_text()

    @property
    def err(self) -> str:
        return self._path("err").read_text()

    def ended(self, within_s: float = LONG_S) -> int:
        """The exit code."""
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.args} still runs after {within_s:g} s: {self.out}{self.err}") from None

    def stop(self) -> None:
        """Ends it where a test did not."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def processes(self) -> list[str]:
        """Every process that came of it and is alive, itself among them."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if f"{_MARK}={self.mark}".encode() in (entry / "environ").read_bytes():
                        found.append(f"{entry.name} {(entry / 'cmdline').read_bytes()[:80]!r}")
                except OSError:
                    pass  # it ended meanwhile, or is not ours
        return found

    def left_behind(self) -> list[str]:
        """Processes and temporary files."""
        return [*self.processes(), *(str(p) for p in self.temporary.iterdir())]

    def leaves_nothing(self, within_s: float) -> None:
        until(lambda: not self.left_behind(), within_s, lambda: f"left behind: {self.left_behind()}")

    def says(self, text: str, within_s: float = LONG_S) -> None:
        """Waits for words on either stream."""

        def said() -> bool:
            return text in self.err or text in self.out or self.process.poll() is not None

        until(said, within_s, lambda: f"not a word of {text!r}: {self.out}{self.err}")
        assert text in self.err + self.out, f"ended without a word of {text!r}: {self.out}{self.err}"


def until(true: Callable[[], bool], within_s: float, story: Callable[[], str]) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, story()
        time.sleep(0.02)
