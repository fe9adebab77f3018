"""Inside a simulation, real time, real randomness and threads are errors of the code that asks for them, not surprises.

Only callers in Syncline's own modules are refused the time and chance: libraries may measure and hash as they like.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from syncline import chance
from syncline_sim.gathering import gather
from syncline_sim.loop import NotSimulated

_GUARDED: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (time, ("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "sleep")),
    (random, ("random", "uniform", "randint", "randrange", "choice", "choices", "shuffle", "sample", "getrandbits")),
    (random, ("gauss", "expovariate", "seed")),
    (os, ("urandom",)),
    (secrets, ("token_bytes", "token_hex", "token_urlsafe", "randbelow", "choice", "randbits")),
    (uuid, ("uuid1", "uuid4")),
)


class _NoChance(random.Random):
    """Stands in for the process-wide source: whoever draws from it has not been given one of its own."""

    def random(self) -> float:
        raise NotSimulated("chance.source was not set for this service")

    def getrandbits(self, k: int, /) -> int:
        raise NotSimulated("chance.source was not set for this service")


def _no_clock() -> float:
    raise NotSimulated("chance.wall_clock was not set for this service")


SIMULATED = ("syncline.", "syncline_agent", "syncline_coordinator", "syncline_sim")


@contextmanager
def guarded(prefix: str | tuple[str, ...] = SIMULATED, *, threads: bool = False) -> Iterator[None]:
    """Callers in modules whose names begin with `prefix` get no real time and no real randomness; nobody gets a thread,
    unless `threads` lets a user's task do as it likes."""
    before: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, stand_in: Any) -> None:
        before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, stand_in)

    source, clock = chance.source.set(_NoChance(0)), chance.wall_clock.set(_no_clock)
    try:
        for owner, names in _GUARDED:
            for name in names:
                put(owner, name, _checked(f"{owner.__name__}.{name}", getattr(owner, name), prefix))
        put(asyncio, "gather", gather)
        if not threads:
            put(threading.Thread, "start", _no_thread)
        yield
    finally:
        for owner, name, was in reversed(before):
            setattr(owner, name, was)
        chance.source.reset(source)
        chance.wall_clock.reset(clock)


def _checked(name: str, real: Callable[..., Any], prefix: str | tuple[str, ...]) -> Callable[..., Any]:
    def check(*args: Any, **kwargs: Any) -> Any:
        caller = str(sys._getframe(1).f_globals.get("__name__", ""))
        if caller.startswith(prefix):
            raise NotSimulated(f"{caller} calls {name} in a simulation")
        return real(*args, **kwargs)

    return check


def _no_thread(thread: threading.Thread) -> None:
    raise NotSimulated(f"thread {thread.name} started in a simulation")


@contextmanager
def quiet() -> Iterator[None]:
    """What services log in a simulation is nobody's news."""
    logger = logging.getLogger("syncline")
    others = [logging.getLogger(name) for name in ("syncline_agent", "syncline_coordinator", "asyncio")]
    before = [(each, each.disabled, each.level) for each in (logger, *others)]
    for each, _, _ in before:
        each.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for each, disabled, level in before:
            each.disabled = disabled
            each.setLevel(level)
