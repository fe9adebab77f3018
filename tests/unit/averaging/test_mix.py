"""W_i ← W_i + α (W − W_i): the identities of elastic averaging, in float64 and to the last bit where they are exact."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from syncline.averaging.mix import mix_

ALPHAS = (0.1, 0.25, 0.5, 0.9, 1.0, 1.5, 1.99)
alphas = st.floats(0.0, 1.999)
seeds = st.integers(0, 1 << 30)


def agents(n: int = 5, elements: int = 64, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(elements, generator=generator, dtype=dtype) for _ in range(n)]


def mixed(w: list[Tensor], alpha: float, center: Tensor | None = None) -> list[Tensor]:
    """All agents after a mix with the center; default: their mean."""
    center = mean(w) if center is None else center
    after = [x.clone() for x in w]
    for x in after:
        mix_(x, center, alpha)
    return after


def mean(w: list[Tensor]) -> Tensor:
    return torch.stack(w).mean(0)


def spread(w: list[Tensor], center: Tensor) -> float:
    """Σ‖W_i − W‖²."""
    return float(sum((x - center).square().sum() for x in w))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


@given(alphas, seeds)
def test_the_mean_of_all_agents_is_kept(alpha: float, seed: int) -> None:
    w = agents(seed=seed)
    assert close(mean(mixed(w, alpha)), mean(w))


@given(alphas, seeds)
def test_the_spread_shrinks_by_exactly_the_square_of_one_minus_alpha(alpha: float, seed: int) -> None:
    w = agents(seed=seed)
    before, after = spread(w, mean(w)), spread(mixed(w, alpha), mean(w))
    assert after == pytest.approx((1 - alpha) ** 2 * before, rel=1e-12, abs=1e-12)


@given(alphas, seeds)
def test_renaming_the_agents_renames_the_results(alpha: float, seed: int) -> None:
    w = agents(seed=seed)
    center, order = mean(w), torch.randperm(len(w), generator=torch.Generator().manual_seed(seed)).tolist()
    for x, y in zip(
        mixed([w[i] for i in order], alpha, center), [mixed(w, alpha, center)[i] for i in order], strict=True
    ):
        assert torch.equal(x, y)


@given(alphas, seeds)
def test_moving_everything_moves_the_results(alpha: float, seed: int) -> None:
    w, by = agents(seed=seed), agents(1, seed=seed + 1)[0]
    for moved, plain in zip(mixed([x + by for x in w], alpha), mixed(w, alpha), strict=True):
        assert close(moved, plain + by)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_alpha_one_is_consensus_to_the_last_bit(dtype: torch.dtype) -> None:
    w, center = agents(dtype=dtype), agents(1, seed=9, dtype=dtype)[0]
    assert all(torch.equal(x, center) for x in mixed(w, 1.0, center))


def test_alpha_one_takes_over_even_from_an_agent_that_diverged() -> None:
    w = torch.tensor([float("inf"), float("nan"), 1.0])
    mix_(w, torch.tensor([1.0, 2.0, 3.0]), 1.0)
    assert w.tolist() == [1.0, 2.0, 3.0]


def test_alpha_zero_leaves_every_bit_as_it_was() -> None:
    odd = [
        b"\x00\x00\x00\x80",
        b"\x00\x00\x80\x7f",
        b"\x00\x00\x80\xff",
        b"\x01\x00\xc0\x7f",
        b"\xde\xad\xff\xff",
        b"\x01\0\0\0",
    ]
    w = torch.frombuffer(bytearray(b"".join(odd)), dtype=torch.float32)  # −0, Inf, −Inf, NaNs with payloads, a denormal
    before = w.numpy().tobytes()
    assert struct.unpack("<f", odd[0]) == (-0.0,)
    for center in (torch.zeros(6), torch.full((6,), float("nan")), torch.full((6,), float("inf"))):
        mix_(w, center, 0.0)
        assert w.numpy().tobytes() == before


@pytest.mark.parametrize("alpha", ALPHAS)
def test_it_works_in_place_and_leaves_the_center_alone(alpha: float) -> None:
    w, center = agents(2)
    before, place = center.clone(), w.data_ptr()
    expected = w + alpha * (center - w)
    mix_(w, center, alpha)
    assert torch.equal(center, before) and w.data_ptr() == place and close(w, expected)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_single_precision_is_as_exact_as_it_can_be(alpha: float) -> None:
    w = agents(dtype=torch.float32)
    exact = mixed([x.double() for x in w], alpha)
    assert all(close(x.double(), y, 1e-5) for x, y in zip(mixed(w, alpha), exact, strict=True))


def test_below_two_agents_come_together_and_at_two_they_swing_for_ever() -> None:
    for alpha, shrinks in ((0.1, True), (1.9, True), (2.0, False)):
        w = agents()
        before = spread(w, mean(w))
        for _ in range(50):
            w = mixed(w, alpha)
        assert (spread(w, mean(w)) < 1e-3 * before) is shrinks
