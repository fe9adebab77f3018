"""Ends a run that nobody drives: one that waits in the queue, or that was left by a coordinator which is gone."""

from __future__ import annotations

import logging
from functools import partial

from syncline.bus.base import Bus
from syncline.bus.blobs import patiently
from syncline.observe.telemetry import Telemetry
from syncline.wire import subjects
from syncline.wire.messages import ENDED, Head, Stop, Stopped
from syncline_coordinator.head import Deposed, HeadKeeper
from syncline_coordinator.space import release

log = logging.getLogger(__name__)

TRIES = 5  # each lost to somebody who moved head meanwhile


def why(stop: Stop) -> str:
    """The reason as it stands in head, in the events and in the commit log. It may hold anything: people read it."""
    by = "".join(c if c.isprintable() else "�" for c in stop.by).strip()
    return f"stopped by {by or 'somebody'}"


async def end_undriven(bus: Bus, stop: Stop) -> Stopped:
    """Moves head to `done` under a higher term, so that whoever opens the run just now learns that it is over.

    Raises BusError, and Deposed where head moves too often to be caught up with.
    """
    run, reason = stop.run, why(stop)
    for _ in range(TRIES):
        keeper = await HeadKeeper.read(bus, run)
        if keeper is None:
            return await _without_head(bus, stop)
        head = keeper.head
        if head.phase in ENDED:
            return Stopped(run=run, outcome="ended", reason=head.reason)
        ended: dict[str, object] = {"term": head.term + 1, "phase": "done", "plan": None, "reason": reason}
        try:
            await keeper.write(head.model_copy(update=ended))
        except Deposed:
            continue
        await release(bus, run, ended=True)
        await Telemetry(bus, run, subjects.COORDINATOR).event("run-done", f"run {run}: {reason}")
        return Stopped(run=run, outcome="stopped", reason=reason)
    raise Deposed(f"the head of {run} moved {TRIES} times meanwhile: ask again")


async def _without_head(bus: Bus, stop: Stop) -> Stopped:
    """Whoever accepted the run may have died between its spec and its head: then it gets one that says it is over."""
    spec = await patiently(partial(bus.kv_get, subjects.RUNS_BUCKET, subjects.spec_key(stop.run)))
    if spec is None:
        return Stopped(run=stop.run, outcome="unknown")
    await HeadKeeper.create(bus, Head(run=stop.run, term=1, version=0, phase="done", reason=why(stop)))
    await release(bus, stop.run, ended=True)
    return Stopped(run=stop.run, outcome="stopped", reason=why(stop))


async def give_up(keeper: HeadKeeper, reason: str, telemetry: Telemetry) -> None:
    """The run has failed, unless another coordinator has moved it on: then what was missing here is only out of date."""
    head = keeper.head
    if head.phase in ENDED:
        return
    try:
        await keeper.write(head.model_copy(update={"phase": "failed", "reason": reason[:2000]}))
    except Deposed as error:
        log.warning("run %s: %s; given up here: %s", head.run, error, reason)
    else:
        await telemetry.event("run-failed", f"run {head.run}: {reason}", level="error")
