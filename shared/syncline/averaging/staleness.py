"""Staleness weights s(τ): the factor of an update whose base is τ versions old.

To add a weight: write a class with its settings and `weight`, and add a line to `STALENESS`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

from pydantic import Field

from syncline.settings import Settings


class Staleness(Settings):
    """Base class of staleness weights. Its fields are the settings of the spec's section `sync.staleness`."""

    kind: str

    @abstractmethod
    def weight(self, lag: int) -> float:
        """Return s(τ) ≥ 0 for a lag of τ versions; s(0) = 1."""


class Constant(Staleness):
    """s(τ) = 1: the lag of an update has no influence."""

    kind: Literal["constant"] = "constant"

    def weight(self, lag: int) -> float:
        return 1.0


class Polynomial(Staleness):
    """s(τ) = (1 + τ)^−a (FedAsync, arXiv:1903.03934, §5.2); a = ½ is FedBuff's 1/√(1 + τ) (arXiv:2106.06639)."""

    kind: Literal["polynomial"] = "polynomial"
    a: float = Field(0.5, ge=0, le=100)

    def weight(self, lag: int) -> float:
        return float((1 + lag) ** -self.a)


class Hinge(Staleness):
    """s(τ) = 1 up to a lag of b versions, then 1 / (a (τ − b) + 1) (FedAsync, arXiv:1903.03934, §5.2)."""

    kind: Literal["hinge"] = "hinge"
    a: float = Field(10.0, ge=0, le=1e6)
    b: int = Field(4, ge=0, le=1_000_000, description="The lag in versions up to which an update has its full weight.")

    def weight(self, lag: int) -> float:
        return 1.0 if lag <= self.b else 1.0 / (self.a * (lag - self.b) + 1.0)


STALENESS: dict[str, type[Staleness]] = {
    "constant": Constant,
    "polynomial": Polynomial,
    "hinge": Hinge,
}
