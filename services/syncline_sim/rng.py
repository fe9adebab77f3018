"""A random number generator that gives the same numbers for a seed on every Python version.

Of `random.Random`, only `random()` is documented to keep its sequence in later versions; all other draws are computed from it.
"""

from __future__ import annotations

import math
import random
from collections.abc import MutableSequence, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
_WORD = 1 << 32


class Rng:
    """A generator seeded by a text."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed).random  # 0 ≤ x < 1

    def uniform(self, least: float, most: float) -> float:
        """Return a number in [least, most)."""
        return least + (most - least) * self.random()

    def below(self, n: int) -> int:
        """Return an integer in 0 … n − 1."""
        return int(self.random() * n)

    def between(self, least: int, most: int) -> int:
        """Return an integer in least … most, both included."""
        return least + self.below(most - least + 1)

    def choice(self, values: Sequence[T]) -> T:
        return values[self.below(len(values))]

    def shuffle(self, values: MutableSequence[Any]) -> None:
        """Shuffle in place (Fisher and Yates)."""
        for i in range(len(values) - 1, 0, -1):
            j = self.below(i + 1)
            values[i], values[j] = values[j], values[i]

    def getrandbits(self, k: int) -> int:
        """Return an integer of k random bits."""
        bits = 0
        for _ in range(-(-k // 32)):
            bits = bits << 32 | int(self.random() * _WORD)
        return bits & ((1 << k) - 1)

    def normal(self) -> float:
        """Return a sample of the normal distribution with mean 0 and deviation 1 (Box and Muller)."""
        radius = math.sqrt(-2.0 * math.log(1.0 - self.random()))
        return radius * math.cos(2.0 * math.pi * self.random())
