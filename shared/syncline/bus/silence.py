"""The time limit of an answer on a connection whose requests queue behind each other. This module knows no broker.

A small request is answered at once or never. A request with a chunk is not: over a slow link a chunk alone takes many seconds,
and later requests wait behind it. So the time limit applies to the silence of the whole connection, counted from the last
answer to any request. The limit depends on the bytes that have to travel before the next answer.

Answers may come out of order. A request is *overtaken* if a later one was answered first. The connection is not silent then, so
an overtaken request has the same time limit, counted from the moment when the overtaking was noticed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from syncline.errors import NoResponders, Unreachable

ANSWER_S = 5.0  # time for the broker's own work on a request
SILENT_ANSWERS = 3  # unanswered requests in a row after which the connection counts as dead
LEAST_BYTES_PER_S = 16 * 1024  # a slower link counts as broken: 1 MiB takes at most 64 s
_NOW_S = 1e-3  # a timer may fire this much before its time


class Silent(Unreachable):
    """No request on the connection was answered for longer than the slowest accepted link needs."""


@dataclass(slots=True)
class Turn:
    """The place of a request in the queue."""

    bytes: int  # of request and answer
    through: int  # bytes of all requests so far, this one included
    asked_at_s: float  # seconds, by the clock of the caller
    overtaken_at_s: float | None = None  # when a later answer was noticed; None: not overtaken


class Queue:
    """The requests of one connection, as a pure state machine: time is an argument."""

    def __init__(self) -> None:
        self._asked = 0  # bytes of all requests and their answers
        self._answered = 0  # bytes up to the last request that was answered
        self._largest = 0  # bytes of the largest request with its answer
        self._heard_at_s = float("-inf")  # time of the last answer

    def ask(self, size_bytes: int, now_s: float) -> Turn:
        """Append a request.

        Args:
            size_bytes: bytes of the request and the largest answer to it.
            now_s: the time in seconds, by a clock that never goes back.

        Returns:
            Its place, an argument of the other methods.
        """
        self._asked += size_bytes
        self._largest = max(self._largest, size_bytes)
        return Turn(size_bytes, self._asked, now_s)

    def answered(self, turn: Turn, now_s: float) -> None:
        """Note an answer. All requests before it count as answered or overtaken."""
        self._answered = max(self._answered, turn.through)
        self._heard_at_s = now_s

    def wait_s(self, turn: Turn, now_s: float) -> float:
        """Return the seconds left for the answer of a request if no other answer comes; at most 0 if the answer is late."""
        ahead = turn.through - self._answered
        since_s = max(turn.asked_at_s, self._heard_at_s)
        if ahead <= 0:
            if turn.overtaken_at_s is None:
                turn.overtaken_at_s = now_s
            since_s = turn.overtaken_at_s
            ahead = turn.bytes
        return since_s + ANSWER_S + min(ahead, self._largest) / LEAST_BYTES_PER_S - now_s


class Watch:
    """A timer that calls `late()` once when the answer of a request is late. Checks every `ANSWER_S` until cancelled."""

    def __init__(self, queue: Queue, turn: Turn, late: Callable[[], None]) -> None:
        self._queue = queue
        self._turn = turn
        self._late = late
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(ANSWER_S, self._check)

    def _check(self) -> None:
        wait_s = self._queue.wait_s(self._turn, self._loop.time())
        if wait_s < _NOW_S:
            self._late()
        else:
            self._timer = self._loop.call_later(min(wait_s, ANSWER_S), self._check)

    def cancel(self) -> None:
        """Stop the timer."""
        self._timer.cancel()


@contextmanager
def in_turn(queue: Queue, size_bytes: int, late: Callable[[Turn], None]) -> Iterator[None]:
    """Guard a body that sends a request and waits for the answer.

    A body that ends normally or with NoResponders counts as answered; any other error does not.

    Args:
        queue: the requests of the connection.
        size_bytes: bytes of the request and the largest answer to it.
        late: called once with the place of the request when the answer is late. It should make the body fail.
    """
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
