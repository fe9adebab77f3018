"""Sums that are independent of the slices of a vector, and sorting networks."""

from __future__ import annotations

import itertools

import pytest
import torch

from syncline.averaging.kernels import BLOCK, Sums, finite, network, products, squared_distances, squares


# -- sums --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_squares_and_products_are_what_they_say(dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 3 * BLOCK + 100, dtype=dtype)
    assert len(squares(x)) == 4 and squares(x).dtype == torch.float64
    assert float(squares(x).sum()) == pytest.approx(float(x.double() @ x.double()), rel=1e-6)
    total = products([x, y]).sum(0)
    assert float(total[0, 1]) == pytest.approx(float(x.double() @ y.double()), rel=1e-12)
    assert total.shape == (2, 2) and torch.equal(total, total.T)


def test_sums_come_out_the_same_in_any_order_of_the_slices() -> None:
    figures = [torch.rand(blocks, 3, dtype=torch.float64) for blocks in (4, 1, 3, 2)]
    totals = []
    for order in itertools.permutations(range(4)):
        sums = Sums()
        for k in order:
            sums.add(k, figures[k].clone())
        assert sums.total is not None
        totals.append(sums.total)
    assert all(torch.equal(total, totals[0]) for total in totals)
    assert torch.allclose(totals[0], torch.cat(figures).sum(0), rtol=1e-14)


def test_a_sum_waits_for_the_slice_that_is_missing() -> None:
    sums = Sums()
    sums.add(1, torch.ones(2, 1, dtype=torch.float64))
    waiting = sums.total
    assert waiting is None
    sums.add(0, torch.ones(1, 1, dtype=torch.float64))
    total = sums.total
    assert total is not None and total.tolist() == [3.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30])
@pytest.mark.parametrize("place", [0, 1500, 1999])
def test_one_bad_element_shows_in_the_squares_wherever_it_is(bad: float, place: int) -> None:
    x = torch.ones(2000)
    x[place] = bad
    assert not squares(x).isfinite().all()


def test_distances_of_updates_that_are_the_same_are_zero_and_no_distance_is_negative() -> None:
    x, y = 1e6 * torch.randn(2, 500, dtype=torch.float32)
    d = squared_distances(products([x, y, x]).sum(0), [1.0, 1.0, 1.0])
    assert d[0, 2] == 0 and (d.diagonal() == 0).all() and (d >= 0).all()
    assert float(d[0, 1]) == pytest.approx(float((x.double() - y.double()).square().sum()), rel=1e-10)


# -- sorting networks --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", range(1, 13))
def test_a_network_sorts_every_row_that_is_wanted(n: int) -> None:
    """By the zero-one principle: a network sorts if it sorts all sequences of zeros and ones."""
    for first, last in ((0, n), ((n - 1) // 2, n // 2 + 1), (min(1, n - 1), n)):
        rows = torch.tensor(list(itertools.product([0, 1], repeat=n))).T.clone()
        expected = rows.sort(0).values
        for i, j, lower, upper in network(n, first, last):
            small, large = torch.minimum(rows[i], rows[j]), torch.maximum(rows[i], rows[j])
            rows[i], rows[j] = (small if lower else -1), (large if upper else -1)
        assert torch.equal(rows[first:last], expected[first:last])


def test_a_median_needs_fewer_comparisons_than_a_sort() -> None:
    half = [len(network(n, n // 2, n // 2 + 1)) / len(network(n, 0, n)) for n in (7, 15, 64)]
    assert all(share < 1 for share in half) and len(network(4, 0, 4)) == 5 and network(1, 0, 1) == ()


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
