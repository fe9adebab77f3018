"""Weights of the updates in a merge."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncline.averaging.weights import weights_of
from syncline.policy.events import AgentJoined, Merge, OfferReady
from syncline.policy.rounds import Rounds

COUNT = st.integers(0, 10**6)


def offers(*rows_and_steps: tuple[int, int]) -> list[OfferReady]:
    return [OfferReady(f"a{i}", 1, 0, rows, steps) for i, (rows, steps) in enumerate(rows_and_steps, 1)]


def test_each_kind_of_weights() -> None:
    given = offers((10, 1), (30, 4), (60, 3))
    assert weights_of(given, "uniform") == [1 / 3] * 3
    assert weights_of(given, "samples") == [0.1, 0.3, 0.6]
    assert weights_of(given, "steps") == [0.125, 0.5, 0.375]


@pytest.mark.parametrize("weights", ["samples", "steps"])
def test_weights_are_uniform_where_nobody_has_made_anything(weights: str) -> None:
    assert weights_of(offers((0, 0), (0, 0)), weights) == [0.5, 0.5]  # type: ignore[arg-type]


def test_fednova_weights_are_the_formula() -> None:
    """p_i (Σ p_j a_j) / a_i."""
    given, shares, steps = offers((10, 1), (30, 4), (60, 8)), [0.1, 0.3, 0.6], [1, 4, 8]
    effective = 0.1 * 1 + 0.3 * 4 + 0.6 * 8
    expected = [p * effective / a for p, a in zip(shares, steps, strict=True)]
    assert weights_of(given, "samples", "fednova") == pytest.approx(expected, rel=1e-15)
    assert sum(expected) > 1.5


def test_an_update_without_a_step_weighs_nothing() -> None:
    assert weights_of(offers((1, 0), (1, 3)), "uniform", "fednova") == [0.0, 0.25]


@given(st.lists(COUNT, min_size=1, max_size=9), COUNT, st.sampled_from(["uniform", "samples", "steps"]))
def test_fednova_with_equal_steps_is_none_at_all(rows: list[int], steps: int, weights: str) -> None:
    given = offers(*((r, steps) for r in rows))
    assert weights_of(given, weights, "fednova") == weights_of(given, weights)  # type: ignore[arg-type]


@given(st.lists(st.tuples(COUNT, COUNT), min_size=1, max_size=9), st.sampled_from(["uniform", "samples", "steps"]))
def test_shares_sum_to_one_and_fednova_keeps_the_step_each_update_has_made(
    given: list[tuple[int, int]], weights: str
) -> None:
    """Σ w_i a_i / Σ p_i a_i counts the shares of those that have made a step."""
    made = offers(*given)
    shares = weights_of(made, weights)  # type: ignore[arg-type]
    assert sum(shares) == pytest.approx(1)
    normalized = weights_of(made, weights, "fednova")  # type: ignore[arg-type]
    effective = sum(p * o.steps for p, o in zip(shares, made, strict=True))
    moved = sum(w * o.steps for w, o in zip(normalized, made, strict=True))
    assert moved == pytest.approx(effective * sum(p for p, o in zip(shares, made, strict=True) if o.steps))


def test_a_round_merges_with_them() -> None:
    rounds = Rounds(
        min_agents=2, quorum=None, grace_s=1.0, sample=None, weights="steps", versions=9, seed=0, normalize="fednova"
    )
    for agent in ("a1", "a2"):
        rounds.handle(AgentJoined(agent), 0.0)
    first, second = offers((1, 1), (1, 3))
    assert rounds.handle(first, 0.0) == []
    (merge,) = rounds.handle(second, 0.0)
    assert isinstance(merge, Merge)
    assert [c.weight for c in merge.updates] == pytest.approx([0.25 * 2.5, 0.75 * 2.5 / 3])
