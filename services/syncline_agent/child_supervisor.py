"""Asks the training child of a session, and replaces it after its death."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from syncline.chance import jitter
from syncline.errors import SynclineError
from syncline.runtime.child import ChildDied
from syncline.runtime.child_messages import PrepareRun
from syncline_agent.center_inbox import CenterInbox
from syncline_agent.session_events import SessionEvents
from syncline_agent.session_status import SessionStatus
from syncline_agent.states import SessionState
from syncline_agent.training_child import Training

CRASHES_IN_A_ROW = 3  # of the child, after which this agent says that it cannot train
FIRST_PAUSE_S = 1.0  # after the second death in a row; the pause doubles with each further one
LONGEST_PAUSE_S = 300.0
OUT_FROM_S = 5.0  # pauses from this length on take the agent out of the run

A = TypeVar("A")


class CannotTrain(SynclineError):
    """This agent cannot take part in the run, with the reason."""


class ChildSupervisor:
    """Counts deaths of the training child since it last made an update."""

    def __init__(self, training: Training, status: SessionStatus, events: SessionEvents, inbox: CenterInbox) -> None:
        self._training = training
        self._status = status
        self._events = events
        self._inbox = inbox
        self._prepare: PrepareRun | None = None
        self._deaths = 0
        self._crashes = 0  # deaths that no other process caused

    async def begin(self, prepare: PrepareRun) -> None:
        """Have the child prepare the run; each later child does the same first.

        Raises:
            CannotTrain: the child crashed too often in a row.
            ConfigError: the task or the spec cannot be used on this agent.
            ChildFailed: the task's code raised an error.
        """
        self._prepare = prepare
        await self._start_child()

    async def ask(self, answer: Awaitable[A]) -> A | None:
        """Return the child's answer; None: the child died, and another one is ready. Raises the errors of `begin`."""
        try:
            return await answer
        except ChildDied as error:
            await self._child_died(error)
            await self._start_child()
            return None

    def update_made(self) -> None:
        self._deaths = 0
        self._crashes = 0

    async def _start_child(self) -> None:
        assert self._prepare is not None
        while True:
            try:
                prepared = await self._training.prepare(self._prepare)
                break
            except ChildDied as error:
                await self._child_died(error)
        await self._events.advise(prepared.advice)
        self._status.clock = max(self._status.clock, prepared.clock)
        self._inbox.forget()
        if self._status.state is SessionState.OUT:
            self._status.ready()

    async def _child_died(self, error: ChildDied) -> None:
        """Report the death, and wait before another child is started.

        The first child is replaced at once. A third crash in a row raises CannotTrain: the task would crash in every period.
        A death that another process caused says nothing about the task: the pauses grow, and the agent stays in the run.
        """
        self._deaths += 1
        self._crashes += not error.from_outside
        if self._crashes >= CRASHES_IN_A_ROW:
            raise CannotTrain(f"the training process crashed {self._crashes} times in a row, the last time: {error}")
        pause_s = 0.0
        if self._deaths > 1:
            pause_s = jitter(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(self._deaths - 2, 16)))
        await self._events.child_died(error, pause_s)
        if pause_s >= OUT_FROM_S:
            self._status.go_out(
                f"{self._deaths} training processes in a row died; it starts another in {pause_s:.0f} s"
            )
        await asyncio.sleep(pause_s)
