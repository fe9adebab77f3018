"""Tells once that the broker stores nothing, as its disk is full, and once that it takes versions again."""

from __future__ import annotations

from syncline.errors import StoreDown, StreamFull
from syncline.observe.telemetry import Telemetry

MORE_ROOM = (
    "Free some of the disk that holds its JetStream store, or raise max_file_store. A nats-server whose log says that "
    "JetStream was disabled must be started again. The run goes on by itself then"
)


class Room:
    def __init__(self, events: Telemetry) -> None:
        self._events = events
        self._is_full = False

    async def refused(self, run: str, error: StreamFull | StoreDown) -> None:
        """A write of this run found no room."""
        if not self._is_full:
            self._is_full = True
            text = f"the broker stores nothing, and run {run} waits: {error}. {MORE_ROOM}"
            await self._events.event("broker-full", text, level="error")

    async def committed(self) -> None:
        """A version was written as a whole, so that there is room."""
        if self._is_full:
            self._is_full = False
            await self._events.event("broker-has-room", "the broker takes new versions again", level="warning")
