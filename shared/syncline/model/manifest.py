"""The manifest: the layout of a model's averaged tensors in one flat vector.

Averaged are trainable parameters and floating-point buffers. Integer buffers are never averaged, frozen parameters do
not travel (so a LoRA run sends only its adapters), tied weights travel once, and tensors that the task calls `local`
stay with the agent. This module holds the layout alone and imports no torch; `flat` applies the layout to a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar

import xxhash
from pydantic import Field

from syncline.wire.dtypes import DTYPE_PATTERN, DTYPES, Dtype
from syncline.wire.messages import MAX_BLOB_RECORD_BYTES, Count, Record

ALIGN_ELEMENTS = 1024  # chunks hold a multiple of this, so that a codec's blocks never cross them
MAX_CODE_FILES = 1000


class Entry(Record):
    """One averaged tensor."""

    name: Annotated[str, Field(max_length=500)]
    shape: Annotated[list[Count], Field(max_length=16)]
    offset: Count = Field(description="first element in the flat vector")
    elements: Count
    buffer: bool = Field(
        False,
        description="no trained parameter but a statistic: an update holds its value, and the center takes the mean",
    )
    unit: bool = Field(False, description="a vector of length 1, as spectral norm keeps them; its mean is scaled back")


class NamedDigest(Record):
    """The digest of a tensor, or of a file."""

    name: Annotated[str, Field(max_length=500)]
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")] = Field(description="xxh3-64 of its content")


class Manifest(Record):
    """The layout of the center, fixed at submit."""

    kind: ClassVar[str] = "manifest"
    max_bytes: ClassVar[int] = MAX_BLOB_RECORD_BYTES
    dtype: Annotated[str, Field(pattern=DTYPE_PATTERN)] = Field(description="of the flat vector")
    elements: Annotated[int, Field(ge=1, lt=1 << 48)]
    chunk_elements: Annotated[int, Field(ge=1)]
    tensors: Annotated[list[Entry], Field(max_length=100_000)]
    sections: Annotated[int, Field(ge=1, le=2)] = Field(
        1,
        description="vectors in a blob: of an update delta, then control; of a center W, then the sum of all controls",
    )
    local: Annotated[list[str], Field(max_length=100_000)] = Field(
        default_factory=list, description="tensors that do not travel"
    )

    frozen: Annotated[list[NamedDigest], Field(max_length=100_000)] = Field(
        default_factory=list,
        description="of those, the tensors that must be equal on every machine, as the coordinator has them at version 0",
    )
    code: Annotated[list[NamedDigest], Field(max_length=MAX_CODE_FILES)] = Field(
        default_factory=list, description="files of the task's code, as the coordinator has them"
    )

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        return self.elements * self.itemsize

    @property
    def chunk_bytes(self) -> int:
        return self.chunk_elements * self.itemsize

    @property
    def chunks(self) -> int:
        return -(-self.elements // self.chunk_elements)

    def chunk(self, k: int) -> slice:
        """Return the elements of chunk k."""
        return slice(k * self.chunk_elements, min((k + 1) * self.chunk_elements, self.elements))

    @property
    def buffers(self) -> list[slice]:
        """Return the elements of the flat vector that belong to buffers, in order; buffers side by side make one slice."""
        found: list[slice] = []
        for entry in self.tensors:
            if not entry.buffer or not entry.elements:
                continue
            begin, end = entry.offset, entry.offset + entry.elements
            if found and found[-1].stop == begin:
                begin = found.pop().start
            found.append(slice(begin, end))
        return found

    def buffers_of_chunks(self) -> dict[int, list[slice]]:
        """Return the elements of `buffers`, counted from the start of their chunk, by the number of the chunk."""
        found: dict[int, list[slice]] = {}
        for buffer in self.buffers:
            for k in range(buffer.start // self.chunk_elements, -(-buffer.stop // self.chunk_elements)):
                chunk = self.chunk(k)
                begin, end = max(buffer.start, chunk.start), min(buffer.stop, chunk.stop)
                found.setdefault(k, []).append(slice(begin - chunk.start, end - chunk.start))
        return found

    @property
    def blob_bytes(self) -> int:
        """Return the bytes of a center on the bus: all its sections, each with chunks of its own, one after the other."""
        return self.sections * self.nbytes

    def coded_bytes(self, payload_bytes: Callable[[int, Dtype], int]) -> int:
        """Return the bytes of an update after coding.

        Args:
            payload_bytes: the codec's function from the elements of a chunk and their type to the bytes of a payload.
        """
        dtype, last = DTYPES[self.dtype], self.chunk(self.chunks - 1)
        full = (self.chunks - 1) * payload_bytes(self.chunk_elements, dtype)
        return self.sections * (full + payload_bytes(last.stop - last.start, dtype))

    @property
    def blob_chunks(self) -> int:
        return self.sections * self.chunks

    def layout_digest(self) -> str:
        """Return a digest that two models share if and only if they have the same averaged tensors."""
        rows = [f"{t.name}:{t.shape}:{t.offset}{':buffer' * t.buffer}" for t in self.tensors]
        return xxhash.xxh3_128_hexdigest("\n".join([self.dtype, *rows]).encode())
