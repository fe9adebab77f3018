"""Local updates and W_i: the table of `local_update`, in float64; elastic averaging loses no difference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from syncline.spec.run_spec import RunSpec, parse
from syncline_agent.local_update import DeviationUpdate, ElasticUpdate, LocalUpdate, ProgressUpdate, local_update_of

ROUNDS: dict[str, Any] = {"kind": "rounds"}
ASYNC: dict[str, Any] = {"kind": "async"}


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(x: Tensor, y: Tensor) -> bool:
    return torch.allclose(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("sync", "mix", "kind", "needs_center"),
    [
        (ROUNDS, {"alpha": 0.5}, DeviationUpdate, False),
        (ASYNC, {}, ProgressUpdate, False),
        (ROUNDS, {"kind": "elastic", "alpha": 0.2}, ElasticUpdate, True),
        (ASYNC, {"kind": "elastic", "alpha": 0.2}, ElasticUpdate, True),
    ],
    ids=["rounds", "async", "elastic rounds", "elastic async"],
)
def test_the_settings_say_what_an_update_is(sync: Any, mix: Any, kind: type[LocalUpdate], needs_center: bool) -> None:
    made = local_update_of(parse(RunSpec, {"task": "a:B", "agents": {"min": 4}, "sync": sync, "mix": mix}), [])
    assert type(made) is kind and made.needs_center is needs_center and made.pending == {}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 1.7])
def test_a_deviation_is_from_the_center_that_the_period_began_with(alpha: float) -> None:
    updates, own, start = DeviationUpdate(alpha), vector(9.0, 9.0), torch.empty(2, dtype=torch.float64)
    updates.begin(own, start, vector(1.0, 2.0), first=True)
    assert own.tolist() == start.tolist() == [1.0, 2.0], "an agent without W_i begins with W, whatever alpha"
    own += vector(1.0, -1.0)
    assert updates.take(own, start, 1).tolist() == [1.0, -1.0]
    updates.resolve({1: False}, own)
    updates.begin(own, start, vector(4.0, 0.0), first=False)
    assert close(own, vector(2.0, 1.0) + alpha * (vector(4.0, 0.0) - vector(2.0, 1.0)))
    assert close(updates.take(own, start, 2), own - vector(4.0, 0.0)) and updates.pending == {}


def test_progress_is_of_that_one_period_from_the_newest_center_or_from_where_the_last_one_ended() -> None:
    updates, own, start = ProgressUpdate(), vector(0.0), vector(0.0)
    updates.begin(own, start, vector(5.0), first=True)
    own += 1.0
    assert updates.take(own, start, 1).tolist() == [1.0]
    updates.begin(own, start, None, first=False)
    own += 0.25
    assert own.tolist() == [6.25] and updates.take(own, start, 2).tolist() == [0.25], "counted from where it went on"
    updates.resolve({1: True, 2: False}, own)
    updates.begin(own, start, vector(-1.0), first=False)
    assert own.tolist() == start.tolist() == [-1.0] and updates.pending == {}


def test_an_elastic_difference_is_given_up_at_once_and_given_back_where_it_is_not_merged() -> None:
    updates, own, center = ElasticUpdate(0.25), vector(0.0), vector(0.0)
    updates.begin(own, center, vector(4.0), first=True)
    assert own.tolist() == [4.0]
    own += 8.0
    difference = updates.take(own, center, 1)
    assert difference.tolist() == [2.0] and own.tolist() == [10.0] and updates.pending.keys() == {1}
    updates.resolve({}, own)
    assert own.tolist() == [10.0] and updates.pending.keys() == {1}, "not judged"
    updates.resolve({1: False}, own)
    assert own.tolist() == [12.0] and updates.pending == {}
    updates.resolve({1: False}, own)
    assert own.tolist() == [12.0], "told again"
    updates.take(own, center, 2)
    updates.resolve({1: False, 2: True}, own)
    assert own.tolist() == [10.0] and updates.pending == {}


def test_a_difference_that_was_never_offered_comes_back_with_the_next_verdict() -> None:
    updates, own = ElasticUpdate(0.5), vector(8.0)
    updates.take(own, vector(0.0), 1)
    updates.take(own, vector(0.0), 2)
    updates.resolve({2: True}, own)
    assert own.tolist() == [6.0] and updates.pending == {}, "8 − 4 − 2, and the 4 are back"


def test_where_an_elastic_agent_begins_its_center_is_only_what_it_is_measured_from() -> None:
    updates, own, center = ElasticUpdate(0.5), vector(3.0), vector(0.0)
    updates.begin(own, center, vector(7.0), first=False)
    assert own.tolist() == [3.0] and center.tolist() == [7.0]
    updates.begin(own, center, None, first=False)
    assert own.tolist() == [3.0] and center.tolist() == [7.0]


@given(
    st.floats(0.01, 0.9),
    st.lists(
        st.tuples(st.floats(-10, 10), st.floats(-10, 10), st.sampled_from(["merged", "dropped", "", ""])), max_size=30
    ),
)
def test_what_an_agent_gives_up_is_merged_waiting_or_back(
    alpha: float, periods: list[tuple[float, float, str]]
) -> None:
    """W_i + Σ merged d + Σ pending d = the first W_i + Σ training steps, for any verdicts in any order."""
    updates, own, total = ElasticUpdate(alpha), vector(1.0, -1.0), vector(1.0, -1.0)
    merged = vector(0.0, 0.0)
    verdicts: dict[Any, Any] = {}
    waiting: dict[Any, Any] = {}
    for clock, (step, place, fate) in enumerate(periods, start=1):
        updates.resolve({c: v for c, v in verdicts.items() if c > max(verdicts, default=0) - 4}, own)
        own += step
        total = total + step
        waiting[clock] = updates.take(own, vector(place, -place), clock).clone()
        if fate or len(waiting) > 2:  # everything that waits is judged, and the oldest fares otherwise than the rest
            for older, difference in waiting.items():
                verdicts[older] = (fate == "merged") ^ (older == min(waiting) and len(waiting) > 1)
                merged = merged + difference * verdicts[older]
            waiting.clear()
    updates.resolve({c: v for c, v in verdicts.items() if c > max(verdicts, default=0) - 4}, own)
    pending = sum(updates.pending.values(), vector(0.0, 0.0))
    assert updates.pending.keys() == waiting.keys()
    assert torch.allclose(own + merged + pending, total, atol=1e-9)


BUFFERS = [slice(1, 2)]


def test_every_update_holds_the_values_of_the_buffers_and_the_differences_of_the_parameters() -> None:
    for updates in (DeviationUpdate(0.5, BUFFERS), ProgressUpdate(BUFFERS), ElasticUpdate(0.5, BUFFERS)):
        own, start = vector(0.0, 0.0), vector(0.0, 0.0)
        updates.begin(own, start, vector(1.0, 4.0), first=True)
        own += vector(2.0, 3.0)
        moved = 1.0 if isinstance(updates, ElasticUpdate) else 2.0
        assert updates.take(own, start, 1).tolist() == [moved, 7.0]


def test_elastic_averaging_gives_up_nothing_of_a_buffer() -> None:
    updates, own, center = ElasticUpdate(0.5, BUFFERS), vector(0.0, 0.0), vector(0.0, 0.0)
    updates.begin(own, center, vector(0.0, 4.0), first=True)
    own += vector(2.0, 3.0)
    updates.take(own, center, 1)
    assert own.tolist() == [1.0, 7.0] and updates.pending[1].tolist() == [1.0, 0.0]
    updates.resolve({1: False}, own)
    assert own.tolist() == [2.0, 7.0], "what was dropped is given back"


def test_over_relaxed_mixing_does_not_take_a_buffer_beyond_the_center() -> None:
    updates, own, start = DeviationUpdate(1.5, BUFFERS), vector(10.0, 10.0), vector(0.0, 0.0)
    updates.begin(own, start, vector(1.0, 1.0), first=False)
    assert own.tolist() == [-3.5, 1.0]
