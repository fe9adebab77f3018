"""Chance by a seed, the same on every Python.

Of `random.Random`, `random()` alone is promised to give the same numbers for ever.
"""

from __future__ import annotations

import math
import random
from collections.abc import MutableSequence, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
_WORD = 1 << 32


class Dice:
    """Everything is made of `random()`."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed).random  # 0 ≤ x < 1

    def uniform(self, least: float, most: float) -> float:
        return least + (most - least) * self.random()

    def below(self, n: int) -> int:
        """0 … n − 1."""
        return int(self.random() * n)

    def between(self, least: int, most: int) -> int:
        """Both of them included."""
        return least + self.below(most - least + 1)

    def choice(self, values: Sequence[T]) -> T:
        return values[self.below(len(values))]

    def shuffle(self, values: MutableSequence[Any]) -> None:
        """Fisher and Yates, in place."""
        for i in range(len(values) - 1, 0, -1):
            j = self.below(i + 1)
            values[i], values[j] = values[j], values[i]

    def getrandbits(self, k: int) -> int:
        bits = 0
        for _ in range(-(-k // 32)):
            bits = bits << 32 | int(self.random() * _WORD)
        return bits & ((1 << k) - 1)

    def normal(self) -> float:
        """Mean 0, deviation 1 (Box and Muller)."""
        radius = math.sqrt(-2.0 * math.log(1.0 - self.random()))
        return radius * math.cos(2.0 * math.pi * self.random())
