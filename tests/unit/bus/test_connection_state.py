"""The table of a connection's states: every state is reached, and a transition that is not in it is a bug."""

from __future__ import annotations

from itertools import product

import pytest

from syncline.bus.connection_state import TRANSITIONS, State, moved


@pytest.mark.parametrize(("before", "after"), [*product(State, State)], ids=lambda state: state.value)
def test_only_what_the_table_has_is_possible(before: State, after: State) -> None:
    if after in TRANSITIONS[before]:
        assert moved(before, after) is after
    else:
        with pytest.raises(AssertionError, match=f"from {before.value} to {after.value}"):
            moved(before, after)


def test_every_state_is_reached_from_the_first_and_can_be_closed_but_the_closed_one() -> None:
    reached = {State.NEW}
    while (more := reached.union(*(TRANSITIONS[state] for state in reached))) != reached:
        reached = more
    assert reached == TRANSITIONS.keys() == set(State)
    assert {state for state in State if State.CLOSED in TRANSITIONS[state]} == set(State) - {State.CLOSED}
    assert not TRANSITIONS[State.CLOSED]
