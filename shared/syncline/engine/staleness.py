"""What an update counts for that was trained from an older version: s(τ), τ its lag in versions. Pure.

To add one: a class with its settings and `weight`, a line in `STALENESS`, and its settings in `spec`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class Staleness(Protocol):
    def weight(self, lag: int) -> float:
        """s(τ) ≥ 0 for a lag of τ versions; s(0) = 1."""
        ...


@dataclass(frozen=True, slots=True)
class Constant:
    """s(τ) = 1: staleness changes nothing."""

    def weight(self, lag: int) -> float:
        return 1.0


@dataclass(frozen=True, slots=True)
class Polynomial:
    """s(τ) = (1 + τ)^−a (FedAsync, arXiv:1903.03934, §5.2); a = ½ is FedBuff's 1/√(1 + τ) (arXiv:2106.06639)."""

    a: float

    def weight(self, lag: int) -> float:
        return float((1 + lag) ** -self.a)


@dataclass(frozen=True, slots=True)
class Hinge:
    """s(τ) = 1 up to a lag of b versions, then 1 / (a (τ − b) + 1) (FedAsync, arXiv:1903.03934, §5.2)."""

    a: float
    b: int

    def weight(self, lag: int) -> float:
        return 1.0 if lag <= self.b else 1.0 / (self.a * (lag - self.b) + 1.0)


STALENESS: dict[str, Callable[..., Staleness]] = {"constant": Constant, "polynomial": Polynomial, "hinge": Hinge}
