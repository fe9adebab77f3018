"""Reads the offers of a run in stream order, and lets through only those that are what they claim to be.

A core message wakes the reader at once; the stream is the truth, and is read again every few seconds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial

from syncline.bus.base import Bus, Delivery, Stored
from syncline.bus.blobs import with_retries
from syncline.errors import BusError, PeerError
from syncline.model.manifest import Manifest
from syncline.transform.codecs import Codec
from syncline.wire import subjects
from syncline.wire.messages import Offer, decode
from syncline.wire.signing import verify
from syncline_coordinator.head import VerifyDurable

log = logging.getLogger(__name__)

READ_AT_ONCE = 256
READ_AGAIN_S = 2.0
SOON_S = (0.0005, 0.001, 0.002, 0.005, 0.02, 0.1)


@dataclass(slots=True)
class StreamPosition:
    """How far a coordinator has read the stream of offers."""

    read_up_to: int  # sequence number
    last_read: Stored | None = None  # the message there, unless it was read by a coordinator before

    def passed(self, message: Stored) -> None:
        """Note that this message was read, acceptable or not."""
        self.read_up_to, self.last_read = message.seq, message


class OfferReader:
    """`public_key(agent)`: the key the agent said hello with, or '' where it has not yet."""

    def __init__(self, bus: Bus, run: str, manifest: Manifest, codec: Codec, public_key: Callable[[str], str]) -> None:
        self._bus, self._run, self._manifest, self._codec, self._public_key = bus, run, manifest, codec, public_key
        self._woken = asyncio.Event()
        self._told = self._looks = 0  # offers told of by core messages and not read yet; times looked for them in vain

    async def read(
        self, after_seq: int, verify_durable: VerifyDurable
    ) -> AsyncGenerator[tuple[Stored, Offer | PeerError], None]:
        """Yield every offer after that sequence number, without end, and a bad one as the error that says why.

        `verify_durable()` raises where an offer that was read before is lost.
        """
        subscription = await self._bus.subscribe(subjects.offer(self._run, "*"), self._wake, limit=64)
        stream, next_seq = subjects.offers_stream(self._run), after_seq + 1
        try:
            while True:
                self._woken.clear()
                losses = self._bus.losses
                await verify_durable()
                found = await with_retries(partial(self._bus.read, stream, next_seq, READ_AT_ONCE))
                all_told_of = len(found) == self._told
                self._told = max(0, self._told - len(found))
                for stored in found:
                    if self._bus.losses != losses:  # it may be lost by now: read again
                        all_told_of = False
                        break
                    next_seq = stored.seq + 1
                    yield stored, self._checked(stored)
                if found:
                    self._looks = 0
                if all_told_of or not found:
                    await self._wait()
        finally:
            try:
                await subscription.unsubscribe()
            except BusError:
                pass

    async def _wake(self, _: Delivery) -> None:
        self._told += 1
        self._woken.set()

    async def _wait(self) -> None:
        """Until there may be more. Core messages run ahead of the stream: one told of and not yet there is looked for soon."""
        pause = READ_AGAIN_S
        if self._told and self._looks < len(SOON_S):
            pause, self._looks = SOON_S[self._looks], self._looks + 1
        else:
            self._told = self._looks = 0
        try:
            async with asyncio.timeout(pause):
                await self._woken.wait()
        except TimeoutError:
            pass

    def _checked(self, stored: Stored) -> Offer | PeerError:
        try:
            agent = subjects.agent_of(stored.subject)
            offer = decode(Offer, stored.data, limit=16 * 1024)
            if offer.blob.codec != self._codec.kind:
                raise PeerError(
                    f"offer: its update is coded by {offer.blob.codec!r}, the run's is {self._codec.kind!r}"
                )
            size, chunks = self._manifest.coded_bytes(self._codec.payload_bytes), self._manifest.blob_chunks
            if offer.blob.size != size or offer.blob.chunks != chunks:
                raise PeerError(
                    f"offer: a blob of {offer.blob.size} bytes in {offer.blob.chunks} chunks, "
                    f"expected {size} bytes in {chunks}"
                )
            key = self._public_key(agent)
            if key and not verify(key, offer.signed_bytes(self._run, agent), offer.signature):
                raise PeerError("offer: the signature is not by the key this agent said hello with")
            return offer
        except PeerError as error:
            return error
