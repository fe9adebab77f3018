"""Runs on a bus: their names, heads, specs and records, read with a coordinator's key."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from syncline.bus.base import Bus
from syncline.bus.blobs import BlobGone
from syncline.bus.records import record_of
from syncline.errors import BusError, ConfigError, NoResponders, PeerError, Unavailable
from syncline.spec.run_spec import RunSpec
from syncline.spec.submission import submitted_spec
from syncline.wire import subjects
from syncline.wire.messages import ENDED, Head, Presence, Roster, Submit, decode

MAX_NAMED = 8  # runs that an error lists
CONCURRENT_READS = 16
ANSWER_S = 5.0


# -- single records --------------------------------------------------------------------------------------------------
async def names(bus: Bus) -> list[str]:
    """Return the names of all submitted runs, sorted; an empty list if no coordinator was ever on this bus."""
    try:
        keys = await bus.kv_keys(subjects.RUNS_BUCKET)
    except Unavailable as error:
        if "JetStream" in str(error):
            raise
        return []
    return sorted({key.rpartition(".")[0] for key in keys})


async def head_of(bus: Bus, run: str) -> Head:
    """Return the run's head.

    Raises:
        ConfigError: no such run, with similar names; or its head cannot be read by this version.
    """
    if subjects.NAME.fullmatch(run):
        try:
            entry = await bus.kv_get(subjects.RUNS_BUCKET, subjects.head_key(run))
        except NoResponders:  # the bucket does not exist yet
            entry = None
        if entry is not None:
            return _decoded(run, entry.value)
    known = await names(bus)
    if run in known:
        raise ConfigError("RUN", f"{run} was submitted just now and has no head yet", "Ask again in a moment")
    raise ConfigError("RUN", f"there is no run {run!r}", suggestion(run, known))


def suggestion(run: str, known: Iterable[str]) -> str:
    """Return a hint with runs that the user may have meant."""
    known = list(known)
    close = difflib.get_close_matches(run, known, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(f'`{name}`' for name in close)}?"
    if not known:
        return "No run was ever submitted on this broker; submit one with `syncline run SPEC.yaml`"
    more = f" and {len(known) - MAX_NAMED} more" if len(known) > MAX_NAMED else ""
    return f"Runs: {', '.join(known[:MAX_NAMED])}{more}"


async def spec_of(bus: Bus, run: str) -> RunSpec | None:
    """Return the run's settings; None if they are missing, or written by a newer Syncline."""
    entry = await bus.kv_get(subjects.RUNS_BUCKET, subjects.spec_key(run))
    try:
        return None if entry is None else submitted_spec(decode(Submit, entry.value))
    except (PeerError, ConfigError):
        return None


def _decoded(run: str, data: bytes) -> Head:
    try:
        return decode(Head, data)
    except PeerError as error:
        raise ConfigError(
            "RUN", f"the head of {run} cannot be read: {error}", "Use the Syncline version that wrote it"
        ) from None


# -- the list of runs ------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class RunSummary:
    """A run as it is listed."""

    run: str
    phase: str  # as in head; `queued` before the run's model is made
    version: int
    versions: int | None  # commits after which the run is done; None if its spec cannot be read
    agents: int  # present or slow ones, in the newest round
    slow: int  # those of them that make no progress
    roster: int  # all agents that ever took part
    task: str
    reason: str  # of the last round's end, or of the run's
    revision: int  # of the spec: the order of submission

    @property
    def ended(self) -> bool:
        return self.phase in ENDED


async def summaries(bus: Bus) -> list[RunSummary]:
    """Return all runs with a head that can be read, the newest first."""
    known = await names(bus)
    found: list[RunSummary | None] = []
    for i in range(0, len(known), CONCURRENT_READS):
        found += await asyncio.gather(*(_summary(bus, name) for name in known[i : i + CONCURRENT_READS]))
    return sorted((row for row in found if row is not None), key=lambda row: -row.revision)


async def _summary(bus: Bus, name: str) -> RunSummary | None:
    entry = await bus.kv_get(subjects.RUNS_BUCKET, subjects.spec_key(name))
    spec = await spec_of(bus, name)
    agents = slow = roster = 0
    try:
        head = await head_of(bus, name)
        if head.roster is not None:
            members = decode(Roster, await record_of(bus, name, head.roster))
            slow = members.presence.count(Presence.SLOW)
            agents = slow + members.presence.count(Presence.PRESENT)
            roster = len(members.agents)
    except BlobGone:
        pass  # a newer head has another roster
    except ConfigError:
        return None  # without a head yet, or with one of a newer Syncline
    queued = head.phase not in ENDED and head.manifest is None
    return RunSummary(
        run=name,
        phase="queued" if queued else head.phase,
        version=head.version,
        versions=spec.stop.versions if spec is not None else None,
        agents=agents,
        slow=slow,
        roster=roster,
        task=spec.task if spec is not None else "",
        reason=head.reason,
        revision=entry.revision if entry is not None else 0,
    )


async def coordinator_answers(bus: Bus) -> bool:
    """Tell whether a coordinator is up: an empty submission is refused, and a refusal is an answer."""
    try:
        await bus.request(subjects.submit(), b"", ANSWER_S)
    except BusError:
        return False
    return True
