"""How much each update of a merge counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

Weights = Literal["uniform", "samples", "steps"]
Normalize = Literal["fednova"]


class Counts(Protocol):
    """What an update is weighed by."""

    @property
    def samples(self) -> int: ...
    @property
    def steps(self) -> int: ...


def weights_of(offers: Sequence[Counts], weights: Weights, normalize: Normalize | None = None) -> list[float]:
    """The weight of each update, in the order given.

    Shares p_i that sum to 1: `uniform` 1/N, or in proportion to the `samples` of the agents' parts or their `steps`;
    uniform where all of those are 0. With `fednova` (Wang et al., arXiv:2007.07481) each update counts as if every agent had
    made the same number of steps: p_i (Σ_j p_j a_j) / a_i with a_i its steps, so that W moves by (Σ p_j a_j) Σ p_i Δ_i / a_i.
    Those need not sum to 1, and are the p_i, to the last bit, where all made the same number. An update of no steps weighs 0.
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
