"""An agent in one run: follows head, trains when it may, and offers what it made.

In synchronous rounds a period begins when head names this agent a participant of its round, and ends with the offer. In
asynchronous runs the next period begins while the last update is sent, as long as the gate in head and the updates that are
not judged yet allow it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from syncline.bus.base import Bus, Delivery
from syncline.bus.blobs import BlobGone, get_blob
from syncline.chance import jitter
from syncline.errors import BusError, ConfigError, Denied, PeerError, SynclineError
from syncline.model.manifest import Manifest
from syncline.observe.telemetry import Telemetry
from syncline.runtime.child import ChildDied, ChildFailed
from syncline.runtime.child_messages import MakeElasticUpdate, PrepareRun, RetrySave, SaveReport, TrainPeriod
from syncline.spec.run_spec import RunSpec
from syncline.spec.sections import Async
from syncline.spec.submission import submitted_spec
from syncline.wire import subjects
from syncline.wire.chunks import content_bytes
from syncline.wire.messages import ENDED, BlobRef, Head, Notify, Submit, decode
from syncline_agent.heartbeat import HEARTBEAT_S, HEARTBEATS_TO_MISS, SignsOfLife, Stand
from syncline_agent.run_view import MAX_RECORD_BYTES, READ_AGAIN_S, News, Place, Seen
from syncline_agent.state_dir import Shelf
from syncline_agent.training_child import SAVE_AGAIN_S, Training, outboxes
from syncline_agent.update_sender import FinishedUpdate, How, Me, Sender

log = logging.getLogger(__name__)

A = TypeVar("A")

CRASHES_IN_A_ROW = 3  # of the training child, after which this agent says it cannot train
REVIVE_S = 1.0  # the pause after the second death in a row; it doubles with each further one
LONGEST_PAUSE_S = 300.0
OUT_FROM_S = 5.0  # a pause from which on this agent is out of the run meanwhile
GIVEN_UP = 8  # clocks, the newest: no more of them can wait for their verdicts
MOST_ADVICE = 16  # texts of one run


def spec_in(record: bytes) -> RunSpec:
    """Return a run's settings. Raises ConfigError where a newer Syncline wrote one that this one does not know."""
    try:
        return submitted_spec(decode(Submit, record))
    except ConfigError as error:
        hint = "The coordinator accepts it: upgrade Syncline on this agent, or leave the setting out of the run"
        raise ConfigError(error.setting, error.problem, hint) from None


def check_payload(manifest: Manifest, max_payload: int) -> None:
    """Raise ConfigError where this agent's broker takes no message as large as a chunk of the run's updates."""
    if manifest.chunk_bytes > content_bytes(max_payload):
        problem = f"the broker takes messages of {max_payload} bytes, a chunk of this run has {manifest.chunk_bytes}"
        hint = "Set it alike on every server and leaf node, or lower wire.chunk_bytes in the run's spec"
        raise ConfigError("max_payload", problem, hint)


class CannotTrain(SynclineError):
    """This agent cannot take part in the run, with the reason."""


class Session:
    """`follow` until the run has ended or this agent must leave it."""

    def __init__(self, bus: Bus, run: str, me: Me, training: Training, hello: Callable[[], Awaitable[str]]) -> None:
        self._bus, self._run, self._me, self._training = bus, run, me, training
        self._shelf = Shelf(bus, me.state_dir, me.agent)
        self._hello = hello  # claims the session again; returns the run to take part in
        self._telemetry = Telemetry(bus, run, me.agent)
        self._news = News(bus, run, self._on_head)
        self._stand = Stand()
        self._sender = Sender(bus, run, me, self._news, self._telemetry)
        self._signs = SignsOfLife(bus, run, me.agent, me.session, self._stand, self._news, training)
        self._offered_for = ""  # rounds: the model that the last offer deviates from
        self._handed = 0  # clock of the newest update that is sent, or on its way
        self._held: BlobRef | None = None  # the center in the inbox
        self._held_term = 0  # under which it was the newest
        self._fresh = False  # no period that counts has begun with it
        self._given_up = range(0)  # clocks whose verdicts the broker lost
        self._said_not_saved = False
        self._advised: set[str] = set()  # told already
        self._made = 0  # updates, by this process: they go to the outboxes in turns
        self._deaths = self._crashes = 0  # of the training child, since it last made an update
        self._to_send: asyncio.Queue[FinishedUpdate] = asyncio.Queue(1)

    # -- life ----------------------------------------------------------------------------------------------------------
    async def follow(self) -> None:
        """Raises Superseded; returns when the run has ended, or this agent cannot train for it and has said so."""
        works = (
            self._signs.beat(self._hello),
            self._signs.show(),
            self._work(),
            self._send_all(),
            self._news.over.wait(),
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
            await self._signs.show_once()
            await self._training.close()
        if self._news.head is not None and self._news.head.phase in ENDED:
            await self._shelf.remove(self._run)

    async def leave(self) -> None:
        """Says goodbye, so that nobody waits for this agent."""
        await self._signs.leave()

    async def on_notify(self, delivery: Delivery) -> None:
        """Head has moved."""
        if subjects.run_of(delivery.subject) != self._run:
            return
        try:
            self._news.hear(decode(Notify, delivery.data))
        except PeerError as error:
            text = f"{self._me.agent}: ignored a notify that is none: {error}"
            await self._telemetry.event("bad-message", text, level="warning", agent=self._me.agent)

    def look_again(self) -> None:
        """The connection was gone: what was sent meanwhile is lost."""
        self._news.forget()

    def _on_head(self, head: Head) -> None:
        late = self._stand.state == "training" and not self._is_async and head.version > self._stand.version
        if late or (self._stand.state == "training" and head.epoch != self._stand.epoch):
            self._training.stop_early()  # the round is over without us

    @property
    def _is_async(self) -> bool:
        return isinstance(self._spec.sync, Async)

    # -- the work ------------------------------------------------------------------------------------------------------
    async def _work(self) -> None:
        try:
            while True:
                self._news.clear()
                try:
                    if self._stand.state == "starting":
                        await self._prepare()
                    seen = await self._news.newest()
                    if seen.head.epoch != self._stand.epoch:
                        self._rebase(seen.head.epoch)
                    if seen.head.version < self._stand.version:
                        await self._say_set_back(seen.head)
                    place = self._due(seen)
                    if place is not None:
                        await self._one_period(seen.head, place)
                    else:
                        await self._news.wait()
                except Denied:
                    raise
                except BusError as error:  # what is finished waits in its outbox, and is sent when the bus is back
                    log.warning("the bus is out of reach: %s", error)
                    await asyncio.sleep(jitter(READ_AGAIN_S))
                except BlobGone:  # purged meanwhile: head has moved on, or will
                    before = self._news.head
                    await self._news.read_head()
                    if self._news.head is before:
                        await asyncio.sleep(jitter(1.0))
                except PeerError as error:
                    text = f"{self._me.agent}: {error}; trying again"
                    await self._telemetry.event("bad-message", text, level="warning", agent=self._me.agent)
                    await asyncio.sleep(jitter(1.0))
                    await self._news.read_head()
        except (CannotTrain, ConfigError, ChildFailed) as error:
            await self._cannot(str(error))

    async def _prepare(self) -> None:
        """Reads spec and manifest, and has the child make the model."""
        entry = await self._news.read(subjects.spec_key(self._run))
        self._spec = spec_in(entry.value)
        self._signs.advises = not self._spec.evaluate.center
        self._signs.heartbeat_s = min(HEARTBEAT_S, self._spec.agents.lost_after_s / HEARTBEATS_TO_MISS)
        while (manifest := (head := (await self._news.newest()).head).manifest) is None:
            self._news.clear()
            await self._news.wait()
        self._stand.epoch = head.epoch
        self._manifest_bytes = await self._news.record(manifest)
        self._manifest = decode(Manifest, self._manifest_bytes, limit=MAX_RECORD_BYTES)
        check_payload(self._manifest, self._bus.max_payload)
        self._submission = manifest.id
        await self._shelf.tidy(self._run)
        await self._revive()
        self._stand.is_ready()

    async def _revive(self) -> None:
        """A child with the model, and with what this agent kept of the run. Raises CannotTrain."""
        question = PrepareRun(
            spec=self._spec,
            manifest=self._manifest_bytes,
            state_path=str(self._shelf.path(self._run)),
            submission=self._submission,
        )
        while True:
            try:
                prepared = await self._training.prepare(question)
            except ChildDied as error:
                await self._child_died(error)
                continue
            await self._advise(prepared.advice)
            self._stand.clock, self._held = max(self._stand.clock, prepared.clock), None
            if self._stand.state == "leaving":
                self._stand.is_ready()
            return

    def _due(self, seen: Seen) -> Place | None:
        """This agent's place where it may begin a period, else None."""
        head = seen.head
        place = Place.of(seen.roster, self._me.agent) if seen.roster is not None else None
        if place is None or not place.participant or head.model is None:
            return None
        if isinstance(self._spec.sync, Async):
            position = max(self._handed, place.judged)
            waiting = position - place.judged >= outboxes(self._spec)
            gated = head.gate is not None and position + place.offset > head.gate
            return None if waiting or gated or head.phase not in ("training", "merging") else place
        # under whatever term it was offered: that offer waits on the bus, if it was not judged and this agent is asked again
        waits = self._offered_for == head.model.id and place.judged < self._handed
        return None if head.phase != "training" or waits else place

    def _rebase(self, epoch: int) -> None:
        """The broker lost what it had acknowledged, and the run goes on from an older head: what was handed over and not seen
        judged counts for nothing, and clocks go on from those that are known there."""
        stand = self._stand
        self._given_up = range(max(1, stand.clock - GIVEN_UP + 1), stand.clock + 1)
        stand.epoch, stand.handed, stand.clock = epoch, 0, 0
        self._handed, self._offered_for, self._held = 0, "", None

    async def _say_set_back(self, head: Head) -> None:
        """The coordinator may not know: where it was started again it begins with what it finds."""
        text = (
            f"{self._me.agent}: the run goes on from version {head.version}, and was at {self._stand.version} already: the "
            f"broker lost what came between"
        )
        self._stand.version = head.version
        await self._telemetry.event("run-set-back", text, level="warning", agent=self._me.agent)

    async def _say_not_saved(self, save: SaveReport) -> None:
        """Report, once, that the disk is full or cannot be written."""
        if save.problem and not self._said_not_saved:
            self._said_not_saved = True
            then = (
                "takes no part until it is, for what it gives up must be there first"
                if save.blocks_offer
                else "goes on without"
            )
            text = f"{self._me.agent}: what it trains is not kept on its disk, and {then}: {save.problem}"
            await self._telemetry.event("not-kept", text[:2000], level="warning", agent=self._me.agent)

    async def _advise(self, advice: Sequence[str]) -> None:
        """Publish each text once in this run, also if the child was started again meanwhile."""
        for text in advice:
            if text not in self._advised and len(self._advised) < MOST_ADVICE:
                self._advised.add(text)
                text = f"{self._me.agent}: {text}"
                await self._telemetry.event("advice", text[:2000], level="warning", agent=self._me.agent)

    async def _may_offer(self, clock: int, save: SaveReport) -> bool:
        """Return whether the update may be offered, after waiting for the disk if the state must be saved first.

        The agent is out of the run meanwhile. False: the child died while it waited, and the update with it.
        """
        await self._say_not_saved(save)
        if not save.blocks_offer:
            return True
        self._stand.is_out(save.problem)
        saved = False
        while not saved:
            await asyncio.sleep(jitter(SAVE_AGAIN_S))
            retried = await self._ask(self._training.retry_save(RetrySave(clock=clock)))
            if retried is None:
                break
            saved = not retried.blocks_offer
        self._said_not_saved = False
        self._stand.is_ready()
        return saved

    async def _one_period(self, head: Head, place: Place) -> None:
        stand = self._stand
        stand.clock = max(stand.clock, place.judged, self._handed)
        elastic = self._spec.mix.kind == "elastic"
        if not (elastic and self._is_async and self._held is not None):
            await self._fetch(head)
        stand.state, stand.part, clock = "training", place.number, stand.clock + 1
        period = TrainPeriod(
            version=stand.version,
            clock=clock,
            part=place.number,
            parts=place.parts,
            fresh_center=self._fresh or not self._is_async,  # every round begins with its center, a second time too
            outbox=self._made % outboxes(self._spec),  # its last update but one was judged; clocks may leave one out
            verdicts={**{c: False for c in self._given_up if c > place.judged}, **place.verdicts},
        )
        report = await self._ask(self._training.period(period))
        known = self._news.head
        if report is not None:
            await self._advise(report.advice)
        if report is None or report.stopped or (known is not None and known.epoch != stand.epoch):
            stand.state = "waiting"  # it counts for nothing; where head goes back, another begins with the same center
            return
        self._fresh, self._given_up = False, range(0)
        made = report.update
        if made is None:
            if self._is_async:
                await self._fetch((await self._news.newest()).head)
            question = MakeElasticUpdate(period=period, fresh_center=self._fresh)
            made = await self._ask(self._training.make_elastic_update(question))
            self._fresh = False
            if made is None:
                stand.state = "waiting"
                return
        if not await self._may_offer(clock, made.save):
            return
        stand.last_report, stand.clock = report, clock
        self._made, self._deaths, self._crashes = self._made + 1, 0, 0
        if made.broken:
            self._held = None  # the next one begins with the center, be it the same
        update = FinishedUpdate(period, report, stand.version, self._held_term, stand.epoch)
        if self._is_async:
            self._handed = clock
            await self._to_send.put(update)
        else:
            stand.state = "sending"
            await self._send(update)
            if update.epoch == stand.epoch:
                self._offered_for = head.model.id if head.model is not None else ""
        stand.state = "waiting"
        await self._signs.tell(clock, stand.version, report)

    async def _fetch(self, head: Head) -> None:
        """The center of head, if it is not the one in the inbox."""
        assert head.model is not None
        if self._held != head.model:
            self._stand.state, layout = "fetching", self._manifest
            prefix, stream = partial(subjects.model_prefix, self._run), subjects.model_stream(self._run)
            into, window = self._training.inbox(layout.blob_bytes), self._spec.wire.window
            self._held = None
            await get_blob(
                self._bus,
                stream,
                prefix,
                head.model,
                into,
                layout.chunk_bytes,
                window=window,
                sections=layout.sections,
            )
            self._held, self._fresh = head.model, True
            self._stand.bytes_down += layout.blob_bytes
        self._stand.version, self._held_term = head.version, head.term

    async def _ask(self, question: Awaitable[A]) -> A | None:
        """Return the child's answer; None: the child died, and another one is ready."""
        try:
            return await question
        except ChildDied as error:
            await self._child_died(error)
            await self._revive()
            return None

    async def _child_died(self, error: ChildDied) -> None:
        """Tell of it, and wait before another child is started.

        The first one is replaced at once. A third crash in a row raises CannotTrain: the task would crash in every period. A
        kill from outside says nothing about the task: the pauses grow, and the agent stays in the run.
        """
        self._deaths += 1
        self._crashes += not error.from_outside
        if self._crashes >= CRASHES_IN_A_ROW:
            raise CannotTrain(f"the training process crashed {self._crashes} times in a row, the last time: {error}")
        pause_s = 0.0
        if self._deaths > 1:
            pause_s = jitter(min(LONGEST_PAUSE_S, REVIVE_S * 2 ** min(self._deaths - 2, 16)))
        text = f"{self._me.agent}: the training process died: {error}; starting another"
        text += f" in {pause_s:.0f} s" if pause_s else ""
        await self._telemetry.event("trainer-died", text, level="warning", agent=self._me.agent)
        if pause_s >= OUT_FROM_S:
            self._stand.is_out(f"{self._deaths} training processes in a row died; it starts another in {pause_s:.0f} s")
        await asyncio.sleep(pause_s)

    async def _cannot(self, why: str) -> None:
        """Says so, and stays until the run is over: this agent is of no use in it."""
        self._stand.cannot(why[:2000])
        text = f"{self._me.agent} cannot train: {why}"
        await self._telemetry.event("agent-failed", text, level="error", agent=self._me.agent)
        await self._training.close()
        while True:
            await self._news.wait()
            self._news.clear()

    # -- sending -------------------------------------------------------------------------------------------------------
    async def _send_all(self) -> None:
        """What was made while another update was on its way."""
        while True:
            update = await self._to_send.get()
            if update.epoch == self._stand.epoch:
                await self._send(update)

    async def _send(self, update: FinishedUpdate) -> None:
        """Hands the update over, however long that takes."""
        codec, layout = self._spec.wire.codec, self._manifest
        content = self._training.outbox(layout.blob_bytes, update.period.outbox)[
            : layout.coded_bytes(codec.payload_bytes)
        ]
        how = How(layout, codec, self._spec.wire.window, keep=self._is_async)
        if not await self._sender.send(update, content, how):
            return
        if update.epoch == self._stand.epoch:
            self._handed = max(self._handed, update.period.clock)
            self._stand.handed = max(self._stand.handed, update.period.clock)
        self._stand.bytes_up += len(content)
