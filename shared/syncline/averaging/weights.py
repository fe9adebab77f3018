"""Weights of the updates in a merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

Weights = Literal["uniform", "samples", "steps"]
Normalize = Literal["fednova"]


class Counts(Protocol):
    """The numbers of an update that decide its weight."""

    @property
    def samples(self) -> int:
        """Rows of the agent's part of the data."""
        ...

    @property
    def steps(self) -> int:
        """Local steps of the period."""
        ...


def weights_of(offers: Sequence[Counts], weights: Weights, normalize: Normalize | None = None) -> list[float]:
    """Return the weight of each update, in the given order.

    The shares p_i sum to 1. With `fednova` (Wang et al., arXiv:2007.07481) the weight is p_i (Σ_j p_j a_j) / a_i for a_i steps,
    so that W moves by (Σ p_j a_j) Σ p_i Δ_i / a_i, as if every agent had made the same number of steps. These weights need
    not sum to 1; they equal p_i to the last bit if all agents made the same number. An update of 0 steps has weight 0.

    Args:
        offers: the updates of the merge.
        weights: `uniform` gives p_i = 1/N; `samples` and `steps` give shares in proportion to these numbers, or 1/N if all
            of them are 0.
        normalize: `fednova`, or None for the shares themselves.
    """
    shares = _shares(offers, weights)
    steps = [offer.steps for offer in offers]
    if normalize is None or len(set(steps)) < 2:
        return shares
    effective = sum(share * a for share, a in zip(shares, steps, strict=True))
    return [share * effective / a if a else 0.0 for share, a in zip(shares, steps, strict=True)]


def _shares(offers: Sequence[Counts], weights: Weights) -> list[float]:
    match weights:
        case "uniform":
            counts = [1] * len(offers)
        case "samples":
            counts = [offer.samples for offer in offers]
        case "steps":
            counts = [offer.steps for offer in offers]
    total = sum(counts)
    return [count / total for count in counts] if total else [1 / len(offers)] * len(offers)
