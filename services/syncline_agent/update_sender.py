"""Sends an agent's updates: puts the chunks of an update, then its offer. Knows nothing of training.

A finished update is kept however long the bus is out of reach, and given up when the run goes on without that update.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from functools import partial

from syncline.bus.base import Bus
from syncline.bus.blobs import Growth, put_blob, with_retries
from syncline.chance import jitter, new_id
from syncline.errors import BrokerFull, BusError, Denied, StreamFull
from syncline.model.manifest import Manifest
from syncline.observe.telemetry import Telemetry
from syncline.transform.codecs import Codec
from syncline.wire import subjects
from syncline.wire.dtypes import DTYPES
from syncline.wire.messages import BlobRef, Offer, encode
from syncline_agent.identity import AgentIdentity
from syncline_agent.local_period import LocalPeriod
from syncline_agent.run_view import READ_AGAIN_S, RunView

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SendOptions:
    """Settings of the run for sending."""

    layout: Manifest
    codec: Codec
    window: int  # chunks under way at once
    late_counts: bool  # an update is worth sending after head has moved on: the run is asynchronous


class UpdateSender:
    """Sends the updates of one session, one call of `send` for each."""

    def __init__(self, bus: Bus, run: str, identity: AgentIdentity, view: RunView, telemetry: Telemetry) -> None:
        self._bus = bus
        self._run = run
        self._identity = identity
        self._view = view
        self._telemetry = telemetry
        self._is_full = False  # the bus had no room for the last update, and that was published

    async def send(self, period: LocalPeriod, content: memoryview, options: SendOptions) -> bool:
        """Put the update and offer it, however long that takes.

        Args:
            content: the coded update; must not change until the call returns.

        Returns:
            True: the bus holds the offer. False: the run went on without the update.

        Raises:
            Denied: the broker refuses this agent's writes.
        """
        blob = new_id()
        growth = Growth()
        while True:
            try:
                ref, digest = await self._put(content, options, blob, growth)
                offer = encode(self._offer(period, ref, digest))
                put = partial(self._bus.put, subjects.offer(self._run, self._identity.agent), offer, bulk=True)
                await with_retries(put, patience_s=growth.left_s)  # after that time the chunks may be purged
                self._is_full = False
                return True
            except StreamFull as error:
                await self._tell_no_room(error)
                await asyncio.sleep(READ_AGAIN_S)
            except Denied:
                raise
            except BusError as error:
                log.warning("the update of clock %d is not handed over yet: %s", period.question.clock, error)
                await asyncio.sleep(jitter(READ_AGAIN_S))
                await self._read_head()
            if self._is_obsolete(period, options):
                return False
            if growth.left_s < 0:  # the chunks of the first attempt may be purged
                blob = new_id()
                growth = Growth()

    async def _put(self, content: memoryview, options: SendOptions, blob: str, growth: Growth) -> tuple[BlobRef, bytes]:
        layout = options.layout
        return await put_blob(
            self._bus,
            partial(subjects.update_prefix, self._run, self._identity.agent),
            content,
            options.codec.payload_bytes(layout.chunk_elements, DTYPES[layout.dtype]),
            blob=blob,
            codec=options.codec.kind,
            window=options.window,
            sections=layout.sections,
            growth=growth,
        )

    def _offer(self, period: LocalPeriod, ref: BlobRef, digest: bytes) -> Offer:
        """Return the offer, signed if this agent has a key."""
        identity = self._identity
        assert period.report is not None
        offer = Offer(
            session=identity.session,
            clock=period.question.clock,
            base=period.base,
            term=period.term,
            epoch=period.epoch,
            samples=period.report.rows,
            steps=period.report.steps,
            seconds=period.report.seconds,
            blob=ref,
            digest=digest,
        )
        if identity.signer is None:
            return offer
        signature = identity.signer.sign(offer.signed_bytes(self._run, identity.agent))
        return offer.model_copy(update={"signature": signature})

    async def _tell_no_room(self, error: StreamFull) -> None:
        """Publish once that the update finds no room, until an update is sent again."""
        if self._is_full:
            return
        self._is_full = True
        agent = self._identity.agent
        hint = error.hint if isinstance(error, BrokerFull) else "Raise agents.max, or start fewer agents"
        text = f"{agent}: no room for its update on the bus, and it tries again: {error}. {hint}"
        await self._telemetry.event("stream-full", text, level="error", agent=agent)

    async def _read_head(self) -> None:
        """Read head, which tells whether the run has ended or moved on; the bus may still be out of reach."""
        try:
            await self._view.read_head()
        except Denied:
            raise
        except BusError:
            pass

    def _is_obsolete(self, period: LocalPeriod, options: SendOptions) -> bool:
        head = self._view.head
        if head is None:
            return False
        return head.epoch != period.epoch or (not options.late_counts and head.version > period.base)
