"""Who looks on while a world plays: told of every message that a stream takes, of what is purged, and of what is said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import msgpack

from syncline.bus.base import Stored
from syncline.bus.memory.store import Store
from syncline.wire import subjects
from syncline.wire.messages import BlobRef, Committed, Head, Heartbeat, LogLine, decode


class Books(Protocol):
    """The world stops as soon as there is a problem."""

    problems: list[str]
    merged: dict[tuple[str, int], int]  # (agent, clock) → version
    incomplete: bool  # the broker lost what its head names

    @property
    def head(self) -> Head | None:
        """The newest."""
        ...

    def stored(self, stream: str, message: Stored) -> str:
        """Returns what the timeline is to say of it, or ''."""
        ...

    def purged(self, stream: str, removed: list[str]) -> None: ...

    def heard(self, beat: Heartbeat) -> None:
        """An agent says what it has seen."""
        ...

    def wrote(self, who: str, head: Head) -> None:
        """Head was changed, and this is whose it is."""
        ...

    def copy(self) -> Books:
        """As they are now, for `rolled_back`."""
        ...

    def rolled_back(self, then: Books, store: Store) -> None:
        """The broker lost what came after `then`, or some of it: `store` is what it holds."""
        ...

    def told(self, subject: str, data: bytes) -> None:
        """A metric or an event was published."""
        ...

    def answered(self, agent: str, heard_s: float) -> None:
        """The coordinator in charge has taken a heartbeat, at this time of the wall clock or later."""
        ...


def content(prefix: str, ref: BlobRef, frames: Mapping[str, bytes]) -> bytes:
    """What the frames of a blob hold, by their subjects. Raises KeyError for one that is missing."""
    return b"".join(msgpack.unpackb(frames[f"{prefix}.{k}"])["data"] for k in range(ref.chunks))


def is_line(subject: str) -> bool:
    """Whether a subject of the log is a commit's line; else it is a chunk of a record."""
    return subject.count(".") == subjects.log_record("r", 0, 0).count(".")


def record_of(run: str, line: LogLine, frames: Mapping[str, bytes]) -> Committed | None:
    """The record of a line, or None where a part of it is not there."""
    try:
        if isinstance(line.record, bytes):
            return decode(Committed, line.record)
        return decode(
            Committed, content(subjects.log_blob(run, line.version, line.term, line.record.id), line.record, frames)
        )
    except KeyError:
        return None
