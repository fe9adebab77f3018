"""Report progress from a thread while a large model is mixed, encoded, checked or saved: single calls that report none."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

EVERY_S = 0.5
LARGE_BYTES = 4 << 20  # a smaller model takes less time than a thread costs
SLOWEST_BYTES_PER_S = 4 << 20  # a slower disk counts as hung

BackgroundProgress = Callable[[Callable[[], None], int], AbstractContextManager[None]]


@contextmanager
def background_progress(tick: Callable[[], None], nbytes: int) -> Iterator[None]:
    """Call `tick` from a thread while the body runs.

    Args:
        tick: reports progress; must be safe to call from a thread.
        nbytes: bytes that the body works on. The calls end after the time that the slowest disk takes for so many.
    """
    if nbytes < LARGE_BYTES:
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_tick, args=(done, tick, nbytes / SLOWEST_BYTES_PER_S), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _tick(done: threading.Event, tick: Callable[[], None], most_s: float) -> None:
    until_s = time.monotonic() + most_s
    while not done.wait(EVERY_S) and time.monotonic() < until_s:
        tick()
