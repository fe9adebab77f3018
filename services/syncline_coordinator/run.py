"""One run at the coordinator: the shell around the policy, which collects facts, executes commands and decides nothing.

Every step is written into head by compare-and-set before it begins: the participants before an agent trains, the plan before
the first chunk is reduced. The commit is the compare-and-set that moves head to the next version. A coordinator that starts
again reads head and continues: it executes the plan in head, and judges the offers after head's `offers_seq`.
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
from syncline.observe.telemetry import LOST_NAMED, REASON_CHARS, RunStatus, Telemetry, tell_often
from syncline.policy.events import (
    AgentJoined,
    AgentLost,
    AgentSlow,
    Command,
    Drop,
    Fact,
    Finish,
    LetRun,
    Merge,
    OfferReady,
    PresenceFact,
    StartRound,
    TargetReached,
    Tick,
    UpdateBroken,
    VersionCommitted,
    WakeAt,
    Warn,
)
from syncline.policy.words import closed_words, finish_words, warning_words
from syncline.spec.guardrails import too_many_agents
from syncline.spec.run_spec import RunSpec
from syncline.wire import subjects
from syncline.wire.messages import (
    ENDED,
    PLAN_INLINE_BYTES,
    BlobRef,
    Head,
    Offer,
    Phase,
    Plan,
    Presence,
    Roster,
    decode,
    encode,
)
from syncline_coordinator.evaluation import Evaluation
from syncline_coordinator.head import HeadKeeper
from syncline_coordinator.merge.center import Center
from syncline_coordinator.merge.reducer import Reducer
from syncline_coordinator.merge.updates import UpdateGone, UpdateUnusable
from syncline_coordinator.offers import OfferReader, StreamPosition
from syncline_coordinator.policies import policy_of, resume_point_of
from syncline_coordinator.recovery import LossDetector
from syncline_coordinator.reporting import MergeDone, RunReport, StorageAlarm
from syncline_coordinator.reservation import Reservation, is_log_full
from syncline_coordinator.retention import Janitor, Purger, Retention, kept_models, leftovers, uncommitted

log = logging.getLogger(__name__)

MAX_INBOX_FACTS = 10_000
SLOW_HINT = "Raise agents.lost_after_s if a step may take so long"


@dataclass(slots=True)
class Parts:
    """The objects that a run works with. A simulation may replace some of them."""

    bus: Bus
    spec: RunSpec
    manifest: Manifest
    center: Center
    reducer: Reducer
    telemetry: Telemetry
    offers: OfferReader
    evaluation: Evaluation | None  # None: the center is not evaluated
    max_agents: int  # for which space is reserved
    storage_alarm: StorageAlarm


class Run:
    """A run that this coordinator drives. Call `resume`, then `pump`, which returns when the run has ended.

    Args:
        keeper: holds the head from which the run continues.
        is_trusted: returns whether an agent's reports about lost writes count.
        rolled_back: the run continues after a loss that this coordinator has noticed.
    """

    def __init__(
        self, parts: Parts, keeper: HeadKeeper, *, is_trusted: Callable[[str], bool], rolled_back: bool = False
    ) -> None:
        spec = parts.spec
        self.parts = parts
        self.keeper = keeper
        self.policy = policy_of(spec, parts.max_agents)
        self.ledger = self.policy.ledger
        self.position = StreamPosition(keeper.head.offers_seq)
        self.ended = asyncio.Event()
        self._report = RunReport(spec, parts.telemetry, parts.max_agents)
        self._inbox: asyncio.Queue[Fact | MergeDone] = asyncio.Queue(MAX_INBOX_FACTS)
        self._waiting_presence: dict[str, PresenceFact] = {}  # by agent: the newest such fact in the inbox
        self._wake_at_s: float | None = None  # when the policy wants a Tick
        self._purger = Purger(parts.bus)
        self._retention = Retention(spec, keeper.head, self._purger)
        self._janitor = Janitor(parts.bus, spec.name, self._purger, parts.telemetry, self.ledger.needed_blobs)
        self.loss_detector = LossDetector(
            parts.bus,
            keeper,
            self.ledger,
            self.position,
            is_trusted=is_trusted,
            rolled_back=rolled_back,
            outer_ref=parts.reducer.outer_ref if spec.state_vectors else None,
        )
        self._diverged_at: int | None = None  # the newest version with a held-out loss that is not finite
        self._tasks: set[asyncio.Task[None]] = set()

    # -- presence ------------------------------------------------------------------------------------------------------
    def presence(self, agent: str) -> Presence:
        """Return the agent's presence, as the policy will see it after the facts that wait in the inbox."""
        match self._waiting_presence.get(agent):
            case AgentJoined():
                return Presence.PRESENT
            case AgentSlow():
                return Presence.SLOW
            case AgentLost():
                return Presence.LOST
            case None:
                return self.policy.presence(agent)

    def present(self) -> set[str]:
        """Return the agents that take part, slow ones included."""
        known = self.policy.live | self.policy.slow | self._waiting_presence.keys()
        return {agent for agent in known if self.presence(agent) != Presence.LOST}

    def slow(self) -> set[str]:
        """Return the agents that take part and make no progress."""
        return {
            agent for agent in self.policy.slow | self._waiting_presence.keys() if self.presence(agent) == Presence.SLOW
        }

    def why_no_room(self, agent: str) -> str:
        """Return why the agent cannot take part, or ''."""
        present = self.present()
        why_not = self.ledger.why_no_room(agent, present)
        return why_not or too_many_agents(self.parts.spec, len(present | {agent}))

    async def joined(self, agent: str) -> str:
        """Note that the agent takes part from now on, or makes progress again.

        Returns:
            '', or the reason why the agent cannot take part.
        """
        presence = self.presence(agent)
        if presence == Presence.PRESENT:
            return ""
        if presence == Presence.SLOW:
            await self._presence_changed(AgentJoined(agent))
            await self.parts.telemetry.event("agent-present", f"{agent} makes progress again", agent=agent)
            return ""
        if why_not := self.why_no_room(agent):
            return why_not
        if self.policy.started:
            self.ledger.numbering.admit([agent])
        await self._presence_changed(AgentJoined(agent))
        await self.parts.telemetry.event("agent-joined", f"{agent} joined", agent=agent)
        return ""

    async def slowed(self, agent: str, reason: str) -> None:
        """Note that the agent sends heartbeats and its training makes no progress.

        Args:
            reason: the figures, for the event.
        """
        if self.presence(agent) != Presence.PRESENT or self.keeper.head.phase in ENDED:
            return
        await self._presence_changed(AgentSlow(agent, reason))
        text = f"{agent} slow: {reason}. The run does not wait for it until it makes progress. {SLOW_HINT}"
        await self.parts.telemetry.event("agent-slow", text, level="warning", agent=agent)

    async def lost(self, agent: str, reason: str, *, failed: bool = False) -> None:
        """Note that the agent takes no part any more. A run that has ended ignores this, since all its agents leave.

        Args:
            reason: for the event.
            failed: the agent has reported that it cannot train.
        """
        is_present = self.presence(agent) != Presence.LOST
        if self.keeper.head.phase in ENDED or not (is_present or failed):
            return
        await self._presence_changed(AgentLost(agent, reason, failed))
        if is_present and not failed:
            await self.parts.telemetry.event("agent-lost", f"{agent} lost: {reason}", level="warning", agent=agent)

    async def _presence_changed(self, fact: PresenceFact) -> None:
        self._waiting_presence[fact.agent] = fact
        await self._inbox.put(fact)

    async def stop(self, reason: str) -> None:
        """End the run as if its target were reached: at once, or with the commit of a merge that has begun."""
        await self._inbox.put(TargetReached(reason))

    # -- life ----------------------------------------------------------------------------------------------------------
    async def resume(self) -> None:
        """Continue from head: the same round, the same plan, and the offers after head's `offers_seq`.

        Raises:
            BlobGone: the bus does not hold a record that head names.
            PeerError: a record is not valid.
        """
        head = self.keeper.head
        bus = self.parts.bus
        if head.term > 1:
            kept = await kept_models(bus, head, self.parts.spec.keep_models)
            self._retention.take_over(kept, await leftovers(bus, head, kept), await uncommitted(bus, head))
        if head.roster is None:
            return
        roster = decode(Roster, await record_of(bus, head.run, head.roster))
        self.ledger.restore(roster)
        self.policy.resume(resume_point_of(head, roster), _now())
        if head.plan is not None:
            packed = head.plan if isinstance(head.plan, bytes) else await record_of(bus, head.run, head.plan)
            plan = decode(Plan, packed)
            offers = [OfferReady(e.agent, e.clock, head.version - e.lag, e.samples, e.steps) for e in plan.merged]
            self.policy.resume_merge(offers)
            self.ledger.resume_plan(plan, head.offers_seq + 1)
            self._begin(self._merge(plan))
        await self._inbox.put(Tick())  # head may be between two rounds, and no other fact need follow

    async def pump(self) -> None:
        """Pass facts to the policy and execute its commands until the run has ended.

        Raises:
            Deposed: another coordinator took over.
            RolledBack: the broker lost writes that it had acknowledged.
            StreamFull, StoreDown: the broker does not store any more.
            ConfigError: the log of commits is full.
        """
        try:
            self._begin(self._read_offers())
            self._begin(self._purger.run(self.loss_detector.verify_durable))
            self._begin(self._janitor.run())
            self._begin(self.loss_detector.watch())
            self._begin(tell_often(self.parts.telemetry, self.status))
            while not self.ended.is_set():
                fact = await self._next()
                if isinstance(fact, MergeDone):
                    await self._commit(fact)
                else:
                    await self._handle(fact)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _handle(self, fact: Fact) -> None:
        """Pass a fact to the policy and execute its commands. An offer that contradicts the run's history is refused."""
        try:
            commands = self.policy.handle(fact, _now())
        except PeerError as error:
            if isinstance(fact, OfferReady):
                self.ledger.refuse(fact.agent, fact.clock)
            await self.parts.telemetry.event("offer-refused", str(error), level="warning")
            return
        if isinstance(fact, PresenceFact) and self._waiting_presence.get(fact.agent) is fact:
            del self._waiting_presence[fact.agent]
        for command in commands:
            await self._execute(command)

    async def _next(self) -> Fact | MergeDone:
        """Return the next fact, or a Tick at the time of the last `WakeAt`. Raises the error of a background task."""
        self._raise_task_errors()
        if not self._inbox.empty():
            return self._inbox.get_nowait()
        get = asyncio.ensure_future(self._inbox.get())
        timeout = None if self._wake_at_s is None else max(0.0, self._wake_at_s - _now())
        try:
            await asyncio.wait({get, *self._tasks}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            self._raise_task_errors()
            if get.done():
                return get.result()
            if self._wake_at_s is not None and _now() >= self._wake_at_s:
                self._wake_at_s = None
            return Tick()
        finally:
            get.cancel()

    def _raise_task_errors(self) -> None:
        """Forget the background tasks that have ended. Raises the error of the first that has failed."""
        for task in [t for t in self._tasks if t.done()]:
            self._tasks.discard(task)
            task.result()

    def _begin(self, work: object) -> None:
        """Run a coroutine as a background task until `pump` ends."""
        self._tasks.add(asyncio.ensure_future(work))  # type: ignore[call-overload]

    # -- commands ------------------------------------------------------------------------------------------------------
    async def _execute(self, command: Command) -> None:
        match command:
            case StartRound() | LetRun():
                await self._let_train(command)
            case Merge():
                await self._begin_merge(command)
            case Drop():
                await self._report.update_dropped(command)
            case WakeAt(at_s):
                self._wake_at_s = at_s
            case Warn(reason):
                await self.parts.telemetry.event("too-few-updates", warning_words(reason), level="warning")
            case Finish(reason, failed):
                await self._finish(finish_words(reason), "failed" if failed else "done")

    async def _let_train(self, command: StartRound | LetRun) -> None:
        """Write the participants into head. In an asynchronous run a merge that has begun goes on; else the round is new."""
        before = self.keeper.head
        roster, ref = await self._put_roster(command)
        changes: dict[str, Any] = {
            "roster": ref,
            "round": before.round + 1,
            "offers_seq": self.ledger.judged_up_to(self.position.read_up_to),
        }
        if isinstance(command, LetRun) and command.merging:
            changes |= {"gate": command.gate}
        else:
            changes |= {"plan": None, "phase": _phase(command), "gate": _gate(command)}
        if (isinstance(command, StartRound) and before.phase != "training") or not before.round:
            self._report.round_opened(_now())
        await self._write_head(before.changed(**changes), roster)

    async def _write_head(self, head: Head, roster: Roster) -> None:
        """Write head, and queue the purge of blobs that only the older head needed."""
        before = self.keeper.head
        await self.loss_detector.write_head(head, roster)
        self._retention.head_moved(before, head, self.ledger.take_purgeable())

    async def _begin_merge(self, merge: Merge) -> None:
        """Write the plan into head, then begin to execute it."""
        head = self.keeper.head
        entries = self.ledger.plan_entries(merge.updates)
        plan = Plan(version=head.version + 1, reason=closed_words(merge.reason), merged=entries, late=list(merge.late))
        self._report.plan_made(_now())
        packed = encode(plan)
        inline_or_ref = packed if len(packed) <= PLAN_INLINE_BYTES else await self._put_record(packed)
        await self.loss_detector.write_head(head.changed(plan=inline_or_ref, phase="merging"), tell=False)
        self._begin(self._merge(plan))

    async def _merge(self, plan: Plan) -> None:
        """Execute a plan. The result comes back as a fact: `MergeDone`, or `UpdateBroken` with the update at fault."""
        if self.parts.evaluation is not None:
            await self.parts.evaluation.copied()
        began_s = _now()
        risks = self.loss_detector.risks
        try:
            merged = await self.parts.reducer.merge(plan)
        except UpdateUnusable as error:
            if error.blob:
                self._retention.purge_model(error.blob)
            if isinstance(error, UpdateGone) and self.loss_detector.report_missing_update(error.agent, error.why):
                return  # `LossDetector.watch` raises RolledBack at its next check, which begins now
            await self._inbox.put(UpdateBroken(error.agent, error.clock, error.why))
            return
        self.loss_detector.note_put(merged.model, risks)
        await self._inbox.put(MergeDone(plan, merged, _now() - began_s))

    async def _commit(self, done: MergeDone) -> None:
        """Commit a version: put the roster and the commit record, then write head with the new model."""
        parts = self.parts
        head = self.keeper.head
        plan = done.plan
        commands = self.policy.handle(VersionCommitted(plan.version), _now())
        start = next((c for c in commands if isinstance(c, StartRound | LetRun)), None)
        for drop in [c for c in commands if isinstance(c, Drop)]:  # reported first, to be in this version's record
            await self._report.update_dropped(drop)
        risks = self.loss_detector.risks
        (roster, ref), _ = await asyncio.gather(self._put_roster(start), self._put_commit_record(done))
        self.loss_detector.note_commit_record(plan.version, risks)
        changes = {
            "version": plan.version,
            "digest": done.merged.digest,
            "model": done.merged.model,
            "previous": head.model,
            "roster": ref,
            "plan": None,
            "phase": _phase(start),
            "round": head.round + bool(start),
            "gate": _gate(start),
            "offers_seq": self.ledger.judged_up_to(self.position.read_up_to),
            "reason": plan.reason[:2000],
        }
        await self._write_head(head.changed(**changes), roster)
        if parts.evaluation is not None and plan.version % parts.spec.evaluate.every == 0:
            parts.evaluation.offer(plan.version)
        await self._report.version_committed(done, _now(), last=start is None)
        await parts.storage_alarm.clear()
        for command in commands:
            if command is not start and not isinstance(command, Drop):
                await self._execute(command)

    async def _finish(self, reason: str, phase: Phase) -> None:
        """End the run. A run whose last version has diverged has failed, whatever the policy says."""
        head = self.keeper.head
        if self.parts.evaluation is not None and phase == "done":
            await self.parts.evaluation.last(head.version)
        if self._diverged_at == head.version:
            phase = "failed"
            reason = f"{_diverged(head.version)}. Before that: {reason}"
        await self.loss_detector.write_head(head.changed(phase=phase, plan=None, reason=reason[:2000]))
        await self.parts.telemetry.metric(self.status())
        level = "info" if phase == "done" else "error"
        await self.parts.telemetry.event(f"run-{phase}", f"run {head.run}: {reason}", level=level)  # type: ignore[arg-type]
        self.ended.set()

    # -- offers --------------------------------------------------------------------------------------------------------
    async def _read_offers(self) -> None:
        """Pass every valid offer of the stream to ledger and policy, and report the others."""
        async with aclosing(
            self.parts.offers.read(self.position.read_up_to, self.loss_detector.verify_durable)
        ) as offers:
            async for stored, offer in offers:
                self.position.advance(stored)
                agent = subjects.agent_of(stored.subject)
                if isinstance(offer, Offer) and offer.epoch == self.keeper.head.epoch:
                    self.ledger.found(agent, offer.clock)
                problem = offer if isinstance(offer, PeerError) else self._offer_problem(agent, offer)
                if problem is not None:
                    await self.parts.telemetry.event(
                        "offer-refused", f"{agent}: {problem}", level="warning", agent=agent
                    )
                elif isinstance(offer, Offer):
                    if self.ledger.offer(agent, offer, stored.seq):
                        self._report.update_offered(agent, offer)
                    await self._inbox.put(OfferReady(agent, offer.clock, offer.base, offer.samples, offer.steps))

    def _offer_problem(self, agent: str, offer: Offer) -> PeerError | None:
        """Return why an offer is refused, or None. Report a loss if the offer proves one."""
        if agent not in self.ledger.numbering.names:
            # An agent trains only after head's roster has named it: such a head is lost.
            if offer.epoch == self.keeper.head.epoch:
                self.loss_detector.report_loss(agent, "has trained in a round that head does not know")
            return PeerError("offer: not an agent of this run")
        if offer.epoch != self.keeper.head.epoch or self.loss_detector.is_version_lost(agent, offer.term, offer.base):
            return PeerError("offer: made before the broker lost writes that it had acknowledged")
        if offer.term > self.keeper.head.term:
            return PeerError(f"offer: made under term {offer.term}, this coordinator has {self.keeper.head.term}")
        return None

    # -- records -------------------------------------------------------------------------------------------------------
    async def _put_roster(self, start: StartRound | LetRun | None) -> tuple[Roster, BlobRef]:
        """Put a roster with the participants of the round that starts, if one does."""
        offsets = dict(start.offsets) if isinstance(start, LetRun) else {}
        participants = start.participants if start else ()
        roster = self.ledger.roster(self.present(), participants, offsets, self.policy.presence)
        return roster, await self._put_record(encode(roster))

    async def _put_record(self, data: bytes) -> BlobRef:
        """Put a record as a blob that head may name."""
        prefix = partial(subjects.model_prefix, self.parts.spec.name)
        risks = self.loss_detector.risks
        ref = await put_record(self.parts.bus, prefix, data)
        self.loss_detector.note_put(ref, risks)
        return ref

    async def _put_commit_record(self, done: MergeDone) -> None:
        """Put the record of a version into the log. Raises ConfigError if the log has reached its limit."""
        parts = self.parts
        record = self._report.commit_record(self.keeper.head, done)
        try:
            await put_commit(parts.bus, record)
        except StreamFull as error:
            reserved = Reservation.of(parts.spec, parts.manifest, parts.max_agents).log
            if not await is_log_full(parts.bus, parts.spec.name, reserved):
                raise
            problem = f"the log of commits is full at version {self.keeper.head.version}, {reserved >> 20} MiB: {error}"
            hint = "Export the newest version, and submit the run under another name: a new run has a log of its own"
            raise ConfigError("stop.versions", problem, hint) from None

    def evaluated(self, version: int, metrics: dict[str, float]) -> None:
        """Compare the metrics of an evaluated version with the target, and find out whether training has diverged.

        Args:
            metrics: of the held-out data; they may hold values that are not finite.
        """
        loss = metrics.get("loss")
        if loss is not None and not math.isfinite(loss):
            if self._diverged_at is None:
                self._begin(self.parts.telemetry.event("center-diverged", _diverged(version), level="error"))
            self._diverged_at = version
        target = self.parts.spec.stop.target
        value = metrics.get(target.metric) if target is not None else None
        if target is not None and target.metric not in metrics:
            self._begin(self._report.target_metric_missing(metrics))
        if target is not None and value is not None and target.reached(value) and not self._inbox.full():
            why = f"target reached: {target.metric} = {value:.4g} at version {version}"
            self._inbox.put_nowait(TargetReached(why))

    def status(self) -> RunStatus:
        """Return the run's state, published every few seconds for watchers that have missed earlier events."""
        head = self.keeper.head
        spec = self.parts.spec
        present = self.present()
        return RunStatus(
            task=spec.task,
            phase=head.phase,
            version=head.version,
            versions=spec.stop.versions,
            agents=len(present),
            needed=spec.agents.min,
            lost=[agent for agent in self.ledger.numbering.names if agent not in present][:LOST_NAMED],
            slow=sorted(self.slow())[:LOST_NAMED],
            reason=head.reason[:REASON_CHARS],
        )


def _diverged(version: int) -> str:
    """Return the text of a diverged version: problem and hint."""
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
