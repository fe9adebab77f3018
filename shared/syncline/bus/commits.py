"""The log of commits: one small line for each commit. The line contains the commit's record, or names the blob with the record.

A record grows by some 200 bytes with every update of its merge, while the size of a message is limited. The chunks of a large
record are stored in the stream of the line, under the subject of the line, so that line and record share one reservation and
one lifetime. The record is put before its line: a coordinator that dies between the two leaves chunks that no line names, and
the next coordinator purges them.
"""

from __future__ import annotations

from functools import partial

from syncline.bus.base import Bus
from syncline.bus.blobs import get_record, put_record, with_retries
from syncline.errors import Unavailable
from syncline.wire import subjects
from syncline.wire.messages import LOG_INLINE_BYTES, MAX_BLOB_RECORD_BYTES, BlobRef, Committed, LogLine, decode, encode

INLINE_SHARE = 32  # a record inside its line takes at most this fraction, 1/32, of the largest message of the broker


async def put_commit(bus: Bus, record: Committed) -> None:
    """Put the record of a commit, then its line.

    Raises:
        StreamFull: the log has no room.
        Unreachable: the bus did not answer for `blobs.PATIENCE_S` seconds.
    """
    data = encode(record)
    held: bytes | BlobRef = data
    if len(data) > min(LOG_INLINE_BYTES, bus.max_payload // INLINE_SHARE):
        held = await put_record(bus, partial(subjects.log_blob, record.run, record.version, record.term), data)
    line = LogLine(version=record.version, term=record.term, model=record.model, record=held)
    subject = subjects.log_record(record.run, record.version, record.term)
    await with_retries(partial(bus.put, subject, encode(line)))


async def line_of(bus: Bus, run: str, version: int, most_term: int) -> LogLine | None:
    """Return the line of a committed version, or None if the log has none.

    Several coordinators may have put a line of one version. The line with the highest term counts: a line with a lower term
    comes from a coordinator that was replaced before the commit.

    Args:
        bus: the bus of the run.
        run: name of the run.
        version: the committed version.
        most_term: the term in head; lines with a higher term are ignored.
    """
    stream, every_term = subjects.log_stream(run), subjects.log_record(run, version, "*")
    found = (await with_retries(partial(bus.state, stream, every_term))).subjects
    terms = [term for term in (int(subject.rpartition(".")[2]) for subject in found) if term <= most_term]
    if not terms:
        return None
    stored = await with_retries(partial(bus.get, stream, subjects.log_record(run, version, max(terms))))
    return None if stored is None else decode(LogLine, stored.data)


async def holds_commit(bus: Bus, run: str, version: int, term: int) -> bool:
    """Return whether the log holds the line of this version and term, and every chunk of its record."""
    try:
        line = await line_of(bus, run, version, term)
        if line is None or line.term != term:
            return False
        if isinstance(line.record, bytes):
            return True
        chunks = f"{subjects.log_blob(run, version, term, line.record.id)}.*"
        state = await with_retries(partial(bus.state, subjects.log_stream(run), chunks))
    except Unavailable:  # the broker has lost the stream
        return False
    return len(state.subjects) >= line.record.chunks


async def record_in(bus: Bus, run: str, line: LogLine) -> Committed:
    """Return the whole record of a line.

    Raises:
        BlobGone: the broker has lost a part of the record.
        PeerError: the record is not valid.
    """
    data = line.record
    if not isinstance(data, bytes):
        prefix = partial(subjects.log_blob, run, line.version, line.term)
        data = await get_record(bus, subjects.log_stream(run), prefix, data, MAX_BLOB_RECORD_BYTES)
    return decode(Committed, data)
