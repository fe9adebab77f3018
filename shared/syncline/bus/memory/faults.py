"""Faults on the bus in memory: networks that delay and lose messages, and hooks that see every operation.

A `Network` decides how long each message takes, or that the message is lost. A hook is called with an `Operation`
before the request is sent, when the broker has carried it out, and after the answer; the hook may raise, or cut the
connection.

Only `Seeded` draws random numbers, from a generator that is passed in. The only clock is the event loop's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

BROKER = "broker"  # the other end of every connection, to a `Network`
CORE_KINDS = frozenset({"publish", "deliver"})  # kinds of messages that NATS may lose


class Network(Protocol):
    """The delays and losses of messages."""

    def delay(self, source: str, target: str, kind: str, size_bytes: int) -> float | None:
        """Return the seconds that one message takes, or None for a lost message.

        From a connection to "broker", `kind` is the name of the operation, `subscribe` among them; from "broker" to a
        connection `kind` is `deliver` (a core message), `answer`, `refusal`, or `connect` (until a lost connection is
        back); from "broker" to a stream's name `kind` is `store`: a real server may deliver a message to subscribers
        before the stream holds the message.
        """
        ...


class Instant:
    """A network without delay and loss: everything happens in the order of the requests, one turn of the event loop per
    hop.
    """

    def delay(self, source: str, target: str, kind: str, size_bytes: int) -> float | None:
        return 0.0


class Seeded:
    """Uniform delays up to `longest_s`, and the share `lost` of messages that NATS may lose. Equal generators give
    equal runs.
    """

    def __init__(self, rng: random.Random, longest_s: float, lost: float = 0.0) -> None:
        self._rng, self._longest_s, self._lost = rng, longest_s, lost

    def delay(self, source: str, target: str, kind: str, size_bytes: int) -> float | None:
        if kind in CORE_KINDS and self._rng.random() < self._lost:
            return None
        return self._rng.uniform(0.0, self._longest_s)


Phase = Literal["before", "done", "after"]


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of a bus method, as hooks see the call, up to three times.

    `before`: an error that the hook raises reaches the caller, and nothing is sent. `done`: the broker has carried out
    the request and has not answered yet; if the hook cuts the connection, the caller never learns the outcome (an error
    of the hook goes to the event loop's exception handler). `after`: the end of the call, with its error if it failed.
    """

    number: int  # counts the operations of a broker's life, from 1
    who: str  # the connection's name
    name: str  # the bus method's
    arguments: tuple[object, ...]
    phase: Phase = "before"
    error: BaseException | None = None

    def at(self, phase: Phase, error: BaseException | None = None) -> Operation:
        return Operation(self.number, self.who, self.name, self.arguments, phase, error)


Hook = Callable[[Operation], None]


class Hooks:
    """Calls the hooks for each operation, in the order in which they were added."""

    def __init__(self) -> None:
        self._hooks: list[Hook] = []
        self._count = 0

    def add(self, hook: Hook) -> None:
        self._hooks.append(hook)

    @contextmanager
    def around(self, who: str, name: str, arguments: tuple[object, ...]) -> Iterator[Operation]:
        self._count += 1
        now = Operation(self._count, who, name, arguments)
        self.tell(now, "before")
        try:
            yield now
        except BaseException as error:
            self.tell(now, "after", error)
            raise
        self.tell(now, "after")

    def tell(self, now: Operation | None, phase: Phase, error: BaseException | None = None) -> None:
        if now is not None and self._hooks:
            told = now.at(phase, error)
            for hook in self._hooks:
                hook(told)
