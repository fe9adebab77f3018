"""Signs of progress while a large model is mixed in, encoded, checked or saved: single calls that report nothing themselves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

EVERY_S = 0.5
LARGE_BYTES = 4 << 20  # a smaller model takes no time that matters, and a thread would
SLOWEST_BYTES_PER_S = 4 << 20  # a disk that is slower than this counts as hung

BackgroundProgress = Callable[[Callable[[], None], int], AbstractContextManager[None]]


@contextmanager
def background_progress(tick: Callable[[], None], nbytes: int) -> Iterator[None]:
    """Call `tick` from a thread while the body works on so many bytes, at most for as long as the slowest disk takes."""
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
