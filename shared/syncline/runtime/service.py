"""The frame of every service process: logging, the event loop, signals, and errors that a person can read."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from syncline.errors import BusError, ConfigError, SynclineError

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130

log = logging.getLogger(__name__)

_PR_SET_NAME = 15


def set_up_logging(file: str | None = None, level: str = "INFO") -> None:
    """Log to standard error or to a file; standard output is for results.

    Args:
        file: receives the log, and the output of the service and its children.

    Raises:
        ConfigError: the file cannot be written.
    """
    if file:
        try:
            log_file = Path(file).open("ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise ConfigError("--log-file", f"{file}: {error.strerror}", "Name a file that you may write") from None
        with log_file:
            os.dup2(log_file.fileno(), 1)
            os.dup2(log_file.fileno(), 2)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("nats").setLevel(logging.CRITICAL)  # the bus logs lost connections itself


def name_process(name: str) -> None:
    """Set the name of this process in `ps -e`, `top` and `pkill`, as `syncline-a2`, on Linux; longer names are cut off."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, f"syncline-{name}".encode()[:15], 0, 0, 0)


def loop_factory() -> asyncio.AbstractEventLoop:
    """Return a uvloop if that is installed: it is faster, and has write back-pressure on every Python version."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def run_service(work: Callable[[], Awaitable[Any]], *, drain: Callable[[], Awaitable[None]] | None = None) -> int:
    """Run a service until its work ends or a signal comes.

    Args:
        work: serves; its result, if that is an integer, is the exit code.
        drain: is awaited after a signal, before the work is cancelled.

    Returns:
        The exit code.
    """
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        try:
            return runner.run(_until_signal(work, drain))
        except ConfigError as error:
            return complain(error)


def complain(error: Exception) -> int:
    """Print an error without a traceback, and return its exit code."""
    print(f"error: {error}", file=sys.stderr)  # noqa: T201
    return WRONG_INPUT if isinstance(error, ConfigError) else FAILED


async def _until_signal(work: Callable[[], Awaitable[Any]], drain: Callable[[], Awaitable[None]] | None) -> int:
    loop, asked = asyncio.get_running_loop(), asyncio.Event()
    for which in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(which, asked.set)
    working, waiting = asyncio.ensure_future(work()), asyncio.ensure_future(asked.wait())
    await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not working.done():
        log.info("asked to stop")
        if drain is not None:
            await drain()
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        return DONE
    try:
        result = working.result()
    except ConfigError:
        raise
    except (BusError, SynclineError) as error:
        return complain(error)
    return result if isinstance(result, int) else DONE


def state_dir(given: str | None) -> Path:
    """Return the directory for state that must survive the service."""
    return Path(given) if given else Path.home() / ".local" / "state" / "syncline"
