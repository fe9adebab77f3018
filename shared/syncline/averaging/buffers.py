"""Averaging of a model's buffers, for example BatchNorm's statistics. No merge rule and no outer optimiser acts on them.

An update holds differences in the places of parameters and the agent's values in the places of buffers. The center's buffer
becomes a mean of values, W ← (1 − Σ w_i) W + Σ w_i v_i, which stays between the smallest and the largest of them. A sum of
differences would not: three stale differences of a variance can make the variance negative.

The module imports no torch; it calls methods of the tensors that it is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from syncline.averaging.weights import Counts, Normalize, Weights, weights_of

if TYPE_CHECKING:
    from torch import Tensor

Places = Sequence[slice]  # positions of the buffers within a slice of the flat vector


def buffer_weights(
    updates: Sequence[Counts],
    planned: Sequence[float],
    weights: Weights,
    normalize: Normalize | None,
    elastic_alpha: float | None = None,
) -> list[float]:
    """Return w_i, the weight of each update's buffers. The weights sum to at most 1.

    Args:
        updates: the updates of a merge.
        planned: the weights of the plan.
        weights: the setting `merge.weights`.
        normalize: the setting `merge.normalize`. Its factors correct for numbers of optimiser steps; buffers make no steps,
            so the factors are divided out again.
        elastic_alpha: α of elastic averaging, whose planned weights are 1; None in other runs.
    """
    if elastic_alpha is not None:
        return [min(elastic_alpha, 1 / len(updates))] * len(updates)
    if normalize is None:
        return [*planned]
    shares, normalized = weights_of(updates, weights), weights_of(updates, weights, normalize)
    return [w * share / n if n else 0.0 for w, share, n in zip(planned, shares, normalized, strict=True)]


def of_chosen(weights: Sequence[float], chosen: Sequence[int]) -> list[float]:
    """Return the weights of the updates with the numbers `chosen`, scaled so that they have the sum of all weights."""
    total = math.fsum(weights[i] for i in chosen)
    scale = math.fsum(weights) / total if total else 0.0
    return [weights[i] * scale for i in chosen]


def without_buffers(x_E: Tensor, buffers: Places) -> Tensor:
    """Return the slice with zeros in the places of buffers; a slice without buffers is returned itself, not copied."""
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
    """Return the new value of each buffer in the slice, (1 − Σ w_i) W + Σ w_i v_i.

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
