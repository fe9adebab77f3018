"""The agent's side of SCAFFOLD (arXiv:1910.06378, algorithm 1): its control variate c_i, and what is pending of it.

The center holds Σ c_i over all N parts of the data, so that c is that over N, whoever takes part and however many join: a
part that nobody has trained on has c_i = 0. Each period offers Δc_i, which the coordinator adds to the sum if it merges the
update, and which is added here to c_i if it was merged. So the sum is always the sum of what the agents have.

Knows no bus, no file and no training.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from syncline.local.gradients import Control
from syncline_agent.local_update import Verdicts

OWN = "own"  # the name of c_i among what is kept; pending ones go by their clock


class ControlVariates:
    """P: elements of the flat vector. Elements that are no parameters have no gradient: theirs stay 0.

    `along`: c_i becomes the mean of the gradients that a period has stepped along (option II); else whoever trains writes one
    to `gradients_P` (option I: the gradient of the whole part where the period begins). `overlap`: a period begins while the
    update of the one before is on its way; in rounds, one that is not known to be judged by then was late.
    """

    def __init__(self, like_P: Tensor, *, along: bool, overlap: bool = False) -> None:
        self._overlap = overlap
        self.own_P = torch.zeros_like(like_P)  # c_i
        self.pending: dict[int, Tensor] = {}  # Δc_i by clock: offered, and not known to be judged
        self.gradients_P = torch.zeros_like(like_P)
        self._sum_P = torch.zeros_like(like_P)  # Σ c_i, of the newest center
        self._control = Control(torch.zeros_like(like_P), self.gradients_P if along else None)

    @property
    def at_center(self) -> bool:
        """Option I: the gradient of the whole part is wanted before the period's first step."""
        return self._control.gradients_P is None

    def resolve(self, verdicts: Verdicts) -> None:
        """What was merged is in the center's sum, so it is in c_i; what was dropped, or never offered, has not been."""
        newest = max(verdicts, default=0)
        for clock in [c for c in sorted(self.pending) if c <= newest]:
            change_P = self.pending.pop(clock)
            if verdicts.get(clock, False):
                self.own_P.add_(change_P)

    def begin(self, sum_P: Tensor | None, parts: int) -> Control:
        """A period begins. `sum_P`: Σ c_i of a newer center, or None; `parts`: N."""
        if sum_P is not None:
            self._sum_P.copy_(sum_P)
        torch.div(self._sum_P, parts, out=self._control.correction_P).sub_(self.own_P)
        self.gradients_P.zero_()
        return self._control

    def take(self, clock: int, steps: int) -> Tensor:
        """Δc_i of the period that is over, after so many steps of the optimiser.

        The mean of the gradients that were stepped along is, for plain SGD, the paper's c_i − c + (x − y_i) / (K η); it is as
        right with momentum, with a schedule and with any other optimiser. Where periods overlap, what is still pending is taken
        for merged: c_i would swing for ever otherwise, and what is dropped after all, the next change makes up for.
        """
        count = 1 if self._control.gradients_P is None else steps
        if count:
            change_P = torch.div(self.gradients_P, count).sub_(self.own_P)
            for earlier_P in self.pending.values() if self._overlap else ():
                change_P.sub_(earlier_P)
        else:
            change_P = torch.zeros_like(self.own_P)
        self.pending[clock] = change_P
        return change_P

    def kept(self) -> dict[str, Tensor]:
        return {OWN: self.own_P, **{str(clock): change_P for clock, change_P in self.pending.items()}}

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        for name, tensor in kept.items():
            if name == OWN:
                self.own_P.copy_(tensor)
            else:
                self.pending[int(name)] = tensor.to(self.own_P.device)
