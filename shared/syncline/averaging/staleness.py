"""What an update counts for that was trained from an older version: s(τ), τ its lag in versions.

To add one: a class with its settings and `weight`, and a line in `STALENESS`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

from pydantic import Field

from syncline.settings import Settings


class Staleness(Settings):
    """Base of all: what a spec's section `sync.staleness` may set, and what follows from it."""

    kind: str

    @abstractmethod
    def weight(self, lag: int) -> float:
        """s(τ) ≥ 0 for a lag of τ versions; s(0) = 1."""


class Constant(Staleness):
    """s(τ) = 1: an update counts the same however old it is."""

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
    b: int = Field(4, ge=0, le=1_000_000, description="versions")

    def weight(self, lag: int) -> float:
        return 1.0 if lag <= self.b else 1.0 / (self.a * (lag - self.b) + 1.0)


STALENESS: dict[str, type[Staleness]] = {
    "constant": Constant,
    "polynomial": Polynomial,
    "hinge": Hinge,
}
