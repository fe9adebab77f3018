"""The reducer: streams the updates of a plan through the merge rule and the outer optimiser, chunk by chunk.

The reducer makes the next version and decides nothing: the plan gives the updates, their weights and their order.

**Memory.** One model, its outer state, and a few chunks of every update. The chunk size is fixed at submit so that these chunks
fit into `STAGING_BYTES` for the largest number of agents. The next version is made in the place of the present one, and each
chunk is put on the bus as soon as it is made. A merge that fails reads the present version again from the bus. A rule with two
passes reads the updates twice, and keeps a few numbers for each update from the first pass.

**Outer state.** The outer state of a version is a blob with the id of the model, under another prefix. For S vectors and a
model of C chunks the blob has S · C chunks, vector after vector. It is committed and purged with the model. Version 0 has no
such blob: its outer state is zero.

**Control variates.** If the manifest has two sections (SCAFFOLD, arXiv:1910.06378), chunks C to 2C − 1 of an update hold the
change of the agent's control variate, and those of a model hold the sum of all variates. A merge adds the changes to the sum,
without weights.

**Buffers.** Buffers of the model, such as the statistics of BatchNorm, become the weighted mean of the agents' values under
every rule and outer optimiser. Norms and distances do not count them.
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
from syncline_coordinator.merge.updates import UpdateReader, UpdateUnusable

T = TypeVar("T")

STAGING_BYTES = 8 << 20  # for chunks of all updates in a merge; up to twice as much if every possible agent takes part
LEAST_DEPTH = 2  # chunks of each update in memory: one is being read while another one is reduced
LEAST_CHUNK_BYTES = 4096
ON_LOOP_BYTES = 64 * 1024  # a model up to this size is reduced on the event loop: a thread would take longer


@dataclass(frozen=True, slots=True)
class MergedVersion:
    """A version that is complete on the bus, and not committed yet."""

    model: BlobRef
    digest: str
    bytes_got: int
    bytes_put: int
    norms: tuple[float, ...] = ()  # ‖Δ_i‖ of each update, in the plan's order
    norm: float = 0.0  # ‖D‖

    def drift(self, weights: Sequence[float]) -> float | None:
        """Return ‖Σ p_i Δ_i‖² / Σ p_i ‖Δ_i‖²: 1 for equal updates, 1/N for N orthogonal ones. None if all updates are zero.

        Args:
            weights: p_i, in the plan's order.
        """
        spread = sum(weights) * sum(w * norm**2 for w, norm in zip(weights, self.norms, strict=True))
        return self.norm**2 / spread if spread > 0 else None


@dataclass(slots=True)
class _MergeInProgress:
    """A merge, with the figures that its chunks add to."""

    plan: Plan
    blob: str  # id of the new model
    weights: list[float]  # of the updates that are reduced; behind them those of the rule's state vectors
    shares: list[float]  # weights of the same updates in the mean of buffers
    chosen: list[int] | None = (
        None  # places in the plan of the updates that are reduced; None: all, there was no first pass
    )
    squares: Sums = field(default_factory=Sums)  # ‖Δ_i‖²
    step_squares: Sums = field(default_factory=Sums)  # ‖D‖²
    bytes_got: int = 0
    bytes_put: int = 0


@dataclass(frozen=True, slots=True)
class _ReducedChunk:
    """One chunk of the next version, encoded. B: blocks of the chunk; N: updates."""

    model: bytes
    states: list[bytes]  # the same chunk of each state vector
    step_squares_B: Tensor  # Σ D² of each block
    squares_BN: Tensor | None = None  # Σ Δ_i² of each block; None if a first pass has computed it


def chunk_bytes_for(spec: RunSpec, agents: int, max_payload: int) -> int:
    """Return the size of a chunk of a run.

    That is `wire.chunk_bytes`, or by default as much as fits into a message and, for so many agents, into the staging memory.

    Args:
        max_payload: largest message that the broker accepts, in bytes.

    Returns:
        Bytes of tensor elements, at least `LEAST_CHUNK_BYTES`.
    """
    allowed = content_bytes(max_payload)
    wanted = spec.wire.chunk_bytes or min(allowed, STAGING_BYTES // max(1, agents))
    return max(LEAST_CHUNK_BYTES, min(wanted, allowed))


class Reducer:
    """Executes plans: reads updates from the bus and puts the next version on the bus.

    Args:
        center: filled by `get_center`, or by the task's child before `put_center`; changed by each merge.
        executor: runs the arithmetic. None: the event loop does, which makes simulated time deterministic.
    """

    def __init__(
        self, bus: Bus, spec: RunSpec, manifest: Manifest, center: Center, executor: Executor | None = None
    ) -> None:
        self._bus = bus
        self._spec = spec
        self._manifest = manifest
        self._center = center
        self._executor = executor
        self._rule = spec.merge
        self._outer = spec.outer
        self._buffers = manifest.buffers_of_chunks()
        self._running: set[Future[Any]] = set()  # in the executor
        self._stored_as: tuple[BlobRef, int] | None = None  # model and version of the center, as the bus holds it

    # -- merging -------------------------------------------------------------------------------------------------------
    async def merge(self, plan: Plan) -> MergedVersion:
        """Make the next version in the place of the present one, and put it on the bus.

        Every update is checked while it is read: frame, checksum, signed digest, finite values.

        Raises:
            UpdateUnusable: an update of the plan cannot be merged. The center is the present version again.
        """
        weights = [entry.weight for entry in plan.merged]
        merge = _MergeInProgress(plan, new_id(), weights, self._buffer_shares(plan, weights))
        if self._rule.two_pass:
            await self._first_pass(merge)
        try:
            await self._reducing_pass(merge)
        except UpdateUnusable as error:
            error.blob = merge.blob
            await self._restore_center()
            raise
        model = self._model_ref(merge.blob)
        digest = await self._compute(digest_of, self._center.w_P)
        self._stored_as = model, plan.version
        norms = tuple(_roots(merge.squares))
        return MergedVersion(model, digest, merge.bytes_got, merge.bytes_put, norms, *_roots(merge.step_squares))

    def _buffer_shares(self, plan: Plan, weights: list[float]) -> list[float]:
        """Return the weight of each update in the mean of buffers."""
        mix = self._spec.mix
        alpha = mix.alpha if mix.kind == "elastic" else None
        return buffer_weights(plan.merged, weights, self._rule.weights, self._rule.normalize, alpha)

    async def _first_pass(self, merge: _MergeInProgress) -> None:
        """Let the rule measure every update, and replace the plan's weights by those that the rule computes.

        Raises:
            UpdateUnusable: an update cannot be merged.
        """
        updates = self._reader(merge.plan)
        figures = Sums()

        async def measure(k: int) -> None:
            frames = await updates.get(k)
            squares_BN, figures_BF = await self._compute(self._measure_chunk, updates, merge.weights, frames, k)
            merge.squares.add(k, squares_BN)
            figures.add(k, figures_BF)

        assert self._manifest.sections == 1, "a rule with two passes cannot merge control variates"
        await windowed(self._manifest.chunks, self._depth(merge.plan), measure)
        updates.verify_digests()
        merge.bytes_got += len(updates.entries) * self._manifest.blob_bytes
        assert figures.total is not None
        weights = self._rule.weigh(merge.weights, figures.total)
        n = len(merge.plan.merged)
        merge.chosen = [i for i in range(n) if weights[i]]
        merge.weights = [weights[i] for i in (*merge.chosen, *range(n, len(weights)))]
        merge.shares = of_chosen(merge.shares, merge.chosen)

    def _measure_chunk(
        self, updates: UpdateReader, weights: list[float], frames: list[bytes], k: int
    ) -> tuple[Tensor, Tensor]:
        """Return Σ Δ_i² of each block, (B, N), and the rule's figures of each block, (B, F), of chunk k."""
        slices = updates.decode(k, frames)
        buffers = self._buffers.get(k, [])
        rule_states = self._center.states(self._manifest.chunk(k))[: self._rule.state_vectors]
        squares_BN = updates.checked_squares(slices, buffers)
        return squares_BN, self._rule.measure([without_buffers(x_E, buffers) for x_E in slices], weights, rule_states)

    async def _reducing_pass(self, merge: _MergeInProgress) -> None:
        """Make and put every chunk of the next version.

        Raises:
            UpdateUnusable: an update cannot be merged. A part of the center is the next version then.
        """
        updates = self._reader(merge.plan, merge.chosen)
        chunks = self._manifest.chunks
        outer = subjects.outer_prefix(self._spec.name, merge.blob)

        async def reduce_and_put(k: int) -> None:
            reduce = self._reduce_chunk if k < chunks else self._reduce_controls
            reduced = await self._compute(reduce, updates, merge, await updates.get(k), k)
            if k < chunks:
                merge.step_squares.add(k, reduced.step_squares_B[:, None])
            if reduced.squares_BN is not None:
                merge.squares.add(k, reduced.squares_BN)
            merge.bytes_put += len(reduced.model)
            await self._put_model_chunk(merge.blob, k, reduced.model)
            for s, frame in enumerate(reduced.states):
                await put_chunk(self._bus, f"{outer}.{s * chunks + k}", frame)

        await windowed(self._manifest.blob_chunks, self._depth(merge.plan), reduce_and_put)
        updates.verify_digests()
        merge.bytes_got += len(updates.entries) * self._manifest.blob_bytes

    def _depth(self, plan: Plan) -> int:
        """Return how many chunks of each update may be in memory at once."""
        fitting = STAGING_BYTES // (len(plan.merged) * self._manifest.chunk_bytes)
        return min(self._spec.wire.window, max(LEAST_DEPTH, fitting))

    def _reader(self, plan: Plan, chosen: list[int] | None = None) -> UpdateReader:
        return UpdateReader(self._bus, self._spec.name, self._manifest, self._spec.wire.codec, plan, chosen)

    def _reduce_chunk(
        self, updates: UpdateReader, merge: _MergeInProgress, frames: list[bytes], k: int
    ) -> _ReducedChunk:
        """Decode chunk k of each update, merge, take the outer step in the center, and encode the result."""
        slices = updates.decode(k, frames)
        part = self._manifest.chunk(k)
        chunks = self._manifest.chunks
        buffers = self._buffers.get(k, [])
        squares_BN = updates.checked_squares(slices, buffers) if merge.chosen is None else None
        merged_E = torch.empty(part.stop - part.start, dtype=TORCH_DTYPES[self._manifest.dtype])
        w_E = self._center.w_P[part]
        states = self._center.states(part)
        rule_states = states[: self._rule.state_vectors]
        outer_states = states[self._rule.state_vectors :]
        buffer_means = mean_of_values(w_E, slices, merge.shares, buffers)
        self._rule.reduce(slices, merge.weights, rule_states, merged_E, rule_states)
        for x_E in (merged_E, *rule_states):
            clear_(x_E, buffers)
        self._outer.step(w_E, merged_E, outer_states, w_E, outer_states, merge.plan.version - 1)
        for buffer, mean_B in zip(buffers, buffer_means, strict=True):
            w_E[buffer] = mean_B
        updates.check_finite_sum(w_E, slices)
        frames_of_states = [
            self._frame(x_E, merge.blob, s * chunks + k, len(states) * chunks) for s, x_E in enumerate(states)
        ]
        model = self._frame(w_E, merge.blob, k, self._manifest.blob_chunks)
        return _ReducedChunk(model, frames_of_states, squares(merged_E), squares_BN)

    def _reduce_controls(
        self, updates: UpdateReader, merge: _MergeInProgress, frames: list[bytes], k: int
    ) -> _ReducedChunk:
        """Add chunk k of each update, a change of control variates, to the sum: Σ c_i ← Σ c_i + Σ Δc_i."""
        slices = updates.decode(k, frames)
        part = self._manifest.chunk(k - self._manifest.chunks)
        updates.checked_squares(slices)
        control_E = self._center.control_P[part]
        for x_E in slices:
            control_E.add_(x_E)
        updates.check_finite_sum(control_E, slices)
        model = self._frame(control_E, merge.blob, k, self._manifest.blob_chunks)
        return _ReducedChunk(model, [], squares(control_E))

    # -- the center on the bus -----------------------------------------------------------------------------------------
    async def put_center(self) -> MergedVersion:
        """Put the center on the bus as version 0."""
        model = self._model_ref(new_id())
        chunks = self._model_chunks()
        bytes_put = 0

        async def put(k: int) -> None:
            nonlocal bytes_put
            frame = self._frame(chunks[k], model.id, k, model.chunks)
            bytes_put += len(frame)
            await self._put_model_chunk(model.id, k, frame)

        await windowed(model.chunks, self._spec.wire.window, put)
        self._stored_as = model, 0
        return MergedVersion(model, digest_of(self._center.w_P), 0, bytes_put)

    async def get_center(self, ref: BlobRef, version: int) -> None:
        """Fill the center, its outer state included, with a version from the bus. Raises BlobGone.

        Args:
            ref: the model of that version.
        """
        await self._read_blob(partial(subjects.model_prefix, self._spec.name), ref, self._model_chunks())
        vectors = zip(*map(self._center.states, self._slices()), strict=True)
        states = [state_E for vector in vectors for state_E in vector]  # vector after vector, as in the blob
        if version and states:
            await self._read_blob(partial(subjects.outer_prefix, self._spec.name), self.outer_ref(ref), states)
        for state_E in states if not version else ():
            state_E.zero_()
        self._stored_as = ref, version

    async def _restore_center(self) -> None:
        """Fill the center with the present version again, once no thread of the failed merge writes to the center."""
        await asyncio.gather(*map(asyncio.wrap_future, tuple(self._running)), return_exceptions=True)
        assert self._stored_as is not None, "a merge into a center that was neither put nor got"
        await self.get_center(*self._stored_as)

    def outer_ref(self, model: BlobRef) -> BlobRef:
        """Return the reference of the outer state that belongs to a model."""
        vectors = self._spec.state_vectors
        layout = self._manifest
        return BlobRef(id=model.id, size=vectors * layout.nbytes, chunks=vectors * layout.chunks)

    def _model_ref(self, blob: str) -> BlobRef:
        return BlobRef(id=blob, size=self._manifest.blob_bytes, chunks=self._manifest.blob_chunks)

    def _model_chunks(self) -> list[Tensor]:
        """Return the center as views, one for each chunk of a model, section after section."""
        vectors = [self._center.w_P, self._center.control_P][: self._manifest.sections]
        return [vector_P[part] for vector_P in vectors for part in self._slices()]

    def _slices(self) -> list[slice]:
        """Return the elements of each chunk of one section."""
        return [self._manifest.chunk(k) for k in range(self._manifest.chunks)]

    async def _read_blob(self, prefix: Prefix, ref: BlobRef, out: Sequence[Tensor]) -> None:
        """Decode chunk k of a blob into `out[k]`, for every k. Raises BlobGone."""
        stream = subjects.model_stream(self._spec.name)
        dtype = DTYPES[self._manifest.dtype]

        async def read(k: int) -> None:
            size = RAW.payload_bytes(out[k].numel(), dtype)
            RAW.decode(await get_chunk(self._bus, stream, prefix, ref, k, size), out[k])

        await windowed(ref.chunks, self._spec.wire.window, read)

    async def _put_model_chunk(self, blob: str, k: int, frame: bytes) -> None:
        await put_chunk(self._bus, f"{subjects.model_prefix(self._spec.name, blob)}.{k}", frame)

    def _frame(self, part_E: Tensor, blob: str, k: int, n: int) -> bytes:
        """Encode chunk k of n of a blob."""
        return pack_chunk(blob, k, n, RAW.kind, payload_of(RAW, part_E))

    async def _compute(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function in the executor; on the event loop without an executor or for a small model."""
        if self._executor is None or self._manifest.nbytes <= ON_LOOP_BYTES:
            return function(*args)
        running = self._executor.submit(function, *args)
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        return await asyncio.wrap_future(running)


def digest_of(center_P: Tensor) -> str:
    """Return the xxh3-128 digest of the center's bytes, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(center_P.numpy().data)


def _roots(sums: Sums) -> list[float]:
    return sums.total.sqrt().tolist() if sums.total is not None else []
