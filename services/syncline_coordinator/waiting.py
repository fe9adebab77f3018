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


async def waiting_runs(bus: Bus) -> list[str]:
    """Their names, the oldest first. One whose head cannot be read stands in nobody's way."""
    await patiently(partial(bus.ensure_bucket, RUNS))  # a broker may have lost even that
    keys = await patiently(partial(bus.kv_keys, subjects.RUNS_BUCKET))
    waiting = []
    for key in keys:
        name, _, kind = key.rpartition(".")
        if kind != "spec":
            continue
        try:
            keeper = await HeadKeeper.read(bus, name)
            entry = await patiently(partial(bus.kv_get, subjects.RUNS_BUCKET, key))
            if entry is not None and keeper is None:  # whoever accepted the run died between its spec and its head
                await patiently(partial(first_head, bus, name))
                keeper = await HeadKeeper.read(bus, name)
        except PeerError as error:
            log.error("run %s: its head cannot be read: %s", name, error)
            continue
        if keeper is not None and entry is not None and keeper.head.phase not in ENDED:
            waiting.append((entry.revision, name))
    return [name for _, name in sorted(waiting)]


async def first_head(bus: Bus, name: str) -> None:
    """Where it is there already, whoever takes the run from the queue was faster."""
    try:
        await HeadKeeper.create(bus, Head(run=name, term=1, version=0, line=new_number(), phase="waiting"))
    except Conflict:
        pass
