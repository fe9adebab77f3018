"""Randomness and the time of day, in one place, so that a simulation can replace both.

They serve for random ids, jitter and time stamps of metrics, and decide nothing: decisions take time as an argument.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Protocol


class Source(Protocol):
    """The methods of `random.Random` that Syncline uses."""

    def getrandbits(self, k: int, /) -> int: ...
    def uniform(self, a: float, b: float, /) -> float: ...


source: ContextVar[Source] = ContextVar("source", default=random.SystemRandom())  # noqa: B039 (no state of its own)
wall_clock: ContextVar[Callable[[], float]] = ContextVar("wall_clock", default=time.time)


def new_id() -> str:
    """Return a random 128-bit name, 32 hexadecimal digits."""
    return f"{source.get().getrandbits(128):032x}"


def new_number() -> int:
    """Return a random positive number of 62 bits."""
    return 1 + source.get().getrandbits(62)


def jitter(value: float, least: float = 0.7, most: float = 1.3) -> float:
    """Return the value times a random factor, so that many waiting processes do not come back at the same moment."""
    return value * source.get().uniform(least, most)


def wall_time_s() -> float:
    """Return the seconds since the epoch."""
    return wall_clock.get()()
