"""The queue of runs that have not ended, as the bus holds them, and how a run enters and leaves it.

The queue lives on the bus, so that it survives every coordinator.
"""

from __future__ import annotations

import logging
from functools import partial

from syncline.bus.base import Bus
from syncline.bus.blobs import BlobGone, put_record, with_retries
from syncline.bus.server.accounts import MAX_PAYLOAD_BYTES
from syncline.chance import new_number
from syncline.errors import ConfigError, Conflict, PeerError
from syncline.model.manifest import Manifest
from syncline.observe.telemetry import Telemetry
from syncline.wire import subjects
from syncline.wire.chunks import LEAST_PAYLOAD_BYTES
from syncline.wire.messages import ENDED, Head, Stop, Stopped, Welcome, encode
from syncline_coordinator.head import Deposed, HeadKeeper
from syncline_coordinator.merge.reducer import Reducer
from syncline_coordinator.recovery import taken_over
from syncline_coordinator.reservation import RUNS, release

log = logging.getLogger(__name__)


def exists(head: Head) -> ConfigError:
    there, other = f"there is a run {head.run!r} already", "or choose another name (--name)"
    if head.phase in ENDED:
        hint = f"See how it went with `syncline why {head.run}`, {other}"
        return ConfigError("name", f"{there}, and it has ended: {head.reason}", hint)
    hint = f"Follow it with `syncline watch {head.run}`, end it with `syncline stop {head.run}`, {other}"
    return ConfigError("name", f"{there}: {head.phase}, at version {head.version}", hint)


def payload_too_small(max_payload: int) -> ConfigError:
    """Say what a broker must let through in one message."""
    problem = f"the broker takes messages of at most {max_payload} bytes, a run needs {LEAST_PAYLOAD_BYTES}"
    hint = f"Set max_payload: {MAX_PAYLOAD_BYTES} in the broker's configuration, on every server alike, and reload it"
    return ConfigError("max_payload", problem, hint)


def gone(name: str, error: BlobGone) -> str:
    """Why a run fails whose head names what the broker has lost."""
    hint = f"Give the broker its store back, or submit the run again under another name; {name} itself cannot go on"
    return f"what head names is not on the bus any more: {error}. {hint}"


def superseded(agent: str) -> Welcome:
    return Welcome(superseded=True, reason=f"another process has claimed the name {agent}")


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
        await with_retries(partial(self._bus.ensure_bucket, RUNS))  # a broker may have lost even that
        state = await with_retries(partial(self._bus.state, f"KV_{subjects.RUNS_BUCKET}"))
        stands_at = losses, state.last_seq, state.messages
        if stands_at != self._looked_at:
            if self._looked_at is None or self._looked_at[0] != losses:  # the broker may be back with an older store
                self._ended.clear()
            self._names = await self._read()
            self._looked_at = stands_at
        return self._names

    async def _read(self) -> list[str]:
        waiting = []
        for key in await with_retries(partial(self._bus.kv_keys, subjects.RUNS_BUCKET)):
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
        entry = await with_retries(partial(self._bus.kv_get, subjects.RUNS_BUCKET, key))
        if (
            entry is not None and keeper is None
        ):  # the coordinator that accepted the run died between its spec and its head
            await with_retries(partial(first_head, self._bus, name))
            keeper = await HeadKeeper.read(self._bus, name)
        return entry.revision if entry is not None and keeper is not None and keeper.head.phase not in ENDED else None


async def first_head(bus: Bus, name: str) -> None:
    """Where it is there already, whoever takes the run from the queue was faster."""
    try:
        await HeadKeeper.create(bus, Head(run=name, term=1, version=0, epoch=new_number(), phase="waiting"))
    except Conflict:
        pass


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
            await keeper.write(head.changed(**ended))
        except Deposed:
            continue
        await release(bus, run, ended=True)
        await Telemetry(bus, run, subjects.COORDINATOR).event("run-done", f"run {run}: {reason}")
        return Stopped(run=run, outcome="stopped", reason=reason)
    raise Deposed(f"the head of {run} moved {TRIES} times meanwhile: ask again")


async def _without_head(bus: Bus, stop: Stop) -> Stopped:
    """Whoever accepted the run may have died between its spec and its head: then it gets one that says it is over."""
    spec = await with_retries(partial(bus.kv_get, subjects.RUNS_BUCKET, subjects.spec_key(stop.run)))
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
        await keeper.write(head.changed(phase="failed", reason=reason[:2000]))
    except Deposed as error:
        log.warning("run %s: %s; given up here: %s", head.run, error, reason)
    else:
        await telemetry.event("run-failed", f"run {head.run}: {reason}", level="error")


async def commit_initial(
    bus: Bus, keeper: HeadKeeper, reducer: Reducer, manifest: Manifest, rolled_back: int | None
) -> None:
    """The model as the task makes it under the run's seed. `rolled_back`: as in `taken_over`."""
    merged = await reducer.put_center()
    prefix = partial(subjects.model_prefix, keeper.head.run)
    layout = await put_record(bus, prefix, encode(manifest))
    moved = {"model": merged.model, "digest": merged.digest, "manifest": layout, "roster": None, "phase": "waiting"}
    head = keeper.head if rolled_back is None else await taken_over(bus, keeper.head, rolled_back)
    await keeper.check()  # a broker that was set back gives revisions again
    await keeper.write(head.changed(**moved))
