"""Many updates → one, slice by slice: memory is one slice an update, whatever the model's size.

A rule reduces slice k of every update in the plan's order, so that the result does not depend on the order of arrival.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

Rule = Callable[[Sequence[Tensor], Sequence[float], Tensor], None]


def mean(updates_E: Sequence[Tensor], weights: Sequence[float], out_E: Tensor) -> None:
    """D = Σ p_i Δ_i, added up in the given order. E: elements of the slice. Weights need not sum to 1."""
    out_E.zero_()
    for update_E, weight in zip(updates_E, weights, strict=True):
        out_E.add_(update_E, alpha=weight)


RULES: dict[str, Rule] = {"mean": mean}


def finite(x_E: Tensor) -> bool:
    """Whether no element is NaN or infinite. A sum is enough to say yes; only where it is not, every element is looked at."""
    return bool(x_E.sum().isfinite()) or bool(x_E.isfinite().all())
