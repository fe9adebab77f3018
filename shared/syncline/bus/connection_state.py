"""The states of one connection to a broker, as a table. Both implementations of the bus follow this table.

A bus has two connections, each with a state of its own. A connection that is lost heals itself; only its owner closes a
connection, and that is final.
"""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """The state of a connection."""

    NEW = "new"  # never connected yet
    CONNECTED = "connected"  # requests are answered
    LOST = "lost"  # no server is reached; pending requests have failed, and small messages wait
    RECONNECTING = "reconnecting"  # a new connection is being made from scratch
    CLOSED = "closed"  # by its owner


TRANSITIONS: dict[State, frozenset[State]] = {
    State.NEW: frozenset({State.CONNECTED, State.LOST, State.CLOSED}),
    State.CONNECTED: frozenset({State.LOST, State.CLOSED}),
    State.LOST: frozenset({State.CONNECTED, State.RECONNECTING, State.CLOSED}),
    State.RECONNECTING: frozenset({State.CONNECTED, State.LOST, State.CLOSED}),
    State.CLOSED: frozenset(),
}


def moved(before: State, after: State) -> State:
    """Return the state after a transition. One that is not in the table is a bug of ours."""
    assert after in TRANSITIONS[before], f"a connection went from {before.value} to {after.value}"
    return after
