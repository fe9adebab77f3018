"""Kinds of local updates: how an update is computed, and how the agent takes over a center. Knows no bus, file or training.

| kind | the update of a period | with a center W |
|---|---|---|
| rounds | the deviation W_i − W from the center the period began with | W_i ← W_i + α (W − W_i) |
| async | the progress W_end − W_start of that one period | W_i ← W, where it is newer than the one before |
| elastic | d = α (W_i − W), which the agent gives up: W_i ← W_i − d | no change |

An elastic difference that is not merged is added back: W_i ← W_i + d. So no difference counts twice, and none is lost.

The table is about parameters. In the elements of buffers (BatchNorm's statistics) every update holds the agent's own values,
and the center takes their mean; elastic averaging leaves the agent's buffers unchanged.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from syncline.averaging.buffers import Places, clear_
from syncline.averaging.mix import mix_
from syncline.spec.run_spec import RunSpec

Verdicts = dict[int, bool]  # by clock, of the updates that were judged last: whether they were merged
Pending = dict[int, Tensor]  # by clock: vectors that the agent must remember until the update is judged


class LocalUpdate(Protocol):
    """Computes the updates of one agent. P: elements of the flat vector."""

    needs_center: bool  # the update is made from the center that is newest when the period is over
    pending: Pending

    def resolve(self, verdicts: Verdicts, own_P: Tensor) -> None:
        """Apply verdicts to W_i, `own_P`."""
        ...

    def begin(self, own_P: Tensor, from_P: Tensor, center_P: Tensor | None, *, first: bool) -> None:
        """Begin a period: take over a center.

        Args:
            own_P: W_i; modified.
            from_P: receives the vector that the period is measured from.
            center_P: a newer center; None: no newer center.
            first: W_i does not exist yet, and becomes W.
        """
        ...

    def take(self, own_P: Tensor, from_P: Tensor, clock: int) -> Tensor:
        """Return the update of the period that is over.

        Args:
            own_P: W_i; an elastic update modifies this vector.
            from_P: as `begin` left it, or the newest center if `needs_center`.
            clock: of the period.
        """
        ...


class _WithoutMemory:
    """Base of updates of which the agent remembers nothing."""

    needs_center = False

    def __init__(self, buffers: Places = ()) -> None:
        self._buffers = buffers
        self.pending: Pending = {}

    def resolve(self, verdicts: Verdicts, own_P: Tensor) -> None:
        pass

    def take(self, own_P: Tensor, from_P: Tensor, clock: int) -> Tensor:
        return _with_values(own_P - from_P, own_P, self._buffers)


class DeviationUpdate(_WithoutMemory):
    """The deviation W_i − W, of synchronous rounds."""

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
    """The change of one period, of asynchronous runs. A period begins with the newest center, or where the last one ended."""

    def begin(self, own_P: Tensor, from_P: Tensor, center_P: Tensor | None, *, first: bool) -> None:
        if center_P is not None:
            own_P.copy_(center_P)
        from_P.copy_(own_P)


class ElasticUpdate:
    """The elastic difference (EASGD and AEASGD, arXiv:1412.6651): agent and center move by the same vector."""

    needs_center = True

    def __init__(self, alpha: float, buffers: Places = ()) -> None:
        self._alpha = alpha
        self._buffers = buffers
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
    """Return the kind of update that a run's settings ask for. `buffers`: the buffers' slices of the flat vector."""
    if spec.mix.kind == "elastic":
        return ElasticUpdate(spec.mix.alpha, buffers)
    return ProgressUpdate(buffers) if spec.sync.kind == "async" else DeviationUpdate(spec.mix.alpha, buffers)
