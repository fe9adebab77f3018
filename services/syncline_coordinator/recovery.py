"""Detect that another coordinator took over, or that the broker lost writes which it had acknowledged, and go on after it.

A broker loses acknowledged writes for example after a power failure. The loss shows in head, in the stream of offers, or in
what agents have seen and handed over.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from functools import partial

from syncline.bus.base import Bus
from syncline.bus.blobs import BlobGone, with_retries
from syncline.bus.records import record_of
from syncline.chance import jitter, new_number
from syncline.policy.ledger import Ledger
from syncline.wire import subjects
from syncline.wire.messages import BlobRef, Head, Heartbeat, Roster, decode
from syncline_coordinator.head import HeadKeeper, RolledBack
from syncline_coordinator.offers import StreamPosition
from syncline_coordinator.reservation import RUNS

WORDS = 3  # of one agent: an honest one may be the only one to notice two losses in a row


class Losses:
    def __init__(self) -> None:
        self._terms: dict[str, int] = {}  # run → the highest term that anybody has seen
        self._words: Counter[tuple[str, str]] = Counter()  # (run, agent) → roll-backs on its word alone

    def noticed(self, run: str, error: RolledBack) -> str:
        """Notes it. Returns the agent who is not believed any more from now on, or ''."""
        self._terms[run] = max(error.term, self._terms.get(run, 0))
        if not error.agent:
            return ""
        self._words[run, error.agent] += 1
        return "" if self.believes(run, error.agent) else error.agent

    def believes(self, run: str, agent: str) -> bool:
        return self._words[run, agent] < WORDS

    def connection_was_gone(self) -> None:
        self._words.clear()

    def term(self, run: str) -> int | None:
        """The highest term seen of a run that has lost something and was not opened since, or None."""
        return self._terms.get(run)

    def recovered(self, run: str) -> None:
        """It goes on under a higher term."""
        self._terms.pop(run, None)


LOOK_S = 3.0  # a coordinator that nobody asks for anything learns this way that it was replaced
KNOWN_BLOBS = 16
LOST_OFFER_S = 10.0  # an acknowledged offer that was not found for so long is lost


class Lookout:
    """`watch` until there is something wrong. `look`, `heard`: reasons to look at once.

    `believes(agent)`: whether what this agent says of losses still counts. `rolled_back`: the run goes on after a loss that
    this coordinator has noticed. `outer_ref(model)`: what lies beside a model, where the run has an outer state.
    """

    def __init__(
        self,
        bus: Bus,
        keeper: HeadKeeper,
        ledger: Ledger,
        position: StreamPosition,
        *,
        believes: Callable[[str], bool] = lambda agent: True,
        rolled_back: bool = False,
        outer_ref: Callable[[BlobRef], BlobRef] | None = None,
    ) -> None:
        self._bus, self._keeper, self._ledger, self._position = bus, keeper, ledger, position
        self._believes, self._outer_ref = believes, outer_ref
        self._stream = subjects.offers_stream(keeper.head.run)
        self._doubt = asyncio.Event()
        self._doubts = 1  # beside losses of the connection: one for what was before our time
        self._settled = 0  # up to how many losses all was found there
        self._there: dict[str, int] = {}  # blob that head names → after how many losses it was there for certain
        self._suspected = self.losses if rolled_back else 0  # up to which an update that is gone was taken for lost
        self._began = keeper.head.version  # with our term: nobody has made a newer one under an older term
        self._seen, self._seen_by = (0, 0, 0), ""  # the highest (term, version, round) that an agent told of
        self._lost = self._lost_by = ""  # what an agent has seen, and cannot be
        self._missing: dict[str, tuple[int, float]] = {}  # agent → clock of an offer that it tells of, and since when

    @property
    def losses(self) -> int:
        """Times that the connection was lost, and with it, perhaps, what the bus had acknowledged."""
        return self._doubts + self._bus.losses

    def look(self) -> None:
        """The connection is back."""
        self._doubt.set()

    # -- what agents say -----------------------------------------------------------------------------------------------
    def heard(self, agent: str, beat: Heartbeat) -> None:
        """What an agent has seen and handed over."""
        if not self._believes(agent):
            return
        head, seen = self._keeper.head, (beat.seen_term, beat.seen_version, beat.seen_round)
        if seen > self._seen:
            self._seen, self._seen_by = seen, agent
        if self._seen > (head.term, head.version, head.round):
            self._doubt.set()
        if beat.seen_epoch != head.epoch:
            return  # it does not know yet what was lost before
        self.is_lost(agent, beat.seen_term, beat.seen_version)
        if self._ledger.misses(agent, beat.handed):
            self._missing.setdefault(agent, (beat.handed, _now()))

    def is_lost(self, agent: str, term: int, version: int) -> bool:
        """Whether the version that an agent has seen, or trained from, is none of this run's any more."""
        if term >= self._keeper.head.term or version <= self._began:
            return False
        self.lost(agent, f"has seen version {version} of term {term}")
        return True

    def lost(self, agent: str, what: str) -> None:
        """An agent has seen what cannot be."""
        if self._believes(agent):
            self._lost, self._lost_by = f"{agent} {what}", agent
            self._doubt.set()

    def suspects(self, agent: str, what: str) -> bool:
        """An update that was offered is gone: lost, if the connection was, with whatever else. Agents may lie, so that one such
        loss is believed each time that the connection was gone, and no more."""
        if self._suspected == self.losses:
            return False
        self._suspected = self.losses
        self._lost, self._lost_by = f"{agent}: {what}", ""
        self._doubt.set()
        return True

    # -- what the bus shows --------------------------------------------------------------------------------------------
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
            if self._settled != self.losses:
                await self.verify_durable()

    async def write(self, head: Head, roster: Roster | None = None, *, tell: bool = True) -> None:
        """Writes head, which names and rests on what is there, also where the connection was gone since that was put."""
        await self._verify_durable(head)
        losses = self.losses
        await self._keeper.write(head, roster, tell=tell, verify_durable=partial(self._verify_durable, head))
        if losses != self.losses:  # it may have come through after a roll-back all the same, and was not looked at
            self._doubts += 1
            self._doubt.set()

    async def verify_durable(self) -> None:
        """Nothing was lost, as far as head can show. Raises Deposed and RolledBack."""
        await self._verify_durable(self._keeper.head)

    def was_put(self, blob: BlobRef, losses: int) -> None:
        """A blob for head to name, begun after so many losses of the connection."""
        self._there = {**dict(list(self._there.items())[-KNOWN_BLOBS:]), blob.id: losses}

    async def _verify_durable(self, head: Head) -> None:
        before = self._keeper.head
        while self._settled != (losses := self.losses) or self._lost:
            await self._look_around()
            await self._check_blobs(head, before, losses)
            self._settled = losses
        await self._check_blobs(head, before, self.losses)  # what settled the last loss may have been the head before

    async def _look_around(self) -> None:
        if self._settled != self.losses:  # a broker may have lost even that
            await with_retries(partial(self._bus.ensure_bucket, RUNS))
        seen, seen_by = self._seen, self._seen_by  # before we ask: agents see newer heads meanwhile
        term = max(seen[0], self._keeper.head.term)
        there = await self._keeper.check(term)
        if (there.term, there.version, there.round) < seen:
            raise RolledBack("{} has seen term {}, version {}, round {}".format(seen_by, *seen), term, seen_by)
        if self._lost:
            raise RolledBack(self._lost, term, self._lost_by)
        await self._check_offers(term)

    async def _check_offers(self, term: int) -> None:
        """Every offer that was read, or acknowledged to its agent, is in the stream."""
        read = self._position.read_up_to
        state = await with_retries(partial(self._bus.state, self._stream))
        if state.last_seq < read:
            raise RolledBack(f"{self._stream} ends at {state.last_seq}, and {read} was read", term)
        if self._settled != self.losses and self._position.last_read is not None:
            last = self._position.last_read
            for there in await with_retries(partial(self._bus.read, self._stream, last.seq, 1)):
                if there.seq == last.seq and (there.subject, there.data) != (last.subject, last.data):
                    raise RolledBack(f"{self._stream} holds another offer {last.seq} than was read", term)
        self._missing = {a: (c, s) for a, (c, s) in self._missing.items() if self._ledger.misses(a, c)}
        for agent, (clock, since_s) in self._missing.items():
            if _now() - since_s > LOST_OFFER_S and state.last_seq == self._position.read_up_to:
                raise RolledBack(f"{agent}'s offer of clock {clock} is not in {self._stream}", term, agent)

    async def _check_blobs(self, head: Head, before: Head, losses: int) -> None:
        """Those that head names are there, unless head moved on since it was `before`: then what it named may be purged, and
        who moved it has looked. `losses`: of the connection, after which they are then known to be there."""
        named = self._named(head)
        for what, prefix, ref in [(w, p, r) for w, p, r in named if self._there.get(r.id) != losses]:
            state = await with_retries(partial(self._bus.state, subjects.model_stream(head.run), f"{prefix}.*"))
            if len(state.subjects) < ref.chunks and self._keeper.head is before:
                await self._keeper.check(self._seen[0])  # whoever took over clears up behind us
                raise RolledBack(f"head names a {what} that is gone", max(self._seen[0], head.term))
        for _, _, ref in named:
            self.was_put(ref, losses)

    def _named(self, head: Head) -> list[tuple[str, str, BlobRef]]:
        """What it is, where it lies, and its reference."""
        plan = head.plan if isinstance(head.plan, BlobRef) else None
        records = (("model", head.model), ("manifest", head.manifest), ("roster", head.roster), ("plan", plan))
        named = [(what, subjects.model_prefix(head.run, ref.id), ref) for what, ref in records if ref is not None]
        if self._outer_ref is not None and head.version and head.model is not None:
            outer = self._outer_ref(head.model)
            named.append(("outer state", subjects.outer_prefix(head.run, outer.id), outer))
        return named


async def taken_over(bus: Bus, head: Head, lost_term: int | None) -> Head:
    """Head under a term of our own. `lost_term`: the broker was set back, and this is the highest term that was seen before.

    Then a new line begins: the round is opened again, and what agents have made and not seen judged counts for nothing, as
    some of it is lost and some is not. It begins as well where the stream of offers ends before what head calls judged.
    """
    last_seq = (await with_retries(partial(bus.state, subjects.offers_stream(head.run)))).last_seq
    if lost_term is None and last_seq >= head.offers_seq:
        return head.changed(term=head.term + 1)
    phase = head.phase
    if phase == "merging":
        phase = "training" if await _somebody_trains(bus, head) else "waiting"
    again = {"plan": None, "phase": phase, "round": head.round + 1, "epoch": new_number(), "offers_seq": last_seq}
    return head.changed(term=max(head.term, lost_term or 0) + 1, **again)


async def _somebody_trains(bus: Bus, head: Head) -> bool:
    """Whether a round that is merged has participants: an asynchronous run also merges what nobody may run before."""
    if head.roster is None:
        return True
    try:
        roster = decode(Roster, await record_of(bus, head.run, head.roster))
    except BlobGone:  # whoever needs it says so
        return False
    return any(map(roster.participant, range(len(roster.agents))))


def _now() -> float:
    return asyncio.get_running_loop().time()
