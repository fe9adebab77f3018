"""The step of an agent towards a new center: W_i ← W_i + α (W − W_i)."""

from __future__ import annotations

from torch import Tensor


def mix_(w_P: Tensor, center_P: Tensor, alpha: float) -> None:
    """Move a local model towards the center in place: W_i ← W_i + α (W − W_i).

    The mean of all W_i stays the same, and Σ‖W_i − W‖² is multiplied by (1 − α)². The step is stable for 0 ≤ α < 2.

    Args:
        w_P: local parameters, P elements, any float dtype; modified.
        center_P: the center, same shape and dtype.
        alpha: 1 copies the center; 0 leaves w_P unchanged bit for bit.
    """
    if alpha == 1:
        w_P.copy_(center_P)
    elif alpha:  # lerp at 0 would turn −0.0 into +0.0 and Inf into NaN
        w_P.lerp_(center_P, alpha)
