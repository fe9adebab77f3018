"""An event loop whose time is made up: when nothing is ready it jumps to the next timer, so nobody waits.

The same program and the same seed give the same order of everything. What a simulation cannot repeat (sockets, processes,
signals, threads) is an error here, and so is waiting for what can never come.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextvars import Context
from typing import Any, TypeVar

from syncline_sim.dice import Dice

T = TypeVar("T")

LONGEST_S = 3600.0
TICKS = 1 << 20  # a second; no timer comes early by a rounding, to find that it has to wait for another 1e-16 s
MOST_TURNS = 20_000  # at one instant
_NOT_HERE = (
    "add_reader", "add_writer", "remove_reader", "remove_writer", "add_signal_handler", "remove_signal_handler",
    "sock_recv", "sock_recv_into", "sock_sendall", "sock_connect", "sock_accept", "sock_sendfile", "sendfile",
    "create_connection", "create_server", "create_unix_connection", "create_unix_server", "create_datagram_endpoint",
    "connect_accepted_socket", "connect_read_pipe", "connect_write_pipe", "subprocess_exec", "subprocess_shell",
    "getaddrinfo", "getnameinfo", "start_tls", "call_soon_threadsafe",
)  # fmt: skip


class NotSimulated(AssertionError):
    """Something that a simulation cannot repeat was asked for."""


class Stuck(AssertionError):
    """The simulation cannot go on, or does not end."""


class SimTask(asyncio.Task[T]):
    """A task that counts: sets of tasks have the same order in every process."""

    def __init__(self, coro: Generator[Any, Any, T] | Coroutine[Any, Any, T], number: int, **kwargs: Any) -> None:
        self._number = number
        super().__init__(coro, **kwargs)

    def __hash__(self) -> int:
        return self._number


class SimFuture(asyncio.Future[Any]):
    """The same for futures."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        assert isinstance(loop, VirtualLoop)
        self._number = loop.number()
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self._number


class VirtualLoop(asyncio.BaseEventLoop):
    """`order`: shuffles what is ready at the same instant; without it, first come, first served."""

    def __init__(
        self, order: Dice | None = None, *, longest_s: float = LONGEST_S, most_turns: int = MOST_TURNS
    ) -> None:
        super().__init__()
        self.on_task: Callable[[SimTask[Any]], None] = lambda task: None  # told of every new task, in its own context
        self._order, self._longest_s, self._most_turns = order, longest_s, most_turns
        self._now_s = 0.0
        self._turns = 0
        self._abandoned = ""
        self._numbers = itertools.count()
        self._selector = self  # where other loops wait for sockets, this one jumps
        self._clock_resolution = 1e-9
        self.set_debug(False)
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        return self._now_s

    def hang(self, seconds: float) -> None:
        """Let time pass while nothing runs, as when the machine sleeps."""
        self._now_s += seconds

    def create_future(self) -> asyncio.Future[Any]:
        return SimFuture(self)

    def number(self) -> int:
        """The next one: of a task or a future."""
        return next(self._numbers)

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Inline: it takes no time, and is done when this returns."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def select(self, timeout_s: float | None) -> list[Any]:
        """One turn. `timeout_s` is 0 where something is ready, None where nothing ever will be."""
        if self._abandoned:
            raise NotSimulated(
                f"{self._abandoned} was left to the garbage collector. Close it, as with contextlib.aclosing"
            )
        self._turns += 1
        if self._turns > self._most_turns:
            self._turns = 0
            raise Stuck(
                f"time stands still at {self._now_s:.3f} s, and something goes round and round: {self._waiting()}"
            )
        if timeout_s is None:
            raise Stuck(f"nothing is ready and no timer is set, at {self._now_s:.3f} s: {self._waiting()}")
        loop: Any = self
        if timeout_s > 0:
            self._turns = 0
            self._now_s = max(self._now_s, math.ceil(loop._scheduled[0].when() * TICKS) / TICKS)
            if self._now_s > self._longest_s:
                raise Stuck(f"it did not end within {self._longest_s:g} s: {self._waiting()}")
        elif self._order is not None and len(loop._ready) > 1:
            ready = list(loop._ready)
            self._order.shuffle(ready)
            loop._ready = deque(ready)
        return []

    def _process_events(self, event_list: list[Any]) -> None:
        assert not event_list

    def _make_task(
        self,
        loop: asyncio.AbstractEventLoop,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        context: Context | None = None,
        **kwargs: Any,
    ) -> SimTask[T]:
        task: SimTask[T] = SimTask(coro, self.number(), loop=self, context=context, **kwargs)
        self.on_task(task) if context is None else context.run(self.on_task, task)
        return task

    def _asyncgen_finalizer_hook(self, agen: AsyncGenerator[Any, Any]) -> None:
        """Its `finally` would run whenever the garbage collector comes by."""
        self._abandoned = getattr(agen, "__qualname__", repr(agen))

    def _waiting(self) -> str:
        names = sorted({str(getattr(task.get_coro(), "__qualname__", task)) for task in asyncio.all_tasks(self)})
        return f"{', '.join(names) or 'nobody'} waiting"


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(self: VirtualLoop, *_: Any, **__: Any) -> Any:
        raise NotSimulated(f"loop.{name} in a simulation")

    return refuse


for _name in _NOT_HERE:
    setattr(VirtualLoop, _name, _refusing(_name))
