"""Streams the updates of a plan through the merge rule and the outer optimiser, chunk by chunk, into the next version.

Memory is one model with its outer state, and a few chunks of every update: the chunk size is fixed at submit so that those
stay within `STAGING_BYTES` for the largest number of agents. The next version is made in place, and put as it is made; where a
merge has to be given up, the version that was left is read again from the bus. A rule that looks at the updates first gets them
from the bus twice, and keeps a few numbers of them. Nothing here decides anything: the plan says what is merged, with which
weights, in which order.

The outer state of a version lies beside its model, under the same blob id: a blob of S · C chunks, vector after vector, for
S vectors and a model of C chunks. It is committed and purged with the model. Version 0 has none: zeros.

Where the manifest has two sections (SCAFFOLD), chunks C to 2C − 1 of an update are the change of its agent's control variate,
and those of a model the sum of all variates: the changes of the merged updates are added to it, whatever their weights.

Buffers of the model (BatchNorm's statistics) take the weighted mean of the agents' values, whatever the rule and the outer
optimiser; they count in no norm and no distance.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
import xxhash
from torch import Tensor

from syncline.averaging.buffers import buffer_weights, clear_, mean_of_values, of_chosen, without_buffers
from syncline.averaging.kernels import Sums, squares
from syncline.bus.base import Bus
from syncline.bus.blobs import Prefix, get_chunk, put_chunk, windowed
from syncline.chance import new_id
from syncline.model.manifest import Manifest
from syncline.spec.run_spec import RunSpec
from syncline.transform.codecs import RAW
from syncline.transform.payloads import payload_of
from syncline.transform.torch_dtypes import TORCH_DTYPES
from syncline.wire import subjects
from syncline.wire.chunks import content_bytes, pack_chunk
from syncline.wire.dtypes import DTYPES
from syncline.wire.messages import BlobRef, Plan
from syncline_coordinator.merge.center import Center
from syncline_coordinator.merge.updates import Updates, UpdateUnusable

T = TypeVar("T")

STAGING_BYTES = 8 << 20  # for chunks of updates under way, all agents together; twice as much where all come that may
LEAST_DEPTH = 2  # chunks of every update: one is on its way while another is reduced
INLINE_BYTES = 64 * 1024  # a chunk up to this size is reduced on the event loop: handing it over costs more


@dataclass(frozen=True, slots=True)
class Merged:
    """The next version as it lies on the bus."""

    model: BlobRef
    digest: str
    bytes_got: int
    bytes_put: int
    norms: tuple[float, ...] = ()  # ‖Δ_i‖ of each update, in the plan's order
    norm: float = 0.0  # ‖D‖

    def drift(self, weights: Sequence[float]) -> float | None:
        """‖Σ p_i Δ_i‖² / Σ p_i ‖Δ_i‖² with these weights: 1 where the updates agree, 1/N where they are orthogonal."""
        spread = sum(weights) * sum(w * norm**2 for w, norm in zip(weights, self.norms, strict=True))
        return self.norm**2 / spread if spread > 0 else None


@dataclass(slots=True)
class _Work:
    """One merge under way."""

    plan: Plan
    blob: str
    weights: list[float]  # of the updates that are added up, and then of what the rule has kept
    shares: list[float]  # of the same updates, for the mean of their buffers
    chosen: list[int] | None = None  # numbers of those updates, once all were looked at; None: all of them
    squares: Sums = field(default_factory=Sums)  # ‖Δ_i‖²
    moved: Sums = field(default_factory=Sums)  # ‖D‖²
    bytes_got: int = 0
    bytes_put: int = 0


@dataclass(frozen=True, slots=True)
class _Made:
    """One chunk of the next version: frames of the model and of what is kept beside it."""

    model: bytes
    states: list[bytes]
    moved_B: Tensor  # Σ D² of each block
    squares_BN: Tensor | None = None  # Σ Δ_i² of each block, unless a first pass has seen them


def chunk_bytes_for(spec: RunSpec, agents: int, max_payload: int) -> int:
    """Bytes of tensor in a chunk: what a message holds, less where many agents would not fit into the staging memory."""
    allowed = content_bytes(max_payload)
    wanted = spec.wire.chunk_bytes or min(allowed, STAGING_BYTES // max(1, agents))
    return max(4096, min(wanted, allowed))


class Reducer:
    """`executor` runs the arithmetic; without one it runs inline, which makes simulated time deterministic."""

    def __init__(
        self, bus: Bus, spec: RunSpec, manifest: Manifest, center: Center, executor: Executor | None = None
    ) -> None:
        self._executor, self._running = executor, set[Future[Any]]()
        self._lies_at: tuple[BlobRef, int] | None = None  # where the center is on the bus, and its version
        self._bus, self._spec, self._manifest, self._center = bus, spec, manifest, center
        self._rule, self._outer = spec.merge, spec.outer
        self._buffers = manifest.buffers_of_chunks()

    async def merge(self, plan: Plan) -> Merged:
        """The next center, in the place of this one, and put on the bus. Raises UpdateUnusable for an update it cannot merge;
        then the center is what it was.

        Every update is checked as it passes: frame, checksum, digest as signed, no NaN.
        """
        planned = [entry.weight for entry in plan.merged]
        work = _Work(plan, new_id(), planned, self._shares(plan, planned))
        if self._rule.two_pass:
            await self._look(work)
        try:
            await self._make(work)
        except UpdateUnusable as error:
            error.blob = work.blob
            await self._go_back()
            raise
        digest, model = await self._off_loop(digest_of, self._center.w_P), self._model_ref(work.blob)
        self._lies_at = model, plan.version
        return Merged(model, digest, work.bytes_got, work.bytes_put, tuple(_roots(work.squares)), *_roots(work.moved))

    def _shares(self, plan: Plan, planned: list[float]) -> list[float]:
        mix = self._spec.mix
        alpha = mix.alpha if mix.kind == "elastic" else None
        return buffer_weights(plan.merged, planned, self._rule.weights, self._rule.normalize, alpha)

    async def _look(self, work: _Work) -> None:
        """The first pass, of rules that need one: what the updates count in the second."""
        updates, figures = self._updates(work.plan), Sums()

        async def one(k: int) -> None:
            frames = await updates.get(k)
            squares_BN, figures_BF = await self._off_loop(self._look_at, updates, work.weights, frames, k)
            work.squares.add(k, squares_BN)
            figures.add(k, figures_BF)

        assert self._manifest.sections == 1, "a rule that looks at the updates is not for control variates"
        await windowed(self._manifest.chunks, self._depth(work.plan), one)
        updates.finish()
        work.bytes_got += len(updates.entries) * self._manifest.blob_bytes
        assert figures.total is not None
        work.weights, n = self._rule.weigh(work.weights, figures.total), len(work.plan.merged)
        work.chosen = [i for i in range(n) if work.weights[i]]
        work.weights = [work.weights[i] for i in (*work.chosen, *range(n, len(work.weights)))]
        work.shares = of_chosen(work.shares, work.chosen)

    def _look_at(self, updates: Updates, weights: list[float], frames: list[bytes], k: int) -> tuple[Tensor, Tensor]:
        slices, buffers = updates.slice(k, frames), self._buffers.get(k, [])
        kept = self._center.states(self._manifest.chunk(k))[: self._rule.state_vectors]
        squares_BN = updates.figures(slices, buffers)
        return squares_BN, self._rule.measure([without_buffers(x_E, buffers) for x_E in slices], weights, kept)

    async def _make(self, work: _Work) -> None:
        """The pass that makes the next center."""
        updates, chunks = self._updates(work.plan, work.chosen), self._manifest.chunks
        outer = subjects.outer_prefix(self._spec.name, work.blob)

        async def one(k: int) -> None:
            reduce = self._reduce if k < chunks else self._add_up
            made = await self._off_loop(reduce, updates, work, await updates.get(k), k)
            if k < chunks:
                work.moved.add(k, made.moved_B[:, None])
            if made.squares_BN is not None:
                work.squares.add(k, made.squares_BN)
            work.bytes_put += len(made.model)
            await self._put_model(work.blob, k, made.model)
            for s, frame in enumerate(made.states):
                await put_chunk(self._bus, f"{outer}.{s * chunks + k}", frame)

        await windowed(self._manifest.blob_chunks, self._depth(work.plan), one)
        updates.finish()
        work.bytes_got += len(updates.entries) * self._manifest.blob_bytes

    def _depth(self, plan: Plan) -> int:
        """Chunks of every update that may be under way at once."""
        fitting = STAGING_BYTES // (len(plan.merged) * self._manifest.chunk_bytes)
        return min(self._spec.wire.window, max(LEAST_DEPTH, fitting))

    def _updates(self, plan: Plan, chosen: list[int] | None = None) -> Updates:
        return Updates(self._bus, self._spec.name, self._manifest, self._spec.wire.codec, plan, chosen)

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
        self._lies_at = model, 0
        return Merged(model, digest_of(self._center.w_P), 0, put)

    async def get_center(self, ref: BlobRef, version: int) -> None:
        """Fills the center, and what is kept beside it, from the blobs of a version."""
        await self._fill(partial(subjects.model_prefix, self._spec.name), ref, self._model_parts())
        states = [
            state_E for vector in zip(*map(self._center.states, self._parts()), strict=True) for state_E in vector
        ]
        if version and states:
            await self._fill(partial(subjects.outer_prefix, self._spec.name), self.outer_ref(ref), states)
        for state_E in states if not version else ():
            state_E.zero_()
        self._lies_at = ref, version

    async def _go_back(self) -> None:
        """The center as it was before a merge that was given up, once nobody writes to it any more."""
        await asyncio.gather(*map(asyncio.wrap_future, tuple(self._running)), return_exceptions=True)
        assert self._lies_at is not None, "a merge into a center that was neither put nor got"
        await self.get_center(*self._lies_at)

    def outer_ref(self, model: BlobRef) -> BlobRef:
        """The outer state that lies beside a model."""
        states, layout = self._spec.state_vectors, self._manifest
        return BlobRef(id=model.id, size=states * layout.nbytes, chunks=states * layout.chunks)

    def _model_ref(self, blob: str) -> BlobRef:
        return BlobRef(id=blob, size=self._manifest.blob_bytes, chunks=self._manifest.blob_chunks)

    def _model_parts(self) -> list[Tensor]:
        """The current center as the chunks of a model hold it, section after section."""
        vectors = [self._center.w_P, self._center.control_P][: self._manifest.sections]
        return [vector_P[part] for vector_P in vectors for part in self._parts()]

    def _parts(self) -> list[slice]:
        return [self._manifest.chunk(k) for k in range(self._manifest.chunks)]

    async def _fill(self, prefix: Prefix, ref: BlobRef, parts: Sequence[Tensor]) -> None:
        """Chunk k of the blob into `parts[k]`."""
        stream, dtype = subjects.model_stream(self._spec.name), DTYPES[self._manifest.dtype]

        async def one(k: int) -> None:
            size = RAW.payload_bytes(parts[k].numel(), dtype)
            RAW.decode(await get_chunk(self._bus, stream, prefix, ref, k, size), parts[k])

        await windowed(ref.chunks, self._spec.wire.window, one)

    async def _put_model(self, blob: str, k: int, frame: bytes) -> None:
        await put_chunk(self._bus, f"{subjects.model_prefix(self._spec.name, blob)}.{k}", frame)

    def _reduce(self, updates: Updates, work: _Work, frames: list[bytes], k: int) -> _Made:
        """Chunk k: decode, merge, step, encode."""
        slices, part, chunks = updates.slice(k, frames), self._manifest.chunk(k), self._manifest.chunks
        buffers = self._buffers.get(k, [])
        squares_BN = updates.figures(slices, buffers) if work.chosen is None else None
        merged_E = torch.empty(part.stop - part.start, dtype=TORCH_DTYPES[self._manifest.dtype])
        w_E, kept, keeps = self._center.w_P[part], self._center.states(part), self._rule.state_vectors
        rules, outers = kept[:keeps], kept[keeps:]
        means = mean_of_values(w_E, slices, work.shares, buffers)
        self._rule.reduce(slices, work.weights, rules, merged_E, rules)
        for x_E in (merged_E, *rules):
            clear_(x_E, buffers)
        self._outer.step(w_E, merged_E, outers, w_E, outers, work.plan.version - 1)
        for buffer, mean_B in zip(buffers, means, strict=True):
            w_E[buffer] = mean_B
        updates.blame_unless_finite(w_E, slices)
        states = [self._frame(x_E, work.blob, s * chunks + k, len(kept) * chunks) for s, x_E in enumerate(kept)]
        model = self._frame(w_E, work.blob, k, self._manifest.blob_chunks)
        return _Made(model, states, squares(merged_E), squares_BN)

    def _add_up(self, updates: Updates, work: _Work, frames: list[bytes], k: int) -> _Made:
        """Chunk k of the section of control variates: Σ c_i ← Σ c_i + Σ Δc_i."""
        slices, part = updates.slice(k, frames), self._manifest.chunk(k - self._manifest.chunks)
        updates.figures(slices)
        control_E = self._center.control_P[part]
        for x_E in slices:
            control_E.add_(x_E)
        updates.blame_unless_finite(control_E, slices)
        return _Made(self._frame(control_E, work.blob, k, self._manifest.blob_chunks), [], squares(control_E))

    def _frame(self, part_E: Tensor, blob: str, k: int, n: int) -> bytes:
        return pack_chunk(blob, k, n, RAW.kind, payload_of(RAW, part_E))

    async def _off_loop(self, work: Callable[..., T], *args: Any) -> T:
        """Runs it in the executor; on the event loop where the whole model is so small that handing over costs more."""
        if self._executor is None or self._manifest.nbytes <= INLINE_BYTES:
            return work(*args)
        running = self._executor.submit(work, *args)
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        return await asyncio.wrap_future(running)


def digest_of(center_P: Tensor) -> str:
    """xxh3-128 over the center's bytes."""
    return xxhash.xxh3_128_hexdigest(center_P.numpy().data)


def _roots(sums: Sums) -> list[float]:
    return sums.total.sqrt().tolist() if sums.total is not None else []
