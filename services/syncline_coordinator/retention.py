"""What the bus may forget: judged updates, old models, blobs that were never offered, and leftovers of a killed coordinator.

Purges name blobs, never "all but". They run beside the rounds, and a purge that fails is tried again with the next.
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
from syncline.wire import subjects
from syncline.wire.messages import BlobRef, Head
from syncline_coordinator.head import VerifyDurable

AT_ONCE = 4
PAUSE_S = 0.02


class Purger:
    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._due: deque[tuple[str, str]] = deque(maxlen=100_000)
        self._woken = asyncio.Event()

    def add(self, stream: str, prefix: str, *, itself: bool = False) -> None:
        """The blob whose chunks lie under `prefix`. `itself`: and what lies at that subject."""
        self._due.append((stream, f"{prefix}.>"))
        if itself:
            self._due.append((stream, prefix))
        self._woken.set()

    async def run(self, verify_durable: VerifyDurable) -> None:
        """`verify_durable()`: the broker holds what this coordinator believes it does, or it raises."""
        while True:
            await self._woken.wait()
            self._woken.clear()
            while self._due:
                await verify_durable()
                batch = [self._due.popleft() for _ in range(min(AT_ONCE, len(self._due)))]
                results = await asyncio.gather(*(self._bus.purge(s, p) for s, p in batch), return_exceptions=True)
                self._due.extend(b for b, r in zip(batch, results, strict=True) if isinstance(r, BusError))
                if any(isinstance(r, BusError) for r in results):
                    await asyncio.sleep(1.0)
            await asyncio.sleep(PAUSE_S)


LOOK_S = 20.0
QUOTA_BLOBS = 2  # of one agent, neither judged nor offered


@dataclass(slots=True)
class _Unoffered:
    """A blob that nobody offered yet, as the looks at it saw it."""

    seen_at_s: float  # first
    chunks: int = 0
    grown_at_s: float = 0.0  # seen with more chunks than before


class Janitor:
    """`offered()`: ids of the blobs that are offered and not judged."""

    def __init__(
        self, bus: Bus, run: str, purger: Purger, telemetry: Telemetry, offered: Callable[[], set[str]]
    ) -> None:
        self._bus, self._run, self._purger, self._telemetry, self._offered = bus, run, purger, telemetry, offered
        self._unoffered: dict[tuple[str, str], _Unoffered] = {}  # by (agent, blob)
        self._named: set[str] = set()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.look(asyncio.get_running_loop().time())
            except BusError:
                pass  # looked at again soon

    async def look(self, now_s: float) -> None:
        """One look: purges what is too old, names who holds too much."""
        state = await self._bus.state(subjects.updates_stream(self._run), subjects.every_update(self._run))
        offered = self._offered()
        chunks = Counter(blob for blob in map(_blob_of, state.subjects) if blob and blob[1] not in offered)
        self._unoffered = {blob: self._unoffered.get(blob, _Unoffered(now_s)) for blob in sorted(chunks)}
        for blob, known in self._unoffered.items():
            if chunks[blob] > known.chunks:
                known.chunks, known.grown_at_s = chunks[blob], now_s
            elif now_s - known.grown_at_s > UNOFFERED_S:
                self._purger.add(subjects.updates_stream(self._run), subjects.update_prefix(self._run, *blob))
        stays = Counter(agent for (agent, _), known in self._unoffered.items() if known.seen_at_s < now_s)  # not new
        over = {agent for agent, count in stays.items() if count > QUOTA_BLOBS}
        for agent in sorted(over - self._named):
            text = (
                f"{agent} holds more than {QUOTA_BLOBS} blobs that it never offered; they go when they have not grown "
                f"for {UNOFFERED_S:g} s"
            )
            await self._telemetry.event("over-quota", text, level="warning", agent=agent)
        self._named = over


def _blob_of(subject: str) -> tuple[str, str] | None:
    tokens = subject.split(".")
    try:
        return subjects.agent_of(subject), tokens[6]
    except (PeerError, IndexError):
        return None


LOOKED_BACK = 2  # versions: a coordinator that was replaced may put a record late


async def kept_models(bus: Bus, head: Head, keep: int) -> list[BlobRef]:
    """The models of the last `keep` versions, the oldest first, as the log and head tell."""
    named = {head.version - 1: head.previous, head.version: head.model}
    found = {version: model for version, model in named.items() if model is not None}
    for version in range(max(1, head.version - keep + 1), head.version - 1):
        if (line := await line_of(bus, head.run, version, head.term)) is not None:
            found[version] = line.model
    return [found[version] for version in sorted(found)]


async def leftovers(bus: Bus, head: Head, kept: list[BlobRef]) -> list[str]:
    """Prefixes of all chunks in the model stream that belong neither to what head names nor to a model that is kept."""
    named = [*kept, head.model, head.previous, head.manifest, head.roster, head.plan]
    ids = {ref.id for ref in named if isinstance(ref, BlobRef)}
    every = f"{subjects.PREFIX}.{head.run}.>"
    state = await with_retries(lambda: bus.state(subjects.model_stream(head.run), every))
    blobs = {subject.rpartition(".")[0] for subject in state.subjects}
    return sorted(prefix for prefix in blobs if prefix.rpartition(".")[2] not in ids)


async def uncommitted(bus: Bus, head: Head) -> list[str]:
    """Subjects of lines in the log, and with them of their chunks, whose commit was interrupted under an older term than
    head's: those of the next version, and those of the newest ones beside the line that counts."""
    left = []
    for version in range(max(1, head.version - LOOKED_BACK), head.version + 2):
        every = subjects.log_record(head.run, version, ">")
        state = await with_retries(partial(bus.state, subjects.log_stream(head.run), every))
        tokens = [subject.split(".")[5:] for subject in state.subjects]
        lines = [int(term) for term, *chunk in tokens if not chunk and int(term) <= head.term]
        counts = max(lines, default=0) if version <= head.version else 0
        left += [(version, term) for term in {int(term) for term, *_ in tokens} if term < head.term and term != counts]
    return [subjects.log_record(head.run, version, term) for version, term in sorted(left)]
