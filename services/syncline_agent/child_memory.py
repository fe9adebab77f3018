"""The memory that a training child shares with its service, as the child uses it: progress, inbox and outboxes."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from syncline.model.manifest import Manifest
from syncline.shm import SharedMemory
from syncline.transform.codecs import RAW, Codec
from syncline.transform.payloads import write_payloads
from syncline.transform.torch_dtypes import TORCH_DTYPES
from syncline_agent.training_child import PROGRESS_BYTES, STEPS_EXPECTED, STOP_EARLY

MODEL = 0  # the section of a box that holds the center or the update; the first one
CONTROL = 1  # the section that holds control variates
_STEPS = struct.Struct("<QQ")  # steps ever, and steps of this period
_EXPECTED = struct.Struct("<QQ")  # steps of this period when it is over, and rows of the agent's part


class ChildMemory:
    """Reads and writes the shared memory. P: elements of the flat vector.

    Attributes:
        steps_ever: signs of progress since this process began: steps, batches of an evaluation, and ticks of long work.
    """

    def __init__(self, memory: SharedMemory) -> None:
        self.steps_ever = 0
        self._memory = memory
        self._view = memory.view()

    def lay_out(self, layout: Manifest, outboxes: int, codec: Codec) -> None:
        """Make room for the boxes of a run. `codec`: of the updates; the codec's state begins anew."""
        self._layout = layout
        self._codec = codec
        self._chunks = [layout.chunk(k) for k in range(layout.chunks)]
        zeros_P = torch.zeros(layout.elements if codec.vectors else 0, dtype=TORCH_DTYPES[layout.dtype])
        self._codec_states = [[zeros_P.clone() for _ in range(codec.vectors)] for _ in range(layout.sections)]
        self._memory.grow(PROGRESS_BYTES + (1 + outboxes) * layout.blob_bytes)
        self._view = self._memory.view()

    @property
    def stop_requested(self) -> bool:
        """Return whether the service asks for the end of the period."""
        return bool(self._view[STOP_EARLY])

    @property
    def steps_made(self) -> int:
        """Return the steps made in this period."""
        return int(_STEPS.unpack_from(self._view, 0)[1])

    def period_begins(self) -> None:
        _STEPS.pack_into(self._view, 0, self.steps_ever, 0)

    def expect(self, steps: int, rows: int) -> None:
        """Show how many steps the period will have, 0 if that is not known, and the rows of the agent's part."""
        _EXPECTED.pack_into(self._view, STEPS_EXPECTED, steps, rows)

    def step_made(self, made: int, expected: int) -> None:
        """Count a step; `made` of `expected` are made in this period."""
        self.steps_ever += 1
        _STEPS.pack_into(self._view, 0, self.steps_ever, made)
        struct.pack_into("<Q", self._view, STEPS_EXPECTED, expected)

    def show_progress(self) -> None:
        """Show a sign of progress other than a step."""
        self.steps_ever += 1
        struct.pack_into("<Q", self._view, 0, self.steps_ever)

    def center(self, section: int = MODEL) -> Tensor:
        """Return a section of the inbox, decoded, on the CPU."""
        center_P = torch.empty(self._layout.elements, dtype=TORCH_DTYPES[self._layout.dtype])
        begin = PROGRESS_BYTES + section * self._layout.nbytes
        RAW.decode(self._view[begin : begin + self._layout.nbytes], center_P)
        return center_P

    def put_update(self, outbox: int, *sections_P: Tensor) -> None:
        """Encode an update into an outbox: its sections, one behind the other."""
        begin = PROGRESS_BYTES + (1 + outbox) * self._layout.blob_bytes
        out = self._view[begin : begin + self._layout.blob_bytes]
        for section, section_P in enumerate(sections_P):
            payloads, state = self._codec.encode(section_P.cpu(), self._chunks, self._codec_states[section])
            self._codec_states[section] = list(state)
            out = out[write_payloads(payloads, out) :]
