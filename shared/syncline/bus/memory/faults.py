"""Faults of the bus in memory: networks that delay and lose messages, and hooks that observe every operation.

A `Network` decides how long each message takes or that the message is lost. A hook is called with an `Operation` before the
operation is sent, when the broker has performed it, and after it; the hook may raise an error or cut the connection. This
module knows no connection, stream or account.

Only `Seeded` draws random numbers, from a given generator. No code here reads a clock.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

BROKER = "broker"  # the name of the broker to a `Network`
CORE_KINDS = frozenset({"publish", "deliver"})  # kinds of messages that NATS itself may lose


class Network(Protocol):
    """The delays and losses of a simulated network."""

    def delay(self, source: str, target: str, kind: str, size_bytes: int) -> float | None:
        """Return the seconds that one message takes, or None if the message is lost.

        Args:
            source: the name of a client, or "broker".
            target: the name of a client, "broker", or the name of a stream.
            kind: from a client to the broker the name of the operation, such as `put` or `subscribe`. From the broker to a
                client `deliver` (a core message), `answer`, `refusal`, or `connect` (the time until a lost connection is back).
                From the broker to a stream `store`: a real server may inform subscribers of a message before storing it.
            size_bytes: the size of the message.
        """
        ...


class Instant:
    """A network without delay and loss. Each hop takes one turn of the event loop and keeps the order of the calls."""

    def delay(self, source: str, target: str, kind: str, size_bytes: int) -> float | None:
        return 0.0


class Seeded:
    """A network with random delays and losses. A generator with the same seed gives the same run."""

    def __init__(self, rng: random.Random, longest_s: float, lost: float = 0.0) -> None:
        """Delays are uniform from 0 to `longest_s`. A share `lost`, from 0 to 1, of the messages of `CORE_KINDS` is lost."""
        self._rng = rng
        self._longest_s = longest_s
        self._lost = lost

    def delay(self, source: str, target: str, kind: str, size_bytes: int) -> float | None:
        if kind in CORE_KINDS and self._rng.random() < self._lost:
            return None
        return self._rng.uniform(0.0, self._longest_s)


Phase = Literal["before", "done", "after"]


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of a bus method, as hooks see it in up to three phases.

    * `before` the operation is sent. An error of the hook is raised to the caller, and no message is sent.
    * `done`: the broker has performed the operation and not answered yet. If the hook cuts the connection here, the caller
      cannot learn the result. (The event loop's exception handler receives an error of the hook.)
    * `after` the call, with its error if it failed.
    """

    number: int  # counts the operations of a broker's life, from 1
    client: str  # the name of the client
    name: str  # the name of the bus method
    arguments: tuple[object, ...]
    phase: Phase = "before"
    error: BaseException | None = None

    def at(self, phase: Phase, error: BaseException | None = None) -> Operation:
        """Return the same operation in another phase."""
        return Operation(self.number, self.client, self.name, self.arguments, phase, error)


Hook = Callable[[Operation], None]


class Hooks:
    """The hooks of a broker, called in the order in which they were added."""

    def __init__(self) -> None:
        self._hooks: list[Hook] = []
        self._count = 0

    def add(self, hook: Hook) -> None:
        """Add a hook, for all later operations."""
        self._hooks.append(hook)

    @contextmanager
    def around(self, client: str, name: str, arguments: tuple[object, ...]) -> Iterator[Operation]:
        """Number an operation and call the hooks before and after the body, which performs the operation."""
        self._count += 1
        now = Operation(self._count, client, name, arguments)
        self.tell(now, "before")
        try:
            yield now
        except BaseException as error:
            self.tell(now, "after", error)
            raise
        self.tell(now, "after")

    def tell(self, now: Operation | None, phase: Phase, error: BaseException | None = None) -> None:
        """Call the hooks with an operation in a phase. None: the message belongs to no operation, and no hook is called."""
        if now is not None and self._hooks:
            told = now.at(phase, error)
            for hook in self._hooks:
                hook(told)
