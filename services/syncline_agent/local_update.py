"""What an agent's update *is*, and what the agent does with a center. Knows no bus, no file and no training.

| kind | the update of a period | with a center W |
|---|---|---|
| rounds | the deviation W_i − W from the center the period began with | W_i ← W_i + α (W − W_i) |
| async | the progress W_end − W_start of that one period | W_i ← W, where it is newer than the one before |
| elastic | d = α (W_i − W), which the agent gives up: W_i ← W_i − d | – |

An elastic difference that is not merged is given back: W_i ← W_i + d. So nothing is counted twice, and nothing is lost.

All of this is about parameters. In the places of buffers (BatchNorm's statistics) every update holds the agent's own values,
of which the center takes the mean; of elastic averaging they are no part.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from syncline.averaging.buffers import Places, clear_
from syncline.averaging.mix import mix_
from syncline.spec.run_spec import RunSpec

Verdicts = dict[int, bool]  # the last judged clocks of this agent: whether they were merged
Pending = dict[int, Tensor]  # by clock: what is offered and not judged, as far as the agent has to remember it


class LocalUpdate(Protocol):
    needs_center: bool  # the update is made from the center that is newest when the period is over
    pending: Pending

    def resolve(self, verdicts: Verdicts, own_P: Tensor) -> None:
        """What was judged since."""
        ...

    def begin(self, own_P: Tensor, from_P: Tensor, center_P: Tensor | None, *, first: bool) -> None:
        """A period begins. `center_P`: a newer center, or None; `first`: there is no W_i yet. Writes W_i, and into `from_P`
        what the period is measured from."""
        ...

    def take(self, own_P: Tensor, from_P: Tensor, clock: int) -> Tensor:
        """The update of the period that is over. `from_P`: as `begin` left it; the newest center where that is needed."""
        ...


class _WithoutMemory:
    """Nothing has to be remembered until it is judged."""

    needs_center = False

    def __init__(self, buffers: Places = ()) -> None:
        self._buffers = buffers
        self.pending: Pending = {}

    def resolve(self, verdicts: Verdicts, own_P: Tensor) -> None:
        pass

    def take(self, own_P: Tensor, from_P: Tensor, clock: int) -> Tensor:
        return _with_values(own_P - from_P, own_P, self._buffers)


class DeviationUpdate(_WithoutMemory):
    """Of synchronous rounds."""

    def __init__(self, alpha: float, buffers: Places = ()) -> None:
        super().__init__(buffers)
        self._alpha = alpha

    def begin(self, own_P: Tensor, from_P: Tensor, center_P: Tensor | None, *, first: bool) -> None:
        assert center_P is not None, "every round begins with its center"
        from_P.copy_(center_P)
        mix_(own_P, center_P, 1.0 if first else self._alpha)
        for buffer in self._buffers if self._alpha > 1 else ():  # a variance beyond the center could be negative
            own_P[buffer] = center_P[buffer]


class ProgressUpdate(_WithoutMemory):
    """Of asynchronous runs: the next period begins with the newest center, or goes on from where the last one ended."""

    def begin(self, own_P: Tensor, from_P: Tensor, center_P: Tensor | None, *, first: bool) -> None:
        if center_P is not None:
            own_P.copy_(center_P)
        from_P.copy_(own_P)


class ElasticUpdate:
    """Of elastic averaging (EASGD and AEASGD, arXiv:1412.6651): agent and center meet by the same difference."""

    needs_center = True

    def __init__(self, alpha: float, buffers: Places = ()) -> None:
        self._alpha, self._buffers = alpha, buffers
        self.pending: Pending = {}

    def resolve(self, verdicts: Verdicts, own_P: Tensor) -> None:
        newest = max(verdicts, default=0)
        for clock in [c for c in sorted(self.pending) if c <= newest]:
            difference_P = self.pending.pop(clock)
            if not verdicts.get(clock, False):  # dropped, or never offered
                own_P.add_(difference_P)

    def begin(self, own_P: Tensor, from_P: Tensor, center_P: Tensor | None, *, first: bool) -> None:
        if center_P is not None:
            from_P.copy_(center_P)
            if first:
                own_P.copy_(center_P)

    def take(self, own_P: Tensor, from_P: Tensor, clock: int) -> Tensor:
        difference_P = torch.sub(own_P, from_P).mul_(self._alpha)
        clear_(difference_P, self._buffers)
        own_P.sub_(difference_P)
        self.pending[clock] = difference_P
        return _with_values(difference_P.clone(), own_P, self._buffers) if self._buffers else difference_P


def _with_values(update_P: Tensor, own_P: Tensor, buffers: Places) -> Tensor:
    for buffer in buffers:
        update_P[buffer] = own_P[buffer]
    return update_P


def local_update_of(spec: RunSpec, buffers: Places) -> LocalUpdate:
    """Return the kind of update that a run's settings ask for. `buffers`: their places in the flat vector."""
    if spec.mix.kind == "elastic":
        return ElasticUpdate(spec.mix.alpha, buffers)
    return ProgressUpdate(buffers) if spec.sync.kind == "async" else DeviationUpdate(spec.mix.alpha, buffers)
