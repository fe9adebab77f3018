"""Streams the updates of a plan through the merge rule and the outer optimiser, chunk by chunk, into the next version.

Memory is two models with their outer state, and a window of chunks of every update: the chunk size is fixed at submit so
that those stay within `STAGING_BYTES` for the largest number of agents. Nothing here decides anything: the plan says what is
merged, with which weights, in which order.

The outer state of a version lies beside its model, under the same blob id: a blob of S · C chunks, vector after vector, for
S vectors and a model of C chunks. It is committed and purged with the model. Version 0 has none: zeros.

Where the manifest has two sections (SCAFFOLD), chunks C to 2C − 1 of an update are the change of its agent's control variate,
and those of a model the sum of all variates: the changes of the merged updates are added to it, whatever their weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import xxhash
from torch import Tensor

from syncline.bus.base import Bus
from syncline.bus.blobs import Prefix, get_chunk, put_chunk, windowed
from syncline.chance import new_id
from syncline.engine.merge import RULES, finite
from syncline.errors import PeerError, SynclineError
from syncline.spec import RunSpec
from syncline.wire import subjects
from syncline.wire.chunks import blob_digest, checksum, pack_chunk
from syncline.wire.codecs import CODECS
from syncline.wire.flat import DTYPES
from syncline.wire.manifest import Manifest
from syncline.wire.messages import BlobRef, Plan, PlanEntry
from syncline_coordinator.center import Center

T = TypeVar("T")

STAGING_BYTES = 64 << 20  # for chunks of updates under way, all agents together
INLINE_BYTES = 64 * 1024  # a chunk up to this size is reduced on the event loop: handing it over costs more


class UpdateUnusable(SynclineError):
    """One update of the plan cannot be merged. `blob`: the model that was being put."""

    def __init__(self, agent: str, clock: int, why: str, blob: str = "") -> None:
        self.agent, self.clock, self.why, self.blob = agent, clock, why, blob
        super().__init__(f"{agent}: {why}")


@dataclass(frozen=True, slots=True)
class Merged:
    """The next version as it lies on the bus."""

    model: BlobRef
    digest: str
    bytes_got: int
    bytes_put: int


def chunk_bytes_for(spec: RunSpec, agents: int, max_payload: int, overhead: int) -> int:
    """Bytes of tensor in a chunk: what a message holds, less where many agents would not fit into the staging memory."""
    allowed = max_payload - overhead
    wanted = spec.wire.chunk_bytes or min(allowed, STAGING_BYTES // max(1, agents * spec.wire.window))
    return max(4096, min(wanted, allowed))


class Reducer:
    """`executor` runs the arithmetic; without one it runs inline, which makes simulated time deterministic."""

    def __init__(
        self, bus: Bus, spec: RunSpec, manifest: Manifest, center: Center, executor: Executor | None = None
    ) -> None:
        self._executor = executor
        self._bus, self._spec, self._manifest, self._center = bus, spec, manifest, center
        self._codec = CODECS[manifest.dtype]
        self._rule = RULES[spec.merge.rule]

    async def merge(self, plan: Plan) -> Merged:
        """The next center, put on the bus and in `center.next_P`. Raises UpdateUnusable for an update it cannot merge.

        Every update is checked as it passes: frame, checksum, digest as signed, no NaN.
        """
        blob, chunks = new_id(), self._manifest.chunks
        weights = [entry.weight for entry in plan.merged]
        checksums = [[0] * self._manifest.blob_chunks for _ in plan.merged]
        put = 0

        async def one(k: int) -> None:
            nonlocal put
            datas = await asyncio.gather(*(self._get(entry, k) for entry in plan.merged))
            reduce = self._reduce if k < chunks else self._add_up
            model, *states = await self._off_loop(reduce, plan, weights, datas, checksums, blob, k)
            put += len(model)
            await self._put_model(blob, k, model)
            for s, frame in enumerate(states):
                await put_chunk(self._bus, f"{subjects.outer_prefix(self._spec.name, blob)}.{s * chunks + k}", frame)

        try:
            await windowed(self._manifest.blob_chunks, self._spec.wire.window, one)
            for entry, sums in zip(plan.merged, checksums, strict=True):
                if blob_digest(sums) != entry.digest:
                    raise UpdateUnusable(entry.agent, entry.clock, "its content is not what it signed")
        except UpdateUnusable as error:
            error.blob = blob
            raise
        digest = await self._off_loop(digest_of, self._center.next_P)
        model = self._model_ref(blob)
        return Merged(model, digest, model.size * len(plan.merged), put)

    async def put_center(self) -> Merged:
        """The current center as a blob: version 0."""
        model, parts = self._model_ref(new_id()), self._model_parts()
        put = 0

        async def one(k: int) -> None:
            nonlocal put
            frame = self._frame(parts[k], model.id, k, model.chunks)
            put += len(frame)
            await self._put_model(model.id, k, frame)

        await windowed(model.chunks, self._spec.wire.window, one)
        return Merged(model, digest_of(self._center.now_P), 0, put)

    async def get_center(self, ref: BlobRef, version: int) -> None:
        """Fills the current center, and its outer state, from the blobs of a version."""
        model = partial(subjects.model_prefix, self._spec.name)
        await self._fill(model, ref, self._model_parts())
        states = [
            state_E for vector in zip(*map(self._center.states_now, self._parts()), strict=True) for state_E in vector
        ]
        if version and states:
            outer = partial(subjects.outer_prefix, self._spec.name)
            await self._fill(outer, self.outer_ref(ref), states)

    def outer_ref(self, model: BlobRef) -> BlobRef:
        """The outer state that lies beside a model."""
        states, layout = self._spec.states, self._manifest
        return BlobRef(id=model.id, size=states * layout.nbytes, chunks=states * layout.chunks)

    def _model_ref(self, blob: str) -> BlobRef:
        return BlobRef(id=blob, size=self._manifest.blob_bytes, chunks=self._manifest.blob_chunks)

    def _model_parts(self) -> list[Tensor]:
        """The current center as the chunks of a model hold it, section after section."""
        vectors = [self._center.now_P, self._center.control_now_P][: self._manifest.sections]
        return [vector_P[part] for vector_P in vectors for part in self._parts()]

    def _parts(self) -> list[slice]:
        return [self._manifest.chunk(k) for k in range(self._manifest.chunks)]

    async def _fill(self, prefix: Prefix, ref: BlobRef, parts: Sequence[Tensor]) -> None:
        """Chunk k of the blob into `parts[k]`."""
        stream = subjects.model_stream(self._spec.name)

        async def one(k: int) -> None:
            size = self._codec.nbytes(parts[k].numel())
            self._codec.decode(await get_chunk(self._bus, stream, prefix, ref, k, size, self._codec.name), parts[k])

        await windowed(ref.chunks, self._spec.wire.window, one)

    async def _put_model(self, blob: str, k: int, frame: bytes) -> None:
        await put_chunk(self._bus, f"{subjects.model_prefix(self._spec.name, blob)}.{k}", frame)

    async def _get(self, entry: PlanEntry, k: int) -> bytes:
        run, part = self._spec.name, self._manifest.chunk(k % self._manifest.chunks)
        prefix = partial(subjects.update_prefix, run, entry.agent)
        size = self._codec.nbytes(part.stop - part.start)
        try:
            return await get_chunk(
                self._bus, subjects.updates_stream(run), prefix, entry.blob, k, size, self._codec.name
            )
        except PeerError as error:
            raise UpdateUnusable(entry.agent, entry.clock, str(error)) from None

    def _reduce(
        self,
        plan: Plan,
        weights: Sequence[float],
        datas: Sequence[bytes],
        checksums: Sequence[list[int]],
        blob: str,
        k: int,
    ) -> list[bytes]:
        """Chunk k: decode, merge, step, encode. Returns the frame of the model, and those of the outer state."""
        part = self._manifest.chunk(k)
        staged_NE = self._staged(part, datas, checksums, k)
        merged_E = torch.empty(part.stop - part.start, dtype=DTYPES[self._manifest.dtype])
        self._rule(list(staged_NE), weights, merged_E)
        if not finite(merged_E):
            raise self._diverged(plan, staged_NE)
        center, next_E, states = self._center, self._center.next_P[part], self._center.states_next(part)
        self._spec.outer.step(center.now_P[part], merged_E, center.states_now(part), next_E, states, plan.version - 1)
        chunks = self._manifest.chunks
        return [
            self._frame(next_E, blob, k, self._manifest.blob_chunks),
            *(self._frame(state_E, blob, s * chunks + k, len(states) * chunks) for s, state_E in enumerate(states)),
        ]

    def _add_up(
        self,
        plan: Plan,
        weights: Sequence[float],
        datas: Sequence[bytes],
        checksums: Sequence[list[int]],
        blob: str,
        k: int,
    ) -> list[bytes]:
        """Chunk k of the section of control variates: Σ c_i ← Σ c_i + Σ Δc_i. Returns its frame."""
        part = self._manifest.chunk(k - self._manifest.chunks)
        staged_NE = self._staged(part, datas, checksums, k)
        next_E = self._center.control_next_P[part].copy_(self._center.control_now_P[part])
        for row_E in staged_NE:
            next_E.add_(row_E)
        if not finite(next_E):
            raise self._diverged(plan, staged_NE)
        return [self._frame(next_E, blob, k, self._manifest.blob_chunks)]

    def _staged(self, part: slice, datas: Sequence[bytes], checksums: Sequence[list[int]], k: int) -> Tensor:
        """Chunk k of every update, decoded; its checksums are noted."""
        staged_NE = torch.empty((len(datas), part.stop - part.start), dtype=DTYPES[self._manifest.dtype])
        for row_E, data, sums in zip(staged_NE, datas, checksums, strict=True):
            self._codec.decode(data, row_E)
            sums[k] = checksum(data)
        return staged_NE

    @staticmethod
    def _diverged(plan: Plan, staged_NE: Tensor) -> UpdateUnusable:
        """Whose update it is that makes the sum infinite."""
        odd = next((i for i, row_E in enumerate(staged_NE) if not finite(row_E)), None)
        entry = plan.merged[int(staged_NE.abs().amax(1).argmax()) if odd is None else odd]
        what = "values too large to add up" if odd is None else "NaN or infinite values"
        return UpdateUnusable(entry.agent, entry.clock, f"it holds {what}: its training diverged")

    def _frame(self, part_E: Tensor, blob: str, k: int, n: int) -> bytes:
        coded = bytearray(self._codec.nbytes(part_E.numel()))
        self._codec.encode(part_E, memoryview(coded))
        return pack_chunk(blob, k, n, self._codec.name, memoryview(coded))

    async def _off_loop(self, work: Callable[..., T], *args: Any) -> T:
        """Runs it in the executor; on the event loop where the whole model is so small that handing over costs more."""
        if self._executor is None or self._manifest.nbytes <= INLINE_BYTES:
            return work(*args)
        return await asyncio.get_running_loop().run_in_executor(self._executor, work, *args)


def digest_of(center_P: Tensor) -> str:
    """xxh3-128 over the center's bytes."""
    return xxhash.xxh3_128_hexdigest(center_P.numpy().data)
