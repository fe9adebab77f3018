"""Many updates → one, slice by slice: memory is one slice an update, whatever the model's size.

A rule reduces slice k of every update in the plan's order, so that the result does not depend on the order of arrival. One
that has to see all of the updates before it can say what each counts *looks* at every slice first: what it finds there is
summed up to a few numbers an update, the rule solves in those, and a second pass adds up the updates.

To add one: a class with its settings and arithmetic, and a line in `RULES`. It reads no torch by itself, so that a spec can
be read without it: everything it does are methods of the tensors it is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from syncline.averaging.kernels import geometric_median, middle_mean, products, squared_distances, squares
from syncline.averaging.weights import Normalize, Weights
from syncline.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    Tensors = Sequence[Tensor]

MOST_POINTS = 128  # updates whose N × N distances are looked at


class Rule(Settings):
    """Base of all: what a spec's section `merge` may set, and what is done with it. N: updates; E: elements of a slice."""

    rule: str
    weights: Weights = Field(
        "uniform",
        description="uniform: W = (1/N) Σ W_i; samples: weighted by the rows of each agent's part; steps: by its local steps.",
    )
    normalize: Normalize | None = Field(
        None, description="fednova: each update counts as if all agents had made the same number of local steps."
    )
    weighted: ClassVar[bool] = False  # has a form with weights; all others take the updates as equals
    looks: ClassVar[bool] = False  # needs a first pass
    most: ClassVar[int | None] = None  # updates it can take
    keeps: ClassVar[int] = (
        0  # flat vectors of the model's size that it keeps from one merge to the next; zeros at first
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: object) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        named = not cls.model_fields["rule"].is_required()  # else it is a base of rules
        if named and cls.looks and (cls.look is Rule.look or cls.weigh is Rule.weigh):
            raise TypeError(f"{cls.__name__} sets `looks`: define both `look` and `weigh`, or leave it out")

    def least(self) -> int:
        """Updates below which it cannot do what it is chosen for."""
        return 1

    def with_fewer(self) -> str:
        """What to change for it to need fewer."""
        return "use another merge.rule"

    def look(self, updates: Tensors, weights: Sequence[float], old: Tensors) -> Tensor:
        """The first pass: figures of each block of the slice, in float64, (B, …). They are summed over all blocks."""
        return updates[0].new_zeros(0, 0).double()

    def weigh(self, weights: Sequence[float], figures: Tensor) -> list[float]:
        """After the first pass: what each update counts in the second, and after those what each kept vector counts."""
        return [*weights]

    def reduce(self, updates: Tensors, weights: Sequence[float], old: Tensors, out_E: Tensor, new: Tensors) -> None:
        """Writes D to `out_E`, and what is kept for the next merge to `new`; `old`: what was kept. Leaves all else as it is.
        `new` may lie where `old` does.

        The default is Σ w_i x_i over the updates and what was kept, in the given order. Weights need not sum to 1.
        """
        out_E.zero_()
        for x_E, weight in zip((*updates, *old), weights, strict=True):
            if weight:
                out_E.add_(x_E, alpha=weight)


def scales(weights: Sequence[float]) -> list[float]:
    """What rules that take updates as equals multiply each with: N w_i, which is 1 for uniform weights.

    So a stale update, or one of many local steps, counts as little as it does in the mean, (1/N) Σ N w_i x_i.
    """
    n = len(weights)
    return [1.0 if weight == 1 / n else n * weight for weight in weights]


class Mean(Rule):
    """D = Σ p_i Δ_i."""

    rule: Literal["mean"] = "mean"
    weighted: ClassVar[bool] = True


class Median(Rule):
    """The median of each coordinate: as long as fewer than half are bad, within what the others sent (arXiv:1803.01498)."""

    rule: Literal["median"] = "median"

    def least(self) -> int:
        return 3

    def reduce(self, updates: Tensors, weights: Sequence[float], old: Tensors, out_E: Tensor, new: Tensors) -> None:
        middle_mean(updates, scales(weights), (len(updates) - 1) // 2, out_E)


class TrimmedMean(Rule):
    """The mean of each coordinate without its k smallest and k largest values (arXiv:1803.01498)."""

    rule: Literal["trimmed_mean"] = "trimmed_mean"
    trim: float = Field(1, ge=0, description="Values left out on either side: a number k, or a share below 0.5.")

    @field_validator("trim")
    @classmethod
    def _number_or_share(cls, trim: float) -> float:
        if trim >= 0.5 and trim != int(trim):
            raise ValueError(f"{trim:g} is neither a whole number nor a share below 0.5")
        return trim

    def least(self) -> int:
        return 2 * int(self.trim) + 1 if self.trim >= 1 or not self.trim else math.ceil(1 / self.trim - 1e-9)

    def with_fewer(self) -> str:
        return "lower merge.trim" if self.trim >= 1 else "set merge.trim to a number of values"

    def reduce(self, updates: Tensors, weights: Sequence[float], old: Tensors, out_E: Tensor, new: Tensors) -> None:
        n = len(updates)
        k = int(self.trim) if self.trim >= 1 else int(self.trim * n + 1e-9)
        middle_mean(updates, scales(weights), min(k, (n - 1) // 2), out_E)


class NormClip(Rule):
    """D = Σ p_i Δ_i min(1, C / ‖Δ_i‖): no update moves the center by more than p_i C (arXiv:1911.07963)."""

    rule: Literal["norm_clip"] = "norm_clip"
    max_norm: float = Field(gt=0, description="C, the norm that larger updates are scaled down to.")
    weighted: ClassVar[bool] = True
    looks: ClassVar[bool] = True

    def look(self, updates: Tensors, weights: Sequence[float], old: Tensors) -> Tensor:
        return _columns([squares(x_E) for x_E in updates])

    def weigh(self, weights: Sequence[float], figures: Tensor) -> list[float]:
        return [w * _clipped(float(s), self.max_norm) for w, s in zip(weights, figures, strict=True)]


class CentredClip(Rule):
    """D = v + (1/N) Σ (Δ_i − v) min(1, τ / ‖Δ_i − v‖), v the D of the merge before (arXiv:2012.10333)."""

    rule: Literal["centred_clip"] = "centred_clip"
    tau: float = Field(gt=0, description="τ, how far from the last D an update may pull.")
    looks: ClassVar[bool] = True
    keeps: ClassVar[int] = 1  # v

    def look(self, updates: Tensors, weights: Sequence[float], old: Tensors) -> Tensor:
        return _columns([squares(x_E * s - old[0]) for x_E, s in zip(updates, scales(weights), strict=True)])

    def weigh(self, weights: Sequence[float], figures: Tensor) -> list[float]:
        pulls = [_clipped(float(s), self.tau) / len(weights) for s in figures]
        return [*(pull * s for pull, s in zip(pulls, scales(weights), strict=True)), 1 - math.fsum(pulls)]

    def reduce(self, updates: Tensors, weights: Sequence[float], old: Tensors, out_E: Tensor, new: Tensors) -> None:
        super().reduce(updates, weights, old, out_E, new)
        new[0].copy_(out_E)


class _Distances(Rule):
    """Rules that look at the distances between all updates."""

    looks: ClassVar[bool] = True
    most: ClassVar[int | None] = MOST_POINTS

    def look(self, updates: Tensors, weights: Sequence[float], old: Tensors) -> Tensor:
        return products(updates)


class Krum(_Distances):
    """The one update whose N − f − 2 nearest others are nearest, by the sum of squared distances (arXiv:1703.02757).

    After updates that could not be read were dropped there may be fewer than 2f + 3. Those were bad ones: then f is what is
    left of it, (N − 3) / 2 at most.
    """

    rule: Literal["krum"] = "krum"
    f: int = Field(1, ge=0, description="Bad updates that it has to withstand; needs 2f + 3 updates.")

    def least(self) -> int:
        return 2 * self.f + 3

    def with_fewer(self) -> str:
        return "lower merge.f"

    def weigh(self, weights: Sequence[float], figures: Tensor) -> list[float]:
        n, factors = len(weights), scales(weights)
        bad = min(self.f, max(0, (n - 3) // 2))
        nearest = squared_distances(figures, factors).sort(1).values[:, 1 : max(1, n - bad - 1)]
        best = nearest.sum(1).sort(stable=True).indices[: self.chosen(n, bad)].tolist()
        return [factors[i] / len(best) if i in best else 0.0 for i in range(n)]

    def chosen(self, n: int, bad: int) -> int:
        """How many of the best are averaged."""
        return 1


class MultiKrum(Krum):
    """The mean of the m updates that Krum finds best."""

    rule: Literal["multi_krum"] = "multi_krum"  # type: ignore[assignment]
    m: int | None = Field(None, ge=1, le=MOST_POINTS, description="Updates that are averaged; default N − f − 2.")

    def least(self) -> int:
        return max(super().least(), self.m or 0)

    def with_fewer(self) -> str:
        return "lower merge.f" if self.least() > (self.m or 0) else "lower merge.m"

    def chosen(self, n: int, bad: int) -> int:
        return min(n, max(1, n - bad - 2 if self.m is None else self.m))


class GeometricMedian(_Distances):
    """The point with the least sum of distances to all updates, weighted where weights are asked for (arXiv:1912.13445)."""

    rule: Literal["geometric_median"] = "geometric_median"
    weighted: ClassVar[bool] = True

    def least(self) -> int:
        return 3

    def weigh(self, weights: Sequence[float], figures: Tensor) -> list[float]:
        total = math.fsum(weights)
        if not total:
            return [0.0] * len(weights)
        distances = squared_distances(figures, [1.0] * len(weights))
        return [total * w for w in geometric_median(distances, [w / total for w in weights])]


def _columns(figures: Sequence[Tensor]) -> Tensor:
    """N times (B,) → (B, N)."""
    table_BN = figures[0].new_empty((len(figures[0]), len(figures)))
    for i, column_B in enumerate(figures):
        table_BN[:, i] = column_B
    return table_BN


def _clipped(squared_norm: float, most: float) -> float:
    """What a vector is scaled by so that its norm is not above `most`."""
    norm = math.sqrt(squared_norm)
    return 1.0 if norm <= most else most / norm


RULES: dict[str, type[Rule]] = {
    "mean": Mean,
    "median": Median,
    "trimmed_mean": TrimmedMean,
    "norm_clip": NormClip,
    "centred_clip": CentredClip,
    "krum": Krum,
    "multi_krum": MultiKrum,
    "geometric_median": GeometricMedian,
}
