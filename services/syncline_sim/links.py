"""The agents' connections in a simulated fleet: each with a delay, and a rate that what it sends and gets shares."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from syncline.bus.memory.faults import BROKER
from syncline_sim.faults import Weather
from syncline_sim.settings import Link

SMALL_BYTES = 16 * 1024  # a message up to this size finds a gap between the large ones


@dataclass(slots=True)
class Way:
    """One direction of one connection."""

    bits_per_s: float | None
    free_at_s: float = 0.0
    bytes: int = 0  # that ever went this way

    def wait_s(self, size_bytes: int, now_s: float) -> float:
        """Seconds until the last bit of the message is on its way. Large ones queue, as they share the rate."""
        self.bytes += size_bytes
        if self.bits_per_s is None:
            return 0.0
        takes_s = 8 * size_bytes / self.bits_per_s
        if size_bytes <= SMALL_BYTES:
            return takes_s
        self.free_at_s = max(self.free_at_s, now_s) + takes_s
        return self.free_at_s - now_s


@dataclass(slots=True)
class Links(Weather):
    """Whoever has no link, as the coordinator, is beside the broker."""

    links: Mapping[str, Link] = field(default_factory=dict)
    up: dict[str, Way] = field(default_factory=dict)
    down: dict[str, Way] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for who, link in self.links.items():
            self.up[who], self.down[who] = Way(_bits(link.up_mbit)), Way(_bits(link.down_mbit))

    def delay(self, source: str, target: str, kind: str, size_bytes: int) -> float | None:
        delay_s = Weather.delay(self, source, target, kind, size_bytes)
        who = (target if source == BROKER else source).partition("/")[0]
        link = self.links.get(who)
        if link is None or delay_s is None:
            return delay_s
        way = (self.down if source == BROKER else self.up)[who]
        return delay_s + link.delay_s + way.wait_s(size_bytes, asyncio.get_running_loop().time())


def _bits(mbit: float | None) -> float | None:
    return None if mbit is None else mbit * 1e6
