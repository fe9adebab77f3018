"""An agent's view of its run: the newest head, and the roster that belongs to it.

A notify carries head and wakes the agent at once. Notifies may be lost, so the agent also reads head every few seconds. A
notify is only a hint: an older head than the one known changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from syncline.bus.base import Bus, Entry
from syncline.bus.blobs import with_retries
from syncline.bus.records import record_of
from syncline.chance import jitter
from syncline.wire import subjects
from syncline.wire.messages import ENDED, REMEMBERED, Head, Notify, Roster, Verdict, decode

log = logging.getLogger(__name__)

READ_AGAIN_S = 3.0
GONE_S = 1.0  # until this agent asks again for a run to take part in
PHASES = {"waiting": 0, "training": 1, "merging": 2, "done": 3, "failed": 3}  # in the order of a round


@dataclass(slots=True)
class HeadAndRoster:
    """The newest head, and its roster once that is read."""

    head: Head
    roster: Roster | None = None
    roster_blob: str = ""


@dataclass(frozen=True, slots=True)
class RosterLine:
    """An agent's line in a roster."""

    number: int  # of the agent, and of its part of the data
    parts: int
    participant: bool
    judged: int  # clock of the last update that was judged
    offset: int  # added to the agent's clock before that is compared with the gate
    verdicts: dict[int, bool]  # by clock, of the updates that were judged last: whether they were merged

    @classmethod
    def of(cls, roster: Roster, agent: str) -> RosterLine | None:
        number = roster.number(agent)
        if number is None:
            return None
        clock = roster.clocks[number]
        earlier = roster.merged_before(number)
        merged = [roster.verdict(number) == Verdict.MERGED, *(bool(earlier >> k & 1) for k in range(REMEMBERED))]
        verdicts = {clock - k: merged[k] for k in range(min(clock, len(merged)))}
        return cls(number, roster.parts, roster.participant(number), clock, roster.offset(number), verdicts)


class RunView:
    """Follows head.

    Attributes:
        over: set when the run has ended, or is gone from the bus.
    """

    def __init__(self, bus: Bus, run: str, on_head: Callable[[Head], None]) -> None:
        """`on_head`: called with each head that is newer than the one before."""
        self.over = asyncio.Event()
        self._bus = bus
        self._run = run
        self._on_head = on_head
        self._moved = asyncio.Event()
        self._newest: HeadAndRoster | None = None
        self._order = (0, 0, 0, 0)  # of the newest head ever seen

    @property
    def highest(self) -> tuple[int, int, int]:
        """Return the highest (term, version, round) ever seen; the broker may have lost it since."""
        return self._order[:3]

    @property
    def head(self) -> Head | None:
        return self._newest.head if self._newest is not None else None

    def hear(self, note: Notify) -> None:
        """Take in a notify. Raises PeerError for a notify without a head."""
        self._take_in(decode(Head, note.head), note.roster)

    def forget(self) -> None:
        """Have head read again: the connection was gone, and the messages of that time are lost."""
        self._newest = None
        self._moved.set()

    def clear(self) -> None:
        """From now on `wait` waits for the next news."""
        self._moved.clear()

    def wake(self) -> None:
        self._moved.set()

    async def wait(self) -> None:
        """Wait for news, and read head after a few seconds without any. Raises BusError."""
        try:
            async with asyncio.timeout(jitter(READ_AGAIN_S)):
                await self._moved.wait()
        except TimeoutError:
            await self.read_head()

    async def read_head(self) -> None:
        """Read head. An older head than the one seen changes nothing: the coordinator will write a newer one."""
        self._take_in(decode(Head, (await self.read(subjects.head_key(self._run))).value))

    async def read(self, key: str) -> Entry:
        """Return the run's spec or head. If it is gone from the bus, the run is over, and this call does not return."""
        entry = await with_retries(partial(self._bus.kv_get, subjects.RUNS_BUCKET, key))
        while entry is None:
            log.warning("%s is gone from the bus", key)
            await asyncio.sleep(jitter(GONE_S))
            self.over.set()
            await asyncio.Event().wait()
        return entry

    async def newest(self) -> HeadAndRoster:
        """Return head with its roster. Raises BusError, BlobGone and PeerError."""
        while (newest := self._newest) is None:
            await self.read_head()
            if self._newest is None:
                self._moved.clear()
                await self.wait()
        if newest.roster is None and newest.head.roster is not None:
            data = await record_of(self._bus, self._run, newest.head.roster)
            newest.roster = decode(Roster, data)
            newest.roster_blob = newest.head.roster.id
        return newest

    def _take_in(self, head: Head, roster: bytes = b"") -> None:
        if head.run != self._run:
            return
        known = self._newest
        if _order(head) < self._order:
            return
        self._order = _order(head)
        moved = known is None or known.head != head
        if moved:
            newest = HeadAndRoster(head)
            if known is not None and head.roster is not None and known.roster_blob == head.roster.id:
                newest = HeadAndRoster(head, known.roster, known.roster_blob)
            self._newest = newest
        if roster and self._newest is not None and head.roster is not None and self._newest.roster is None:
            self._newest.roster = decode(Roster, roster)
            self._newest.roster_blob = head.roster.id
        if moved:
            self._on_head(head)
        if head.phase in ENDED:
            self.over.set()  # an update that is under way is not needed any more
        self._moved.set()


def _order(head: Head) -> tuple[int, int, int, int]:
    """Return the sort key of a head's age: term, version, round, and how far the round is."""
    return (head.term, head.version, head.round, PHASES[head.phase])
