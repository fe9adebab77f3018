"""The coordinator's copy of the center W and of the vectors that are committed with it.

The version on the bus is authoritative: a coordinator that starts again reads the copy again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from syncline.model.manifest import Manifest
from syncline.shm import SharedMemory
from syncline.transform.torch_dtypes import TORCH_DTYPES


class Center:
    """The flat vectors of one version, P elements each: W, the sum of control variates, and the outer state.

    The memory holds each vector once. A merge changes them in place, and a merge that fails reads them again from the bus.

    Attributes:
        w_P: W, in shared memory, which the evaluator reads too.
        control_P: the sum of all agents' control variates, for a manifest with a second section; else 0 elements.
    """

    def __init__(self, manifest: Manifest, memory: SharedMemory, states: int = 0) -> None:
        """
        Args:
            memory: grown to the size of W.
            states: vectors of outer state, of the merge rule and the outer optimiser together; zeros at first.
        """
        memory.grow(manifest.nbytes)
        dtype = TORCH_DTYPES[manifest.dtype]
        elements = manifest.elements
        self.w_P = torch.frombuffer(memory.view(), dtype=dtype, count=elements)
        self.control_P = torch.zeros(elements if manifest.sections > 1 else 0, dtype=dtype)
        self._states = [torch.zeros(elements, dtype=dtype) for _ in range(states)]

    def states(self, part: slice) -> list[Tensor]:
        """Return the same slice of each state vector; changes of the slices change the center."""
        return [state_P[part] for state_P in self._states]
