"""What the bus knows of runs, read by those who may: names, heads, specs, commit records, models."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import partial

from syncline.bus.base import Bus
from syncline.bus.blobs import BlobGone, get_record
from syncline.bus.commits import line_of, record_in
from syncline.errors import ConfigError, NoResponders, PeerError, Unavailable
from syncline.spec.run_spec import RunSpec
from syncline.spec.submission import submitted_spec
from syncline.wire import subjects
from syncline.wire.messages import MAX_BLOB_RECORD_BYTES, BlobRef, Committed, Head, Submit, decode

NAMED = 8  # runs that an error lists


async def names(bus: Bus) -> list[str]:
    """Every run that was ever submitted, sorted; none where no coordinator has ever been."""
    try:
        keys = await bus.kv_keys(subjects.RUNS_BUCKET)
    except Unavailable as error:
        if "JetStream" in str(error):
            raise
        return []
    return sorted({key.rpartition(".")[0] for key in keys})


async def head_of(bus: Bus, run: str) -> Head:
    """Raises ConfigError, with the names that are near, where there is no such run."""
    if subjects.NAME.fullmatch(run):
        try:
            entry = await bus.kv_get(subjects.RUNS_BUCKET, subjects.head_key(run))
        except NoResponders:  # there is no bucket yet
            entry = None
        if entry is not None:
            return _readable(run, entry.value)
    known = await names(bus)
    if run in known:
        raise ConfigError("RUN", f"{run} was submitted just now and has no head yet", "Ask again in a moment")
    raise ConfigError("RUN", f"there is no run {run!r}", near(run, known))


def near(run: str, known: Iterable[str]) -> str:
    """What to type instead."""
    known = list(known)
    close = difflib.get_close_matches(run, known, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(f'`{name}`' for name in close)}?"
    if not known:
        return "No run was ever submitted there; submit one with `syncline run SPEC.yaml`"
    more = f" and {len(known) - NAMED} more" if len(known) > NAMED else ""
    return f"There are: {', '.join(known[:NAMED])}{more}"


async def spec_of(bus: Bus, run: str) -> RunSpec | None:
    """None where it is not there, or a newer Syncline's."""
    entry = await bus.kv_get(subjects.RUNS_BUCKET, subjects.spec_key(run))
    try:
        return None if entry is None else submitted_spec(decode(Submit, entry.value))
    except (PeerError, ConfigError):
        return None


async def record(bus: Bus, run: str, ref: BlobRef) -> bytes:
    """A record that travels as a blob: a roster, a manifest. Raises BlobGone."""
    prefix = partial(subjects.model_prefix, run)
    return await get_record(bus, subjects.model_stream(run), prefix, ref, MAX_BLOB_RECORD_BYTES)


async def commit_of(bus: Bus, head: Head, version: int) -> Committed:
    """The record of a commit, under the highest term: one under a lower term was put and then not committed.

    Raises ConfigError for a version that is not there.
    """
    run, newest = head.run, head.version
    if not newest:
        raise ConfigError("VERSION", f"{run} has committed no version yet ({head.phase})", "Ask again when it has")
    if version > newest or version < 1:
        why = "is the initial model, which nothing was merged into" if version == 0 else "does not exist"
        raise ConfigError("VERSION", f"version {version} of {run} {why}", f"There are versions 1 to {newest}")
    if (line := await line_of(bus, run, version, head.term)) is not None:
        try:
            return await record_in(bus, run, line)
        except BlobGone as error:
            problem = f"the record of version {version} of {run} is not whole: {error}"
            raise ConfigError(
                "VERSION", problem, "The broker has lost a part of it: other versions may be there"
            ) from None
    oldest = await bus.read(subjects.log_stream(run), 1, 1)
    kept = f"It holds versions {oldest[0].subject.split('.')[4]} to {newest}" if oldest else "It is empty"
    raise ConfigError("VERSION", f"version {version} of {run} is no longer in the log", kept)


def _readable(run: str, data: bytes) -> Head:
    try:
        return decode(Head, data)
    except PeerError as error:
        raise ConfigError(
            "RUN", f"the head of {run} cannot be read: {error}", "Use the Syncline that wrote it"
        ) from None
