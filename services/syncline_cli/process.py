"""This process: its age, and its interruption by signals."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = 130


class Interrupted(Exception):
    """A signal has asked this command to end. The error's text is printed after the word «interrupted»."""


def _age_s() -> float:
    """Return the seconds since the process was created, by the kernel's record; 0 if the kernel has none."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began_s)
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0


_BEGAN_S = time.monotonic() - _age_s()


def since_start_s(at_s: float | None = None) -> float:
    """Return the seconds between the creation of this process and `at_s`, a time by time.monotonic(); default: now.

    Counts from the import of this module if the system does not tell when the process was created.
    """
    return (time.monotonic() if at_s is None else at_s) - _BEGAN_S


def silence_logging() -> None:
    """Drop log records of this process. The caller shows problems itself: as events, findings or errors."""
    logging.getLogger().addHandler(logging.NullHandler())


def as_typed() -> str:
    """Return how the user types this command: `syncline`, or its relative path if PATH does not hold it."""
    script = Path(sys.executable).with_name("syncline")  # in the directory of the interpreter
    return os.path.relpath(script) if shutil.which("syncline") is None and script.exists() else "syncline"


def run_interruptible(work: Callable[[], Awaitable[int]], *, on_signal: Callable[[], None] = lambda: None) -> int:
    """Run `work` in a new event loop. The first signal cancels the work, which can clean up; the second ends the process.

    Args:
        work: returns the exit code.
        on_signal: called at the first signal, before `work` is cancelled.

    Raises:
        Interrupted: a signal ended `work`.
    """
    with asyncio.Runner() as runner:  # no uvloop: its descriptors leak into the broker and keep the watchdog waiting
        return runner.run(_until_signal(work, on_signal))


async def _until_signal(work: Callable[[], Awaitable[int]], on_signal: Callable[[], None]) -> int:
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work())
    asked = False

    def stop() -> None:
        nonlocal asked
        if asked:
            if sys.stdout.isatty():
                os.write(1, b"\x1b[?25h")  # show the cursor, which a live display hides
            os._exit(INTERRUPTED)  # every process that this one started ends with it
        asked = True
        on_signal()
        task.cancel()

    for which in STOP_SIGNALS:
        loop.add_signal_handler(which, stop)
    try:
        return await task
    except asyncio.CancelledError:
        if asked:
            raise Interrupted from None
        raise
