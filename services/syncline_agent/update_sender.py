"""Hands over what an agent has made: puts it chunk by chunk, and offers it. Knows nothing of training.

What is finished is not given up because the bus is out of reach, for however long; it is when the run goes on without it.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from syncline.bus.base import Bus
from syncline.bus.blobs import Growth, put_blob, with_retries
from syncline.chance import jitter, new_id
from syncline.errors import BusError, Denied, StreamFull
from syncline.model.manifest import Manifest
from syncline.observe.telemetry import Telemetry
from syncline.runtime.child_messages import PeriodReport, TrainPeriod
from syncline.transform.codecs import Codec
from syncline.wire import subjects
from syncline.wire.dtypes import DTYPES
from syncline.wire.messages import BlobRef, Offer, encode
from syncline.wire.signing import Signer
from syncline_agent.run_view import READ_AGAIN_S, News

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Me:
    """Who this process is."""

    agent: str
    session: str
    state_dir: Path
    signer: Signer | None


@dataclass(frozen=True, slots=True)
class FinishedUpdate:
    """An update in an outbox, with the period that made it."""

    period: TrainPeriod
    report: PeriodReport
    base: int  # version of the center that the update deviates from; elastic updates are made from a newer one than the period
    term: int  # under which that center was the newest
    epoch: int  # of the head that named the center


@dataclass(frozen=True, slots=True)
class How:
    """What the run says of it."""

    layout: Manifest
    codec: Codec
    window: int
    keep: bool  # an update is worth sending when head has moved on: the run is asynchronous


class Sender:
    def __init__(self, bus: Bus, run: str, me: Me, news: News, telemetry: Telemetry) -> None:
        self._bus, self._run, self._me, self._news, self._telemetry = bus, run, me, news, telemetry

    async def send(self, update: FinishedUpdate, content: memoryview, how: How) -> bool:
        """True once it is offered; False where the run went on without it. Raises Denied."""
        blob, growth = new_id(), Growth()
        while True:
            try:
                ref, digest = await self._put(content, how, blob, growth)
                offer = encode(self._offer(update, ref, digest))
                put = partial(self._bus.put, subjects.offer(self._run, self._me.agent), offer, bulk=True)
                await with_retries(put, patience_s=growth.left_s)  # behind its chunks, and not once they may be gone
                return True
            except StreamFull as error:
                await self._no_room(error)
                await asyncio.sleep(READ_AGAIN_S)
            except Denied:
                raise
            except BusError as error:
                log.warning("the update of clock %d is not handed over yet: %s", update.period.clock, error)
                await asyncio.sleep(jitter(READ_AGAIN_S))
                await self._look()
            if self._is_over(update, how):
                return False
            if growth.left_s < 0:  # what was put before may be purged
                blob, growth = new_id(), Growth()

    async def _put(self, content: memoryview, how: How, blob: str, growth: Growth) -> tuple[BlobRef, bytes]:
        layout = how.layout
        return await put_blob(
            self._bus,
            partial(subjects.update_prefix, self._run, self._me.agent),
            content,
            how.codec.payload_bytes(layout.chunk_elements, DTYPES[layout.dtype]),
            blob=blob,
            codec=how.codec.kind,
            window=how.window,
            sections=layout.sections,
            growth=growth,
        )

    def _offer(self, update: FinishedUpdate, ref: BlobRef, digest: bytes) -> Offer:
        """Signed, where this agent has a key."""
        me = self._me
        offer = Offer(
            session=me.session,
            clock=update.period.clock,
            base=update.base,
            term=update.term,
            epoch=update.epoch,
            samples=update.report.rows,
            steps=update.report.steps,
            seconds=update.report.seconds,
            blob=ref,
            digest=digest,
        )
        if me.signer is None:
            return offer
        return offer.model_copy(update={"signature": me.signer.sign(offer.signed_bytes(self._run, me.agent))})

    async def _no_room(self, error: StreamFull) -> None:
        agent = self._me.agent
        text = f"{agent}: no room for its update on the bus: {error}. Raise agents.max, or start fewer agents"
        await self._telemetry.event("stream-full", text, level="error", agent=agent)

    async def _look(self) -> None:
        """Where the run is over, or gone, that is known then."""
        try:
            await self._news.read_head()
        except Denied:
            raise
        except BusError:
            pass  # still out of reach

    def _is_over(self, update: FinishedUpdate, how: How) -> bool:
        head = self._news.head
        return head is not None and (head.epoch != update.epoch or (not how.keep and head.version > update.base))
