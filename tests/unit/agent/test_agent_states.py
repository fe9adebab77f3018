"""Transitions of a session and of a local period: the tables decide, and an illegal one raises and changes nothing."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import product
from typing import get_args

import pytest

from syncline.runtime.child_messages import TrainPeriod
from syncline_agent.local_period import LocalPeriod
from syncline_agent.session_status import SessionStatus
from syncline_agent.states import (
    AGENT_SESSION_TRANSITIONS,
    LOCAL_PERIOD_TRANSITIONS,
    PeriodState,
    Reported,
    SessionState,
)

PERIOD = LocalPeriod(TrainPeriod(version=0, clock=1, part=0, parts=1), base=0, term=1, epoch=0)
LEGAL_PERIODS = [
    (before, after) for before, following in LOCAL_PERIOD_TRANSITIONS.items() for after in sorted(following)
]
ILLEGAL_PERIODS = [
    (before, after)
    for before, after in product(PeriodState, repeat=2)
    if after not in LOCAL_PERIOD_TRANSITIONS[before] and (before != after or not LOCAL_PERIOD_TRANSITIONS[before])
]
LEGAL_SESSIONS = [
    (before, after) for before, following in AGENT_SESSION_TRANSITIONS.items() for after in sorted(following)
]
ILLEGAL_SESSIONS = [
    (before, after)
    for before, after in product(SessionState, repeat=2)
    if after not in AGENT_SESSION_TRANSITIONS[before] and before != after and before is not SessionState.LEFT
]


def status_in(state: SessionState) -> SessionStatus:
    return SessionStatus(state=state, reason="as it was", clock=3)


def values(status: SessionStatus) -> dict[str, object]:
    return {field.name: getattr(status, field.name) for field in fields(status)}


@pytest.mark.parametrize(("before", "after"), LEGAL_SESSIONS)
def test_a_session_changes_its_state_as_the_table_says(before: SessionState, after: SessionState) -> None:
    status = status_in(before)
    status.enter(after, "why")
    assert (status.state, status.reason) == (after, "why")


@pytest.mark.parametrize(("before", "after"), ILLEGAL_SESSIONS)
def test_an_illegal_transition_of_a_session_raises_and_changes_nothing(
    before: SessionState, after: SessionState
) -> None:
    status = status_in(before)
    unchanged = values(status)
    with pytest.raises(AssertionError, match=f"from {before} to {after}"):
        status.enter(after)
    assert values(status) == unchanged


@pytest.mark.parametrize("after", SessionState)
def test_after_the_goodbye_a_session_stays_as_it_is(after: SessionState) -> None:
    status = status_in(SessionState.LEFT)
    status.enter(after)
    assert status.state is SessionState.LEFT


@pytest.mark.parametrize(("before", "after"), LEGAL_PERIODS)
def test_a_period_changes_its_state_as_the_table_says(before: PeriodState, after: PeriodState) -> None:
    period = replace(PERIOD, state=before)
    period.enter(after)
    assert period == replace(PERIOD, state=after)


@pytest.mark.parametrize(("before", "after"), ILLEGAL_PERIODS)
def test_an_illegal_transition_of_a_period_raises_and_changes_nothing(before: PeriodState, after: PeriodState) -> None:
    period = replace(PERIOD, state=before)
    with pytest.raises(AssertionError, match=f"from {before} to {after}"):
        period.enter(after)
    assert period == replace(PERIOD, state=before)


def test_every_state_has_a_row_and_can_be_reported() -> None:
    assert set(AGENT_SESSION_TRANSITIONS) == set(SessionState) and set(LOCAL_PERIOD_TRANSITIONS) == set(PeriodState)
    assert {state.reported for state in SessionState} == set(get_args(Reported))


def test_an_update_ends_offered_or_discarded() -> None:
    ends = {state for state, following in LOCAL_PERIOD_TRANSITIONS.items() if not following}
    assert ends == {PeriodState.OFFERED, PeriodState.DISCARDED}
