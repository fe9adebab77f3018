"""The log of commits: one small line for each commit, with its record inside, or with the blob that holds the record.

A record grows by some 200 bytes with every update of its merge, and a message may not. The chunks of a large record lie in
the stream of its line, under the line's own subject, so that both are reserved together and stay as long as each other. The
record is put before its line: a coordinator that dies in between leaves chunks that no line names, and the next one purges
them.
"""

from __future__ import annotations

from functools import partial

from syncline.bus.base import Bus
from syncline.bus.blobs import get_record, put_record, with_retries
from syncline.wire import subjects
from syncline.wire.messages import LINE_INLINE_BYTES, MAX_BLOB_RECORD_BYTES, BlobRef, Committed, LogLine, decode, encode

INLINE_SHARE = 32  # of a message that the broker takes: at most one part in so many is a record inside its line


async def put_commit(bus: Bus, record: Committed) -> None:
    """Put the record of a commit, then its line. Raises StreamFull where the log has no room."""
    data = encode(record)
    held: bytes | BlobRef = data
    if len(data) > min(LINE_INLINE_BYTES, bus.max_payload // INLINE_SHARE):
        held = await put_record(bus, partial(subjects.log_blob, record.run, record.version, record.term), data)
    line = LogLine(version=record.version, term=record.term, model=record.model, record=held)
    subject = subjects.log_record(record.run, record.version, record.term)
    await with_retries(partial(bus.put, subject, encode(line)))


async def line_of(bus: Bus, run: str, version: int, most_term: int) -> LogLine | None:
    """Return the line of a committed version: the one under the highest term up to `most_term`, which is head's.

    A line under a lower term was put by a coordinator that was replaced before it could commit.
    """
    stream, every_term = subjects.log_stream(run), subjects.log_record(run, version, "*")
    found = (await with_retries(partial(bus.state, stream, every_term))).subjects
    terms = [term for term in (int(subject.rpartition(".")[2]) for subject in found) if term <= most_term]
    if not terms:
        return None
    stored = await with_retries(partial(bus.get, stream, subjects.log_record(run, version, max(terms))))
    return None if stored is None else decode(LogLine, stored.data)


async def record_in(bus: Bus, run: str, line: LogLine) -> Committed:
    """Return the whole record of a line. Raises BlobGone where the broker has lost a part of it."""
    data = line.record
    if not isinstance(data, bytes):
        prefix = partial(subjects.log_blob, run, line.version, line.term)
        data = await get_record(bus, subjects.log_stream(run), prefix, data, MAX_BLOB_RECORD_BYTES)
    return decode(Committed, data)
