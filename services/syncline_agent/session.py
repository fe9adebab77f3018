"""An agent in one run: follows head, trains periods, and offers their updates.

In synchronous rounds a period begins when head names this agent a participant of its round, and ends with the offer. In
asynchronous runs the next period begins while the last update is sent, as long as the gate in head and the updates that are
not judged yet allow it.

`syncline_agent.states` has the states of a session and of a period.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from syncline.bus.base import Bus, Delivery
from syncline.bus.blobs import BlobGone
from syncline.bus.records import record_of
from syncline.chance import jitter
from syncline.errors import BusError, ConfigError, Denied, PeerError
from syncline.model.manifest import Manifest
from syncline.observe.telemetry import Telemetry
from syncline.runtime.child import ChildFailed
from syncline.runtime.child_messages import (
    MakeElasticUpdate,
    PeriodReport,
    PrepareRun,
    RetrySave,
    SaveReport,
    TrainPeriod,
    UpdateReport,
)
from syncline.spec.run_spec import RunSpec
from syncline.spec.sections import Async
from syncline.spec.submission import submitted_spec
from syncline.wire import subjects
from syncline.wire.chunks import content_bytes
from syncline.wire.messages import ENDED, Head, Notify, Submit, decode
from syncline_agent.agent_metrics import AgentMetrics
from syncline_agent.center_inbox import CenterInbox
from syncline_agent.child_supervisor import CannotTrain, ChildSupervisor
from syncline_agent.heartbeat import HEARTBEAT_S, HEARTBEATS_TO_MISS, Heartbeats
from syncline_agent.identity import AgentIdentity
from syncline_agent.local_period import LocalPeriod
from syncline_agent.run_view import READ_AGAIN_S, HeadAndRoster, RosterLine, RunView
from syncline_agent.sent_updates import SentUpdates
from syncline_agent.session_events import SessionEvents
from syncline_agent.session_status import SessionStatus
from syncline_agent.state_files import StateFiles
from syncline_agent.states import PeriodState, SessionState
from syncline_agent.training_child import SAVE_AGAIN_S, Training
from syncline_agent.update_sender import SendOptions, UpdateSender

log = logging.getLogger(__name__)

TRY_AGAIN_S = 1.0  # after a blob that is gone or a record that cannot be read


def spec_in(record: bytes) -> RunSpec:
    """Return a run's settings. Raises ConfigError for a setting of a newer Syncline that this one does not have."""
    try:
        return submitted_spec(decode(Submit, record))
    except ConfigError as error:
        hint = "The coordinator accepts it: upgrade Syncline on this agent, or leave the setting out of the run"
        raise ConfigError(error.setting, error.problem, hint) from None


def check_payload(manifest: Manifest, max_payload: int) -> None:
    """Raise ConfigError if this agent's broker refuses messages as large as a chunk of the run's updates."""
    if manifest.chunk_bytes > content_bytes(max_payload):
        problem = f"the broker takes messages of {max_payload} bytes, a chunk of this run has {manifest.chunk_bytes}"
        hint = "Set it alike on every server and leaf node, or lower wire.chunk_bytes in the run's spec"
        raise ConfigError("max_payload", problem, hint)


@dataclass(frozen=True, slots=True)
class RunDefinition:
    """The parts of a run that never change."""

    spec: RunSpec
    manifest: Manifest

    @property
    def is_async(self) -> bool:
        return isinstance(self.spec.sync, Async)

    @property
    def is_elastic(self) -> bool:
        return self.spec.mix.kind == "elastic"


class Session:
    """`follow` until the run has ended or this agent must leave it."""

    def __init__(
        self,
        bus: Bus,
        run: str,
        identity: AgentIdentity,
        training: Training,
        hello: Callable[[], Awaitable[str]],
    ) -> None:
        """`hello`: claims the session again, and returns the run to take part in."""
        telemetry = Telemetry(bus, run, identity.agent)
        self._bus = bus
        self._run = run
        self._agent = identity.agent
        self._training = training
        self._hello = hello
        self._status = SessionStatus()
        self._events = SessionEvents(telemetry, identity.agent)
        self._view = RunView(bus, run, self._on_head)
        self._heartbeats = Heartbeats(bus, run, identity, self._status, self._view, training)
        self._metrics = AgentMetrics(bus, run, identity.agent, self._status, training)
        self._state_files = StateFiles(bus, identity.state_dir, identity.agent)
        self._inbox = CenterInbox(bus, run, training, self._status)
        self._child = ChildSupervisor(training, self._status, self._events, self._inbox)
        self._sender = UpdateSender(bus, run, identity, self._view, telemetry)
        self._sent = SentUpdates()
        self._to_send: asyncio.Queue[LocalPeriod] = asyncio.Queue(1)
        self._definition: RunDefinition | None = None  # until the child has prepared the run

    async def follow(self) -> None:
        """Take part until the run has ended or the coordinator has other plans for this agent.

        An agent that cannot train for the run says so and stays until the run has ended.

        Raises:
            Superseded: another process has claimed this agent's name.
            Denied: the broker refuses this agent's operations.
        """
        works = (
            self._heartbeats.beat(self._hello),
            self._metrics.publish_forever(),
            self._work(),
            self._send_queued(),
            self._view.over.wait(),
        )
        tasks = [asyncio.ensure_future(work) for work in works]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._metrics.publish()
            await self._training.close()
        if self._view.head is not None and self._view.head.phase in ENDED:
            await self._state_files.remove(self._run)

    async def leave(self) -> None:
        """Tell the coordinator that this agent leaves, so that no round waits for it."""
        await self._heartbeats.say_goodbye()

    async def on_notify(self, delivery: Delivery) -> None:
        """Take in a notify of the coordinator: head has moved."""
        if subjects.run_of(delivery.subject) != self._run:
            return
        try:
            self._view.hear(decode(Notify, delivery.data))
        except PeerError as error:
            await self._events.bad_message(f"ignored a notification that cannot be read: {error}")

    def look_again(self) -> None:
        """Read head again: the connection was gone, and the messages of that time are lost."""
        self._view.forget()

    def _on_head(self, head: Head) -> None:
        """Stop a period whose update would come too late."""
        if self._status.state is not SessionState.TRAINING or self._definition is None:
            return
        late = not self._definition.is_async and head.version > self._status.version
        if late or head.epoch != self._status.epoch:
            self._training.stop_early()

    # -- the work ------------------------------------------------------------------------------------------------------
    async def _work(self) -> None:
        """Train periods forever; errors of the bus and of peers are waited out."""
        try:
            while True:
                self._view.clear()
                try:
                    await self._step()
                except Denied:
                    raise
                except BusError as error:  # a finished update waits in its outbox until the bus is back
                    log.warning("the bus is out of reach: %s", error)
                    await asyncio.sleep(jitter(READ_AGAIN_S))
                except BlobGone:  # purged meanwhile: head has moved on, or will
                    before = self._view.head
                    await self._view.read_head()
                    if self._view.head is before:
                        await asyncio.sleep(jitter(TRY_AGAIN_S))
                except PeerError as error:
                    await self._events.bad_message(f"{error}; trying again")
                    await asyncio.sleep(jitter(TRY_AGAIN_S))
                    await self._view.read_head()
        except (CannotTrain, ConfigError, ChildFailed) as error:
            await self._stay_failed(str(error))

    async def _step(self) -> None:
        """Train one period, or wait for head to move."""
        if self._definition is None:
            self._definition = await self._prepare()
            self._status.ready()
        newest = await self._view.newest()
        if newest.head.epoch != self._status.epoch:
            self._rebase(newest.head.epoch)
        if newest.head.version < self._status.version:
            before, self._status.version = self._status.version, newest.head.version
            await self._events.rolled_back(newest.head.version, before)
        line = self._due(newest)
        if line is not None:
            await self._one_period(newest.head, line)
        else:
            await self._view.wait()

    async def _prepare(self) -> RunDefinition:
        """Read spec and manifest, and have the child make the model and restore this agent's state of the run."""
        spec = spec_in((await self._view.read(subjects.spec_key(self._run))).value)
        self._metrics.advises = not spec.evaluate.center
        self._heartbeats.interval_s = min(HEARTBEAT_S, spec.agents.lost_after_s / HEARTBEATS_TO_MISS)
        head = (await self._view.newest()).head
        while head.manifest is None:
            self._view.clear()
            await self._view.wait()
            head = (await self._view.newest()).head
        self._status.epoch = head.epoch
        record = await record_of(self._bus, self._run, head.manifest)
        manifest = decode(Manifest, record)
        check_payload(manifest, self._bus.max_payload)
        await self._state_files.tidy(self._run)
        state_path = str(self._state_files.path(self._run))
        question = PrepareRun(spec=spec, manifest=record, state_path=state_path, submission=head.manifest.id)
        await self._child.begin(question)
        return RunDefinition(spec, manifest)

    def _due(self, newest: HeadAndRoster) -> RosterLine | None:
        """Return this agent's line in the roster; None: no period may begin now."""
        line = RosterLine.of(newest.roster, self._agent) if newest.roster is not None else None
        if line is None or not line.participant or newest.head.model is None:
            return None
        assert self._definition is not None
        return line if self._sent.may_begin(self._definition.spec, newest.head, line) else None

    def _rebase(self, epoch: int) -> None:
        """Go on in a new epoch: the broker has lost acknowledged writes, and head is an older one.

        Updates that were sent and not seen judged count for nothing; clocks go on from those that the roster has.
        """
        self._sent.restart(self._status.clock)
        self._inbox.forget()
        self._status.epoch = epoch
        self._status.acknowledged = 0
        self._status.clock = 0

    async def _stay_failed(self, reason: str) -> None:
        """Report that this agent cannot train, and stay until the run is over."""
        self._status.fail(reason)
        await self._events.failed(reason)
        await self._training.close()
        while True:
            await self._view.wait()
            self._view.clear()

    # -- a period ------------------------------------------------------------------------------------------------------
    async def _one_period(self, head: Head, line: RosterLine) -> None:
        """Train one period and hand over its update."""
        definition, status = self._definition, self._status
        assert definition is not None
        status.clock = max(status.clock, line.judged, self._sent.newest)
        if not (definition.is_elastic and definition.is_async and self._inbox.model is not None):
            await self._fetch(head)
        period = self._begin_period(line)
        report = await self._train(period)
        if report is None:
            self._discard(period)
            return
        update = report.update or await self._make_elastic_update(period)
        if update is None:
            self._discard(period)
            return
        if not await self._may_offer(period, update.save):
            period.enter(PeriodState.DISCARDED)
            return
        period.enter(PeriodState.READY)
        status.last_report = report
        status.clock = period.question.clock
        self._sent.update_made()
        self._child.update_made()
        if update.broken:
            self._inbox.forget()
        await self._hand_over(period, head)
        status.enter(SessionState.WAITING)
        await self._metrics.period_over(period.question.clock, status.version, report)

    def _begin_period(self, line: RosterLine) -> LocalPeriod:
        definition, status = self._definition, self._status
        assert definition is not None
        status.enter(SessionState.TRAINING)
        status.part = line.number
        question = TrainPeriod(
            version=status.version,
            clock=status.clock + 1,
            part=line.number,
            parts=line.parts,
            fresh_center=self._inbox.fresh or not definition.is_async,  # a round that is repeated has the same center
            outbox=self._sent.next_outbox(definition.spec),
            verdicts=self._sent.verdicts(line),
        )
        return LocalPeriod(question, status.version, self._inbox.term, status.epoch)

    async def _train(self, period: LocalPeriod) -> PeriodReport | None:
        """Return the report of the period, or None if the period counts for nothing."""
        report = await self._child.ask(self._training.period(period.question))
        if report is None:
            return None
        known = self._view.head
        await self._events.advise(report.advice)
        if report.stopped or (known is not None and known.epoch != self._status.epoch):
            return None  # the next period may begin with the same center: the inbox stays fresh
        self._inbox.fresh = False
        self._sent.verdicts_applied()
        period.report = report
        return report

    async def _make_elastic_update(self, period: LocalPeriod) -> UpdateReport | None:
        """Have the child make the update from the newest center; None: the child died."""
        assert self._definition is not None
        period.enter(PeriodState.MEETING)
        if self._definition.is_async:
            try:
                await self._fetch((await self._view.newest()).head)
            except BaseException:
                period.enter(PeriodState.DISCARDED)
                raise
        question = MakeElasticUpdate(period=period.question, fresh_center=self._inbox.fresh)
        update = await self._child.ask(self._training.make_elastic_update(question))
        self._inbox.fresh = False
        period.base = self._status.version
        period.term = self._inbox.term
        return update

    async def _may_offer(self, period: LocalPeriod, save: SaveReport) -> bool:
        """Return whether the update may be offered, after waiting for the disk if the state must be saved first.

        The agent is out of the run meanwhile. False: the child died during the wait, and the update is lost.
        """
        await self._events.not_saved(save)
        if not save.blocks_offer:
            return True
        period.enter(PeriodState.BLOCKED)
        self._status.go_out(save.problem)
        saved = False
        while not saved:
            await asyncio.sleep(jitter(SAVE_AGAIN_S))
            retried = await self._child.ask(self._training.retry_save(RetrySave(clock=period.question.clock)))
            if retried is None:
                break
            saved = not retried.blocks_offer
        self._events.saved_again()
        self._status.ready()
        return saved

    def _discard(self, period: LocalPeriod) -> None:
        period.enter(PeriodState.DISCARDED)
        self._status.enter(SessionState.WAITING)

    async def _fetch(self, head: Head) -> None:
        assert self._definition is not None
        await self._inbox.fetch(head, self._definition.manifest, self._definition.spec.wire.window)

    # -- sending -------------------------------------------------------------------------------------------------------
    async def _hand_over(self, period: LocalPeriod, head: Head) -> None:
        """Send the update at once, or queue it: in asynchronous runs the next period begins meanwhile."""
        assert self._definition is not None
        if self._definition.is_async:
            self._sent.newest = period.question.clock
            await self._to_send.put(period)
            return
        self._status.enter(SessionState.SENDING)
        await self._send(period)
        if period.epoch == self._status.epoch:
            self._sent.round_offered(head.model)

    async def _send_queued(self) -> None:
        """Send updates that were made while another one was on its way."""
        while True:
            await self._send(await self._to_send.get())

    async def _send(self, period: LocalPeriod) -> None:
        """Send an update, however long that takes, unless the run goes on without it."""
        if period.epoch != self._status.epoch:
            period.enter(PeriodState.DISCARDED)
            return
        assert self._definition is not None
        layout, wire = self._definition.manifest, self._definition.spec.wire
        period.enter(PeriodState.SENDING)
        outbox = self._training.outbox(layout.blob_bytes, period.question.outbox)
        content = outbox[: layout.coded_bytes(wire.codec.payload_bytes)]
        options = SendOptions(layout, wire.codec, wire.window, late_counts=self._definition.is_async)
        if not await self._sender.send(period, content, options):
            period.enter(PeriodState.DISCARDED)
            return
        period.enter(PeriodState.OFFERED)
        if period.epoch == self._status.epoch:
            self._sent.offered(period.question.clock)
            self._status.acknowledged = max(self._status.acknowledged, period.question.clock)
        self._status.bytes_up += len(content)
