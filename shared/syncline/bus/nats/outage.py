"""The log lines about lost connections: one for the loss, one for each cause that keeps the broker away, one for its
return.

Time is an argument.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

log = logging.getLogger(__name__)

JUST_NOW_S = 1.0  # an error so long before a connection is lost is its cause
MOST_CAUSES = 8  # that are told in one outage
REFUSED_KEY = "it refuses this key, which is unknown to it or was revoked. Ask the operator of the broker for a new one"
NO_SERVER = "no server listens there. Is nats-server running?"
TOO_LATE = "it does not answer in time"
NO_CAUSE = "it answers nothing"


@dataclass(slots=True)
class Outage:
    """The state of all connections of one bus, each called a lane."""

    where: str  # the broker's address, without passwords
    _down: set[str] = field(default_factory=set)
    _newest: dict[str, tuple[float, str]] = field(default_factory=dict)  # of each lane: when, and the cause
    _told: set[str] = field(default_factory=set)  # causes, in this outage
    _since_s: float = 0.0

    def error(self, lane: str, text: str, now_s: float) -> None:
        """Note an error of a connection; while the connection is down, log each cause once."""
        cause = explained(text)
        self._newest[lane] = now_s, cause
        if lane in self._down:
            self._tell(cause)

    def lost(self, lane: str, now_s: float) -> None:
        """Note a lost connection, and log the first loss of an outage."""
        if lane in self._down:
            return
        first = not self._down
        self._down.add(lane)
        if first:
            met_s, cause = self._newest.get(lane, (now_s, NO_CAUSE))
            if now_s - met_s > JUST_NOW_S:  # another error, which the connection has survived
                cause = NO_CAUSE
            self._since_s, self._told = now_s, {cause}
            log.warning("the connection to the broker at %s is lost: %s; connecting again", self.where, cause)

    def back(self, lane: str, now_s: float) -> None:
        """Note a connection that is back, and log the end of the outage with the last one."""
        self._down.discard(lane)
        if not self._down:
            log.warning("connected to the broker at %s again, after %.1f s", self.where, now_s - self._since_s)

    def _tell(self, cause: str) -> None:
        if cause not in self._told and len(self._told) < MOST_CAUSES:
            self._told.add(cause)
            log.warning("the broker at %s is out of reach: %s", self.where, cause)


def explained(text: str) -> str:
    """Return the cause in the operator's terms. All attempts that fail for the same cause get the same text."""
    lower = text.lower()
    if "authorization" in lower or "authentication" in lower or "does not know" in lower:
        return REFUSED_KEY
    if "refused" in lower or "connect call failed" in lower:
        return NO_SERVER
    if "timeout" in lower or "timed out" in lower:
        return TOO_LATE
    return text.removeprefix("nats: ")[:500]
