"""One run at the coordinator: the shell around the policy. It gathers facts, does what commands say, and decides nothing.

Decide, merge, commit: participants go into head by compare-and-set before an agent trains; the plan goes into head before
the first chunk is reduced; the commit is the compare-and-set that moves head to the next version. A coordinator that starts
again reads head and goes on from there: it executes the very plan it finds, and judges offers from where head stopped.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from syncline.bus.base import Bus
from syncline.bus.blobs import put_record
from syncline.bus.commits import put_commit
from syncline.bus.records import record_of
from syncline.errors import ConfigError, PeerError, StreamFull
from syncline.model.manifest import Manifest
from syncline.observe.telemetry import Telemetry, tell_often
from syncline.policy.events import (
    AgentJoined,
    AgentLost,
    AgentSlow,
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
from syncline.spec.guardrails import too_many_agents
from syncline.spec.run_spec import RunSpec
from syncline.wire import subjects
from syncline.wire.messages import (
    ENDED,
    INLINE_BYTES,
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
from syncline_coordinator.evaluation import Evaluation
from syncline_coordinator.head import HeadKeeper
from syncline_coordinator.ledger import Ledger
from syncline_coordinator.merge.center import Center
from syncline_coordinator.merge.reducer import Reducer
from syncline_coordinator.merge.updates import UpdateGone, UpdateUnusable
from syncline_coordinator.offers import OfferReader
from syncline_coordinator.policies import policy_of, standing_of
from syncline_coordinator.recovery import Lookout
from syncline_coordinator.reporting import Account, MergeDone, Room, status_of
from syncline_coordinator.reservation import Reservation, is_log_full
from syncline_coordinator.retention import Janitor, Purger, kept_models, leftovers, uncommitted

log = logging.getLogger(__name__)

INBOX_FACTS = 10_000
RAISE_LOST_AFTER = "Raise agents.lost_after_s where a step may take so long"


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
    room: Room


class Run:
    """`start` or `resume`, then `pump` until the run has ended."""

    def __init__(
        self, parts: Parts, keeper: HeadKeeper, *, believes: Callable[[str], bool], rolled_back: bool = False
    ) -> None:
        spec = parts.spec
        self.parts, self.keeper = parts, keeper
        self.policy, self._account = policy_of(spec), Account(spec, parts.telemetry)
        self.present: set[str] = set()  # agents that take part, slow ones too, as the policy was told
        self.slow: set[str] = set()
        self.ended = asyncio.Event()
        self._inbox: asyncio.Queue[Fact | MergeDone] = asyncio.Queue(INBOX_FACTS)
        self._wake_at_s: float | None = None
        self._purger = Purger(parts.bus)
        self.ledger = Ledger(spec, parts.max_agents, keeper.head, self._purger)
        self._janitor = Janitor(parts.bus, spec.name, self._purger, parts.telemetry, self.ledger.offered_blobs)
        outer_ref = parts.reducer.outer_ref if spec.states else None
        self.lookout = Lookout(
            parts.bus, keeper, self.ledger, believes=believes, rolled_back=rolled_back, outer_ref=outer_ref
        )
        self._diverged_at: int | None = None  # the newest version whose held-out loss was not finite
        self._work: set[asyncio.Task[None]] = set()

    # -- facts from outside --------------------------------------------------------------------------------------------
    def room_for(self, agent: str) -> str:
        """'' where the agent can take part, else why not."""
        why_not = self.ledger.room_for(agent, self.present)
        return why_not or too_many_agents(self.parts.spec, len(self.present | {agent}))

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
        elif agent in self.slow:
            self.slow.discard(agent)
            await self.parts.telemetry.event("agent-present", f"{agent} makes progress again", agent=agent)
            await self._inbox.put(AgentJoined(agent))
        return ""

    async def slowed(self, agent: str, reason: str) -> None:
        """Its heartbeats arrive and its training makes no progress."""
        if agent not in self.present or agent in self.slow or self.keeper.head.phase in ENDED:
            return
        self.slow.add(agent)
        text = f"{agent} slow: {reason}. It is not waited for until it makes progress. {RAISE_LOST_AFTER}"
        await self.parts.telemetry.event("agent-slow", text, level="warning", agent=agent)
        await self._inbox.put(AgentSlow(agent, reason))

    async def lost(self, agent: str, reason: str, *, failed: bool = False) -> None:
        """No news once the run has ended: agents go then."""
        if self.keeper.head.phase in ENDED:
            return
        if agent in self.present:
            self.present.discard(agent)
            self.slow.discard(agent)
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
        head, bus = self.keeper.head, self.parts.bus
        if head.term > 1:
            kept = await kept_models(bus, head, self.parts.spec.keep_models)
            self.ledger.taken_over(kept, await leftovers(bus, head, kept), await uncommitted(bus, head))
        if head.roster is None:
            return
        roster = decode(Roster, await record_of(bus, head.run, head.roster))
        self.ledger.restore(roster)
        standing = standing_of(head, roster)
        self.present, self.slow = {*standing.live, *standing.slow}, set(standing.slow)
        self.policy.resume(standing, _now())
        if head.plan is not None:
            plan = decode(
                Plan, head.plan if isinstance(head.plan, bytes) else await record_of(bus, head.run, head.plan)
            )
            offers = [OfferReady(e.agent, e.clock, head.version - e.lag, e.samples, e.steps) for e in plan.merged]
            self.policy.resume_merge(offers)
            self.ledger.planned(plan, head.offers_seq + 1)
            self._begin(self._merge(plan))
        await self._inbox.put(Tick())  # nobody may have anything to say: a head can stand between two rounds

    async def pump(self) -> None:
        """Feeds the policy until the run has ended. Raises Deposed where another coordinator took over, and RolledBack where
        the broker lost what it had acknowledged."""
        try:
            self._begin(self._read_offers())
            self._begin(self._purger.run(self.lookout.verify_durable))
            self._begin(self._janitor.run())
            self._begin(self.lookout.watch())
            self._begin(tell_often(self.parts.telemetry, partial(status_of, self)))
            while not self.ended.is_set():
                fact = await self._next()
                if isinstance(fact, MergeDone):
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

    async def _next(self) -> Fact | MergeDone:
        """The next fact; a Tick when the policy's time has come. A background task's error is raised here."""
        self._look_after_work()
        if not self._inbox.empty():
            return self._inbox.get_nowait()
        get = asyncio.ensure_future(self._inbox.get())
        timeout = None if self._wake_at_s is None else max(0.0, self._wake_at_s - _now())
        try:
            await asyncio.wait({get, *self._work}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            self._look_after_work()
            if get.done():
                return get.result()
            if self._wake_at_s is not None and _now() >= self._wake_at_s:
                self._wake_at_s = None
            return Tick()
        finally:
            get.cancel()

    def _look_after_work(self) -> None:
        """Raises what a background task has raised."""
        for task in [t for t in self._work if t.done()]:
            self._work.discard(task)
            task.result()

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
        if (isinstance(command, StartRound) and before.phase != "training") or not before.round:
            self._account.opened(_now())
        await self._move(before.model_copy(update=moved), roster)

    async def _move(self, head: Head, roster: Roster) -> None:
        """Head goes on, and what only the older one needed can go."""
        before = self.keeper.head
        await self.lookout.write(head, roster)
        self.ledger.settled(before, head)

    async def _decide(self, merge: Merge) -> None:
        """The plan goes into head; then it is executed."""
        head, entries = self.keeper.head, self.ledger.entries(merge.updates)
        plan = Plan(version=head.version + 1, reason=merge.reason, merged=entries, late=list(merge.late))
        self._account.decided(_now())
        packed = encode(plan)
        held = packed if len(packed) <= INLINE_BYTES else await self._put_record(packed)
        await self.lookout.write(head.model_copy(update={"plan": held, "phase": "merging"}), tell=False)
        self._begin(self._merge(plan))

    async def _merge(self, plan: Plan) -> None:
        if self.parts.evaluation is not None:
            await self.parts.evaluation.copied()
        began, losses = _now(), self.lookout.losses
        try:
            merged = await self.parts.reducer.merge(plan)
        except UpdateUnusable as error:
            if error.blob:
                self.ledger.abandoned(error.blob)
            if isinstance(error, UpdateGone) and self.lookout.suspects(error.agent, error.why):
                return  # who watches knows more in a moment
            await self._inbox.put(UpdateBroken(error.agent, error.clock, error.why))
            return
        self.lookout.was_put(merged.model, losses)
        await self._inbox.put(MergeDone(plan, merged, _now() - began))

    async def _commit(self, done: MergeDone) -> None:
        """Version v + 1: roster and record on the bus, then the compare-and-set that makes it so."""
        parts, head, plan = self.parts, self.keeper.head, done.plan
        self.ledger.merged(plan)
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
        if parts.evaluation is not None and plan.version % parts.spec.evaluate.every == 0:
            parts.evaluation.offer(plan.version)
        await self._account.committed(done, _now(), last=start is None)
        await parts.room.committed()
        for command in commands:
            if command is not start and not isinstance(command, Drop):
                await self._execute(command)

    async def _drop(self, drop: Drop) -> None:
        self.ledger.drop(drop.agent, drop.clock, drop.reason, Verdict.BROKEN if drop.broken else Verdict.LATE)
        await self._account.dropped(drop)

    async def _finish(self, reason: str, phase: Phase) -> None:
        head = self.keeper.head
        if self.parts.evaluation is not None and phase == "done":
            await self.parts.evaluation.last(head.version)
        if self._diverged_at == head.version:
            phase, reason = "failed", f"{_diverged(head.version)}. Before that: {reason}"
        await self.lookout.write(head.model_copy(update={"phase": phase, "plan": None, "reason": reason[:2000]}))
        await self.parts.telemetry.metric(status_of(self))
        level = "info" if phase == "done" else "error"
        await self.parts.telemetry.event(f"run-{phase}", f"run {head.run}: {reason}", level=level)  # type: ignore[arg-type]
        self.ended.set()

    # -- offers --------------------------------------------------------------------------------------------------------
    async def _read_offers(self) -> None:
        async with aclosing(self.parts.offers.read(self.ledger.read_up_to, self.lookout.verify_durable)) as offers:
            async for stored, offer in offers:
                self.ledger.passed(stored)
                agent = subjects.agent_of(stored.subject)
                if isinstance(offer, Offer) and offer.epoch == self.keeper.head.epoch:
                    self.ledger.read(agent, offer.clock)
                problem = offer if isinstance(offer, PeerError) else self._unacceptable(agent, offer)
                if problem is not None:
                    await self.parts.telemetry.event(
                        "offer-refused", f"{agent}: {problem}", level="warning", agent=agent
                    )
                elif isinstance(offer, Offer):
                    if self.ledger.offer(agent, offer, stored.seq):
                        self._account.offered(agent, offer)
                    await self._inbox.put(OfferReady(agent, offer.clock, offer.base, offer.samples, offer.steps))

    def _unacceptable(self, agent: str, offer: Offer) -> PeerError | None:
        if agent not in self.ledger.numbering.names:
            if (
                offer.epoch == self.keeper.head.epoch
            ):  # it trains where head's roster has a place for it, and not before
                self.lookout.lost(agent, "has trained in a round that head does not know")
            return PeerError("offer: not an agent of this run")
        if offer.epoch != self.keeper.head.epoch or self.lookout.is_lost(agent, offer.term, offer.base):
            return PeerError("offer: made before the broker lost what it had acknowledged")
        if offer.term > self.keeper.head.term:
            return PeerError(f"offer: made under term {offer.term}, this coordinator has {self.keeper.head.term}")
        return None

    # -- records -------------------------------------------------------------------------------------------------------
    async def _put_roster(self, start: StartRound | LetRun | None) -> tuple[Roster, BlobRef]:
        offsets = dict(start.offsets) if isinstance(start, LetRun) else {}
        participants = start.participants if start else ()
        roster = self.ledger.roster(self.present, participants, offsets, self.policy.presence)
        return roster, await self._put_record(encode(roster))

    async def _put_record(self, data: bytes) -> BlobRef:
        prefix, losses = partial(subjects.model_prefix, self.parts.spec.name), self.lookout.losses
        ref = await put_record(self.parts.bus, prefix, data)
        self.lookout.was_put(ref, losses)
        return ref

    async def _put_commit_record(self, done: MergeDone) -> None:
        parts, (dropped, more) = self.parts, self.ledger.take_dropped()
        record = self._account.record(self.keeper.head, done, dropped, more)
        try:
            await put_commit(parts.bus, record)
        except StreamFull as error:
            reserved = Reservation.of(parts.spec, parts.manifest, parts.max_agents).log
            if not await is_log_full(parts.bus, parts.spec.name, reserved):
                raise
            problem = f"the log of commits is full at version {self.keeper.head.version}, {reserved >> 20} MiB: {error}"
            hint = "Export the newest version, and submit the run under another name: it gets a log of its own"
            raise ConfigError("stop.versions", problem, hint) from None

    def evaluated(self, version: int, metrics: dict[str, float]) -> None:
        """A held-out result is in: perhaps the target is reached, or the center is of no use any more."""
        loss = metrics.get("loss")
        if loss is not None and not math.isfinite(loss):
            if self._diverged_at is None:
                self._begin(self.parts.telemetry.event("center-diverged", _diverged(version), level="error"))
            self._diverged_at = version
        target = self.parts.spec.stop.target
        value = metrics.get(target.metric) if target is not None else None
        if target is not None and target.metric not in metrics:
            self._begin(self._account.no_such_metric(metrics))
        if target is not None and value is not None and target.reached(value) and not self._inbox.full():
            why = f"target reached: {target.metric} = {value:.4g} at version {version}"
            self._inbox.put_nowait(TargetReached(why))


def _diverged(version: int) -> str:
    return (
        f"the held-out loss of version {version} is not a finite number: the training diverged. "
        "Lower local.optimizer.lr or outer.lr, or look for a division by zero in the task's loss"
    )


def _phase(start: StartRound | LetRun | None) -> Phase:
    return "training" if start is not None and start.participants else "waiting"


def _gate(start: StartRound | LetRun | None) -> int | None:
    return start.gate if isinstance(start, LetRun) else None


def _now() -> float:
    return asyncio.get_running_loop().time()
