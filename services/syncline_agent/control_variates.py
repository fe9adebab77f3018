"""The agent's side of SCAFFOLD (arXiv:1910.06378, algorithm 1): its control variate c_i, and the changes without a verdict.

The center holds Σ c_i over all N parts of the data, and c is that sum divided by N, however many agents take part: a part
without training has c_i = 0. Each period offers Δc_i. The coordinator adds Δc_i to the sum if it merges the update, and the
agent adds it to c_i when it learns of that verdict. So the sum always equals the sum of the agents' c_i.

Knows no bus, no file and no training.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from syncline.local.gradients import Control
from syncline_agent.local_update import Verdicts

OWN = "own"  # the name of c_i among the saved tensors; the name of a pending change is its clock


class ControlVariates:
    """Keeps c_i of one agent. P: elements of the flat vector.

    Elements of buffers have no gradient, so their control variates stay 0.

    Attributes:
        own_P: c_i.
        pending: Δc_i by clock, of the updates that were offered and have no verdict yet.
        gradients_P: sum of the gradients of the present period (option II), or the gradient at its center (option I).
    """

    def __init__(self, like_P: Tensor, *, along: bool, overlap: bool = False) -> None:
        """Begin with c_i = 0.

        Args:
            like_P: any flat vector of the run.
            along: c_i becomes the mean of the gradients of a period's steps (option II). Otherwise the trainer writes the
                gradient of the whole part at the period's center to `gradients_P` (option I).
            overlap: periods begin while the update before is on its way. Without overlap, an update without a verdict when
                the next round begins was late, and is dropped.
        """
        self.own_P = torch.zeros_like(like_P)
        self.pending: dict[int, Tensor] = {}
        self.gradients_P = torch.zeros_like(like_P)
        self._overlap = overlap
        self._sum_P = torch.zeros_like(like_P)  # Σ c_i, of the newest center
        self._control = Control(torch.zeros_like(like_P), self.gradients_P if along else None)

    @property
    def at_center(self) -> bool:
        """Return whether the gradient of the whole part is needed before the period's first step (option I)."""
        return self._control.gradients_P is None

    def resolve(self, verdicts: Verdicts) -> None:
        """Add merged changes to c_i, as the coordinator did to the sum, and drop the others up to the newest verdict."""
        newest = max(verdicts, default=0)
        for clock in [c for c in sorted(self.pending) if c <= newest]:
            change_P = self.pending.pop(clock)
            if verdicts.get(clock, False):
                self.own_P.add_(change_P)

    def begin(self, sum_P: Tensor | None, parts: int) -> Control:
        """Begin a period, and return the correction of its gradients.

        Args:
            sum_P: Σ c_i that came with a newer center; None: there is no newer center.
            parts: N.
        """
        if sum_P is not None:
            self._sum_P.copy_(sum_P)
        torch.div(self._sum_P, parts, out=self._control.correction_P).sub_(self.own_P)
        self.gradients_P.zero_()
        return self._control

    def take(self, clock: int, steps: int) -> Tensor:
        """Return Δc_i of the period that is over, after so many steps of the optimiser.

        For plain SGD, the mean of the steps' gradients is the paper's c_i − c + (x − y_i) / (K η). The mean is also right with
        momentum, with a schedule and with any other optimiser. Where periods overlap, pending changes count as merged here:
        c_i would oscillate otherwise. If one is dropped after all, the next change makes up for it.
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
        """Return the tensors to save, by name."""
        return {OWN: self.own_P, **{str(clock): change_P for clock, change_P in self.pending.items()}}

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        """Take over saved tensors."""
        for name, tensor in kept.items():
            if name == OWN:
                self.own_P.copy_(tensor)
            else:
                self.pending[int(name)] = tensor.to(self.own_P.device)
