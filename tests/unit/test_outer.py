"""The outer optimiser: (W, D) → the next W."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from syncline.engine.merge import mean
from syncline.engine.outer import OUTERS, Outer, sgd


def vectors(n: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(40, generator=generator, dtype=dtype) for _ in range(n)]


def stepped(outer: Outer, center: Tensor, merged: Tensor) -> Tensor:
    out = torch.full_like(center, float("nan"))
    outer(center, merged, out)
    return out


@pytest.mark.parametrize("kind", sorted(OUTERS))
def test_an_outer_step_leaves_center_and_update_alone(kind: str) -> None:
    center, merged = vectors(2)
    before = center.clone(), merged.clone()
    stepped(OUTERS[kind](1.0), center, merged)
    assert torch.equal(center, before[0]) and torch.equal(merged, before[1])


@pytest.mark.parametrize("kind", sorted(OUTERS))
def test_an_outer_step_may_be_made_slice_by_slice(kind: str) -> None:
    center, merged = vectors(2, torch.float32)
    outer = OUTERS[kind](0.7)
    parts = [stepped(outer, center[part], merged[part]) for part in (slice(0, 16), slice(16, 40))]
    assert torch.equal(torch.cat(parts), stepped(outer, center, merged))


@pytest.mark.parametrize("lr", [0.1, 1.0, 2.5])
def test_sgd_goes_lr_times_the_update(lr: float) -> None:
    center, merged = vectors(2)
    assert torch.allclose(stepped(sgd(lr), center, merged), center + lr * merged, rtol=1e-12)


def test_sgd_of_lr_one_on_uniform_updates_is_the_mean_of_the_models() -> None:
    center, *models = vectors(6)
    merged = torch.empty_like(center)
    mean([w - center for w in models], [1 / 5] * 5, merged)
    assert torch.allclose(stepped(sgd(1.0), center, merged), torch.stack(models).mean(0), rtol=1e-12, atol=1e-12)


def test_an_update_of_zeros_keeps_the_center_to_the_last_bit() -> None:
    (center,) = vectors(1, torch.float32)
    assert torch.equal(stepped(sgd(1.0), center, torch.zeros_like(center)), center)
