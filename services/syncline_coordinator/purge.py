"""Removes blobs that nobody needs any more: updates that were judged, models older than those that are kept.

Purges name blobs, never "all but". They run beside the rounds, and a purge that fails is tried again with the next. None is
asked for while the broker may have come back with an older store, in which what was judged is not.
"""

from __future__ import annotations

import asyncio
from collections import deque

from syncline.bus.base import Bus
from syncline.errors import BusError
from syncline_coordinator.head import Sure

AT_ONCE = 4
PAUSE_S = 0.02


class Purger:
    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._due: deque[tuple[str, str]] = deque(maxlen=100_000)
        self._woken = asyncio.Event()

    def add(self, stream: str, prefix: str, *, itself: bool = False) -> None:
        """The blob whose chunks lie under `prefix`. `itself`: and what lies at that subject."""
        self._due.append((stream, f"{prefix}.>"))
        if itself:
            self._due.append((stream, prefix))
        self._woken.set()

    async def run(self, sure: Sure) -> None:
        """`sure()`: the broker holds what this coordinator believes it does, or it raises."""
        while True:
            await self._woken.wait()
            self._woken.clear()
            while self._due:
                await sure()
                batch = [self._due.popleft() for _ in range(min(AT_ONCE, len(self._due)))]
                results = await asyncio.gather(*(self._bus.purge(s, p) for s, p in batch), return_exceptions=True)
                self._due.extend(b for b, r in zip(batch, results, strict=True) if isinstance(r, BusError))
                if any(isinstance(r, BusError) for r in results):
                    await asyncio.sleep(1.0)
            await asyncio.sleep(PAUSE_S)
