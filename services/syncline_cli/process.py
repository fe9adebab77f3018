"""This process: how old it is, and how it is interrupted."""

from __future__ import annotations

import asyncio
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
    """The user, or the system, wants this command to end. Its text follows the word «interrupted»."""


def _age_s() -> float:
    """Seconds since the process was created, as the kernel knows it; 0 where it does not say."""
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


def as_typed() -> str:
    """How this command is typed in the terminal where it runs: `syncline`, or its path where it is not on the PATH."""
    script = Path(sys.executable).with_name("syncline")  # beside the interpreter of its environment
    return os.path.relpath(script) if shutil.which("syncline") is None and script.exists() else "syncline"


def run_interruptible(work: Callable[[], Awaitable[int]], *, on_signal: Callable[[], None] = lambda: None) -> int:
    """Runs `work`; the first signal cancels it, so that it can clean up, and the second one ends the process at once.

    Raises Interrupted where a signal ended it. `on_signal` is called right when the first one comes.
    """
    with asyncio.Runner() as runner:  # no uvloop: it leaks descriptors into the broker, which keep its watchdog waiting
        return runner.run(_until_signal(work, on_signal))


async def _until_signal(work: Callable[[], Awaitable[int]], on_signal: Callable[[], None]) -> int:
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work())
    asked = False

    def stop() -> None:
        nonlocal asked
        if asked:
            if sys.stdout.isatty():
                os.write(1, b"\x1b[?25h")  # the cursor, which a live picture hides
            os._exit(INTERRUPTED)  # what we started ends with us, whatever we do
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
