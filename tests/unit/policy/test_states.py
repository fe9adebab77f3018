"""Transitions of a run: the tables decide, and an illegal one raises and changes nothing."""

from __future__ import annotations

from itertools import product

import pytest

from syncline.policy.rounds import Rounds
from syncline.policy.states import PHASE_TRANSITIONS, POLICY_TRANSITIONS, State, check_transition
from syncline.wire.messages import ENDED, Phase


@pytest.mark.parametrize(("before", "after"), list(product(PHASE_TRANSITIONS, repeat=2)))
def test_a_phase_may_follow_another_as_the_table_says_and_itself_unless_it_is_an_end(
    before: Phase, after: Phase
) -> None:
    if after in PHASE_TRANSITIONS[before] or (after == before and before not in ENDED):
        check_transition(PHASE_TRANSITIONS, before, after)
    else:
        with pytest.raises(AssertionError, match=f"from {before} to {after}"):
            check_transition(PHASE_TRANSITIONS, before, after)


def test_nothing_follows_an_end() -> None:
    assert {phase for phase, following in PHASE_TRANSITIONS.items() if not following} == ENDED
    assert POLICY_TRANSITIONS["ended"] == frozenset()


@pytest.mark.parametrize("state", ["waiting", "open"])
def test_an_illegal_transition_of_a_policy_raises_and_changes_nothing(state: State) -> None:
    rounds = Rounds(min_agents=2, versions=9, quorum=None, sample=None, weights="uniform", seed=1)
    rounds._enter("ended")
    with pytest.raises(AssertionError, match=f"from ended to {state}"):
        rounds._enter(state)
    assert rounds.state == "ended"
