"""What goes wrong on the bus in memory, and where: networks that delay and lose, hooks that see every operation.

A `Network` says how long each message takes, or that it is lost. A hook is told of an `Operation` before it is sent, when
the broker has done it, and after it, and may raise, or cut the connection. Knows no connection, no stream and no account.

Nothing here draws a random number, but for `Seeded`, whose generator is given; nothing reads a clock but the event loop's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

BROKER = "broker"  # the other end of every connection, to a `Network`
CORE_KINDS = frozenset({"publish", "deliver"})  # what NATS itself may lose


class Network(Protocol):
    def delay(self, source: str, target: str, kind: str, size_bytes: int) -> float | None:
        """Seconds that one message takes, or None where it is lost.

        From a connection to "broker", `kind` is the name of the operation, `subscribe` among them; from "broker" to a
        connection it is `deliver` (a core message), `answer`, `refusal`, or `connect` (until a lost connection is back);
        from "broker" to a stream's name it is `store`: a real server may tell subscribers of a message before it holds it.
        """
        ...


class Instant:
    """No delay and no loss: everything happens in the order in which it was asked, one turn of the event loop per hop."""

    def delay(self, source: str, target: str, kind: str, size_bytes: int) -> float | None:
        return 0.0


class Seeded:
    """Uniform delays up to `longest_s`, and of what NATS may lose a share `lost`. The same generator, the same run."""

    def __init__(self, rng: random.Random, longest_s: float, lost: float = 0.0) -> None:
        self._rng, self._longest_s, self._lost = rng, longest_s, lost

    def delay(self, source: str, target: str, kind: str, size_bytes: int) -> float | None:
        if kind in CORE_KINDS and self._rng.random() < self._lost:
            return None
        return self._rng.uniform(0.0, self._longest_s)


Phase = Literal["before", "done", "after"]


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of a bus method, as hooks see it, up to three times.

    `before` it is sent: what the hook raises, the caller gets, and nothing is sent. `done` by the broker and not yet
    answered: cut the connection here, and the caller will never know (what a hook raises here goes to the event loop's
    exception handler). `after` it, with the error if there was one."""

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
    """Tells of each operation, in the order in which the hooks were added."""

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
