"""What an agent knows of its run: the newest head, and the roster that belongs to it.

Edge-triggered for speed, level-triggered for truth: a notify carries head and wakes the agent at once; whoever missed it
reads head again every few seconds. A notify is only a hint: an older one than what is known changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from syncline.bus.base import Bus, Entry
from syncline.bus.blobs import get_record, with_retries
from syncline.chance import jitter
from syncline.wire import subjects
from syncline.wire.messages import ENDED, REMEMBERED, BlobRef, Head, Notify, Roster, Verdict, decode

log = logging.getLogger(__name__)

READ_AGAIN_S = 3.0
GONE_S = 1.0  # until this agent asks again for a run to take part in
MAX_RECORD_BYTES = 64 << 20


@dataclass(slots=True)
class Seen:
    """The newest head, and its roster."""

    head: Head
    roster: Roster | None = None
    roster_blob: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """An agent's line in a roster."""

    number: int
    parts: int
    participant: bool
    judged: int  # its last judged clock
    offset: int
    verdicts: dict[int, bool]  # of its last judged clocks: merged or not

    @classmethod
    def of(cls, roster: Roster, agent: str) -> Place | None:
        number = roster.number(agent)
        if number is None:
            return None
        clock, before = roster.clocks[number], roster.merged_before(number)
        merged = [roster.verdict(number) == Verdict.MERGED, *(bool(before >> k & 1) for k in range(REMEMBERED))]
        verdicts = {clock - k: merged[k] for k in range(min(clock, len(merged)))}
        return cls(number, roster.parts, roster.participant(number), clock, roster.offset(number), verdicts)


class News:
    """`on_head(head)` is told of every head that is newer than the one before."""

    def __init__(self, bus: Bus, run: str, on_head: Callable[[Head], None]) -> None:
        self._bus, self._run, self._on_head = bus, run, on_head
        self._moved = asyncio.Event()
        self._seen: Seen | None = None
        self._order = (0, 0, 0, 0)  # of the newest head ever seen
        self.over = asyncio.Event()  # the run has ended

    @property
    def highest(self) -> tuple[int, int, int]:
        """The highest (term, version, round) ever seen; the broker may have lost it since."""
        return self._order[:3]

    @property
    def head(self) -> Head | None:
        return self._seen.head if self._seen is not None else None

    def hear(self, note: Notify) -> None:
        """Raises PeerError for one that holds no head."""
        self._see(decode(Head, note.head), note.roster)

    def forget(self) -> None:
        """The connection was gone: what was sent meanwhile is lost."""
        self._seen = None
        self._moved.set()

    def clear(self) -> None:
        """From now on `wait` waits for what comes next."""
        self._moved.clear()

    def wake(self) -> None:
        self._moved.set()

    async def wait(self) -> None:
        try:
            async with asyncio.timeout(jitter(READ_AGAIN_S)):
                await self._moved.wait()
        except TimeoutError:
            await self.read_head()

    async def read_head(self) -> None:
        """One that is older than what was seen changes nothing: the coordinator will write a newer one."""
        self._see(decode(Head, (await self.read(subjects.head_key(self._run))).value))

    async def read(self, key: str) -> Entry:
        """The run's spec or head. Where it is gone, deleted or lost by the broker, the run is over for this agent."""
        entry = await with_retries(partial(self._bus.kv_get, subjects.RUNS_BUCKET, key))
        while entry is None:
            log.warning("%s is gone from the bus", key)
            await asyncio.sleep(jitter(GONE_S))
            self.over.set()
            await asyncio.Event().wait()
        return entry

    async def newest(self) -> Seen:
        """Head with its roster."""
        while (seen := self._seen) is None:
            await self.read_head()
            if self._seen is None:
                self._moved.clear()
                await self.wait()
        if seen.roster is None and seen.head.roster is not None:
            data = await self.record(seen.head.roster)
            seen.roster, seen.roster_blob = decode(Roster, data, limit=MAX_RECORD_BYTES), seen.head.roster.id
        return seen

    async def record(self, ref: BlobRef) -> bytes:
        prefix = partial(subjects.model_prefix, self._run)
        stream = subjects.model_stream(self._run)
        return await get_record(self._bus, stream, prefix, ref, MAX_RECORD_BYTES)

    def _see(self, head: Head, roster: bytes = b"") -> None:
        if head.run != self._run:
            return
        known = self._seen
        if _order(head) < self._order:
            return
        self._order = _order(head)
        moved = known is None or known.head != head
        if moved:
            keep = known is not None and head.roster is not None and known.roster_blob == head.roster.id
            self._seen = Seen(head, known.roster, known.roster_blob) if keep and known is not None else Seen(head)
        if roster and self._seen is not None and head.roster is not None and self._seen.roster is None:
            self._seen.roster, self._seen.roster_blob = decode(Roster, roster), head.roster.id
        if moved:
            self._on_head(head)
        if head.phase in ENDED:
            self.over.set()  # whatever is under way, nobody wants it any more
        self._moved.set()


def _order(head: Head) -> tuple[int, int, int, int]:
    """Which of two heads is newer: by term, then version, then how far the round is."""
    phases = {"waiting": 0, "training": 1, "merging": 2, "done": 3, "failed": 3}
    return (head.term, head.version, head.round, phases[head.phase])
