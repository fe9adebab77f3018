"""Status of an agent in its run: the one place that heartbeats, metrics and the session's work share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from syncline.policy.states import check_transition
from syncline.runtime.child_messages import PeriodReport
from syncline_agent.states import AGENT_SESSION_TRANSITIONS, SessionState

MOST_REASON_CHARS = 2000


@dataclass(slots=True)
class SessionStatus:
    """Every assignment sets `changed`, so that metrics follow; `significant` asks for a heartbeat at once."""

    changed: asyncio.Event = field(default_factory=asyncio.Event)
    significant: asyncio.Event = field(default_factory=asyncio.Event)  # the agent is ready, out of the run, or failed
    state: SessionState = SessionState.STARTING
    reason: str = ""  # for OUT and FAILED
    clock: int = 0  # local periods finished
    epoch: int = 0  # of the head that all of this refers to
    acknowledged: int = 0  # clock of the newest offer that the bus has acknowledged in that epoch
    version: int = 0  # of the center that the agent trains from
    part: int = 0  # number of the agent's part of the data
    bytes_up: int = 0
    bytes_down: int = 0
    last_report: PeriodReport | None = None  # of the last period that made an update

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name != "changed":
            self.changed.set()

    def enter(self, state: SessionState, reason: str = "") -> None:
        """Change the state. Raises AssertionError for a transition that AGENT_SESSION_TRANSITIONS does not have.

        After the goodbye nothing changes any more: the session's work goes on until it is cancelled.
        """
        if self.state is SessionState.LEFT:
            return
        check_transition(AGENT_SESSION_TRANSITIONS, self.state, state)
        self.state = state
        self.reason = reason[:MOST_REASON_CHARS]

    def ready(self) -> None:
        self.enter(SessionState.WAITING)
        self.significant.set()

    def go_out(self, reason: str) -> None:
        """Leave the run for a while: the coordinator does not wait for this agent until it is ready again."""
        self.enter(SessionState.OUT, reason)
        self.significant.set()

    def fail(self, reason: str) -> None:
        self.enter(SessionState.FAILED, reason)
        self.significant.set()
