"""The simulated network: message delays, lost messages, and links of limited rate."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from syncline.bus.memory.faults import BROKER, CORE_KINDS
from syncline_sim.rng import Rng
from syncline_sim.settings import Link

SMALL_BYTES = 16 * 1024  # a message up to this size is sent between the packets of larger ones and does not queue


@dataclass(slots=True)
class Network:
    """Uniform delays up to `longest_s`. Faults set `share_lost` and `slow_s` for a while."""

    rng: Rng
    longest_s: float
    share_lost: float = 0.0  # of core messages
    slow_s: dict[str, float] = field(default_factory=dict)  # service → additional delay of its messages

    def delay(self, source: str, target: str, kind: str, size_bytes: int) -> float | None:
        """Return the seconds that a message takes, or None if it is lost.

        Args:
            source: connection of the sender, or BROKER.
            target: connection of the receiver, or BROKER.
            kind: of the message, as the memory broker names it.
            size_bytes: of the message.
        """
        if self.share_lost and kind in CORE_KINDS and self.rng.random() < self.share_lost:
            return None
        return self.rng.uniform(0.0, self.longest_s) + self.slow_s.get(_service(source, target), 0.0)


@dataclass(slots=True)
class LinkDirection:
    """One direction of one agent's link."""

    bits_per_s: float | None  # None: no limit
    free_at_s: float = 0.0  # when the last queued message has been sent
    bytes: int = 0  # sent in this direction since the start

    def wait_s(self, size_bytes: int, now_s: float) -> float:
        """Return the seconds until the last bit of a message is sent. Large messages queue, because they share the rate."""
        self.bytes += size_bytes
        if self.bits_per_s is None:
            return 0.0
        takes_s = 8 * size_bytes / self.bits_per_s
        if size_bytes <= SMALL_BYTES:
            return takes_s
        self.free_at_s = max(self.free_at_s, now_s) + takes_s
        return self.free_at_s - now_s


@dataclass(slots=True)
class LinkNetwork(Network):
    """A network in which each agent has a link of its own. A service without one, such as the coordinator, has no limit."""

    links: Mapping[str, Link] = field(default_factory=dict)  # agent → settings of its link
    up: dict[str, LinkDirection] = field(default_factory=dict)
    down: dict[str, LinkDirection] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for agent, link in self.links.items():
            self.up[agent] = LinkDirection(_bits(link.up_mbit))
            self.down[agent] = LinkDirection(_bits(link.down_mbit))

    def delay(self, source: str, target: str, kind: str, size_bytes: int) -> float | None:
        delay_s = Network.delay(self, source, target, kind, size_bytes)
        service = _service(source, target)
        link = self.links.get(service)
        if link is None or delay_s is None:
            return delay_s
        direction = (self.down if source == BROKER else self.up)[service]
        return delay_s + link.delay_s + direction.wait_s(size_bytes, asyncio.get_running_loop().time())


def _service(source: str, target: str) -> str:
    """Return the service at the other end from the broker."""
    return (target if source == BROKER else source).partition("/")[0]


def _bits(mbit: float | None) -> float | None:
    return None if mbit is None else mbit * 1e6
