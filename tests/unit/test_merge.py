"""Many updates → one: identities of the mean, and the contract of every rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from syncline.engine.merge import RULES, finite, mean

seeds = st.integers(0, 1 << 30)


def updates(n: int = 4, elements: int = 33, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(elements, generator=generator, dtype=dtype) for _ in range(n)]


def reduced(given: list[Tensor], weights: list[float], rule: str = "mean") -> Tensor:
    out = torch.full_like(given[0], float("nan"))  # whatever lay there before
    RULES[rule](given, weights, out)
    return out


# -- every rule --------------------------------------------------------------------------------------------------------
@pytest.fixture(params=sorted(RULES))
def rule(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_identical_updates_give_that_update(rule: str) -> None:
    (x,) = updates(1)
    assert torch.allclose(reduced([x] * 4, [0.25] * 4, rule), x, rtol=1e-12)


def test_a_rule_leaves_its_updates_as_they_were(rule: str) -> None:
    given = updates()
    before = [x.clone() for x in given]
    reduced(given, [0.25] * 4, rule)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


def test_slices_reduced_one_by_one_are_the_whole_reduced_at_once(rule: str) -> None:
    given, weights = updates(), [0.1, 0.2, 0.3, 0.4]
    parts = [reduced([x[part] for x in given], weights, rule) for part in (slice(0, 7), slice(7, 20), slice(20, 33))]
    assert torch.equal(torch.cat(parts), reduced(given, weights, rule))


def test_the_same_updates_in_the_same_order_give_the_same_bits(rule: str) -> None:
    given = updates(dtype=torch.float32)
    assert torch.equal(reduced(given, [0.25] * 4, rule), reduced([x.clone() for x in given], [0.25] * 4, rule))


def test_a_rule_lets_nan_and_infinity_through_to_be_noticed(rule: str) -> None:
    for bad in (float("nan"), float("inf")):
        given = updates()
        given[2][5] = bad
        assert not finite(reduced(given, [0.25] * 4, rule))


# -- the mean ----------------------------------------------------------------------------------------------------------
@given(seeds, st.integers(1, 9))
def test_uniform_weights_give_the_arithmetic_mean(seed: int, n: int) -> None:
    given = updates(n, seed=seed)
    assert torch.allclose(reduced(given, [1 / n] * n), torch.stack(given).mean(0), rtol=1e-12, atol=1e-12)


@given(seeds)
def test_the_mean_is_linear_in_the_updates(seed: int) -> None:
    x, y, weights = updates(seed=seed), updates(seed=seed + 1), [0.4, 0.3, 0.2, 0.1]
    together = reduced([3 * a - 2 * b for a, b in zip(x, y, strict=True)], weights)
    assert torch.allclose(together, 3 * reduced(x, weights) - 2 * reduced(y, weights), rtol=1e-12, atol=1e-12)


@given(seeds)
def test_splitting_an_agent_in_two_of_half_its_weight_changes_nothing(seed: int) -> None:
    x = updates(seed=seed)
    whole, split = reduced(x, [0.4, 0.3, 0.2, 0.1]), reduced([*x, x[0]], [0.2, 0.3, 0.2, 0.1, 0.2])
    assert torch.allclose(whole, split, rtol=1e-12, atol=1e-12)


def test_weights_need_not_sum_to_one() -> None:
    x, y = updates(2)
    assert torch.allclose(reduced([x, y], [2.0, -1.0]), 2 * x - y, rtol=1e-12)


def test_one_update_of_weight_one_stays_itself_to_the_last_bit() -> None:
    (x,) = updates(1, dtype=torch.float32)
    assert torch.equal(reduced([x], [1.0]), x)


def test_whoever_feeds_it_in_the_order_of_names_gets_the_same_bits_whatever_the_order_of_arrival() -> None:
    arrived = dict(zip(["a3", "a1", "a4", "a2"], updates(dtype=torch.float32), strict=True))
    again = {name: arrived[name] for name in ("a2", "a4", "a3", "a1")}
    first, second = (reduced([came[n] for n in sorted(came)], [0.25] * 4) for came in (arrived, again))
    assert torch.equal(first, second)


def test_an_update_without_a_weight_is_our_own_bug() -> None:
    with pytest.raises(ValueError, match="zip"):
        mean(updates(2), [1.0], torch.empty(33, dtype=torch.float64))


# -- finite ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 500, 999])
def test_one_bad_element_is_noticed_wherever_it_is(bad: float, place: int) -> None:
    x = torch.ones(1000)
    x[place] = bad
    assert not finite(x)


def test_infinities_of_both_signs_do_not_cancel() -> None:
    assert not finite(torch.tensor([float("inf"), float("-inf")]))


def test_finite_numbers_are_finite_even_where_their_sum_is_not() -> None:
    assert finite(torch.full((1000,), 3e38))
    assert finite(torch.zeros(3)) and finite(torch.empty(0))
