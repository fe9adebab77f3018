"""The outer optimiser: (W, D) → the next W, on the flat center, slice by slice."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Outer = Callable[[Tensor, Tensor, Tensor], None]


def sgd(lr: float) -> Outer:
    """W ← W + lr · D. With lr 1 and uniform weights this is W = (1/N) Σ W_i."""

    def step(center_E: Tensor, merged_E: Tensor, out_E: Tensor) -> None:
        out_E.copy_(center_E).add_(merged_E, alpha=lr)

    return step


OUTERS: dict[str, Callable[..., Outer]] = {"sgd": sgd}
