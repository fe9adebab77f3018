"""The updates of a plan, read from the bus chunk by chunk and checked. An error names the update that cannot be merged."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from syncline.averaging.buffers import Places, without_buffers
from syncline.averaging.kernels import finite, squares
from syncline.bus.base import Bus
from syncline.bus.blobs import BlobGone, get_frame
from syncline.errors import PeerError, SynclineError
from syncline.model.manifest import Manifest
from syncline.transform.codecs import Codec
from syncline.transform.payloads import decoded
from syncline.wire import subjects
from syncline.wire.chunks import BlobDigest, chunk_digest, unpack_chunk
from syncline.wire.dtypes import DTYPES
from syncline.wire.messages import Plan, PlanEntry


class UpdateUnusable(SynclineError):
    """One update of the plan cannot be merged.

    Args:
        entry: the update.
        why: the problem, with «it» for the update.

    Attributes:
        blob: id of the model that was being put, and is incomplete; '' if no chunk was put.
    """

    def __init__(self, entry: PlanEntry, why: str) -> None:
        self.agent = entry.agent
        self.clock = entry.clock
        self.why = why
        self.blob = ""
        super().__init__(f"{entry.agent}: {why}")


class UpdateGone(UpdateUnusable):
    """An update that was offered is not on the bus."""


class UpdateReader:
    """One pass over the updates of a plan.

    Call `get` and then `decode` once for each chunk, in any order of chunks, and `verify_digests` at the end. `decode`,
    `checked_squares` and `check_finite_sum` may be called in any thread.

    Args:
        chosen: places in the plan of the updates to read. None: all.

    Attributes:
        entries: the updates that are read, in the plan's order; N of them.
    """

    def __init__(
        self,
        bus: Bus,
        run: str,
        manifest: Manifest,
        codec: Codec,
        plan: Plan,
        chosen: Sequence[int] | None = None,
    ) -> None:
        self._bus = bus
        self._run = run
        self._manifest = manifest
        self._codec = codec
        self.entries = plan.merged if chosen is None else [plan.merged[i] for i in chosen]
        self._digests = [BlobDigest() for _ in self.entries]

    async def get(self, k: int) -> list[bytes]:
        """Read chunk k of each update.

        Returns:
            N frames, for `decode` to check.

        Raises:
            UpdateGone: a chunk is not on the bus.
            UpdateUnusable: the bus holds an invalid message in its place.
        """
        return list(await asyncio.gather(*(self._frame(entry, k) for entry in self.entries)))

    def decode(self, k: int, frames: list[bytes]) -> list[Tensor]:
        """Decode the frames of chunk k.

        Args:
            frames: as `get` returns them; emptied one by one, so that memory does not hold a chunk twice.

        Returns:
            N slices of E elements each. They may share memory with the frames: do not write to them.

        Raises:
            UpdateUnusable: a frame is damaged or belongs to another chunk, or its content cannot be decoded.
        """
        frames.reverse()
        return [self._decoded(i, k, frames.pop()) for i in range(len(frames))]

    def checked_squares(self, updates: Sequence[Tensor], buffers: Places = ()) -> Tensor:
        """Check that all elements are finite, and return Σ x² of each block of each slice.

        Args:
            updates: N slices, of the same chunk.
            buffers: elements of the chunk that belong to buffers. They are checked, and count as 0 in the sums.

        Returns:
            Sums in float64, (B, N).

        Raises:
            UpdateUnusable: a slice holds NaN or infinite values, or values whose squares are too large to add up.
        """
        squares_BN = torch.stack([squares(x_E) for x_E in updates], 1)
        if not bool(squares_BN.isfinite().all()):
            bad = squares_BN.isfinite().all(0).tolist().index(False)
            is_finite = bool(updates[bad].isfinite().all())
            problem = "values too large to add up" if is_finite else "NaN or infinite values"
            raise UpdateUnusable(self.entries[bad], f"it holds {problem}: its training diverged")
        if buffers:
            squares_BN = torch.stack([squares(without_buffers(x_E, buffers)) for x_E in updates], 1)
        return squares_BN

    def check_finite_sum(self, sum_E: Tensor, updates: Sequence[Tensor]) -> None:
        """Check a sum of finite updates for overflow, and blame the update with the largest element.

        Raises:
            UpdateUnusable: the sum is not finite.
        """
        if not finite(sum_E):
            largest = max(range(len(updates)), key=lambda i: float(updates[i].abs().max()))
            why = "it holds values too large to add up: its training diverged"
            raise UpdateUnusable(self.entries[largest], why)

    def verify_digests(self) -> None:
        """Compare each update's content with the digest that its agent signed. Call after the last chunk.

        Raises:
            UpdateUnusable: the content is not that of the signed digest.
        """
        for entry, digest in zip(self.entries, self._digests, strict=True):
            if digest.digest() != entry.digest:
                raise UpdateUnusable(entry, "its content does not match the digest that its agent signed")

    async def _frame(self, entry: PlanEntry, k: int) -> bytes:
        prefix = partial(subjects.update_prefix, self._run, entry.agent)
        try:
            return (await get_frame(self._bus, subjects.updates_stream(self._run), prefix, entry.blob, k)).data
        except BlobGone as error:
            raise UpdateGone(entry, str(error)) from None
        except PeerError as error:
            raise UpdateUnusable(entry, str(error)) from None

    def _decoded(self, i: int, k: int, frame: bytes) -> Tensor:
        entry = self.entries[i]
        part = self._manifest.chunk(k % self._manifest.chunks)
        elements = part.stop - part.start
        dtype = self._manifest.dtype
        try:
            size = self._codec.payload_bytes(elements, DTYPES[dtype])
            data = unpack_chunk(frame, blob=entry.blob.id, k=k, n=entry.blob.chunks, codec=self._codec.kind, size=size)
            self._digests[i].add(k, chunk_digest(data))
            return decoded(self._codec, data, elements, dtype)
        except (PeerError, ValueError) as error:
            raise UpdateUnusable(entry, str(error)) from None
