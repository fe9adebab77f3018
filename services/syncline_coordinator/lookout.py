"""Whether the bus still holds what this coordinator and the agents believe it does.

It may not: another coordinator took over; or the broker lost writes that it had acknowledged, as after a power failure. The
second shows in head, in the stream of offers, or in what agents have seen and handed over, whoever was there to remember it.
"""

from __future__ import annotations

import asyncio
from functools import partial

from syncline.bus.base import Bus
from syncline.bus.blobs import patiently
from syncline.chance import jitter, new_number
from syncline.wire import subjects
from syncline.wire.messages import BlobRef, Head, Heartbeat, Roster
from syncline_coordinator.head import HeadKeeper, RolledBack
from syncline_coordinator.ledger import Ledger

LOOK_S = 3.0  # a coordinator that nobody asks for anything learns this way that it was replaced
LOST_OFFER_S = 10.0  # an acknowledged offer that was not found for so long is lost


class Lookout:
    """`watch` until there is something wrong. `look`, `heard`: reasons to look at once.

    `set_back`: the run goes on after a loss that this coordinator has noticed.
    """

    def __init__(self, bus: Bus, keeper: HeadKeeper, ledger: Ledger, *, set_back: bool = False) -> None:
        self._bus, self._keeper, self._ledger = bus, keeper, ledger
        self._stream = subjects.offers_stream(keeper.head.run)
        self._doubt = asyncio.Event()
        self._reconnects, self._settled = 1, 0  # one perhaps before our time; up to which all was found to be there
        self._suspected = int(set_back)  # up to which an update that is gone was taken for a loss of the broker's
        self._began = keeper.head.version  # with our term: nobody has made a newer one under an older term
        self._seen = (0, 0)  # the highest (term, version) that an agent told of
        self._lost = ""  # what an agent has seen, and cannot be
        self._missing: dict[str, tuple[int, float]] = {}  # agent → clock of an offer that it tells of, and since when

    def look(self) -> None:
        """The connection was gone."""
        self._reconnects += 1
        self._doubt.set()

    def heard(self, agent: str, beat: Heartbeat) -> None:
        """What an agent has seen and handed over."""
        head, seen = self._keeper.head, (beat.seen_term, beat.seen_version)
        self._seen = max(self._seen, seen)
        if self._seen > (head.term, head.version):
            self._doubt.set()
        if beat.seen_line != head.line:
            return  # it does not know yet what was lost before
        self.is_lost(agent, beat.seen_term, beat.seen_version)
        if self._ledger.misses(agent, beat.handed):
            self._missing.setdefault(agent, (beat.handed, _now()))

    def is_lost(self, agent: str, term: int, version: int) -> bool:
        """Whether the version that an agent has seen, or trained from, is none of this run's any more."""
        if term >= self._keeper.head.term or version <= self._began:
            return False
        self.lost(f"{agent} has seen version {version} of term {term}")
        return True

    def suspects(self, what: str) -> bool:
        """An update that was offered is gone: lost, if the connection was, with whatever else. Agents may lie, so that one such
        loss is believed each time that the connection was gone, and no more."""
        if self._suspected == self._reconnects:
            return False
        self._suspected = self._reconnects
        self.lost(what)
        return True

    def lost(self, what: str) -> None:
        """An agent has seen what cannot be."""
        self._lost = what
        self._doubt.set()

    async def watch(self) -> None:
        """Raises Deposed and RolledBack."""
        while True:
            try:
                async with asyncio.timeout(jitter(LOOK_S)):
                    await self._doubt.wait()
            except TimeoutError:
                pass
            self._doubt.clear()
            await self._look_around()
            if self._settled != self._reconnects:
                await self.sure_of(self._keeper.head)

    async def write(self, head: Head, roster: Roster | None = None, *, tell: bool = True) -> None:
        """Writes head, which names and rests on what is there, also where the connection was gone since that was put."""
        await self.sure_of(head)
        reconnects = self._reconnects
        await self._keeper.write(head, roster, tell=tell, sure=partial(self.sure_of, head))
        if reconnects != self._reconnects:  # it may have come through after a roll-back all the same
            self._settled = 0
            self._doubt.set()

    async def sure(self) -> None:
        """Nothing was lost, as far as head can show. Raises Deposed and RolledBack."""
        await self.sure_of(self._keeper.head)

    async def sure_of(self, head: Head) -> None:
        """What head names is there. Raises RolledBack."""
        while self._settled != (count := self._reconnects) or self._lost:
            await self._look_around()
            await self._check_blobs(head)
            self._settled = count

    async def _look_around(self) -> None:
        await self._keeper.check(self._seen)
        if self._lost:
            raise RolledBack(self._lost, max(self._seen[0], self._keeper.head.term))
        await self._check_offers()

    async def _check_offers(self) -> None:
        """Every offer that was read, or acknowledged to its agent, is in the stream."""
        read, term = self._ledger.read_up_to, max(self._seen[0], self._keeper.head.term)
        state = await patiently(partial(self._bus.state, self._stream))
        if state.last_seq < read:
            raise RolledBack(f"{self._stream} ends at {state.last_seq}, and {read} was read", term)
        self._missing = {a: (c, s) for a, (c, s) in self._missing.items() if self._ledger.misses(a, c)}
        for agent, (clock, since_s) in self._missing.items():
            if _now() - since_s > LOST_OFFER_S and state.last_seq == self._ledger.read_up_to:
                raise RolledBack(f"{agent}'s offer of clock {clock} is not in {self._stream}", term)

    async def _check_blobs(self, head: Head) -> None:
        stream, models = subjects.model_stream(head.run), partial(subjects.model_prefix, head.run)
        plan = head.plan if isinstance(head.plan, BlobRef) else None
        for what, ref in (("model", head.model), ("manifest", head.manifest), ("roster", head.roster), ("plan", plan)):
            if ref is not None:
                state = await patiently(partial(self._bus.state, stream, f"{models(ref.id)}.*"))
                if len(state.subjects) < ref.chunks and self._keeper.head.version <= head.version:
                    await self._keeper.check(self._seen)  # whoever took over clears up behind us
                    raise RolledBack(f"head names a {what} that is gone", max(self._seen[0], head.term))


async def taken_over(bus: Bus, head: Head, lost_term: int | None) -> Head:
    """Head under a term of our own. `lost_term`: the broker was set back, and this is the highest term that was seen before.

    Then a new line begins: the round is opened again, and what agents have made and not seen judged counts for nothing, as
    some of it is lost and some is not. It begins as well where the stream of offers ends before what head calls judged.
    """
    last_seq = (await patiently(partial(bus.state, subjects.offers_stream(head.run)))).last_seq
    if lost_term is None and last_seq >= head.offers_seq:
        return head.model_copy(update={"term": head.term + 1})
    phase = "training" if head.phase == "merging" else head.phase
    again = {"plan": None, "phase": phase, "round": head.round + 1, "line": new_number(), "offers_seq": last_seq}
    return head.model_copy(update={"term": max(head.term, lost_term or 0) + 1, **again})


def _now() -> float:
    return asyncio.get_running_loop().time()
