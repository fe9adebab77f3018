"""One run at the coordinator: the shell around the policy. It gathers facts, does what commands say, and decides nothing.

Decide, merge, commit: participants go into head by compare-and-set before an agent trains; the plan goes into head before
the first chunk is reduced; the commit is the compare-and-set that moves head to the next version. A coordinator that starts
again reads head and goes on from there: it executes the very plan it finds, and judges offers from where head stopped.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

from syncline.bus.base import Bus
from syncline.bus.blobs import RECORD_CHUNK_BYTES, get_small_blob, patiently, put_blob
from syncline.chance import jitter
from syncline.engine.events import (
    AgentJoined,
    AgentLost,
    Command,
    Committed,
    Drop,
    Fact,
    Finish,
    LetRun,
    Merge,
    OfferReady,
    StartRound,
    TargetReached,
    Tell,
    Tick,
    UpdateBroken,
    WakeAt,
)
from syncline.errors import PeerError
from syncline.spec import RunSpec
from syncline.telemetry import Pace, Round, Telemetry, tell_often
from syncline.wire import subjects
from syncline.wire.manifest import Manifest
from syncline.wire.messages import (
    INLINE_BYTES,
    MAX_RECORD_BYTES,
    BlobRef,
    Head,
    Offer,
    Phase,
    Plan,
    Roster,
    Verdict,
    decode,
    encode,
)
from syncline.wire.messages import Committed as CommitRecord
from syncline_coordinator.center import Center
from syncline_coordinator.evaluation import Evaluation
from syncline_coordinator.head import HeadKeeper
from syncline_coordinator.janitor import Janitor
from syncline_coordinator.ledger import Ledger
from syncline_coordinator.offers import OfferReader
from syncline_coordinator.policies import adviser_of, policy_of, standing_of
from syncline_coordinator.purge import Purger
from syncline_coordinator.reducer import Merged, Reducer
from syncline_coordinator.status import status_of
from syncline_coordinator.updates import UpdateUnusable

log = logging.getLogger(__name__)

INBOX_FACTS = 10_000
LOOK_AT_HEAD_S = 3.0  # a coordinator that nobody asks for anything learns this way that it was replaced
LATE_NAMED = 20


@dataclass(frozen=True, slots=True)
class _MergeDone:
    plan: Plan
    merged: Merged
    seconds: float


@dataclass(slots=True)
class Totals:
    """What the run has moved so far."""

    bytes_up: int = 0
    bytes_down: int = 0
    opened_at_s: float = 0.0
    collect_s: float = 0.0


@dataclass(slots=True)
class Parts:
    """What a run is made of; the coordinator puts it together, a simulation puts in its own."""

    bus: Bus
    spec: RunSpec
    manifest: Manifest
    center: Center
    reducer: Reducer
    telemetry: Telemetry
    offers: OfferReader
    evaluation: Evaluation | None
    max_agents: int


class Run:
    """`start` or `resume`, then `pump` until the run has ended."""

    def __init__(self, parts: Parts, keeper: HeadKeeper) -> None:
        spec = parts.spec
        self.parts, self.keeper = parts, keeper
        self.policy, self._adviser = policy_of(spec), adviser_of(spec)
        self.present: set[str] = set()
        self.ended = asyncio.Event()
        self._inbox: asyncio.Queue[Fact | _MergeDone] = asyncio.Queue(INBOX_FACTS)
        self._totals = Totals()
        self._round_pace = Pace(0.1)
        self._wake_at_s: float | None = None
        self._purger = Purger(parts.bus)
        self.ledger = Ledger(spec, parts.max_agents, keeper.head, self._purger)
        self._janitor = Janitor(parts.bus, spec.name, self._purger, parts.telemetry, self.ledger.offered_blobs)
        self._work: set[asyncio.Task[None]] = set()

    # -- facts from outside --------------------------------------------------------------------------------------------
    def room_for(self, agent: str) -> str:
        """'' where the agent can take part, else why not."""
        return self.ledger.room_for(agent, self.present)

    async def joined(self, agent: str) -> str:
        """Takes the agent in; returns why there is no room for it, or ''."""
        if agent not in self.present:
            if why_not := self.room_for(agent):
                return why_not
            self.present.add(agent)
            if self.policy.started:
                self.ledger.numbering.admit([agent])
            await self.parts.telemetry.event("agent-joined", f"{agent} joined", agent=agent)
            await self._inbox.put(AgentJoined(agent))
        return ""

    async def lost(self, agent: str, reason: str, *, failed: bool = False) -> None:
        if agent in self.present:
            self.present.discard(agent)
            if not failed:  # it has said so itself
                await self.parts.telemetry.event("agent-lost", f"{agent} lost: {reason}", level="warning", agent=agent)
            await self._inbox.put(AgentLost(agent, reason, failed))
        elif failed:
            await self._inbox.put(AgentLost(agent, reason, failed))

    async def stop(self, why: str) -> None:
        """Ends the run as if it had reached its target: at once, or with the merge that is under way."""
        await self._inbox.put(TargetReached(why))

    # -- life ----------------------------------------------------------------------------------------------------------
    async def resume(self) -> None:
        """Goes on from head, as a restarted coordinator: same round, same plan, offers from where head stopped."""
        head = self.keeper.head
        if head.roster is None:
            return
        roster = decode(Roster, await self._record(head.roster))
        self.ledger.restore(roster)
        standing = standing_of(head, roster)
        self.present = set(standing.live)
        self.policy.resume(standing, _now())
        if head.plan is not None:
            plan = decode(Plan, head.plan if isinstance(head.plan, bytes) else await self._record(head.plan))
            offers = [OfferReady(e.agent, e.clock, head.version - e.lag, e.samples, e.steps) for e in plan.merged]
            self.policy.resume_merge(offers)
            self.ledger.planned(plan, head.offers_seq + 1)
            self._begin(self._merge(plan))
        await self._inbox.put(Tick())  # nobody may have anything to say: a head can stand between two rounds

    async def pump(self) -> None:
        """Feeds the policy until the run has ended. Raises Deposed where another coordinator took over."""
        try:
            self._begin(self._read_offers())
            self._begin(self._purger.run())
            self._begin(self._janitor.run())
            self._begin(self._watch_head())
            self._begin(tell_often(self.parts.telemetry, partial(status_of, self)))
            while not self.ended.is_set():
                fact = await self._next()
                if isinstance(fact, _MergeDone):
                    await self._commit(fact)
                    continue
                try:
                    commands = self.policy.handle(fact, _now())
                except PeerError as error:
                    if isinstance(fact, OfferReady):
                        self.ledger.forget(fact.agent, fact.clock)
                    await self.parts.telemetry.event("offer-refused", str(error), level="warning")
                    continue
                for command in commands:
                    await self._execute(command)
        finally:
            for task in self._work:
                task.cancel()
            await asyncio.gather(*self._work, return_exceptions=True)

    async def _watch_head(self) -> None:
        while True:
            await asyncio.sleep(jitter(LOOK_AT_HEAD_S))
            await self.keeper.check()

    async def _next(self) -> Fact | _MergeDone:
        """The next fact; a Tick when the policy's time has come. A background task's error is raised here."""
        if not self._inbox.empty():
            return self._inbox.get_nowait()
        get = asyncio.ensure_future(self._inbox.get())
        timeout = None if self._wake_at_s is None else max(0.0, self._wake_at_s - _now())
        try:
            await asyncio.wait({get, *self._work}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            for task in [t for t in self._work if t.done()]:
                self._work.discard(task)
                task.result()
            if get.done():
                return get.result()
            if self._wake_at_s is not None and _now() >= self._wake_at_s:
                self._wake_at_s = None
            return Tick()
        finally:
            get.cancel()

    def _begin(self, work: object) -> None:
        self._work.add(asyncio.ensure_future(work))  # type: ignore[call-overload]

    # -- commands ------------------------------------------------------------------------------------------------------
    async def _execute(self, command: Command) -> None:
        match command:
            case StartRound() | LetRun():
                await self._let_train(command)
            case Merge():
                await self._decide(command)
            case Drop():
                await self._drop(command)
            case WakeAt(at_s):
                self._wake_at_s = at_s
            case Tell(event, text):
                await self.parts.telemetry.event(event, text, level="warning")
            case Finish(reason, failed):
                await self._finish(reason, "failed" if failed else "done")

    async def _let_train(self, command: StartRound | LetRun) -> None:
        """Who trains goes into head. A round begins anew; in an asynchronous run a merge under way goes on."""
        before = self.keeper.head
        roster, ref = await self._put_roster(command)
        moved: dict[str, Any] = {"roster": ref, "round": before.round + 1, "offers_seq": self.ledger.judged_up_to()}
        if isinstance(command, LetRun) and command.merging:
            moved |= {"gate": command.gate}
        else:
            moved |= {"plan": None, "phase": _phase(command), "gate": _gate(command)}
        if isinstance(command, StartRound) or not before.round:
            self._totals.opened_at_s = _now()
        await self._move(before.model_copy(update=moved), roster)

    async def _move(self, head: Head, roster: Roster) -> None:
        """Head goes on, and what only the older one needed can go."""
        before = self.keeper.head
        await self.keeper.write(head, roster)
        self.ledger.settled(before, head)

    async def _decide(self, merge: Merge) -> None:
        """The plan goes into head; then it is executed."""
        head, entries = self.keeper.head, self.ledger.entries(merge.updates)
        plan = Plan(version=head.version + 1, reason=merge.reason, merged=entries, late=list(merge.late))
        self._totals.collect_s = _now() - self._totals.opened_at_s
        packed = encode(plan)
        held = packed if len(packed) <= INLINE_BYTES else await self._put_record(packed)
        await self.keeper.write(head.model_copy(update={"plan": held, "phase": "merging"}), tell=False)
        self._begin(self._merge(plan))

    async def _merge(self, plan: Plan) -> None:
        if self.parts.evaluation is not None:
            await self.parts.evaluation.copied()
        began = _now()
        try:
            merged = await self.parts.reducer.merge(plan)
        except UpdateUnusable as error:
            if error.blob:
                self.ledger.abandoned(error.blob)
            await self._inbox.put(UpdateBroken(error.agent, error.clock, error.why))
            return
        await self._inbox.put(_MergeDone(plan, merged, _now() - began))

    async def _commit(self, done: _MergeDone) -> None:
        """Version v + 1: roster and record on the bus, then the compare-and-set that makes it so."""
        parts, head, plan, totals = self.parts, self.keeper.head, done.plan, self._totals
        parts.center.advance()
        self.ledger.merged(plan)
        totals.bytes_up += done.merged.bytes_got
        totals.bytes_down += done.merged.bytes_put
        seconds = _now() - totals.opened_at_s
        commands = self.policy.handle(Committed(plan.version), _now())
        start = next((c for c in commands if isinstance(c, StartRound | LetRun)), None)
        for drop in [c for c in commands if isinstance(c, Drop)]:  # the roster of this version tells of them
            await self._drop(drop)
        (roster, ref), _ = await asyncio.gather(self._put_roster(start), self._put_commit_record(done))
        moved = {
            "version": plan.version,
            "digest": done.merged.digest,
            "model": done.merged.model,
            "previous": head.model,
            "roster": ref,
            "plan": None,
            "phase": _phase(start),
            "round": head.round + bool(start),
            "gate": _gate(start),
            "offers_seq": self.ledger.judged_up_to(),
            "reason": plan.reason[:2000],
        }
        await self._move(head.model_copy(update=moved), roster)
        totals.opened_at_s = _now()
        if parts.evaluation is not None and plan.version % parts.spec.evaluate.every == 0:
            parts.evaluation.offer(plan.version, parts.center.current)
        if self._round_pace.due(_now()) or not start:
            await parts.telemetry.metric(self._round_metric(done, seconds))
        await self._advise(plan)
        for command in commands:
            if command is not start and not isinstance(command, Drop):
                await self._execute(command)

    async def _advise(self, plan: Plan) -> None:
        """What the run shows of itself that its owner should know, each once."""
        for entry in plan.merged:
            self._adviser.judged(entry.agent, entry.lag, merged=True)
        for advice in self._adviser.committed():
            await self.parts.telemetry.event("advice", advice.text, level="warning", agent=advice.agent)

    async def _drop(self, drop: Drop) -> None:
        self.ledger.drop(drop.agent, drop.clock, drop.reason, Verdict.BROKEN if drop.broken else Verdict.LATE)
        self._adviser.judged(drop.agent, drop.lag, merged=False, too_stale=drop.lag > 0)
        text = f"{drop.agent}: update of clock {drop.clock} dropped: {drop.reason}"
        await self.parts.telemetry.event("update-dropped", text, level="warning", agent=drop.agent)

    async def _finish(self, reason: str, phase: Phase) -> None:
        head = self.keeper.head
        if self.parts.evaluation is not None and phase == "done":
            await self.parts.evaluation.last(head.version, self.parts.center.current)
        await self.keeper.write(head.model_copy(update={"phase": phase, "plan": None, "reason": reason[:2000]}))
        await self.parts.telemetry.metric(status_of(self))
        level = "info" if phase == "done" else "error"
        await self.parts.telemetry.event(f"run-{phase}", f"run {head.run}: {reason}", level=level)  # type: ignore[arg-type]
        self.ended.set()

    # -- offers --------------------------------------------------------------------------------------------------------
    async def _read_offers(self) -> None:
        async for stored, offer in self.parts.offers.read(self.ledger.read_up_to):
            self.ledger.read_up_to = stored.seq
            agent = subjects.agent_of(stored.subject)
            problem = offer if isinstance(offer, PeerError) else self._unacceptable(agent, offer)
            if problem is not None:
                await self.parts.telemetry.event("offer-refused", f"{agent}: {problem}", level="warning", agent=agent)
            elif isinstance(offer, Offer) and self.ledger.offer(agent, offer, stored.seq):
                self._adviser.offered(agent, offer.samples, offer.seconds)
                await self._inbox.put(OfferReady(agent, offer.clock, offer.base, offer.samples, offer.steps))

    def _unacceptable(self, agent: str, offer: Offer) -> PeerError | None:
        if agent not in self.ledger.numbering.names:
            return PeerError("offer: not an agent of this run")
        if offer.term > self.keeper.head.term:
            return PeerError(f"offer: made under term {offer.term}, this coordinator has {self.keeper.head.term}")
        return None

    # -- records -------------------------------------------------------------------------------------------------------
    async def _put_roster(self, start: StartRound | LetRun | None) -> tuple[Roster, BlobRef]:
        offsets = dict(start.offsets) if isinstance(start, LetRun) else {}
        roster = self.ledger.roster(self.present, start.participants if start else (), offsets)
        return roster, await self._put_record(encode(roster))

    async def _put_record(self, data: bytes) -> BlobRef:
        prefix = partial(subjects.model_prefix, self.parts.spec.name)
        return (await put_blob(self.parts.bus, prefix, memoryview(data), RECORD_CHUNK_BYTES))[0]

    async def _record(self, ref: BlobRef) -> bytes:
        run = self.parts.spec.name
        prefix = partial(subjects.model_prefix, run)
        return await get_small_blob(
            self.parts.bus, subjects.model_stream(run), prefix, ref, RECORD_CHUNK_BYTES, 64 * MAX_RECORD_BYTES
        )

    async def _put_commit_record(self, done: _MergeDone) -> None:
        head, plan = self.keeper.head, done.plan
        record = CommitRecord(
            run=head.run,
            term=head.term,
            version=plan.version,
            digest=done.merged.digest,
            model=done.merged.model,
            plan=plan,
            dropped=self.ledger.dropped,
            norms=list(done.merged.norms),
            norm=done.merged.norm,
            bytes_up=done.merged.bytes_got,
            bytes_down=done.merged.bytes_put,
            phases_s={"collect": self._totals.collect_s, "merge": done.seconds},
        )
        subject = subjects.log_record(head.run, plan.version, head.term)
        await patiently(lambda: self.parts.bus.put(subject, encode(record)))
        self.ledger.dropped = []

    def _round_metric(self, done: _MergeDone, seconds: float) -> Round:
        totals, mean = self._totals, self.parts.spec.merge.rule == "mean"
        return Round(
            version=done.plan.version,
            closed_by=done.plan.reason,
            merged=len(done.plan.merged),
            late=done.plan.late[:LATE_NAMED],
            seconds=seconds,
            collect_s=totals.collect_s,
            merge_s=done.seconds,
            norm=done.merged.norm,
            drift=done.merged.drift([e.weight for e in done.plan.merged]) if mean else None,
            bytes_up=totals.bytes_up,
            bytes_down=totals.bytes_down,
        )

    def evaluated(self, version: int, metrics: dict[str, float]) -> None:
        """A held-out result is in: perhaps the target is reached."""
        target = self.parts.spec.stop.target
        value = metrics.get(target.metric) if target is not None else None
        if target is not None and value is not None and target.reached(value) and not self._inbox.full():
            why = f"target reached: {target.metric} = {value:.4g} at version {version}"
            self._inbox.put_nowait(TargetReached(why))


def _phase(start: StartRound | LetRun | None) -> Phase:
    return "training" if start is not None and start.participants else "waiting"


def _gate(start: StartRound | LetRun | None) -> int | None:
    return start.gate if isinstance(start, LetRun) else None


def _now() -> float:
    return asyncio.get_running_loop().time()
