"""Runs that have not ended, as the bus holds them: the queue is what lies there, and survives every coordinator."""

from __future__ import annotations

import logging
from functools import partial

from syncline.bus.base import Bus
from syncline.bus.blobs import patiently
from syncline.chance import new_number
from syncline.errors import Conflict, PeerError
from syncline.wire import subjects
from syncline.wire.messages import ENDED, Head
from syncline_coordinator.head import HeadKeeper
from syncline_coordinator.space import RUNS

log = logging.getLogger(__name__)


class WaitingRuns:
    """The runs that have not ended. Remembers those that have, so that looking costs the same however many there are."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._ended: set[str] = set()
        self._names: list[str] = []
        self._looked_at: tuple[int, int, int] | None = None  # losses of the connection, and where the bucket stood

    def accepted(self, name: str) -> None:
        """A run was submitted under that name; one that had it before may have ended."""
        self._ended.discard(name)
        self._looked_at = None

    async def look(self) -> list[str]:
        """Return their names, the oldest first. One whose head cannot be read stands in no other's way."""
        losses = self._bus.losses
        await patiently(partial(self._bus.ensure_bucket, RUNS))  # a broker may have lost even that
        state = await patiently(partial(self._bus.state, f"KV_{subjects.RUNS_BUCKET}"))
        stands_at = losses, state.last_seq, state.messages
        if stands_at != self._looked_at:
            if self._looked_at is None or self._looked_at[0] != losses:  # the broker may be back with an older store
                self._ended.clear()
            self._names = await self._read()
            self._looked_at = stands_at
        return self._names

    async def _read(self) -> list[str]:
        waiting = []
        for key in await patiently(partial(self._bus.kv_keys, subjects.RUNS_BUCKET)):
            name, _, kind = key.rpartition(".")
            if kind != "spec" or name in self._ended:
                continue
            try:
                revision = await self._place_of(name)
            except PeerError as error:
                log.error("run %s: its head cannot be read: %s", name, error)
                continue
            if revision is not None:
                waiting.append((revision, name))
        return [name for _, name in sorted(waiting)]

    async def _place_of(self, name: str) -> int | None:
        """Return the revision of the run's spec, or None where it has ended."""
        keeper = await HeadKeeper.read(self._bus, name)
        if keeper is not None and keeper.head.phase in ENDED:
            self._ended.add(name)
            return None
        key = subjects.spec_key(name)
        entry = await patiently(partial(self._bus.kv_get, subjects.RUNS_BUCKET, key))
        if (
            entry is not None and keeper is None
        ):  # the coordinator that accepted the run died between its spec and its head
            await patiently(partial(first_head, self._bus, name))
            keeper = await HeadKeeper.read(self._bus, name)
        return entry.revision if entry is not None and keeper is not None and keeper.head.phase not in ENDED else None


async def first_head(bus: Bus, name: str) -> None:
    """Where it is there already, whoever takes the run from the queue was faster."""
    try:
        await HeadKeeper.create(bus, Head(run=name, term=1, version=0, line=new_number(), phase="waiting"))
    except Conflict:
        pass
