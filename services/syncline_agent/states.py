"""States of an agent's session and of its local periods, as data: which may follow which.

An illegal transition is a bug of this package, and an assertion. The diagrams of the documentation are generated from these
tables.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, cast

Reported = Literal["starting", "waiting", "fetching", "training", "sending", "failed", "leaving"]


class SessionState(StrEnum):
    """State of an agent in its run; AGENT_SESSION_TRANSITIONS describes each."""

    STARTING = "starting"
    WAITING = "waiting"
    FETCHING = "fetching"
    TRAINING = "training"
    SENDING = "sending"
    OUT = "out"
    FAILED = "failed"
    LEFT = "left"

    @property
    def reported(self) -> Reported:
        """Return the state as heartbeats and metrics name it: OUT and LEFT mean the same to the coordinator."""
        left = self in (SessionState.OUT, SessionState.LEFT)
        return "leaving" if left else cast(Reported, self.value)


class PeriodState(StrEnum):
    """State of one local period; LOCAL_PERIOD_TRANSITIONS describes each."""

    TRAINING = "training"
    MEETING = "meeting"
    BLOCKED = "blocked"
    READY = "ready"
    SENDING = "sending"
    OFFERED = "offered"
    DISCARDED = "discarded"


# An agent in its run:
#   starting  the spec is read, and the training child makes the model
#   waiting   for head to move, for a verdict, or for the gate of an asynchronous run
#   fetching  a center is on its way into the child's inbox
#   training  a local period is under way
#   sending   rounds: the update is on its way; in asynchronous runs the next period begins meanwhile
#   out       the coordinator does not wait for this agent: its disk or its training child needs time
#   failed    the agent cannot train for this run
#   left      the agent has said goodbye
AGENT_SESSION_TRANSITIONS: dict[SessionState, frozenset[SessionState]] = {
    SessionState.STARTING: frozenset(
        {SessionState.WAITING, SessionState.OUT, SessionState.FAILED, SessionState.LEFT},
    ),
    SessionState.WAITING: frozenset(
        {
            SessionState.FETCHING,
            SessionState.TRAINING,
            SessionState.SENDING,  # after the disk has taken the state
            SessionState.LEFT,
        }
    ),
    SessionState.FETCHING: frozenset(
        {
            SessionState.TRAINING,
            SessionState.WAITING,  # elastic averaging fetches after training
            SessionState.OUT,
            SessionState.FAILED,
            SessionState.LEFT,
        }
    ),
    SessionState.TRAINING: frozenset(
        {
            SessionState.WAITING,
            SessionState.FETCHING,  # elastic averaging
            SessionState.SENDING,
            SessionState.OUT,
            SessionState.FAILED,
            SessionState.LEFT,
        }
    ),
    SessionState.SENDING: frozenset({SessionState.WAITING, SessionState.LEFT}),
    SessionState.OUT: frozenset({SessionState.WAITING, SessionState.FAILED, SessionState.LEFT}),
    SessionState.FAILED: frozenset({SessionState.LEFT}),
    SessionState.LEFT: frozenset(),
}

# A local period, from the question to the training child to the end of its update:
#   training   the child makes the steps
#   meeting    elastic averaging: the child makes the update from the newest center
#   blocked    the update is made, and must not be offered before the disk has taken the state
#   ready      the update waits in its outbox
#   sending    chunks and offer are on their way
#   offered    the coordinator will judge the update
#   discarded  the period ended without an offer
LOCAL_PERIOD_TRANSITIONS: dict[PeriodState, frozenset[PeriodState]] = {
    PeriodState.TRAINING: frozenset(
        {PeriodState.MEETING, PeriodState.BLOCKED, PeriodState.READY, PeriodState.DISCARDED},
    ),
    PeriodState.MEETING: frozenset({PeriodState.BLOCKED, PeriodState.READY, PeriodState.DISCARDED}),
    PeriodState.BLOCKED: frozenset({PeriodState.READY, PeriodState.DISCARDED}),
    PeriodState.READY: frozenset({PeriodState.SENDING, PeriodState.DISCARDED}),
    PeriodState.SENDING: frozenset({PeriodState.OFFERED, PeriodState.DISCARDED}),
    PeriodState.OFFERED: frozenset(),
    PeriodState.DISCARDED: frozenset(),
}
