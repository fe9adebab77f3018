"""`asyncio.gather` as it is since Python 3.12, for every Python: 3.11 takes a turn more where a task is done already.

Everything else that services use of asyncio takes the same turns everywhere; the timelines in `tests/sim/golden` would tell.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from syncline_sim.loop import SimFuture


class _Gathering(SimFuture):
    """Cancelling it cancels all that it waits for, and it is cancelled when they have ended."""

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
                child.exception()  # it was seen
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
    """As asyncio's, but that every awaitable is given once."""
    return _Gathering([asyncio.ensure_future(a) for a in awaitables], return_exceptions) if awaitables else _nothing()


def _nothing() -> asyncio.Future[list[Any]]:
    future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
    future.set_result([])
    return future


def _outcome(child: asyncio.Future[Any]) -> Any:
    if child.cancelled():
        return asyncio.CancelledError()
    error = child.exception()
    return child.result() if error is None else error
