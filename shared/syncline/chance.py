"""The sources of randomness and of the time of day, in one place, so that a simulation can replace them.

Only ids, jitter and time stamps of metrics come from here. Code that makes decisions takes the time as an argument.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Protocol


class Source(Protocol):
    """A source of random numbers. `random.Random` is one."""

    def getrandbits(self, k: int, /) -> int:
        """Return a random integer of k bits."""
        ...

    def uniform(self, a: float, b: float, /) -> float:
        """Return a random number from a to b."""
        ...


# A context variable, so that several simulations in one process do not share a source.
source: ContextVar[Source] = ContextVar("source", default=random.SystemRandom())  # noqa: B039 (no state of its own)
wall_clock: ContextVar[Callable[[], float]] = ContextVar("wall_clock", default=time.time)


def new_id() -> str:
    """Return a random id of 128 bits as 32 hexadecimal digits."""
    return f"{source.get().getrandbits(128):032x}"


def new_number() -> int:
    """Return a random number from 1 to 2^62."""
    return 1 + source.get().getrandbits(62)


def jitter(value: float, least: float = 0.7, most: float = 1.3) -> float:
    """Return the value times a random factor from `least` to `most`, so that many waiting processes do not return together."""
    return value * source.get().uniform(least, most)


def wall_time_s() -> float:
    """Return the time of day in seconds since the Unix epoch."""
    return wall_clock.get()()
