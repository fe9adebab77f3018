"""W and what the outer optimiser keeps beside it, and the place where the next ones are made."""

from __future__ import annotations

import torch
from torch import Tensor

from syncline.shm import SharedMemory
from syncline.wire.flat import DTYPES
from syncline.wire.manifest import Manifest


class Center:
    """Flat vectors, each in two places that take turns: a merge that is given up has changed nothing.

    W lies in shared memory, which the evaluator reads too. Where the manifest has a second section, the sum of all agents'
    control variates does not, nor do the `states` vectors of the outer optimiser; all of those are zeros at first.
    """

    def __init__(self, manifest: Manifest, memory: SharedMemory, states: int = 0) -> None:
        memory.grow(2 * manifest.nbytes)
        view, dtype = memory.view(), DTYPES[manifest.dtype]
        self._both = [
            torch.frombuffer(view, dtype=dtype, count=manifest.elements, offset=i * manifest.nbytes) for i in (0, 1)
        ]
        self._controls = [torch.zeros(manifest.elements if manifest.sections > 1 else 0, dtype=dtype) for _ in (0, 1)]
        self._states = [[torch.zeros(manifest.elements, dtype=dtype) for _ in range(states)] for _ in (0, 1)]
        self.current = 0

    @property
    def now_P(self) -> Tensor:
        return self._both[self.current]

    @property
    def next_P(self) -> Tensor:
        return self._both[1 - self.current]

    @property
    def control_now_P(self) -> Tensor:
        return self._controls[self.current]

    @property
    def control_next_P(self) -> Tensor:
        return self._controls[1 - self.current]

    def states_now(self, part: slice) -> list[Tensor]:
        """A slice of each state vector."""
        return [state_P[part] for state_P in self._states[self.current]]

    def states_next(self, part: slice) -> list[Tensor]:
        return [state_P[part] for state_P in self._states[1 - self.current]]

    def advance(self) -> None:
        self.current = 1 - self.current
