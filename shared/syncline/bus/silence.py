"""When an answer is late on a connection whose questions queue behind each other. Knows no broker.

A small question is answered at once or never. A chunk is not: over a thin link it takes many seconds by itself, and what is
asked meanwhile stands behind it. So it is the connection's silence that counts, from the last answer to whatever question; how
long it may last goes by the bytes that have to travel before the next answer.

Not every question is answered in its turn: one that was overtaken, as later ones are answered already, has the same time from
when that was noticed, though the connection is not silent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from syncline.errors import NoResponders, Unreachable

ANSWER_S = 5.0  # how long the broker itself may take
SILENT_ANSWERS = 3  # unanswered requests in a row after which the connection counts as dead
LEAST_BYTES_PER_S = 16 * 1024  # a link that carries less is none: 1 MiB in 64 s
_NOW_S = 1e-3


class Silent(Unreachable):
    """Nothing at all was answered for longer than a link that carries anything would need."""


@dataclass(slots=True)
class Turn:
    """A question's place in the queue."""

    bytes: int  # of question and answer
    through: int  # bytes of the queue, up to its own last one
    asked_at_s: float
    overtaken_at_s: float | None = None  # when that was noticed


class Queue:
    """The questions of one connection. Pure: time is an argument."""

    def __init__(self) -> None:
        self._asked = self._answered = self._largest = 0  # bytes
        self._heard_at_s = float("-inf")

    def ask(self, size_bytes: int, now_s: float) -> Turn:
        self._asked += size_bytes
        self._largest = max(self._largest, size_bytes)
        return Turn(size_bytes, self._asked, now_s)

    def answered(self, turn: Turn, now_s: float) -> None:
        self._answered = max(self._answered, turn.through)
        self._heard_at_s = now_s

    def wait_s(self, turn: Turn, now_s: float) -> float:
        """How long it may still take if nothing is heard meanwhile; 0 or less: it is late."""
        ahead, since_s = turn.through - self._answered, max(turn.asked_at_s, self._heard_at_s)
        if ahead <= 0:
            turn.overtaken_at_s = since_s = now_s if turn.overtaken_at_s is None else turn.overtaken_at_s
            ahead = turn.bytes
        return since_s + ANSWER_S + min(ahead, self._largest) / LEAST_BYTES_PER_S - now_s


class Watch:
    """Calls `late()` once, when a question is; looks every `ANSWER_S`, until cancelled."""

    def __init__(self, queue: Queue, turn: Turn, late: Callable[[], None]) -> None:
        self._queue, self._turn, self._late = queue, turn, late
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(ANSWER_S, self._look)

    def _look(self) -> None:
        wait_s = self._queue.wait_s(self._turn, self._loop.time())
        if wait_s < _NOW_S:
            self._late()
        else:
            self._timer = self._loop.call_later(min(wait_s, ANSWER_S), self._look)

    def cancel(self) -> None:
        self._timer.cancel()


@contextmanager
def in_turn(queue: Queue, size_bytes: int, late: Callable[[Turn], None]) -> Iterator[None]:
    """For a body that asks and waits: `late(turn)` is called once, when it is. NoResponders is an answer; whatever else is
    raised is none."""
    loop = asyncio.get_running_loop()
    turn = queue.ask(size_bytes, loop.time())
    watch = Watch(queue, turn, lambda: late(turn))
    try:
        yield
    except NoResponders:
        queue.answered(turn, loop.time())
        raise
    finally:
        watch.cancel()
    queue.answered(turn, loop.time())
