"""The interface through which a cluster reports everything that happens, and readers of the log of commits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import msgpack

from syncline.bus.base import Stored
from syncline.bus.memory.store import Store
from syncline.wire import subjects
from syncline.wire.messages import BlobRef, Committed, Head, Heartbeat, LogLine, decode


class Observer(Protocol):
    """Receives every event of a cluster. The cluster stops as soon as `problems` is not empty."""

    problems: list[str]
    merged: dict[tuple[str, int], int]  # (agent, clock) → the version that the update was merged into
    incomplete: bool  # the broker has lost a blob that its head names

    @property
    def head(self) -> Head | None:
        """The newest head; None before the run is accepted."""
        ...

    def on_stored(self, stream: str, message: Stored) -> str:
        """Take note of a stored message. Return the line for the timeline, or ''."""
        ...

    def on_purged(self, stream: str, removed: list[str]) -> None:
        """Take note of subjects that were purged from a stream."""
        ...

    def on_heartbeat(self, beat: Heartbeat) -> None:
        """Take note of a heartbeat that an agent sends."""
        ...

    def on_heartbeat_answered(self, agent: str, heard_s: float) -> None:
        """Take note that the coordinator in charge received the agent's heartbeat at `heard_s` (wall clock) or later."""
        ...

    def on_head_written(self, connection: str, head: Head) -> None:
        """Take note of a new head and of the connection that wrote it."""
        ...

    def on_published(self, subject: str, data: bytes) -> None:
        """Take note of a core message: a metric or an event."""
        ...

    def on_rolled_back(self, then: Observer, store: Store) -> None:
        """Take note that the broker came back with an older store.

        Args:
            then: a copy of this observer from the time of the older store.
            store: everything that the broker holds now; some streams may be newer than `then`.
        """
        ...

    def copy(self) -> Observer:
        """Return a copy for `on_rolled_back`."""
        ...


def content(prefix: str, ref: BlobRef, frames: Mapping[str, bytes]) -> bytes:
    """Return the content of a blob from its frames by subject.

    Raises:
        KeyError: a frame is missing.
    """
    return b"".join(msgpack.unpackb(frames[f"{prefix}.{k}"])["data"] for k in range(ref.chunks))


def is_line(subject: str) -> bool:
    """Return whether a subject of the log is the line of a commit; the others are chunks of large records."""
    return subject.count(".") == subjects.log_record("r", 0, 0).count(".")


def record_of(run: str, line: LogLine, frames: Mapping[str, bytes]) -> Committed | None:
    """Return the record of a line in the log, or None if one of its chunks is missing."""
    if isinstance(line.record, bytes):
        return decode(Committed, line.record)
    prefix = subjects.log_blob(run, line.version, line.term, line.record.id)
    try:
        return decode(Committed, content(prefix, line.record, frames))
    except KeyError:
        return None
