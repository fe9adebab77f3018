"""Merge rules: the contract of all rules, and the identities of each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from syncline.averaging.kernels import BLOCK, Sums
from syncline.averaging.merge import (
    RULES,
    CentredClip,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    MultiKrum,
    NormClip,
    Rule,
    TrimmedMean,
)
from syncline.spec.run_spec import RunSpec, parse
from syncline_sim.reference_merge import merge_updates

NEEDED: dict[str, dict[str, Any]] = {"norm_clip": {"max_norm": 5.0}, "centred_clip": {"tau": 5.0}}  # without a default
WIDE: dict[str, dict[str, Any]] = {"norm_clip": {"max_norm": 1e6}, "centred_clip": {"tau": 1e6}}  # nothing is clipped
ELEMENTS = 3 * BLOCK + 33
N = 7

seeds = st.integers(0, 1 << 30)


@pytest.fixture(params=sorted(RULES))
def rule(request: pytest.FixtureRequest) -> Rule:
    return RULES[request.param](**NEEDED.get(request.param, {}))


@pytest.fixture(params=sorted(RULES))
def wide(request: pytest.FixtureRequest) -> Rule:
    return RULES[request.param](**WIDE.get(request.param, {}))


def vectors(n: int = N, elements: int = ELEMENTS, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(elements, generator=generator, dtype=dtype) for _ in range(n)]


def reduced(
    rule: Rule,
    updates: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    *,
    chunk: int = BLOCK,
    kept: Sequence[Tensor] = (),
    order: Sequence[int] | None = None,
) -> Tensor:
    """Merge as a coordinator does: one or two passes over the slices, in any order."""
    weights = list(weights or [1 / len(updates)] * len(updates))
    kept = list(kept) or [torch.zeros_like(updates[0]) for _ in range(rule.state_vectors)]
    parts = [slice(start, start + chunk) for start in range(0, len(updates[0]), chunk)]
    if rule.two_pass:
        sums = Sums()
        for k in order or range(len(parts)):
            sums.add(k, rule.measure([x[parts[k]] for x in updates], weights, [v[parts[k]] for v in kept]))
        assert sums.total is not None
        weights = rule.weigh(weights, sums.total)
    out, *new = (torch.full_like(updates[0], float("nan")) for _ in range(1 + rule.state_vectors))
    for part in parts:
        rule.reduce([x[part] for x in updates], weights, [v[part] for v in kept], out[part], [v[part] for v in new])
    assert all(torch.equal(v, out) for v in new), "what is kept is the last D"
    return out


# -- every rule --------------------------------------------------------------------------------------------------------
def test_a_spec_chooses_it_by_its_name(rule: Rule) -> None:
    section = {"rule": rule.rule, **NEEDED.get(rule.rule, {})}
    spec = parse(RunSpec, {"task": "a.b:C", "merge": section, "agents": {"min": rule.min_updates()}})
    assert spec.merge == rule and spec.state_vectors == rule.state_vectors
    assert parse(RunSpec, spec.model_dump(mode="json")) == spec


@pytest.mark.parametrize("n", [3, 4, 7])
def test_identical_updates_give_that_update(wide: Rule, n: int) -> None:
    (x,) = vectors(1)
    assert torch.allclose(reduced(wide, [x] * n), x, rtol=1e-12, atol=1e-14)


def test_it_leaves_its_updates_as_they_were(rule: Rule) -> None:
    given, kept = vectors(), vectors(rule.state_vectors, seed=1)
    before = [x.clone() for x in (*given, *kept)]
    reduced(rule, given, kept=kept)
    assert all(torch.equal(x, y) for x, y in zip((*given, *kept), before, strict=True))


def test_what_it_keeps_may_lie_where_it_lay(rule: Rule) -> None:
    given, kept = vectors(), vectors(rule.state_vectors, seed=1)
    apart = reduced(rule, given, kept=kept)
    weights, out = [1 / N] * N, torch.empty_like(given[0])
    if rule.two_pass:
        sums = Sums()
        sums.add(0, rule.measure(given, weights, kept))
        assert sums.total is not None
        weights = rule.weigh(weights, sums.total)
    rule.reduce(given, weights, kept, out, kept)
    assert torch.equal(out, apart) and all(torch.equal(v, out) for v in kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 4, N])
def test_the_size_and_the_order_of_the_slices_change_no_bit(rule: Rule, n: int, dtype: torch.dtype) -> None:
    given, kept = vectors(n, dtype=dtype), vectors(rule.state_vectors, seed=1, dtype=dtype)
    whole = reduced(rule, given, chunk=4 * BLOCK, kept=kept)
    assert whole.isfinite().all()
    for chunk, order in ((BLOCK, [3, 1, 0, 2]), (2 * BLOCK, [1, 0])):
        assert torch.equal(reduced(rule, given, chunk=chunk, kept=kept, order=order), whole)


def test_where_the_bytes_lie_changes_no_bit(rule: Rule) -> None:
    """Slices of messages are not aligned to anything."""
    given = vectors(dtype=torch.float32)
    moved = [torch.frombuffer(bytearray(b"\0" * shift + bytes(x.numpy().data)), dtype=x.dtype, offset=shift)
             for x, shift in zip(given, itertools.cycle((4, 12, 20)))]  # fmt: skip
    assert torch.equal(reduced(rule, given), reduced(rule, moved))


def test_the_order_of_the_agents_changes_only_the_rounding(rule: Rule) -> None:
    given = vectors()
    assert torch.allclose(reduced(rule, given), reduced(rule, given[::-1]), rtol=1e-10, atol=1e-12)


def test_it_moves_with_its_updates(wide: Rule) -> None:
    """A constant added to all of them is added to the result, and so is a factor; all but those that measure from zero."""
    given, (shift,) = vectors(), vectors(1, seed=5)
    moved = reduced(wide, [2 * x + shift for x in given])
    assert torch.allclose(moved, 2 * reduced(wide, given) + shift, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("n", [3, 5, N, 12])
def test_it_is_the_formula_to_twelve_digits(rule: Rule, n: int) -> None:
    given, kept = vectors(n), vectors(rule.state_vectors, seed=1)
    found = reduced(rule, given, kept=kept)
    expected, _ = merge_updates(rule, [x.numpy() for x in given], [1 / n] * n, [v.numpy() for v in kept])
    close = 1e-7 if isinstance(rule, GeometricMedian) else 1e-12  # the formula's own steps end there
    assert np.allclose(found.numpy(), expected, rtol=close, atol=close)


def test_weights_that_do_not_sum_to_one_scale_the_updates(rule: Rule) -> None:
    """Weights of stale updates are (1/N) s_i. Half of every weight gives half of the result, except for clipped updates."""
    given, kept = vectors(), vectors(rule.state_vectors, seed=1)
    half = reduced(rule, given, [0.5 / N] * N, kept=kept)
    expected, _ = merge_updates(rule, [x.numpy() for x in given], [0.5 / N] * N, [v.numpy() for v in kept])
    assert np.allclose(half.numpy(), expected, rtol=1e-7, atol=1e-9)
    if not (rule.state_vectors or isinstance(rule, NormClip)):
        assert torch.allclose(half, reduced(rule, given) / 2, rtol=1e-12)


# -- under attack ------------------------------------------------------------------------------------------------------
ROBUST = [Median(), TrimmedMean(), NormClip(max_norm=3.0), CentredClip(tau=3.0), Krum(), MultiKrum(), GeometricMedian()]


def attacked(factor: float, n: int = N) -> tuple[list[Tensor], Tensor]:
    """Return six similar updates and one scaled by `factor`, and the mean of the honest ones."""
    (way,) = vectors(1, elements=2 * BLOCK, seed=9)
    way = way / way.norm()
    honest = [way + 0.3 * noise / noise.norm() for noise in vectors(n, elements=2 * BLOCK)]
    return [*honest[:2], factor * honest[2], *honest[3:]], torch.stack([*honest[:2], *honest[3:]]).mean(0)


@pytest.mark.parametrize("robust", ROBUST, ids=lambda r: r.rule)
@pytest.mark.parametrize("factor", [-10.0, 1e6, -1e6])
def test_one_bad_update_of_seven_breaks_the_mean_and_no_other_rule(robust: Rule, factor: float) -> None:
    given, honest = attacked(factor)
    found = reduced(robust, given)
    assert float(reduced(Mean(), given) @ honest) < 0 or abs(factor) > 10, "the mean goes the other way"
    assert (reduced(Mean(), given) - honest).norm() > 1
    assert (found - honest).norm() < 0.9 and float(found @ honest) > 0.1


# -- mean --------------------------------------------------------------------------------------------------------------
@given(seeds, st.integers(1, 9))
def test_uniform_weights_give_the_arithmetic_mean(seed: int, n: int) -> None:
    given = vectors(n, 33, seed)
    assert torch.allclose(reduced(Mean(), given), torch.stack(given).mean(0), rtol=1e-12, atol=1e-12)


@given(seeds)
def test_splitting_an_agent_in_two_of_half_its_weight_changes_nothing(seed: int) -> None:
    x = vectors(4, 33, seed)
    whole = reduced(Mean(), x, [0.4, 0.3, 0.2, 0.1])
    split = reduced(Mean(), [*x, x[0]], [0.2, 0.3, 0.2, 0.1, 0.2])
    assert torch.allclose(whole, split, rtol=1e-12, atol=1e-12)


def test_weights_of_the_mean_need_not_sum_to_one() -> None:
    x, y = vectors(2)
    assert torch.allclose(reduced(Mean(), [x, y], [2.0, -1.0]), 2 * x - y, rtol=1e-12)


def test_one_update_of_weight_one_stays_itself_to_the_last_bit(wide: Rule) -> None:
    (x,) = vectors(1, dtype=torch.float32)
    assert torch.equal(reduced(wide, [x], [1.0]), x)


def test_an_update_without_a_weight_is_our_own_bug() -> None:
    with pytest.raises(ValueError, match="zip"):
        Mean().reduce(vectors(2), [1.0], [], torch.empty(ELEMENTS, dtype=torch.float64), [])


# -- median and trimmed mean -------------------------------------------------------------------------------------------
@given(seeds, st.integers(1, 40))
def test_the_median_is_numpys(seed: int, n: int) -> None:
    given = vectors(n, 50, seed, torch.float32)
    expected = np.median(torch.stack(given).double().numpy(), axis=0)
    assert np.allclose(reduced(Median(), given).numpy(), expected, rtol=1e-6, atol=1e-7)


@given(seeds, st.integers(1, 20))
def test_nothing_trimmed_is_the_mean_and_all_but_the_middle_is_the_median(seed: int, n: int) -> None:
    given = vectors(n, 33, seed)
    assert torch.allclose(reduced(TrimmedMean(trim=0), given), reduced(Mean(), given), rtol=1e-12, atol=1e-12)
    most = (n - 1) // 2
    if most:
        assert torch.equal(reduced(TrimmedMean(trim=most), given), reduced(Median(), given))


@given(seeds, st.integers(3, 15))
def test_the_median_is_within_what_the_honest_ones_sent(seed: int, n: int) -> None:
    given = vectors(n, 33, seed)
    bad = (n - 1) // 2
    for i, x in enumerate(given[:bad]):
        x.mul_((-1) ** i * 1e9)
    found, honest = reduced(Median(), given), torch.stack(given[bad:])
    assert (found >= honest.amin(0)).all() and (found <= honest.amax(0)).all()


def test_of_equal_values_the_median_is_that_value_to_the_last_bit() -> None:
    x, *others = vectors(4, dtype=torch.float32)
    assert torch.equal(reduced(Median(), [others[0], x, x, x, others[1]]), x)


@pytest.mark.parametrize(
    ("trim", "n", "k"), [(0.2, 4, 0), (0.2, 5, 1), (0.2, 9, 1), (0.3, 10, 3), (2, 9, 2), (4, 7, 3)]
)
def test_what_is_trimmed_is_a_number_or_a_share(trim: float, n: int, k: int) -> None:
    given = vectors(n)
    ranked = torch.stack(given).sort(0).values
    assert torch.allclose(reduced(TrimmedMean(trim=trim), given), ranked[k : n - k].mean(0), rtol=1e-12, atol=1e-13)


# -- clipping ----------------------------------------------------------------------------------------------------------
def test_a_clip_beyond_every_norm_is_the_mean() -> None:
    given = vectors()
    for rule in (NormClip(max_norm=1e9), CentredClip(tau=1e9)):
        kept = vectors(rule.state_vectors, seed=1)
        assert torch.allclose(reduced(rule, given, kept=kept), reduced(Mean(), given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", [[1 / N] * N, [0.4, *[0.1] * 6]], ids=["uniform", "by size"])
def test_no_update_moves_a_clipped_mean_by_more_than_its_share_of_the_norm(weights: list[float]) -> None:
    given = vectors()
    without = reduced(NormClip(max_norm=3.0), [torch.zeros_like(given[0]), *given[1:]], weights)
    for factor in (1e-3, 1.0, -1e9):
        moved = reduced(NormClip(max_norm=3.0), [factor * given[0], *given[1:]], weights) - without
        assert moved.norm() <= weights[0] * 3.0 * (1 + 1e-12)


def test_one_update_moves_centred_clipping_by_at_most_two_tau_over_n() -> None:
    given, kept = vectors(), vectors(1, seed=1)
    here = reduced(CentredClip(tau=2.0), given, kept=kept)
    for other in (-given[0], 1e9 * given[0], torch.zeros_like(given[0])):
        moved = reduced(CentredClip(tau=2.0), [other, *given[1:]], kept=kept) - here
        assert moved.norm() <= 2 * 2.0 / N * (1 + 1e-12)


def test_centred_clipping_begins_where_the_last_merge_ended() -> None:
    """Updates that agree are reached step by step, τ at a time."""
    (x,) = vectors(1)
    x = 10 * x / x.norm()
    kept = [torch.zeros_like(x)]
    for merges in range(1, 6):
        kept = [reduced(CentredClip(tau=2.5), [x] * 4, kept=kept)]
        assert torch.allclose(kept[0], min(1.0, merges / 4) * x, rtol=1e-10)


# -- krum --------------------------------------------------------------------------------------------------------------
@given(seeds, st.integers(3, 15), st.integers(0, 6))
def test_krum_gives_one_of_the_updates_to_the_last_bit(seed: int, n: int, f: int) -> None:
    given = vectors(n, 33, seed, torch.float32)
    found = reduced(Krum(f=f), given)
    assert any(torch.equal(found, x) for x in given)


def test_krum_takes_the_one_with_the_nearest_neighbours() -> None:
    given = [torch.tensor([x], dtype=torch.float64) for x in (0.0, 1.0, 1.1, 1.3, 9.0)]
    assert reduced(Krum(f=1), given).item() == 1.1  # its two nearest: 0.01 + 0.04


@pytest.mark.parametrize(("n", "f"), [(5, 1), (7, 2), (15, 6)])
def test_krum_takes_none_of_the_bad_ones_where_they_are_as_many_as_it_withstands(n: int, f: int) -> None:
    assert Krum(f=f).min_updates() == n
    given, (far,) = vectors(n), vectors(1, seed=8)
    for i in range(f):  # they hold together, and are near each other
        given[2 * i] = 100 * far + 1e-3 * given[2 * i]
    found = reduced(Krum(f=f), given)
    assert any(torch.equal(found, given[i]) for i in range(n) if i >= 2 * f or i % 2)


def test_multi_krum_of_all_is_the_mean_and_of_one_is_krum() -> None:
    given = vectors()
    assert torch.allclose(reduced(MultiKrum(m=N), given), reduced(Mean(), given), rtol=1e-12, atol=1e-12)
    assert torch.equal(reduced(MultiKrum(m=1), given), reduced(Krum(), given))


def test_multi_krum_leaves_out_what_krum_finds_worst() -> None:
    given, _ = attacked(-10.0)
    assert (reduced(MultiKrum(m=6), given) - torch.stack([*given[:2], *given[3:]]).mean(0)).norm() < 1e-12


def test_with_fewer_updates_than_it_needs_krum_withstands_fewer() -> None:
    given = vectors(4)  # of five, the one that could not be read is gone: none of the others is bad
    assert torch.equal(reduced(Krum(f=1), given), reduced(Krum(f=0), given))


# -- the geometric median ----------------------------------------------------------------------------------------------
def test_the_geometric_median_of_a_square_is_its_middle() -> None:
    square = [torch.tensor(x, dtype=torch.float64) for x in ([0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0])]
    assert torch.allclose(reduced(GeometricMedian(), square), torch.full((2,), 0.5, dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize("far", [1e-3, 50.0, 1e6])
def test_four_of_seven_that_agree_are_the_geometric_median_to_the_last_bit(far: float) -> None:
    x, *others = vectors(4, dtype=torch.float32)
    assert torch.equal(
        reduced(GeometricMedian(), [x, far * others[0], x, far * others[1], x, x + far * others[2], x]), x
    )


@given(seeds, st.integers(3, 9))
def test_nowhere_is_the_sum_of_the_distances_less_than_at_the_geometric_median(seed: int, n: int) -> None:
    given = vectors(n, 6, seed)

    def distances(z: Tensor) -> float:
        return sum(float((x - z).norm()) for x in given)

    found = reduced(GeometricMedian(), given)
    for step in vectors(8, 6, seed + 1):
        assert distances(found) <= distances(found + 1e-3 * step) * (1 + 1e-12)


def test_an_agent_of_three_times_the_weight_counts_as_three() -> None:
    given = vectors(4)
    weighted = reduced(GeometricMedian(), given, [0.5, 1 / 6, 1 / 6, 1 / 6])
    assert torch.allclose(weighted, reduced(GeometricMedian(), [given[0]] * 3 + given[1:]), rtol=1e-7, atol=1e-9)


def test_a_large_common_part_hides_no_distances() -> None:
    (common,) = vectors(1, seed=4)
    given = vectors()
    moved = reduced(GeometricMedian(), [1e4 * common + x for x in given]) - 1e4 * common
    assert torch.allclose(moved, reduced(GeometricMedian(), given), atol=1e-4)


# -- how many they need ------------------------------------------------------------------------------------------------
def test_a_rule_needs_as_many_updates_as_its_paper_says() -> None:
    assert [r.min_updates() for r in (Mean(), NormClip(max_norm=1), CentredClip(tau=1))] == [1, 1, 1]
    assert [r.min_updates() for r in (Median(), GeometricMedian(), TrimmedMean(), TrimmedMean(trim=3))] == [3, 3, 3, 7]
    assert [TrimmedMean(trim=t).min_updates() for t in (0, 0.1, 0.2, 0.4)] == [1, 10, 5, 3]
    assert [Krum(f=f).min_updates() for f in (0, 1, 2)] == [3, 5, 7] and MultiKrum(f=1, m=9).min_updates() == 9


def test_fewer_than_it_needs_are_reduced_all_the_same(rule: Rule) -> None:
    """Unreadable updates were dropped before, and a rule merges the others; the policy decides whether a merge is made."""
    for n in range(1, rule.min_updates()):
        assert reduced(rule, vectors(n)).isfinite().all()
    assert math.isfinite(float(reduced(rule, vectors(3), [0.0, 0.0, 0.0]).sum()))


def test_a_rule_that_looks_and_does_not_say_at_what_is_no_rule() -> None:
    with pytest.raises(TypeError, match="Blind sets `two_pass`: define both `measure` and `weigh`"):

        class Blind(Rule):
            rule: Literal["blind"] = "blind"
            two_pass: ClassVar[bool] = True
