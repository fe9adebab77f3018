"""The states of a run, as data: which may follow which. An illegal transition is a bug of ours, and an assertion.

The diagrams of the documentation are generated from these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeVar

from syncline.wire.messages import Phase

State = Literal["waiting", "open", "merging", "ended"]
S = TypeVar("S", bound=str)

# The policy:
#   waiting   fewer agents than the run starts with, or none to train
#   open      participants train, and offers are gathered
#   merging   a plan is decided and being executed
#   ended     no command follows any more
POLICY_TRANSITIONS: Mapping[State, frozenset[State]] = {
    "waiting": frozenset({"open", "merging", "ended"}),  # to merging: a coordinator takes over, and the plan is in head
    "open": frozenset({"merging", "ended"}),
    "merging": frozenset({"waiting", "open", "ended"}),
    "ended": frozenset(),
}

# The phase of a run, as its head says. A head that is written again in the same phase is no transition.
PHASE_TRANSITIONS: Mapping[Phase, frozenset[Phase]] = {
    "waiting": frozenset({"training", "merging", "done", "failed"}),
    "training": frozenset({"waiting", "merging", "done", "failed"}),  # to waiting: every participant of a run was lost
    "merging": frozenset({"waiting", "training", "done", "failed"}),
    "done": frozenset(),
    "failed": frozenset(),
}


def check_transition(table: Mapping[S, frozenset[S]], before: S, after: S) -> None:
    """Assert that `after` may follow `before`. Staying in a state is legal, unless nothing may follow it."""
    legal = after in table[before] or (after == before and bool(table[before]))
    assert legal, f"a transition from {before} to {after}"
