"""An agent in one run: follows head, trains when head names it a participant, and offers what it made.

Edge-triggered for speed, level-triggered for truth: a notify carries head and wakes the session at once; whoever missed it
reads head again every few seconds. A notify is only a hint: an older one than what is known changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from syncline.bus.base import Bus, Delivery
from syncline.bus.blobs import BlobGone, get_blob, get_small_blob, patiently, put_blob
from syncline.chance import jitter, new_id
from syncline.child import ChildDied, ChildFailed
from syncline.errors import BusError, ConfigError, PeerError, StreamFull, SynclineError
from syncline.spec import RunSpec, parse
from syncline.telemetry import AgentEval, Pace, Telemetry, Train, numbers
from syncline.wire import subjects
from syncline.wire.manifest import Manifest
from syncline.wire.messages import (
    ENDED,
    Head,
    Heartbeat,
    Notify,
    Offer,
    Roster,
    Submit,
    Welcome,
    decode,
    encode,
)
from syncline.wire.signing import Signer
from syncline_agent.training import Training

log = logging.getLogger(__name__)

READ_AGAIN_S = 3.0
HEARTBEAT_S = 1.0
HEARTBEATS_TO_MISS = 5  # in a row, before this agent counts as lost
METRICS_S = 0.2
DEATHS_IN_A_ROW = 3  # of the training child, after which this agent says it cannot train
RECORD_CHUNK_BYTES = 512 * 1024
SPEC_BYTES = 256 * 1024


class Superseded(SynclineError):
    """Another process has claimed this agent's name: exit."""


class CannotTrain(SynclineError):
    """This agent cannot take part in the run, with the reason."""


@dataclass(frozen=True, slots=True)
class Me:
    """Who this process is."""

    agent: str
    session: str
    state_dir: Path
    signer: Signer | None


@dataclass(slots=True)
class _Seen:
    """The newest head, and the roster that belongs to it."""

    head: Head
    roster: Roster | None = None
    roster_blob: str = ""


class Session:
    """`follow` until the run has ended or this agent must leave it."""

    def __init__(self, bus: Bus, run: str, me: Me, training: Training, hello: Callable[[], Awaitable[str]]) -> None:
        self._bus, self._run, self._me, self._training = bus, run, me, training
        self._hello = hello  # claims the session again; returns the run to take part in
        self._telemetry = Telemetry(bus, run, me.agent)
        self._moved = asyncio.Event()
        self._seen: _Seen | None = None
        self._state: Any = "starting"
        self._why = ""
        self._clock = 0
        self._version = 0
        self._offered_for = ""  # the model that the last offer deviates from
        self._held: str = ""  # blob of the center in the inbox
        self._part = 0
        self._last: dict[str, Any] = {}
        self._bytes_up = self._bytes_down = 0
        self._metrics = Pace(0.1)
        self._announced = False
        self._over = asyncio.Event()
        self._heartbeat_s = HEARTBEAT_S

    # -- life ----------------------------------------------------------------------------------------------------------
    async def follow(self) -> None:
        """Raises Superseded; returns when the run has ended, or this agent cannot train for it and has said so."""
        beat = asyncio.create_task(self._beat())
        show = asyncio.create_task(self._show())
        work = asyncio.create_task(self._work())
        over = asyncio.create_task(self._over.wait())
        try:
            done, _ = await asyncio.wait({beat, show, work, over}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (beat, show, work, over):
                task.cancel()
            await asyncio.gather(beat, show, work, over, return_exceptions=True)
            await self._telemetry.metric(self._train_metric())
            await self._training.close()

    async def leave(self) -> None:
        """Says goodbye, so that nobody waits for this agent."""
        self._state = "leaving"
        try:
            await self._bus.request(subjects.heartbeat(self._run, self._me.agent), encode(self._sign_of_life()), 1.0)
        except BusError:
            pass

    async def on_notify(self, delivery: Delivery) -> None:
        """Head has moved."""
        if subjects.run_of(delivery.subject) != self._run:
            return
        try:
            note = decode(Notify, delivery.data)
            self._see(decode(Head, note.head), note.roster)
        except PeerError as error:
            text = f"{self._me.agent}: ignored a notify that is none: {error}"
            await self._telemetry.event("bad-message", text, level="warning", agent=self._me.agent)

    def look_again(self) -> None:
        """The connection was gone: what was sent meanwhile is lost."""
        self._seen = None
        self._moved.set()

    # -- what is known -------------------------------------------------------------------------------------------------
    def _see(self, head: Head, roster: bytes = b"") -> None:
        if head.run != self._run:
            return
        known = self._seen
        if known is not None and _order(head) < _order(known.head):
            return
        if known is None or known.head != head:
            keep = known is not None and head.roster is not None and known.roster_blob == head.roster.id
            self._seen = _Seen(head, known.roster, known.roster_blob) if keep and known is not None else _Seen(head)
        if roster and self._seen is not None and head.roster is not None and self._seen.roster is None:
            self._seen.roster, self._seen.roster_blob = decode(Roster, roster), head.roster.id
        if self._state == "training" and head.version > self._version:
            self._training.stop_early()  # the round is over without us
        if head.phase in ENDED:
            self._over.set()  # whatever is under way, nobody wants it any more
        self._moved.set()

    async def _read_head(self) -> None:
        key = subjects.head_key(self._run)
        entry = await patiently(partial(self._bus.kv_get, subjects.RUNS_BUCKET, key))
        if entry is None:
            raise CannotTrain(f"run {self._run} is gone from the bus")
        self._see(decode(Head, entry.value))

    async def _newest(self) -> _Seen:
        """Head with its roster."""
        if self._seen is None:
            await self._read_head()
        seen = self._seen
        assert seen is not None
        if seen.roster is None and seen.head.roster is not None:
            data = await self._record(seen.head.roster)
            seen.roster, seen.roster_blob = decode(Roster, data, limit=64 << 20), seen.head.roster.id
        return seen

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(jitter(READ_AGAIN_S)):
                await self._moved.wait()
        except TimeoutError:
            await self._read_head()

    async def _record(self, ref: Any) -> bytes:
        prefix = partial(subjects.model_prefix, self._run)
        return await get_small_blob(
            self._bus, subjects.model_stream(self._run), prefix, ref, RECORD_CHUNK_BYTES, 64 << 20
        )

    # -- the work ------------------------------------------------------------------------------------------------------
    async def _work(self) -> None:
        try:
            while True:
                self._moved.clear()
                try:
                    if self._state == "starting":
                        await self._prepare()
                    seen = await self._newest()
                    if self._is_due(seen):
                        await self._one_period(seen)
                    else:
                        await self._wait()
                except BlobGone:  # purged meanwhile: head has moved on
                    await self._read_head()
                except PeerError as error:
                    text = f"{self._me.agent}: {error}; trying again"
                    await self._telemetry.event("bad-message", text, level="warning", agent=self._me.agent)
                    await asyncio.sleep(jitter(1.0))
                    await self._read_head()
        except (CannotTrain, ConfigError, ChildFailed) as error:
            await self._cannot(str(error))

    async def _prepare(self) -> None:
        """Reads spec and manifest, and has the child make the model."""
        entry = await patiently(partial(self._bus.kv_get, subjects.RUNS_BUCKET, subjects.spec_key(self._run)))
        if entry is None:
            raise CannotTrain(f"run {self._run} has no spec on the bus")
        self._spec = parse(RunSpec, decode(Submit, entry.value, limit=SPEC_BYTES).spec)
        self._heartbeat_s = min(HEARTBEAT_S, self._spec.agents.lost_after_s / HEARTBEATS_TO_MISS)
        while (await self._newest()).head.manifest is None:
            self._moved.clear()
            await self._wait()
        head = (await self._newest()).head
        self._manifest_bytes = await self._record(head.manifest)
        self._manifest = decode(Manifest, self._manifest_bytes, limit=64 << 20)
        await self._revive()
        self._state = "waiting"
        self._announced = True

    async def _revive(self) -> None:
        """A child with the model, and with what this agent kept of the run; several tries where it dies."""
        path = self._me.state_dir / self._run / f"{self._me.agent}.safetensors"
        for _ in range(DEATHS_IN_A_ROW):
            try:
                answer = await self._training.prepare(
                    self._spec.model_dump(mode="json"), self._manifest_bytes, str(path)
                )
            except ChildDied as error:
                await self._child_died(error)
                continue
            self._clock, self._held = max(self._clock, answer["clock"]), ""
            return
        raise CannotTrain(f"the training process died {DEATHS_IN_A_ROW} times in a row")

    def _is_due(self, seen: _Seen) -> bool:
        head, roster = seen.head, seen.roster
        if head.phase != "training" or roster is None or head.model is None:
            return False
        if self._offered_for == head.model.id:  # under whatever term: that offer waits on the bus
            return False
        number = roster.number(self._me.agent)
        return number is not None and roster.participant(number)

    async def _one_period(self, seen: _Seen) -> None:
        head, roster = seen.head, seen.roster
        assert roster is not None and head.model is not None
        number = roster.number(self._me.agent)
        assert number is not None
        self._clock = max(self._clock, roster.clocks[number])
        self._version = head.version
        await self._fetch(head)
        self._state, self._part = "training", number
        report = await self._train(head, number, roster.parts)
        if report is None or report["stopped"]:
            self._state = "waiting"
            return
        self._last = report
        await self._offer(head, report)
        self._state = "waiting"
        await self._tell(report)

    async def _fetch(self, head: Head) -> None:
        assert head.model is not None
        if self._held == head.model.id:
            return
        self._state = "fetching"
        layout = self._manifest
        chunk_bytes = layout.chunk_bytes
        prefix, stream = partial(subjects.model_prefix, self._run), subjects.model_stream(self._run)
        into = self._training.inbox(layout.nbytes)
        window = self._spec.wire.window
        await get_blob(self._bus, stream, prefix, head.model, into, chunk_bytes, codec=layout.dtype, window=window)
        self._held = head.model.id
        self._bytes_down += layout.nbytes

    async def _train(self, head: Head, number: int, parts: int) -> dict[str, Any] | None:
        """The report of a period, or None where the child died."""
        try:
            return await self._training.period(head.version, self._clock + 1, number, parts)
        except ChildDied as error:
            await self._child_died(error)
            await self._revive()
            return None

    async def _offer(self, head: Head, report: dict[str, Any]) -> None:
        self._state = "sending"
        me, layout, blob = self._me, self._manifest, new_id()
        prefix = partial(subjects.update_prefix, self._run, me.agent)
        chunk_bytes = layout.chunk_bytes
        update = self._training.outbox(layout.nbytes)
        window = self._spec.wire.window
        try:
            ref, digest = await put_blob(
                self._bus, prefix, update, chunk_bytes, blob=blob, codec=layout.dtype, window=window
            )
        except StreamFull as error:
            text = f"{me.agent}: no room for its update on the bus: {error}. Raise agents.max, or start fewer agents"
            await self._telemetry.event("stream-full", text, level="error", agent=me.agent)
            await asyncio.sleep(READ_AGAIN_S)
            return
        offer = Offer(
            session=me.session,
            clock=self._clock + 1,
            base=head.version,
            term=head.term,
            samples=report["rows"],
            steps=report["steps"],
            blob=ref,
            digest=digest,
        )
        if me.signer is not None:
            signature = me.signer.sign(offer.signed_bytes(self._run, me.agent))
            offer = offer.model_copy(update={"signature": signature})
        await patiently(partial(self._bus.put, subjects.offer(self._run, me.agent), encode(offer)))
        self._clock += 1
        self._bytes_up += ref.size
        self._offered_for = head.model.id if head.model is not None else ""

    async def _child_died(self, error: ChildDied) -> None:
        text = f"{self._me.agent}: the training process died: {error}; starting another"
        await self._telemetry.event("trainer-died", text, level="warning", agent=self._me.agent)

    async def _cannot(self, why: str) -> None:
        """Says so, and stays until the run is over: this agent is of no use in it."""
        self._state, self._why = "failed", why[:2000]
        text = f"{self._me.agent} cannot train: {why}"
        await self._telemetry.event("agent-failed", text, level="error", agent=self._me.agent)
        await self._training.close()
        while True:
            await self._wait()
            self._moved.clear()

    # -- signs of life -------------------------------------------------------------------------------------------------
    def _sign_of_life(self) -> Heartbeat:
        head = self._seen.head if self._seen is not None else None
        return Heartbeat(
            session=self._me.session,
            clock=self._clock,
            progress=self._training.progress().steps_ever,
            state=self._state,
            reason=self._why,
            seen_term=head.term if head is not None else 0,
            seen_version=head.version if head is not None else 0,
        )

    async def _beat(self) -> None:
        subject = subjects.heartbeat(self._run, self._me.agent)
        while True:
            announced, failed = self._announced, self._state == "failed"
            try:
                answer = decode(Welcome, await self._bus.request(subject, encode(self._sign_of_life()), 5.0))
                if answer.superseded:
                    raise Superseded(answer.reason)
                if not answer.run and not answer.unknown:
                    log.info("no place in run %s: %s", self._run, answer.reason)
                    return
                if answer.unknown:  # the coordinator was restarted, or counted us as lost
                    if await self._hello() not in ("", self._run):
                        return  # it has other plans for us
                    await asyncio.sleep(0.05)
                    continue
            except BusError as error:
                log.debug("heartbeat: %s", error)
            except PeerError as error:
                log.warning("heartbeat: %s", error)
            next_s = asyncio.get_running_loop().time() + jitter(self._heartbeat_s, 0.8, 1.0)
            while asyncio.get_running_loop().time() < next_s:
                await asyncio.sleep(0.02 if not announced else min(0.2, self._heartbeat_s / 4))
                if announced != self._announced or failed != (self._state == "failed"):
                    break  # ready, or of no use: that is news

    async def _show(self) -> None:
        """Where this agent stands, five times a second, while something moves."""
        shown: Any = None
        while True:
            now = (self._state, self._version, self._clock, self._training.progress())
            if now != shown and self._metrics.due(asyncio.get_running_loop().time()):
                shown = now
                await self._telemetry.metric(self._train_metric())
            await asyncio.sleep(METRICS_S)

    async def _tell(self, report: dict[str, Any]) -> None:
        if "metrics" in report:
            metric = AgentEval(version=self._version, clock=self._clock, metrics=numbers(report["metrics"]))
            await self._telemetry.metric(metric)
        if self._metrics.due(asyncio.get_running_loop().time()):
            await self._telemetry.metric(self._train_metric())

    def _train_metric(self) -> Train:
        progress = self._training.progress()
        return Train(
            state=self._state,
            version=self._version,
            clock=self._clock,
            step=progress.step,
            steps=progress.steps,
            loss=self._last.get("loss"),
            samples_per_s=self._last.get("samples_per_s"),
            part=self._part,
            rows=progress.rows,
            bytes_up=self._bytes_up,
            bytes_down=self._bytes_down,
        )


def _order(head: Head) -> tuple[int, int, int, int]:
    """Which of two heads is newer: by term, then version, then how far the round is."""
    phases = {"waiting": 0, "training": 1, "merging": 2, "done": 3, "failed": 3, "refused": 3}
    return (head.term, head.version, head.round, phases[head.phase])
