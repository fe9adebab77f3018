"""Outer optimisers: the contract of all, and the formula of each one's paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from syncline.averaging.merge import Mean
from syncline.averaging.outer import OUTERS, Adagrad, Adam, DelayedNesterov, Momentum, Nesterov, Outer, Sgd, Yogi
from syncline.spec.run_spec import RunSpec, parse
from syncline_sim.reference_merge import outer_step

NEEDED: dict[str, dict[str, Any]] = {"delayed_nesterov": {"every": 3}}  # settings without a default
STEPS = 7


@pytest.fixture(params=sorted(OUTERS))
def outer(request: pytest.FixtureRequest) -> Outer:
    return OUTERS[request.param](**NEEDED.get(request.param, {}))


def vectors(n: int, dtype: torch.dtype = torch.float64, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(40, generator=generator, dtype=dtype) for _ in range(n)]


def step(
    outer: Outer, center: Tensor, merged: Tensor, old: Sequence[Tensor], version: int
) -> tuple[Tensor, list[Tensor]]:
    out, *new = (torch.full_like(center, float("nan")) for _ in range(1 + outer.state_vectors))
    outer.step(center, merged, old, out, new, version)
    return out, new


def walked(outer: Outer, center: Tensor, updates: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """From version 0 through all the updates."""
    state = [torch.zeros_like(center) for _ in range(outer.state_vectors)]
    for version, merged in enumerate(updates):
        center, state = step(outer, center, merged, state, version)
    return center, state


# -- every one of them -------------------------------------------------------------------------------------------------
def test_a_spec_chooses_it_by_its_kind(outer: Outer) -> None:
    section = {"kind": outer.kind, **NEEDED.get(outer.kind, {})}
    spec = parse(RunSpec, {"task": "a.b:C", "outer": section})
    assert spec.outer == outer and spec.state_vectors == outer.state_vectors
    assert parse(RunSpec, spec.model_dump(mode="json")) == spec


def test_a_step_writes_its_results_and_leaves_all_else_alone(outer: Outer) -> None:
    center, merged, *old = vectors(2 + outer.state_vectors)
    old = [x.abs() for x in old]
    before = [x.clone() for x in (center, merged, *old)]
    out, new = step(outer, center, merged, old, 0)
    assert all(torch.equal(x, y) for x, y in zip((center, merged, *old), before, strict=True))
    assert all(x.isfinite().all() for x in (out, *new))


def test_a_step_in_place_is_the_same_step(outer: Outer) -> None:
    """The coordinator steps in place: results are written over the center and the state."""
    center, merged, *old = vectors(2 + outer.state_vectors, torch.float32)
    old = [x.abs() for x in old]
    out, new = step(outer, center, merged, old, 2)
    outer.step(center, merged, old, center, old, 2)
    assert torch.equal(center, out) and all(torch.equal(x, y) for x, y in zip(old, new, strict=True))


@pytest.mark.parametrize("cut", [1, 16, 39])
def test_steps_may_be_made_slice_by_slice(outer: Outer, cut: int) -> None:
    center, *updates = vectors(1 + STEPS, torch.float32)
    whole, state = walked(outer, center, updates)
    parts = [walked(outer, center[p], [u[p] for u in updates]) for p in (slice(0, cut), slice(cut, 40))]
    assert torch.equal(torch.cat([w for w, _ in parts]), whole)
    for mine, pieces in zip(state, zip(*(s for _, s in parts), strict=True), strict=True):
        assert torch.equal(torch.cat(pieces), mine)


def test_it_is_the_formula_to_twelve_digits(outer: Outer) -> None:
    center, *updates = vectors(1 + STEPS)
    found, state = walked(outer, center, updates)
    w, kept = center.numpy(), [np.zeros(40) for _ in range(outer.state_vectors)]
    for version, merged in enumerate(updates):
        w, kept = outer_step(outer, w, merged.numpy(), kept, version)
    for mine, formula in zip((found, *state), (w, *kept), strict=True):
        assert np.allclose(mine.numpy(), formula, rtol=1e-12, atol=1e-14)


def test_an_update_of_zeros_at_the_first_step_keeps_the_center_to_the_last_bit(outer: Outer) -> None:
    (center,) = vectors(1, torch.float32)
    out, state = walked(outer, center, [torch.zeros_like(center)])
    assert torch.equal(out, center)
    assert all(float(x.abs().max()) <= 1e-6 for x in state), "that of FedOpt begins at τ²"


# -- what each of them is ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lr", [0.1, 1.0, 2.5])
def test_sgd_goes_lr_times_the_update(lr: float) -> None:
    center, merged = vectors(2)
    assert torch.allclose(walked(Sgd(lr=lr), center, [merged])[0], center + lr * merged, rtol=1e-12)


def test_sgd_of_lr_one_on_uniform_updates_is_the_mean_of_the_models() -> None:
    center, *models = vectors(6)
    merged = torch.empty_like(center)
    Mean().reduce([w - center for w in models], [1 / 5] * 5, [], merged, [])
    assert torch.allclose(walked(Sgd(), center, [merged])[0], torch.stack(models).mean(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("outer", "arguments"),
    [
        (Sgd(lr=0.3), {"lr": 0.3}),
        (Momentum(lr=0.3), {"lr": 0.3, "momentum": 0.9}),
        (Momentum(momentum=0.5), {"lr": 1.0, "momentum": 0.5}),
        (Nesterov(), {"lr": 0.7, "momentum": 0.9, "nesterov": True}),
    ],
    ids=["sgd", "momentum", "momentum of half", "nesterov"],
)
def test_they_are_torchs_own_to_the_last_bit(outer: Outer, arguments: dict[str, Any], dtype: torch.dtype) -> None:
    """torch.optim.SGD on the flat center, whose gradient is −D."""
    center, *updates = vectors(1 + STEPS, dtype)
    flat = torch.nn.Parameter(center.clone())
    torchs = torch.optim.SGD([flat], **arguments)
    for merged in updates:
        flat.grad = -merged
        torchs.step()
    assert torch.equal(walked(outer, center, updates)[0], flat.detach())


@pytest.mark.parametrize("outer", [Momentum(momentum=0.0), Sgd()], ids=["momentum 0", "sgd"])
def test_momentum_of_zero_is_plain_averaging(outer: Outer) -> None:
    center, *updates = vectors(1 + STEPS)
    assert torch.allclose(walked(outer, center, updates)[0], center + sum(updates), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_as_many_delayed_steps_as_it_waits_for_are_one_nesterov_step_on_their_mean(every: int) -> None:
    center, *updates = vectors(1 + 2 * every)
    means = [torch.stack(updates[i : i + every]).mean(0) for i in (0, every)]
    delayed, (m, gathered) = walked(DelayedNesterov(every=every), center, updates)
    at_once, (same,) = walked(Nesterov(), center, means)
    assert torch.allclose(delayed, at_once, rtol=1e-12, atol=1e-14) and torch.allclose(m, same, rtol=1e-12)
    assert not gathered.any()


def test_delayed_nesterov_moves_by_its_share_between_two_steps_of_the_momentum() -> None:
    center, first, second = vectors(3)
    found, (m, gathered) = walked(DelayedNesterov(every=3), center, [first, second])
    assert torch.allclose(found, center + 0.7 * (first + second) / 3, rtol=1e-12)
    assert not m.any() and torch.allclose(gathered, first + second)


def test_the_first_step_of_fedopt_is_as_the_paper_has_it_without_bias_correction() -> None:
    """v begins at τ², m at 0: m = (1 − β₁) D, v by each one's own rule, W + lr m / (√v + τ). β₁ of Adagrad is 0."""
    center, d = vectors(2)
    start = 1e-3**2
    cases = (
        (Adam(lr=0.2), 0.1 * d, 0.99 * start + 0.01 * d**2),
        (Yogi(lr=0.2), 0.1 * d, start - 0.01 * d**2 * torch.sign(start - d**2)),
        (Adagrad(lr=0.2), d, start + d**2),
    )
    for outer, m, v in cases:
        found, state = walked(outer, center, [d])
        assert torch.allclose(state[0], m, rtol=1e-12) and torch.allclose(state[1], v, rtol=1e-12)
        assert torch.allclose(found, center + 0.2 * m / (v.sqrt() + 1e-3), rtol=1e-12)


def test_yogi_forgets_slowly_where_adam_forgets_at_once() -> None:
    """If D² is far below v, Adam's v shrinks by (1 − β₂) v and Yogi's by (1 − β₂) D²."""
    center, large = vectors(2)
    small = torch.full_like(center, 1e-6)
    (_, adam), (_, yogi) = (walked(outer, center, [100 * large, small])[1] for outer in (Adam(), Yogi()))
    _, first = walked(Yogi(), center, [100 * large])[1]
    assert torch.allclose(adam, 0.99 * first, rtol=1e-6) and torch.allclose(yogi, first, rtol=1e-6)


def test_the_defaults_are_the_papers() -> None:
    assert Momentum().momentum == 0.9 and (Nesterov().lr, Nesterov().momentum) == (0.7, 0.9)
    assert all((o.beta1, o.beta2, o.tau) == (0.9, 0.99, 1e-3) for o in (Adam(), Yogi())) and Adagrad().tau == 1e-3
    assert Adagrad().beta1 == 0.0
