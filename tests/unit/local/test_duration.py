"""The duration of a local period: by steps or by seconds, with time as an argument."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncline.local.duration import Duration


def walk(period: Duration, *step_s: float) -> int:
    """Make steps of these lengths, the last one repeatedly, while they fit; return their number."""
    elapsed_s = 0.0
    for k in range(1_000):
        elapsed_s += step_s[min(k, len(step_s) - 1)]
        if not period.stepped(elapsed_s):
            break
    return period.done


def test_a_period_of_steps_does_not_look_at_the_clock() -> None:
    period = Duration(3)
    assert [period.stepped(t) for t in (0.0, 1e9, 1e9)] == [True, True, False]
    assert period.expected == 3


def test_no_step_is_the_first_and_the_last() -> None:
    assert not Duration(0).is_open and Duration(0).expected == 0


@given(st.integers(1, 64), st.integers(1, 320))
def test_at_an_even_pace_as_many_steps_are_made_as_fit(step: int, whole: int) -> None:
    """Times are sixteenths of a second, so that their sums are exact."""
    assert walk(Duration(10**6, whole / 16), step / 16) == max(1, whole // step)


def test_one_step_is_made_however_long_it_takes() -> None:
    assert walk(Duration(100, 0.5), 60.0) == 1


def test_steps_that_take_no_time_are_bounded() -> None:
    assert walk(Duration(7, 0.5), 0.0) == 7


def test_a_slow_first_step_is_no_measure_of_those_that_follow() -> None:
    """The first step is slow, as it loads data or wakes a device; later steps are quick."""
    assert walk(Duration(100, 4.0), 2.5, 0.25) == 1, "the second may take as long"
    assert walk(Duration(100, 6.0), 2.5, 0.25) == 15


def test_one_hiccup_late_in_a_period_does_not_end_it() -> None:
    assert walk(Duration(100, 4.0), *[0.25] * 8, 1.0, 0.25) == 13


def test_the_steps_to_be_expected_follow_the_pace() -> None:
    period = Duration(100, 4.0)
    assert period.expected == 0, "nobody can tell yet"
    period.stepped(0.5)
    assert period.expected == 8
    period.stepped(0.75)
    assert period.expected == 2 + 13
    period.stepped(9.0)
    assert period.expected == 3


@pytest.mark.parametrize("most", [1, 5])
def test_no_more_are_expected_than_the_most(most: int) -> None:
    period = Duration(most, 60.0)
    period.stepped(0.0)
    assert period.expected == most
