"""What an agent does with the new center: W_i ← W_i + α (W − W_i)."""

from __future__ import annotations

from torch import Tensor


def mix_(w_P: Tensor, center_P: Tensor, alpha: float) -> None:
    """W_i ← W_i + α (W − W_i), in place. P: parameters, any floating dtype.

    The mean of all W_i is kept and Σ‖W_i − W‖² is multiplied by (1 − α)²; stable for 0 ≤ α < 2. α = 1 copies the center;
    α = 0 leaves W_i untouched, bit for bit.
    """
    if alpha == 1:
        w_P.copy_(center_P)
    elif alpha:  # lerp at 0 would turn −0.0 into +0.0 and Inf into NaN
        w_P.lerp_(center_P, alpha)
