"""An event loop with virtual time: when no callback is ready, the time jumps to the next timer.

The same program and the same seed give the same order of all callbacks. Sockets, processes, signals and threads cannot be
repeated, so using them raises `NotSimulated`. Waiting for an event that can never come raises `Stuck`.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from contextvars import Context
from typing import Any, TypeVar

from syncline_sim.rng import Rng

T = TypeVar("T")

LONGEST_S = 3600.0
TICKS = 1 << 20  # per second; time is rounded up to whole ticks, so that no timer fires 1e-16 s early and is set again
MAX_TURNS = 20_000  # turns of the loop at one instant
_NOT_HERE = (
    "add_reader", "add_writer", "remove_reader", "remove_writer", "add_signal_handler", "remove_signal_handler",
    "sock_recv", "sock_recv_into", "sock_sendall", "sock_connect", "sock_accept", "sock_sendfile", "sendfile",
    "create_connection", "create_server", "create_unix_connection", "create_unix_server", "create_datagram_endpoint",
    "connect_accepted_socket", "connect_read_pipe", "connect_write_pipe", "subprocess_exec", "subprocess_shell",
    "getaddrinfo", "getnameinfo", "start_tls", "call_soon_threadsafe",
)  # fmt: skip


class NotSimulated(AssertionError):
    """A simulated service used something that a simulation cannot repeat."""


class Stuck(AssertionError):
    """The simulation cannot go on, or did not end in time."""


class SimTask(asyncio.Task[T]):
    """A task whose hash is a serial number: sets of tasks have the same order in every process."""

    def __init__(self, coro: Generator[Any, Any, T] | Coroutine[Any, Any, T], number: int, **kwargs: Any) -> None:
        self._number = number
        super().__init__(coro, **kwargs)

    def __hash__(self) -> int:
        return self._number


class SimFuture(asyncio.Future[Any]):
    """A future whose hash is a serial number, as a `SimTask` has."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        assert isinstance(loop, VirtualLoop)
        self._number = loop.number()
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self._number


class VirtualLoop(asyncio.BaseEventLoop):
    """The event loop of a simulation.

    Args:
        order: shuffles the callbacks that are ready at the same instant; None: they run in the order in which they were set.
        longest_s: virtual seconds after which the loop raises Stuck.
        max_turns: turns at one instant after which the loop raises Stuck.
    """

    def __init__(self, order: Rng | None = None, *, longest_s: float = LONGEST_S, max_turns: int = MAX_TURNS) -> None:
        super().__init__()
        self.on_task: Callable[[SimTask[Any]], None] = lambda task: (
            None
        )  # called with every new task, in the task's context
        self._order, self._longest_s, self._max_turns = order, longest_s, max_turns
        self._now_s = 0.0
        self._turns = 0
        self._abandoned = ""
        self._numbers = itertools.count()
        self._selector = self  # the base class calls `select` to wait for sockets; here it advances the time
        self._clock_resolution = 1e-9
        self.set_debug(False)
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        return self._now_s

    def hang(self, seconds: float) -> None:
        """Advance the time while no callback runs, as if the machine were suspended."""
        self._now_s += seconds

    def create_future(self) -> asyncio.Future[Any]:
        return SimFuture(self)

    def number(self) -> int:
        """Return the next serial number of a task or a future."""
        return next(self._numbers)

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Call the function at once. The call takes no virtual time."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def select(self, timeout_s: float | None) -> list[Any]:
        """Advance the time by one turn of the loop.

        Args:
            timeout_s: 0 if a callback is ready; None if no callback is ready and no timer is set.
        """
        if self._abandoned:
            raise NotSimulated(
                f"{self._abandoned} was left to the garbage collector. Close it, as with contextlib.aclosing"
            )
        self._turns += 1
        if self._turns > self._max_turns:
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
        """Record an abandoned generator: the garbage collector would run its `finally` at an arbitrary time."""
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


class _Gathering(SimFuture):
    """The future of `gather`. Cancelling it cancels its children; it is cancelled when all of them have ended."""

    def __init__(self, children: list[asyncio.Future[Any]], keep_errors: bool) -> None:
        super().__init__(children[0].get_loop())
        self._children, self._keep_errors = children, keep_errors
        self._missing = len(children)
        self._asked_to_cancel = False
        for child in [c for c in children if not c.done()]:
            child.add_done_callback(self._on_done)
        for child in [c for c in children if c.done()]:
            self._on_done(child)

    def cancel(self, msg: Any = None) -> bool:
        if self.done():
            return False
        for child in self._children:
            self._asked_to_cancel |= child.cancel(msg=msg)
        return self._asked_to_cancel

    def _on_done(self, child: asyncio.Future[Any]) -> None:
        self._missing -= 1
        if self.done():
            if not child.cancelled():
                child.exception()  # marks the exception as retrieved
            return
        if not self._keep_errors:
            error = asyncio.CancelledError() if child.cancelled() else child.exception()
            if error is not None:
                self.set_exception(error)
                return
        if self._missing:
            return
        if self._asked_to_cancel:
            self.set_exception(asyncio.CancelledError())
        else:
            self.set_result([_outcome(c) for c in self._children])


def gather(*awaitables: Awaitable[Any], return_exceptions: bool = False) -> asyncio.Future[list[Any]]:
    """Replace `asyncio.gather` by its behaviour since Python 3.12; no awaitable may be given twice.

    Python 3.11 takes one more turn of the loop if a task is done already, and timelines would differ between versions. All
    other asyncio functions that the services use take the same turns in every version; `tests/sim/golden` proves this.
    """
    if awaitables:
        return _Gathering([asyncio.ensure_future(a) for a in awaitables], return_exceptions)
    empty: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
    empty.set_result([])
    return empty


def _outcome(child: asyncio.Future[Any]) -> Any:
    if child.cancelled():
        return asyncio.CancelledError()
    error = child.exception()
    return child.result() if error is None else error
