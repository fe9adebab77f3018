"""Purge from the bus the blobs that a run does not need any more.

These are updates that were judged, models older than the last `keep_models`, blobs of updates that were never offered, and
leftovers of a coordinator that was killed. A purge always names a blob, never "all but". Purges run beside the rounds; one
that fails is tried again with the next. None is made while the broker may have come back with an older store, in which the
judged updates are still unjudged.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from syncline.bus.base import Bus
from syncline.bus.blobs import UNOFFERED_S, with_retries
from syncline.bus.commits import line_of
from syncline.errors import BusError, PeerError
from syncline.observe.telemetry import Telemetry
from syncline.spec.run_spec import RunSpec
from syncline.wire import subjects
from syncline.wire.messages import BlobRef, Head
from syncline_coordinator.head import VerifyDurable

PURGES_AT_ONCE = 4
PAUSE_S = 0.02
RETRY_S = 1.0
MAX_WAITING_PURGES = 100_000

# -- purging -----------------------------------------------------------------------------------------------------------


class Purger:
    """A queue of purges, and the task that makes them."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._due: deque[tuple[str, str]] = deque(maxlen=MAX_WAITING_PURGES)
        self._woken = asyncio.Event()

    def add(self, stream: str, prefix: str, *, itself: bool = False) -> None:
        """Queue the purge of a blob.

        Args:
            prefix: subject under which the blob's chunks lie.
            itself: purge the message at this subject too.
        """
        self._due.append((stream, f"{prefix}.>"))
        if itself:
            self._due.append((stream, prefix))
        self._woken.set()

    async def run(self, verify_durable: VerifyDurable) -> None:
        """Make the queued purges until cancelled.

        Args:
            verify_durable: called before each batch of purges; raises if the broker has lost writes of this run.
        """
        while True:
            await self._woken.wait()
            self._woken.clear()
            while self._due:
                await verify_durable()
                batch = [self._due.popleft() for _ in range(min(PURGES_AT_ONCE, len(self._due)))]
                results = await asyncio.gather(*(self._bus.purge(s, p) for s, p in batch), return_exceptions=True)
                self._due.extend(b for b, r in zip(batch, results, strict=True) if isinstance(r, BusError))
                if any(isinstance(r, BusError) for r in results):
                    await asyncio.sleep(RETRY_S)
            await asyncio.sleep(PAUSE_S)


class Retention:
    """Decides which blobs of a run are still needed, and queues the purge of the others.

    Models of the last `keep_models` versions are kept.
    """

    def __init__(self, spec: RunSpec, head: Head, purger: Purger) -> None:
        self._run = spec.name
        self._keep_models = spec.keep_models
        self._has_outer_state = spec.state_vectors > 0
        self._purger = purger
        self._kept = [model for model in (head.previous, head.model) if model is not None]  # the oldest first

    def take_over(self, kept: list[BlobRef], leftovers: list[str], uncommitted: list[str]) -> None:
        """Purge what a killed coordinator has left behind.

        Args:
            kept: models to keep, the oldest first.
            leftovers: prefixes of blobs in the model stream that neither head nor a kept model names.
            uncommitted: subjects of commit records whose commit was interrupted.
        """
        self._kept = kept
        for prefix in leftovers:
            self._purger.add(subjects.model_stream(self._run), prefix)
        for subject in uncommitted:
            self._purger.add(subjects.log_stream(self._run), subject, itself=True)

    def head_moved(self, before: Head, after: Head, judged: list[tuple[str, BlobRef]]) -> None:
        """Purge what only the older head needed.

        Args:
            judged: agent and blob of the updates whose verdicts `after` tells.
        """
        for agent, blob in judged:
            self._purger.add(subjects.updates_stream(self._run), subjects.update_prefix(self._run, agent, blob.id))
        if before.roster != after.roster:
            self._purge_record(before.roster)
        if isinstance(before.plan, BlobRef) and before.plan != after.plan:
            self._purge_record(before.plan)
        if after.model is not None and after.model not in self._kept:
            self._kept.append(after.model)
        while len(self._kept) > self._keep_models:
            self.purge_model(self._kept.pop(0).id)

    def purge_model(self, blob: str) -> None:
        """Purge a model and the outer state beside it, complete or put in part."""
        self._purger.add(subjects.model_stream(self._run), subjects.model_prefix(self._run, blob))
        if self._has_outer_state:
            self._purger.add(subjects.model_stream(self._run), subjects.outer_prefix(self._run, blob))

    def _purge_record(self, ref: BlobRef | None) -> None:
        if ref is not None:
            self._purger.add(subjects.model_stream(self._run), subjects.model_prefix(self._run, ref.id))


# -- updates that were never offered -----------------------------------------------------------------------------------

LOOK_S = 20.0
QUOTA_BLOBS = 2  # of one agent, neither judged nor offered


@dataclass(slots=True)
class _Unoffered:
    """A blob in the updates stream that no offer names."""

    seen_at_s: float  # first
    chunks: int = 0
    grown_at_s: float = 0.0  # when more chunks than before were found


class Janitor:
    """Purges updates that were put and never offered, and names an agent that holds too many of them.

    An agent that is killed while it sends leaves such a blob behind; a stolen key could fill the stream with them. A blob that
    still grows is being sent, however long that takes: many minutes over a thin link.

    Args:
        needed_blobs: returns the ids of the blobs that are offered, and not purged yet.
    """

    def __init__(
        self, bus: Bus, run: str, purger: Purger, telemetry: Telemetry, needed_blobs: Callable[[], set[str]]
    ) -> None:
        self._bus = bus
        self._run = run
        self._purger = purger
        self._telemetry = telemetry
        self._needed_blobs = needed_blobs
        self._unoffered: dict[tuple[str, str], _Unoffered] = {}  # by (agent, blob)
        self._named: set[str] = set()

    async def run(self) -> None:
        """Look every `LOOK_S` until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.look(asyncio.get_running_loop().time())
            except BusError:
                pass  # the next look is soon

    async def look(self, now_s: float) -> None:
        """Purge unoffered blobs that have not grown for `UNOFFERED_S`, and name agents that hold too many. Raises BusError."""
        state = await self._bus.state(subjects.updates_stream(self._run), subjects.every_update(self._run))
        needed = self._needed_blobs()
        chunks = Counter(blob for blob in map(_blob_of, state.subjects) if blob and blob[1] not in needed)
        self._unoffered = {blob: self._unoffered.get(blob, _Unoffered(now_s)) for blob in sorted(chunks)}
        for blob, known in self._unoffered.items():
            if chunks[blob] > known.chunks:
                known.chunks, known.grown_at_s = chunks[blob], now_s
            elif now_s - known.grown_at_s > UNOFFERED_S:
                self._purger.add(subjects.updates_stream(self._run), subjects.update_prefix(self._run, *blob))
        held = Counter(agent for (agent, _), known in self._unoffered.items() if known.seen_at_s < now_s)  # not new
        over = {agent for agent, count in held.items() if count > QUOTA_BLOBS}
        for agent in sorted(over - self._named):
            text = (
                f"{agent} holds more than {QUOTA_BLOBS} blobs that it never offered; they are purged when they have not "
                f"grown for {UNOFFERED_S:g} s"
            )
            await self._telemetry.event("over-quota", text, level="warning", agent=agent)
        self._named = over


def _blob_of(subject: str) -> tuple[str, str] | None:
    """Return agent and blob id of a chunk's subject, or None for another subject."""
    tokens = subject.split(".")
    try:
        return subjects.agent_of(subject), tokens[6]
    except (PeerError, IndexError):
        return None


# -- leftovers of a killed coordinator ---------------------------------------------------------------------------------
# The model stream is as large as the kept models and one more, and the log as large as the records of all versions: a
# coordinator that takes over purges leftovers first, as their space would be missing later.

LOOKED_BACK = 2  # versions: a coordinator that was replaced may put a record late


async def kept_models(bus: Bus, head: Head, keep: int) -> list[BlobRef]:
    """Return the models of the last `keep` versions, the oldest first, as the log and head name them."""
    named = {head.version - 1: head.previous, head.version: head.model}
    found = {version: model for version, model in named.items() if model is not None}
    for version in range(max(1, head.version - keep + 1), head.version - 1):
        if (line := await line_of(bus, head.run, version, head.term)) is not None:
            found[version] = line.model
    return [found[version] for version in sorted(found)]


async def leftovers(bus: Bus, head: Head, kept: list[BlobRef]) -> list[str]:
    """Return the prefixes of all chunks in the model stream that belong neither to a blob of head nor to a kept model."""
    named = [*kept, head.model, head.previous, head.manifest, head.roster, head.plan]
    ids = {ref.id for ref in named if isinstance(ref, BlobRef)}
    every = f"{subjects.PREFIX}.{head.run}.>"
    state = await with_retries(lambda: bus.state(subjects.model_stream(head.run), every))
    blobs = {subject.rpartition(".")[0] for subject in state.subjects}
    return sorted(prefix for prefix in blobs if prefix.rpartition(".")[2] not in ids)


async def uncommitted(bus: Bus, head: Head) -> list[str]:
    """Return the subjects of commit records whose commit was interrupted under an older term than head's.

    These are records of the next version, and of the newest ones every record but the one under the highest term. Their
    chunks lie under the same subjects.
    """
    left = []
    for version in range(max(1, head.version - LOOKED_BACK), head.version + 2):
        every = subjects.log_record(head.run, version, ">")
        state = await with_retries(partial(bus.state, subjects.log_stream(head.run), every))
        tokens = [subject.split(".")[5:] for subject in state.subjects]
        lines = [int(term) for term, *chunk in tokens if not chunk and int(term) <= head.term]
        counts = max(lines, default=0) if version <= head.version else 0
        left += [(version, term) for term in {int(term) for term, *_ in tokens} if term < head.term and term != counts]
    return [subjects.log_record(head.run, version, term) for version, term in sorted(left)]
