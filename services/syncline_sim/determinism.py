"""Guards of a simulation's determinism: real time, real randomness and threads raise `NotSimulated`.

Time and randomness are refused only to callers in Syncline's own modules; libraries may measure and hash.
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
from syncline_sim.loop import NotSimulated, gather

_GUARDED: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (time, ("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "sleep")),
    (random, ("random", "uniform", "randint", "randrange", "choice", "choices", "shuffle", "sample", "getrandbits")),
    (random, ("gauss", "expovariate", "seed")),
    (os, ("urandom",)),
    (secrets, ("token_bytes", "token_hex", "token_urlsafe", "randbelow", "choice", "randbits")),
    (uuid, ("uuid1", "uuid4")),
)


class _NoChance(random.Random):
    """The process-wide random source of a simulation. A service that draws from it was given no source of its own."""

    def random(self) -> float:
        raise NotSimulated("chance.source was not set for this service")

    def getrandbits(self, k: int, /) -> int:
        raise NotSimulated("chance.source was not set for this service")


def _no_clock() -> float:
    raise NotSimulated("chance.wall_clock was not set for this service")


SIMULATED = ("syncline.", "syncline_agent", "syncline_coordinator", "syncline_sim")


@contextmanager
def deterministic(prefix: str | tuple[str, ...] = SIMULATED, *, threads: bool = False) -> Iterator[None]:
    """Refuse real time, real randomness and threads inside the context.

    Args:
        prefix: beginnings of the names of modules that are refused time and randomness.
        threads: allow threads, for tasks of users.

    Raises:
        NotSimulated: in the code that uses one of them.
    """
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
def logging_disabled() -> Iterator[None]:
    """Disable the services' logging inside the context."""
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
