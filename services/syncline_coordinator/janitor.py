"""Keeps the updates stream clean: blobs that were put and never offered go after a time, and an agent over quota is named.

An agent that was killed while it sent leaves such a blob behind; a stolen key could fill the stream with them. A blob that
still grows is on its way, however long that takes: over a thin link it may be many minutes.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from syncline.bus.base import Bus
from syncline.bus.blobs import UNOFFERED_S
from syncline.errors import BusError, PeerError
from syncline.observe.telemetry import Telemetry
from syncline.wire import subjects
from syncline_coordinator.purge import Purger

LOOK_S = 20.0
QUOTA_BLOBS = 2  # of one agent, neither judged nor offered


@dataclass(slots=True)
class _Unoffered:
    """A blob that nobody offered yet, as the looks at it saw it."""

    seen_at_s: float  # first
    chunks: int = 0
    grown_at_s: float = 0.0  # seen with more chunks than before


class Janitor:
    """`offered()`: ids of the blobs that are offered and not judged."""

    def __init__(
        self, bus: Bus, run: str, purger: Purger, telemetry: Telemetry, offered: Callable[[], set[str]]
    ) -> None:
        self._bus, self._run, self._purger, self._telemetry, self._offered = bus, run, purger, telemetry, offered
        self._unoffered: dict[tuple[str, str], _Unoffered] = {}  # by (agent, blob)
        self._named: set[str] = set()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.look(asyncio.get_running_loop().time())
            except BusError:
                pass  # looked at again soon

    async def look(self, now_s: float) -> None:
        """One look: purges what is too old, names who holds too much."""
        state = await self._bus.state(subjects.updates_stream(self._run), subjects.every_update(self._run))
        offered = self._offered()
        chunks = Counter(blob for blob in map(_blob_of, state.subjects) if blob and blob[1] not in offered)
        self._unoffered = {blob: self._unoffered.get(blob, _Unoffered(now_s)) for blob in sorted(chunks)}
        for blob, known in self._unoffered.items():
            if chunks[blob] > known.chunks:
                known.chunks, known.grown_at_s = chunks[blob], now_s
            elif now_s - known.grown_at_s > UNOFFERED_S:
                self._purger.add(subjects.updates_stream(self._run), subjects.update_prefix(self._run, *blob))
        stays = Counter(agent for (agent, _), known in self._unoffered.items() if known.seen_at_s < now_s)  # not new
        over = {agent for agent, count in stays.items() if count > QUOTA_BLOBS}
        for agent in sorted(over - self._named):
            text = (
                f"{agent} holds more than {QUOTA_BLOBS} blobs that it never offered; they go when they have not grown "
                f"for {UNOFFERED_S:g} s"
            )
            await self._telemetry.event("over-quota", text, level="warning", agent=agent)
        self._named = over


def _blob_of(subject: str) -> tuple[str, str] | None:
    tokens = subject.split(".")
    try:
        return subjects.agent_of(subject), tokens[6]
    except (PeerError, IndexError):
        return None
