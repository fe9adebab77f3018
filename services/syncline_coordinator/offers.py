"""The reader of a run's stream of offers: yields them in order, and names each one that is not valid.

A core message wakes the reader as soon as an agent has put an offer. Core messages may be lost, so the stream is also read
every `READ_AGAIN_S`.
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

BATCH_OFFERS = 256
MAX_OFFER_BYTES = 16 * 1024
READ_AGAIN_S = 2.0
RETRY_DELAYS_S = (0.0005, 0.001, 0.002, 0.005, 0.02, 0.1)  # before the next tries to read an announced offer


@dataclass(slots=True)
class StreamPosition:
    """How far a coordinator has read the stream of offers."""

    read_up_to: int  # sequence number
    last_read: Stored | None = None  # the message at `read_up_to`; None if an earlier coordinator has read it

    def advance(self, message: Stored) -> None:
        """Note that this message was read, whether its offer is valid or not."""
        self.read_up_to = message.seq
        self.last_read = message


class OfferReader:
    """Reads and checks the offers of one run.

    Args:
        manifest: gives the size of an update.
        codec: the run's, which every update must have.
        public_key: returns the key in an agent's hello, or '' for an agent without a hello or without a key.
    """

    def __init__(self, bus: Bus, run: str, manifest: Manifest, codec: Codec, public_key: Callable[[str], str]) -> None:
        self._bus = bus
        self._run = run
        self._manifest = manifest
        self._codec = codec
        self._public_key = public_key
        self._woken = asyncio.Event()
        self._announced = 0  # offers that core messages have announced and that are not read yet
        self._failed_tries = 0  # reads in a row that did not find an announced offer

    async def read(
        self, after_seq: int, verify_durable: VerifyDurable
    ) -> AsyncGenerator[tuple[Stored, Offer | PeerError], None]:
        """Yield the messages of the stream without end, each with its offer or with an error.

        Args:
            after_seq: the sequence number after which reading starts.
            verify_durable: called before each read; raises if the broker has lost an offer that was read before.
        """
        subscription = await self._bus.subscribe(subjects.offer(self._run, "*"), self._wake, limit=64)
        stream = subjects.offers_stream(self._run)
        next_seq = after_seq + 1
        try:
            while True:
                self._woken.clear()
                losses = self._bus.losses
                await verify_durable()
                found = await with_retries(partial(self._bus.read, stream, next_seq, BATCH_OFFERS))
                all_announced_found = len(found) == self._announced
                self._announced = max(0, self._announced - len(found))
                for stored in found:
                    if self._bus.losses != losses:  # the broker may have lost these offers meanwhile: read again
                        all_announced_found = False
                        break
                    next_seq = stored.seq + 1
                    yield stored, self._checked(stored)
                if found:
                    self._failed_tries = 0
                if all_announced_found or not found:
                    await self._wait()
        finally:
            try:
                await subscription.unsubscribe()
            except BusError:
                pass

    async def _wake(self, _: Delivery) -> None:
        self._announced += 1
        self._woken.set()

    async def _wait(self) -> None:
        """Wait until the stream may hold another offer.

        A core message can arrive before the stream shows its offer. An announced offer is looked for again after short delays.
        """
        delay_s = READ_AGAIN_S
        if self._announced and self._failed_tries < len(RETRY_DELAYS_S):
            delay_s = RETRY_DELAYS_S[self._failed_tries]
            self._failed_tries += 1
        else:
            self._announced = 0
            self._failed_tries = 0
        try:
            async with asyncio.timeout(delay_s):
                await self._woken.wait()
        except TimeoutError:
            pass

    def _checked(self, stored: Stored) -> Offer | PeerError:
        """Return the offer in a message, or the reason why the offer is not valid."""
        try:
            agent = subjects.agent_of(stored.subject)
            offer = decode(Offer, stored.data, limit=MAX_OFFER_BYTES)
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
