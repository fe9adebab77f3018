"""Merge rules: combine the updates of a merge into one merged update D.

A rule works slice by slice, so its memory is one slice of each update, for a model of any size. It reduces slice k of every
update in the order of the plan; the result does not depend on the order in which updates arrive.

A two-pass rule needs figures of the whole updates (norms, distances) before it can weigh them. In the first pass `measure`
returns figures of each block of a slice; their sums over all blocks go to `weigh`, which returns the weight of each update;
the second pass reduces the updates with those weights.

To add a rule: write a class with its settings and arithmetic, and add a line to `RULES`. The module imports no torch, because
agents and commands read specs without torch; a rule calls methods of the tensors that it is given.
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

MAX_POINTS = 128  # updates of a rule that computes N × N distances: 128² float64 values per block are 128 KiB


class Rule(Settings):
    """Base class of merge rules. Its fields are the settings of the spec's section `merge`.

    Dimensions in the names of tensors: N updates, E elements of a slice, B blocks of a slice.
    """

    rule: str
    weights: Weights = Field(
        "uniform",
        description="uniform: W = (1/N) Σ W_i; samples: weighted by the rows of each agent's part; steps: by its local steps.",
    )
    normalize: Normalize | None = Field(
        None, description="fednova: each update counts as if all agents had made the same number of local steps."
    )
    # The rule has a form with weights. Robust rules have none and refuse `merge.weights`: an agent must not gain weight by
    # the numbers that it reports about itself.
    weighted: ClassVar[bool] = False
    two_pass: ClassVar[bool] = False  # the rule needs `measure` and `weigh`
    max_updates: ClassVar[int | None] = None  # the largest number of updates that the rule accepts; None: any
    state_vectors: ClassVar[int] = 0  # vectors of the model's size kept from one merge to the next; zeros at first

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: object) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        named = not cls.model_fields["rule"].is_required()  # a class without a name is a base class of rules
        if named and cls.two_pass and (cls.measure is Rule.measure or cls.weigh is Rule.weigh):
            raise TypeError(f"{cls.__name__} sets `two_pass`: define both `measure` and `weigh`, or leave it out")

    def min_updates(self) -> int:
        """Return the number of updates below which the rule cannot give its guarantee; with fewer nothing is merged."""
        return 1

    def hint_for_fewer(self) -> str:
        """Return the end of a hint that tells which setting lowers `min_updates`."""
        return "use another merge.rule"

    def measure(self, updates: Tensors, weights: Sequence[float], old: Tensors) -> Tensor:
        """Return the figures of the first pass for one slice.

        Args:
            updates: the slice of each update, N tensors of E elements.
            weights: the planned weight of each update.
            old: the slice of each kept vector.

        Returns:
            Figures of each block of the slice, float64, (B, …). The caller sums them over all blocks of the model.
        """
        return updates[0].new_zeros(0, 0).double()

    def weigh(self, weights: Sequence[float], figures: Tensor) -> list[float]:
        """Return the weights of the second pass: of each update, then of each kept vector.

        Args:
            weights: the planned weight of each update.
            figures: the sums of the first pass; an empty tensor for a rule of one pass.
        """
        return [*weights]

    def reduce(self, updates: Tensors, weights: Sequence[float], old: Tensors, out_E: Tensor, new: Tensors) -> None:
        """Write D of one slice to `out_E` and the next kept vectors to `new`; modify no other tensor.

        The default is Σ w_i x_i over the updates and the kept vectors, in the given order. Weights need not sum to 1.

        Args:
            updates: the slice of each update, N tensors of E elements.
            weights: as `weigh` returned them.
            old: the kept vectors as the previous merge left them.
            out_E: receives D.
            new: receives the kept vectors; may share memory with `old`.
        """
        out_E.zero_()
        for x_E, weight in zip((*updates, *old), weights, strict=True):
            if weight:
                out_E.add_(x_E, alpha=weight)


def scales(weights: Sequence[float]) -> list[float]:
    """Return the factors N w_i by which a rule without weights multiplies the updates; exactly 1 for uniform weights.

    With them a stale update, or one of many local steps, has the same reduced influence as in the mean, (1/N) Σ N w_i x_i.
    """
    n = len(weights)
    return [1.0 if weight == 1 / n else n * weight for weight in weights]


class Mean(Rule):
    """The weighted mean, D = Σ p_i Δ_i."""

    rule: Literal["mean"] = "mean"
    weighted: ClassVar[bool] = True


class Median(Rule):
    """The median of each coordinate (arXiv:1803.01498).

    While fewer than half of the updates are bad, each coordinate of D lies within the range of the good ones.
    """

    rule: Literal["median"] = "median"

    def min_updates(self) -> int:
        return 3

    def reduce(self, updates: Tensors, weights: Sequence[float], old: Tensors, out_E: Tensor, new: Tensors) -> None:
        middle_mean(updates, scales(weights), (len(updates) - 1) // 2, out_E)


class TrimmedMean(Rule):
    """The mean of each coordinate without its k smallest and k largest values (arXiv:1803.01498)."""

    rule: Literal["trimmed_mean"] = "trimmed_mean"
    trim: float = Field(1, ge=0, description="Values left out at either end: a number k, or a share below 0.5.")

    @field_validator("trim")
    @classmethod
    def _number_or_share(cls, trim: float) -> float:
        if trim >= 0.5 and trim != int(trim):
            raise ValueError(f"{trim:g} is neither a whole number nor a share below 0.5")
        return trim

    def min_updates(self) -> int:
        return 2 * int(self.trim) + 1 if self.trim >= 1 or not self.trim else math.ceil(1 / self.trim - 1e-9)

    def hint_for_fewer(self) -> str:
        return "lower merge.trim" if self.trim >= 1 else "set merge.trim to a number of values"

    def reduce(self, updates: Tensors, weights: Sequence[float], old: Tensors, out_E: Tensor, new: Tensors) -> None:
        n = len(updates)
        k = int(self.trim) if self.trim >= 1 else int(self.trim * n + 1e-9)
        middle_mean(updates, scales(weights), min(k, (n - 1) // 2), out_E)


class NormClip(Rule):
    """The mean of clipped updates, D = Σ p_i Δ_i min(1, C / ‖Δ_i‖) (arXiv:1911.07963).

    No update moves the center by more than p_i C.
    """

    rule: Literal["norm_clip"] = "norm_clip"
    max_norm: float = Field(gt=0, description="C: an update with a larger norm is scaled down to it.")
    weighted: ClassVar[bool] = True
    two_pass: ClassVar[bool] = True

    def measure(self, updates: Tensors, weights: Sequence[float], old: Tensors) -> Tensor:
        return _columns([squares(x_E) for x_E in updates])

    def weigh(self, weights: Sequence[float], figures: Tensor) -> list[float]:
        return [w * _clipped(float(s), self.max_norm) for w, s in zip(weights, figures, strict=True)]


class CentredClip(Rule):
    """The mean of updates clipped around v, the D of the previous merge (arXiv:2012.10333).

    D = v + (1/N) Σ (Δ_i − v) min(1, τ / ‖Δ_i − v‖)
    """

    rule: Literal["centred_clip"] = "centred_clip"
    tau: float = Field(gt=0, description="τ: the largest distance from the previous D that an update contributes.")
    two_pass: ClassVar[bool] = True
    state_vectors: ClassVar[int] = 1  # v

    def measure(self, updates: Tensors, weights: Sequence[float], old: Tensors) -> Tensor:
        return _columns([squares(x_E * s - old[0]) for x_E, s in zip(updates, scales(weights), strict=True)])

    def weigh(self, weights: Sequence[float], figures: Tensor) -> list[float]:
        pulls = [_clipped(float(s), self.tau) / len(weights) for s in figures]
        return [*(pull * s for pull, s in zip(pulls, scales(weights), strict=True)), 1 - math.fsum(pulls)]

    def reduce(self, updates: Tensors, weights: Sequence[float], old: Tensors, out_E: Tensor, new: Tensors) -> None:
        super().reduce(updates, weights, old, out_E, new)
        new[0].copy_(out_E)


class _Distances(Rule):
    """Base class of rules that use the distances between all pairs of updates."""

    two_pass: ClassVar[bool] = True
    max_updates: ClassVar[int | None] = MAX_POINTS

    def measure(self, updates: Tensors, weights: Sequence[float], old: Tensors) -> Tensor:
        return products(updates)


class Krum(_Distances):
    """The update with the smallest sum of squared distances to its N − f − 2 nearest others (arXiv:1703.02757).

    Unreadable updates are dropped before the merge and may leave fewer than 2f + 3. They count as bad ones: f is lowered to at
    most (N − 3) / 2.
    """

    rule: Literal["krum"] = "krum"
    f: int = Field(1, ge=0, description="Number of bad updates that the rule withstands; needs 2f + 3 updates.")

    def min_updates(self) -> int:
        return 2 * self.f + 3

    def hint_for_fewer(self) -> str:
        return "lower merge.f"

    def weigh(self, weights: Sequence[float], figures: Tensor) -> list[float]:
        n, factors = len(weights), scales(weights)
        bad = min(self.f, max(0, (n - 3) // 2))
        nearest = squared_distances(figures, factors).sort(1).values[:, 1 : max(1, n - bad - 1)]
        best = nearest.sum(1).sort(stable=True).indices[: self.chosen(n, bad)].tolist()
        return [factors[i] / len(best) if i in best else 0.0 for i in range(n)]

    def chosen(self, n: int, bad: int) -> int:
        """Return the number of best updates that are averaged, for N updates of which `bad` may be bad."""
        return 1


class MultiKrum(Krum):
    """The mean of the m updates with the best Krum scores (arXiv:1703.02757)."""

    rule: Literal["multi_krum"] = "multi_krum"  # type: ignore[assignment]
    m: int | None = Field(
        None, ge=1, le=MAX_POINTS, description="Number of updates that are averaged; default: N − f − 2."
    )

    def min_updates(self) -> int:
        return max(super().min_updates(), self.m or 0)

    def hint_for_fewer(self) -> str:
        return "lower merge.f" if self.min_updates() > (self.m or 0) else "lower merge.m"

    def chosen(self, n: int, bad: int) -> int:
        return min(n, max(1, n - bad - 2 if self.m is None else self.m))


class GeometricMedian(_Distances):
    """The point with the smallest weighted sum of distances to all updates (arXiv:1912.13445)."""

    rule: Literal["geometric_median"] = "geometric_median"
    weighted: ClassVar[bool] = True

    def min_updates(self) -> int:
        return 3

    def weigh(self, weights: Sequence[float], figures: Tensor) -> list[float]:
        total = math.fsum(weights)
        if not total:
            return [0.0] * len(weights)
        distances = squared_distances(figures, [1.0] * len(weights))
        return [total * w for w in geometric_median(distances, [w / total for w in weights])]


def _columns(figures: Sequence[Tensor]) -> Tensor:
    """Return N tensors of shape (B,) as the columns of one of shape (B, N)."""
    table_BN = figures[0].new_empty((len(figures[0]), len(figures)))
    for i, column_B in enumerate(figures):
        table_BN[:, i] = column_B
    return table_BN


def _clipped(squared_norm: float, most: float) -> float:
    """Return the factor that scales a vector of this squared norm down to the norm `most`; 1 for a shorter vector."""
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
