"""The buffers of a model, BatchNorm's statistics for example: they are averaged, and no rule or optimiser acts on them.

A parameter's place in an update holds a difference, a buffer's place holds the agent's value. So the center's buffer is always
a mean of values: W ← (1 − Σ w_i) W + Σ w_i v_i, which stays between the smallest and the largest of them. Sums of differences
do not: three stale differences of a variance make it negative. Reads no torch by itself: all it does are methods of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from syncline.averaging.weights import Counts, Normalize, Weights, weights_of

if TYPE_CHECKING:
    from torch import Tensor

Places = Sequence[slice]  # of buffers, in a slice of the flat vector


def buffer_weights(
    updates: Sequence[Counts],
    planned: Sequence[float],
    weights: Weights,
    normalize: Normalize | None,
    elastic_alpha: float | None = None,
) -> list[float]:
    """Return w_i, how much the buffers of each update count. Their sum is at most 1.

    Args:
        updates: the updates of a merge.
        planned: the weights of the plan.
        weights: the setting `merge.weights`.
        normalize: the setting `merge.normalize`; its factors are for steps of an optimiser, and are taken out again.
        elastic_alpha: α of elastic averaging, whose planned weights are 1; None in other runs.
    """
    if elastic_alpha is not None:
        return [min(elastic_alpha, 1 / len(updates))] * len(updates)
    if normalize is None:
        return [*planned]
    shares, normalized = weights_of(updates, weights), weights_of(updates, weights, normalize)
    return [w * share / n if n else 0.0 for w, share, n in zip(planned, shares, normalized, strict=True)]


def of_chosen(weights: Sequence[float], chosen: Sequence[int]) -> list[float]:
    """Return the weights of the updates that a rule has chosen by number, scaled so that they sum to as much as all of them."""
    total = math.fsum(weights[i] for i in chosen)
    scale = math.fsum(weights) / total if total else 0.0
    return [weights[i] * scale for i in chosen]


def without_buffers(x_E: Tensor, buffers: Places) -> Tensor:
    """Return the slice with zeros in the places of buffers: a copy, where there are any."""
    if not buffers:
        return x_E
    x_E = x_E.clone()
    clear_(x_E, buffers)
    return x_E


def clear_(x_E: Tensor, buffers: Places) -> None:
    """Write zeros to the places of buffers."""
    for buffer in buffers:
        x_E[buffer].zero_()


def mean_of_values(
    center_E: Tensor, updates: Sequence[Tensor], weights: Sequence[float], buffers: Places
) -> list[Tensor]:
    """Return what each buffer of the slice becomes: (1 − Σ w_i) W + Σ w_i v_i.

    Args:
        center_E: a slice of W, E elements of any float dtype.
        updates: the same slice of every update.
        weights: w_i of each update.
        buffers: the places of buffers in the slice.
    """
    kept = max(0.0, 1 - math.fsum(weights))
    found = []
    for buffer in buffers:
        mean_B = center_E[buffer] * kept
        for x_E, weight in zip(updates, weights, strict=True):
            mean_B.add_(x_E[buffer], alpha=weight)
        found.append(mean_B)
    return found
