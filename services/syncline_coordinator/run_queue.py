"""The queue of runs that have not ended: how runs enter and leave the queue.

The queue is on the bus, so that every coordinator finds the same one.
"""

from __future__ import annotations

import asyncio
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
from syncline.wire.messages import ENDED, Head, Stop, Stopped, Submit, encode
from syncline_coordinator.head import Deposed, HeadKeeper
from syncline_coordinator.merge.reducer import Reducer
from syncline_coordinator.recovery import head_under_new_term
from syncline_coordinator.reservation import RUNS, release

log = logging.getLogger(__name__)


def exists(head: Head) -> ConfigError:
    """Return the refusal of a run whose name is taken."""
    there, other = f"there is a run {head.run!r} already", "or choose another name (--name)"
    if head.phase in ENDED:
        hint = f"See how it went with `syncline why {head.run}`, {other}"
        return ConfigError("name", f"{there}, and it has ended: {head.reason}", hint)
    hint = f"Follow it with `syncline watch {head.run}`, end it with `syncline stop {head.run}`, {other}"
    return ConfigError("name", f"{there}: {head.phase}, at version {head.version}", hint)


def payload_too_small(max_payload: int) -> ConfigError:
    """Return the refusal of a run on a broker whose messages are too small."""
    problem = f"the broker takes messages of at most {max_payload} bytes, a run needs {LEAST_PAYLOAD_BYTES}"
    hint = f"Set max_payload: {MAX_PAYLOAD_BYTES} in the broker's configuration, on every server alike, and reload it"
    return ConfigError("max_payload", problem, hint)


def gone(name: str, error: BlobGone) -> str:
    """Return the reason of a run that fails because its head names a lost blob."""
    hint = f"Give the broker its store back, or submit the run again under another name; {name} itself cannot go on"
    return f"a blob that head names is not on the bus any more: {error}. {hint}"


class RunQueue:
    """The runs that have not ended, the oldest first.

    Remembers those that have ended, so that reading costs the same however many there are.
    """

    def __init__(self, bus: Bus) -> None:
        self.names: list[str] = []  # as last read
        self.changed = asyncio.Event()  # set: read the queue now
        self._bus = bus
        self._ended: set[str] = set()
        self._found: list[str] = []
        self._bucket_at: tuple[int, int, int] | None = None  # losses of the connection, and state of the bucket

    @property
    def first(self) -> str:
        """The name of the oldest run, or '?'."""
        return self.names[0] if self.names else "?"

    async def put(self, name: str, record: Submit) -> None:
        """Queue an accepted run. Raises ConfigError if a run of that name exists."""
        try:
            await self._bus.kv_create(subjects.RUNS_BUCKET, subjects.spec_key(name), encode(record))
        except Conflict:
            raise exists(Head(run=name, term=1, version=0, phase="waiting")) from None
        await first_head(self._bus, name)
        self._ended.discard(name)  # a run that had this name before may have ended
        self._bucket_at = None
        self.names.append(name)

    def remove(self, name: str) -> None:
        """Take a run out of the names as last read."""
        self.names = [other for other in self.names if other != name]

    async def read(self) -> list[str]:
        """Read the names from the bus. A run whose head cannot be read is left out, and logged."""
        losses = self._bus.losses
        await with_retries(partial(self._bus.ensure_bucket, RUNS))  # a broker may have lost even that
        state = await with_retries(partial(self._bus.state, f"KV_{subjects.RUNS_BUCKET}"))
        bucket_at = losses, state.last_seq, state.messages
        if bucket_at != self._bucket_at:
            if self._bucket_at is None or self._bucket_at[0] != losses:  # the broker may be back with an older store
                self._ended.clear()
            self._found = await self._read_bucket()
            self._bucket_at = bucket_at
        self.names = list(self._found)
        return self.names

    async def _read_bucket(self) -> list[str]:
        found = []
        for key in await with_retries(partial(self._bus.kv_keys, subjects.RUNS_BUCKET)):
            name, _, kind = key.rpartition(".")
            if kind != "spec" or name in self._ended:
                continue
            try:
                revision = await self._revision_of(name)
            except PeerError as error:
                log.error("run %s: its head cannot be read: %s", name, error)
                continue
            if revision is not None:
                found.append((revision, name))
        return [name for _, name in sorted(found)]

    async def _revision_of(self, name: str) -> int | None:
        """Return the revision of the run's spec, or None for a run that has ended."""
        keeper = await HeadKeeper.read(self._bus, name)
        if keeper is not None and keeper.head.phase in ENDED:
            self._ended.add(name)
            return None
        entry = await with_retries(partial(self._bus.kv_get, subjects.RUNS_BUCKET, subjects.spec_key(name)))
        if entry is not None and keeper is None:  # a coordinator that accepted the run died between spec and head
            await with_retries(partial(first_head, self._bus, name))
            keeper = await HeadKeeper.read(self._bus, name)
        if entry is None or keeper is None or keeper.head.phase in ENDED:
            return None
        return entry.revision


async def first_head(bus: Bus, name: str) -> None:
    """Create the first head of a run, unless there is one: another coordinator was faster then."""
    try:
        await HeadKeeper.create(bus, Head(run=name, term=1, version=0, epoch=new_number(), phase="waiting"))
    except Conflict:
        pass


TRIES = 5  # each lost to another coordinator that moved head meanwhile


def stop_reason(stop: Stop) -> str:
    """Return the reason for head, events and the commit log, without the control characters that `stop.by` may hold."""
    by = "".join(c if c.isprintable() else "�" for c in stop.by).strip()
    return f"stopped by {by or 'somebody'}"


async def end_undriven(bus: Bus, stop: Stop) -> Stopped:
    """End a run that no host drives: move head to `done` under a higher term.

    So a coordinator that is opening the run learns that it has ended.

    Raises:
        BusError: the bus is out of reach.
        Deposed: head moved at each of `TRIES` tries.
    """
    run, reason = stop.run, stop_reason(stop)
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
    """End a run whose coordinator died between its spec and its head: create a head that says so."""
    spec = await with_retries(partial(bus.kv_get, subjects.RUNS_BUCKET, subjects.spec_key(stop.run)))
    if spec is None:
        return Stopped(run=stop.run, outcome="unknown")
    await HeadKeeper.create(bus, Head(run=stop.run, term=1, version=0, phase="done", reason=stop_reason(stop)))
    await release(bus, stop.run, ended=True)
    return Stopped(run=stop.run, outcome="stopped", reason=stop_reason(stop))


async def give_up(keeper: HeadKeeper, reason: str, telemetry: Telemetry) -> None:
    """End the run as failed, unless another coordinator has advanced it: this coordinator's view is stale then."""
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
    bus: Bus, keeper: HeadKeeper, reducer: Reducer, manifest: Manifest, lost_term: int | None
) -> None:
    """Commit version 0: the model as the task makes it under the run's seed.

    Args:
        lost_term: as in `head_under_new_term`.
    """
    merged = await reducer.put_center()
    prefix = partial(subjects.model_prefix, keeper.head.run)
    layout = await put_record(bus, prefix, encode(manifest))
    moved = {"model": merged.model, "digest": merged.digest, "manifest": layout, "roster": None, "phase": "waiting"}
    head = keeper.head if lost_term is None else await head_under_new_term(bus, keeper.head, lost_term)
    await keeper.check()  # a broker that was set back gives revisions again
    await keeper.write(head.changed(**moved))
