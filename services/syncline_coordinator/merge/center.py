"""W and what is kept beside it. It is a copy: what counts lies on the bus."""

from __future__ import annotations

import torch
from torch import Tensor

from syncline.model.manifest import Manifest
from syncline.shm import SharedMemory
from syncline.transform.torch_dtypes import TORCH_DTYPES


class Center:
    """Flat vectors, each there once: a merge works in place, and one that is given up reads them again from the bus.

    W lies in shared memory, which the evaluator reads too. Where the manifest has a second section, the sum of all agents'
    control variates does not, nor do the `states` vectors of merge rule and outer optimiser; all of those are zeros at first.
    """

    def __init__(self, manifest: Manifest, memory: SharedMemory, states: int = 0) -> None:
        memory.grow(manifest.nbytes)
        dtype, elements = TORCH_DTYPES[manifest.dtype], manifest.elements
        self.w_P = torch.frombuffer(memory.view(), dtype=dtype, count=elements)
        self.control_P = torch.zeros(elements if manifest.sections > 1 else 0, dtype=dtype)
        self._states = [torch.zeros(elements, dtype=dtype) for _ in range(states)]

    def states(self, part: slice) -> list[Tensor]:
        """A slice of each state vector."""
        return [state_P[part] for state_P in self._states]
