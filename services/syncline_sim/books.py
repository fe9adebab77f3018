"""Who looks on while a world plays: told of every message that a stream takes, of what is purged, and of what is said."""

from __future__ import annotations

from typing import Protocol

from syncline.bus.base import Stored
from syncline.bus.memory_store import Store
from syncline.wire.messages import Head, Heartbeat


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
        """As they are now, for `set_back`."""
        ...

    def set_back(self, then: Books, store: Store) -> None:
        """The broker lost what came after `then`, or some of it: `store` is what it holds."""
        ...

    def told(self, subject: str, data: bytes) -> None:
        """A metric or an event was published."""
        ...
