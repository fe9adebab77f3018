"""The updates of a plan, slice by slice as they are got from the bus: each checked, and named where it cannot be merged."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

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
    """One update of the plan cannot be merged. `blob`: the model that was being put, if one was."""

    def __init__(self, entry: PlanEntry, why: str) -> None:
        self.agent, self.clock, self.why, self.blob = entry.agent, entry.clock, why, ""
        super().__init__(f"{entry.agent}: {why}")


class UpdateGone(UpdateUnusable):
    """It was offered, and is not on the bus."""


class Updates:
    """One pass over the updates of a plan, or over those `chosen` by number: `get` and then `slice` for each k, in any order,
    and `finish` at the end. All of them raise UpdateUnusable."""

    def __init__(
        self,
        bus: Bus,
        run: str,
        manifest: Manifest,
        codec: Codec,
        plan: Plan,
        chosen: Sequence[int] | None = None,
    ) -> None:
        self._bus, self._run, self._manifest, self._codec = bus, run, manifest, codec
        self.entries = plan.merged if chosen is None else [plan.merged[i] for i in chosen]
        self._digests = [BlobDigest() for _ in self.entries]

    async def get(self, k: int) -> list[bytes]:
        """The frame of chunk k of each."""
        return list(await asyncio.gather(*(self._frame(entry, k) for entry in self.entries)))

    def slice(self, k: int, frames: list[bytes]) -> list[Tensor]:
        """Slice k of each, to be read only. In any thread. Takes the frames away one by one: they are not there twice."""
        frames.reverse()
        return [self._unpacked(i, k, frames.pop()) for i in range(len(frames))]

    def figures(self, updates: Sequence[Tensor], buffers: Places = ()) -> Tensor:
        """Σ x² of each block of each update's slice, (B, N), without its `buffers`; all elements are finite. In any thread."""
        found_BN = torch.stack([squares(x_E) for x_E in updates], 1)
        if not bool(found_BN.isfinite().all()):
            odd = found_BN.isfinite().all(0).tolist().index(False)
            what = "values too large to add up" if bool(updates[odd].isfinite().all()) else "NaN or infinite values"
            raise UpdateUnusable(self.entries[odd], f"it holds {what}: its training diverged")
        if buffers:
            found_BN = torch.stack([squares(without_buffers(x_E, buffers)) for x_E in updates], 1)
        return found_BN

    def blame_unless_finite(self, sum_E: Tensor, updates: Sequence[Tensor]) -> None:
        """Finite updates may still be too large to add up."""
        if not finite(sum_E):
            largest = max(range(len(updates)), key=lambda i: float(updates[i].abs().max()))
            why = "it holds values too large to add up: its training diverged"
            raise UpdateUnusable(self.entries[largest], why)

    def finish(self) -> None:
        """Compare each update's content with the digest that its agent signed, after the last slice."""
        for entry, digest in zip(self.entries, self._digests, strict=True):
            if digest.digest() != entry.digest:
                raise UpdateUnusable(entry, "its content is not what it signed")

    async def _frame(self, entry: PlanEntry, k: int) -> bytes:
        prefix = partial(subjects.update_prefix, self._run, entry.agent)
        try:
            return (await get_frame(self._bus, subjects.updates_stream(self._run), prefix, entry.blob, k)).data
        except BlobGone as error:
            raise UpdateGone(entry, str(error)) from None
        except PeerError as error:
            raise UpdateUnusable(entry, str(error)) from None

    def _unpacked(self, i: int, k: int, frame: bytes) -> Tensor:
        entry, part = self.entries[i], self._manifest.chunk(k % self._manifest.chunks)
        blob, elements = entry.blob, part.stop - part.start
        what: dict[str, Any] = {"blob": blob.id, "k": k, "n": blob.chunks, "codec": self._codec.kind}
        dtype = self._manifest.dtype
        try:
            data = unpack_chunk(frame, **what, size=self._codec.payload_bytes(elements, DTYPES[dtype]))
            self._digests[i].add(k, chunk_digest(data))
            return decoded(self._codec, data, elements, dtype)
        except (PeerError, ValueError) as error:
            raise UpdateUnusable(entry, str(error)) from None
