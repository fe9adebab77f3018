"""Detection of lost writes and of another coordinator, and the head with which a run goes on afterwards.

A broker can lose writes that it has acknowledged, for example in a power failure between two flushes. The loss shows in head,
in the stream of offers, and in the reports of agents about the heads that they have seen and the offers that they have made.
`LossDetector` compares these with the records that this coordinator has read and written.

After each loss of the connection the broker may have restarted with an older store. Before head is written, an offer is read
or a blob is purged, the detector checks that every blob which head names is still complete.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from syncline.bus.base import Bus
from syncline.bus.blobs import BlobGone, with_retries
from syncline.bus.commits import holds_commit
from syncline.bus.records import record_of
from syncline.chance import jitter, new_number
from syncline.policy.ledger import Ledger
from syncline.wire import subjects
from syncline.wire.messages import BlobRef, Head, Heartbeat, Roster, decode
from syncline_coordinator.head import HeadKeeper, RolledBack
from syncline_coordinator.offers import StreamPosition
from syncline_coordinator.reservation import RUNS

# Reports of one agent in one run. More than one, since an honest agent may be the only witness of two losses in a row.
MAX_UNCONFIRMED_REPORTS = 3


class LossReports:
    """Losses that runs have not recovered from yet, and the number of losses that each agent alone has reported.

    Agents may lie. A run goes back on the report of one agent at most `MAX_UNCONFIRMED_REPORTS` times until the connection to
    the broker is lost again.
    """

    def __init__(self) -> None:
        self._highest_terms: dict[str, int] = {}  # by run
        self._unconfirmed: Counter[tuple[str, str]] = Counter()  # by (run, agent)

    def record(self, run: str, error: RolledBack) -> str:
        """Record a loss.

        Returns:
            The agent that is not trusted any more from now on, or ''.
        """
        self._highest_terms[run] = max(error.term, self._highest_terms.get(run, 0))
        if not error.agent:
            return ""
        self._unconfirmed[run, error.agent] += 1
        return "" if self.is_trusted(run, error.agent) else error.agent

    def is_trusted(self, run: str, agent: str) -> bool:
        """Return whether the agent's reports about losses of this run still count."""
        return self._unconfirmed[run, agent] < MAX_UNCONFIRMED_REPORTS

    def reset_trust(self) -> None:
        """Trust all agents again. Call after the connection was lost: the broker may have lost writes once more."""
        self._unconfirmed.clear()

    def highest_term(self, run: str) -> int | None:
        """Return the highest term seen before the loss, or None for a run without a loss to recover from."""
        return self._highest_terms.get(run)

    def recovered(self, run: str) -> None:
        """Forget the loss of a run that goes on under a higher term."""
        self._highest_terms.pop(run, None)


CHECK_PERIOD_S = 3.0  # a coordinator without requests learns within this time that another one has replaced it
MAX_VERIFIED_BLOBS = 16
LOST_OFFER_S = 10.0  # an acknowledged offer that is not found for so long is lost


@dataclass(frozen=True, slots=True)
class _MissingOffer:
    """An offer that an agent reports as acknowledged and that the coordinator has not read."""

    clock: int
    since_s: float


class LossDetector:
    """Checks whether another coordinator took over, and whether the broker still holds every write that was acknowledged.

    `watch` checks every few seconds, after a reconnect, and as soon as an agent reports a head that this coordinator does not
    know. `write_head` and `verify_durable` check before an action that relies on earlier writes.

    Args:
        ledger: knows which offers were read.
        position: how far the stream of offers was read.
        is_trusted: returns whether an agent's reports about losses count.
        rolled_back: the run goes on after a loss that this coordinator has noticed.
        outer_ref: returns the outer state of a model, for a run that has one.
    """

    def __init__(
        self,
        bus: Bus,
        keeper: HeadKeeper,
        ledger: Ledger,
        position: StreamPosition,
        *,
        is_trusted: Callable[[str], bool] = lambda agent: True,
        rolled_back: bool = False,
        outer_ref: Callable[[BlobRef], BlobRef] | None = None,
    ) -> None:
        self._bus = bus
        self._keeper = keeper
        self._ledger = ledger
        self._position = position
        self._is_trusted = is_trusted
        self._outer_ref = outer_ref
        self._offers_stream = subjects.offers_stream(keeper.head.run)
        self._check_now = asyncio.Event()
        self._other_risks = 1  # a loss may have happened before this object was made
        self._verified_risks = 0  # value of `risks` at the last check that found every blob of head
        self._blobs_verified_at: dict[str, int] = {}  # blob id → value of `risks` at which the blob was complete
        self._commit_record = (0, 0)  # version, and value of `risks` at which the log held its record
        self._missing_update_at = (
            self.risks if rolled_back else 0
        )  # value of `risks` when a missing update counted as lost
        self._first_version = keeper.head.version  # every newer version was made under this coordinator's term
        self._highest_seen = (0, 0, 0)  # (term, version, round) of the newest head that an agent reports
        self._highest_seen_by = ""
        self._evidence = ""  # of a loss, as an agent has reported it
        self._evidence_by = ""  # the agent on whose word alone the evidence rests
        self._missing_offers: dict[str, _MissingOffer] = {}  # by agent

    @property
    def risks(self) -> int:
        """The number of events so far after which acknowledged writes may be missing, such as a lost connection."""
        return self._other_risks + self._bus.losses

    def check_now(self) -> None:
        """Make `watch` check at once, for example after a reconnect."""
        self._check_now.set()

    # -- reports of agents ---------------------------------------------------------------------------------------------
    def on_heartbeat(self, agent: str, beat: Heartbeat) -> None:
        """Compare the head and the offer that an agent reports with this coordinator's own records."""
        if not self._is_trusted(agent):
            return
        head = self._keeper.head
        seen = (beat.seen_term, beat.seen_version, beat.seen_round)
        if seen > self._highest_seen:
            self._highest_seen = seen
            self._highest_seen_by = agent
        if self._highest_seen > _order(head):
            self._check_now.set()
        if beat.seen_epoch != head.epoch:
            return  # the agent has not heard yet of a loss that is known here
        self.is_version_lost(agent, beat.seen_term, beat.seen_version)
        if self._ledger.misses(agent, beat.handed):
            self._missing_offers.setdefault(agent, _MissingOffer(beat.handed, _now()))

    def is_version_lost(self, agent: str, term: int, version: int) -> bool:
        """Return whether a version that an agent has seen is not part of this run's history any more, and report the loss.

        A version of an older term is lost if this coordinator has started from an older version.
        """
        if term >= self._keeper.head.term or version <= self._first_version:
            return False
        self.report_loss(agent, f"has seen version {version} of term {term}")
        return True

    def report_loss(self, agent: str, evidence: str) -> None:
        """Make the next check fail because an agent has seen something that the bus does not hold any more.

        Args:
            evidence: the version or round that the agent has seen; continues a sentence that starts with the agent's name.
        """
        if self._is_trusted(agent):
            self._evidence = f"{agent} {evidence}"
            self._evidence_by = agent
            self._check_now.set()

    def report_missing_update(self, agent: str, problem: str) -> bool:
        """Return whether an offered update that is not on the bus counts as lost by the broker, and report the loss if so.

        A lying agent may offer updates that were never put. So one missing update counts for each event in `risks`, whichever
        agent it is from; any other is the fault of its agent.
        """
        if self._missing_update_at == self.risks:
            return False
        self._missing_update_at = self.risks
        self._evidence = f"{agent}: {problem}"
        self._evidence_by = ""
        self._check_now.set()
        return True

    # -- checks of the bus ---------------------------------------------------------------------------------------------
    async def watch(self) -> None:
        """Check until something is wrong.

        Raises:
            Deposed: another coordinator took over.
            RolledBack: the broker lost writes that it had acknowledged.
        """
        while True:
            try:
                async with asyncio.timeout(jitter(CHECK_PERIOD_S)):
                    await self._check_now.wait()
            except TimeoutError:
                pass
            self._check_now.clear()
            await self._check_bus()
            if self._verified_risks != self.risks:
                await self.verify_durable()

    async def write_head(self, head: Head, roster: Roster | None = None, *, tell: bool = True) -> None:
        """Write head after a check that the bus holds every blob that `head` names. Raises Deposed and RolledBack.

        Args:
            roster: the roster that `head` names, for the notification of the agents.
            tell: notify the agents.
        """
        await self._verify_head(head)
        risks = self.risks
        await self._keeper.write(head, roster, tell=tell, verify_durable=partial(self._verify_head, head))
        if risks != self.risks:  # the write may have arrived at a broker that lost a blob since the check
            self._other_risks += 1
            self._check_now.set()

    async def verify_durable(self) -> None:
        """Check that the bus still holds head and all blobs that head names. Raises Deposed and RolledBack."""
        await self._verify_head(self._keeper.head)

    def note_commit_record(self, version: int, risks: int) -> None:
        """Note that the record of a version was put, before head names that version.

        Args:
            risks: value of `risks` before the record was put.
        """
        self._commit_record = (version, risks)

    def note_put(self, blob: BlobRef, risks: int) -> None:
        """Note that the bus holds all of a blob.

        Args:
            risks: value of `risks` before the blob was put or looked for.
        """
        recent = list(self._blobs_verified_at.items())[-MAX_VERIFIED_BLOBS:]
        self._blobs_verified_at = {**dict(recent), blob.id: risks}

    async def _verify_head(self, head: Head) -> None:
        before = self._keeper.head
        while self._verified_risks != (risks := self.risks) or self._evidence:
            await self._check_bus()
            await self._check_blobs(head, before, risks)
            await self._check_commit_record(head, before)
            self._verified_risks = risks
        # The last verification may have been of an older head, which named other blobs.
        await self._check_blobs(head, before, self.risks)
        await self._check_commit_record(head, before)

    async def _check_bus(self) -> None:
        """Compare head and the stream of offers with what was read, written and reported. Raises Deposed and RolledBack."""
        if self._verified_risks != self.risks:  # a broker may have lost the bucket too
            await with_retries(partial(self._bus.ensure_bucket, RUNS))
        # Both are read before the bus is asked: meanwhile agents see newer heads.
        seen = self._highest_seen
        seen_by = self._highest_seen_by
        term = max(seen[0], self._keeper.head.term)
        found = await self._keeper.check(term)
        if _order(found) < seen:
            raise RolledBack("{} has seen term {}, version {}, round {}".format(seen_by, *seen), term, seen_by)
        if self._evidence:
            raise RolledBack(self._evidence, term, self._evidence_by)
        await self._check_offers(term)

    async def _check_offers(self, term: int) -> None:
        """Check that the stream holds every offer that was read, or that an agent reports as acknowledged.

        Args:
            term: the highest term seen so far, for the RolledBack that is raised.
        """
        read_up_to = self._position.read_up_to
        state = await with_retries(partial(self._bus.state, self._offers_stream))
        if state.last_seq < read_up_to:
            raise RolledBack(
                f"{self._offers_stream} ends at message {state.last_seq}, and message {read_up_to} was read", term
            )
        if self._verified_risks != self.risks and self._position.last_read is not None:
            last = self._position.last_read
            for found in await with_retries(partial(self._bus.read, self._offers_stream, last.seq, 1)):
                if found.seq == last.seq and (found.subject, found.data) != (last.subject, last.data):
                    raise RolledBack(
                        f"{self._offers_stream} holds another message {last.seq} than the one that was read", term
                    )
        self._missing_offers = {
            agent: missing
            for agent, missing in self._missing_offers.items()
            if self._ledger.misses(agent, missing.clock)
        }
        for agent, missing in self._missing_offers.items():
            all_read = state.last_seq == self._position.read_up_to
            if _now() - missing.since_s > LOST_OFFER_S and all_read:
                problem = f"{agent}'s offer of clock {missing.clock} is not in {self._offers_stream}"
                raise RolledBack(problem, term, agent)

    async def _check_blobs(self, head: Head, before: Head, risks: int) -> None:
        """Check that the bus holds every chunk of the blobs that `head` names.

        The check is void when head has moved on from `before` meanwhile: older blobs may be purged by then, and the write that
        moved head was preceded by a check of its own.

        Args:
            head: the head to check; may be one that is not written yet.
            before: the keeper's head when the check began.
            risks: value of `risks` before the check.
        """
        blobs = self._named_blobs(head)
        for kind, prefix, ref in [b for b in blobs if self._blobs_verified_at.get(b[2].id) != risks]:
            state = await with_retries(partial(self._bus.state, subjects.model_stream(head.run), f"{prefix}.*"))
            if len(state.subjects) < ref.chunks and self._keeper.head is before:
                await self._keeper.check(self._highest_seen[0])  # a coordinator that took over may have purged the blob
                raise RolledBack(f"head names a {kind} that is not on the bus", max(self._highest_seen[0], head.term))
        for _, _, ref in blobs:
            self.note_put(ref, risks)

    async def _check_commit_record(self, head: Head, before: Head) -> None:
        """Check that the log holds the record of the version that `head` commits, unless `before` has that version."""
        version, risks = self._commit_record
        if head.version != version or before.version >= version or risks == self.risks:
            return
        risks = self.risks
        if not await holds_commit(self._bus, head.run, version, head.term) and self._keeper.head is before:
            await self._keeper.check(self._highest_seen[0])  # a coordinator that took over may have purged the record
            raise RolledBack(f"the log has no record of version {version}", max(self._highest_seen[0], head.term))
        self._commit_record = (version, risks)

    def _named_blobs(self, head: Head) -> list[tuple[str, str, BlobRef]]:
        """Return kind, subject prefix and reference of each blob that `head` names, the outer state included."""
        plan = head.plan if isinstance(head.plan, BlobRef) else None
        records = (("model", head.model), ("manifest", head.manifest), ("roster", head.roster), ("plan", plan))
        blobs = [(kind, subjects.model_prefix(head.run, ref.id), ref) for kind, ref in records if ref is not None]
        if self._outer_ref is not None and head.version and head.model is not None:
            outer = self._outer_ref(head.model)
            blobs.append(("outer state", subjects.outer_prefix(head.run, outer.id), outer))
        return blobs


async def head_under_new_term(bus: Bus, head: Head, lost_term: int | None) -> Head:
    """Return the head under which this coordinator continues a run.

    After a loss a new epoch of the history starts: the round is opened again, and agents discard updates whose verdict they
    have not seen, since some of their chunks and offers are lost and others are not. A new epoch also starts if the stream
    of offers ends before the last offer that `head` counts as judged.

    Args:
        head: as the bus holds it.
        lost_term: the highest term seen before the broker lost writes, or None without a loss.
    """
    last_seq = (await with_retries(partial(bus.state, subjects.offers_stream(head.run)))).last_seq
    if lost_term is None and last_seq >= head.offers_seq:
        return head.changed(term=head.term + 1)
    phase = head.phase
    if phase == "merging":
        phase = "training" if await _has_participants(bus, head) else "waiting"
    reopened = {"plan": None, "phase": phase, "round": head.round + 1, "epoch": new_number(), "offers_seq": last_seq}
    return head.changed(term=max(head.term, lost_term or 0) + 1, **reopened)


async def _has_participants(bus: Bus, head: Head) -> bool:
    """Return whether agents still train in the round that is being merged.

    An asynchronous run may merge while no agent is allowed to train before the next version.
    """
    if head.roster is None:
        return True
    try:
        roster = decode(Roster, await record_of(bus, head.run, head.roster))
    except BlobGone:  # `Run.resume` needs the roster too, and reports the loss
        return False
    return any(map(roster.participant, range(len(roster.agents))))


def _order(head: Head) -> tuple[int, int, int]:
    """Return the place of a head in the run's history."""
    return head.term, head.version, head.round


def _now() -> float:
    return asyncio.get_running_loop().time()
