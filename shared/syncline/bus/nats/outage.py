"""The log lines about lost connections: one for the loss, one for each cause of failed attempts, one for the reconnection.

A lane on which the broker leaves a question unanswered is connected again, and again every few seconds while the broker's disk
is full. This is logged once, until the broker answers on that lane.

This module knows no broker. Time is an argument.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

log = logging.getLogger(__name__)

JUST_NOW_S = 1.0  # an error at most this long before the loss of a connection counts as the cause
MOST_CAUSES = 8  # log lines about causes in one outage
REFUSED_KEY = (
    "the broker refuses this key, which is unknown or was revoked. Ask the operator of the broker for a new key"
)
NO_SERVER = "no server listens at this address. Is nats-server running?"
TOO_LATE = "the broker does not answer in time"
NO_CAUSE = "the broker does not answer"
UNANSWERED = "the broker leaves a question unanswered, as it does while its disk is full"


@dataclass(slots=True)
class Outage:
    """The log of all connections of one bus. Each connection is called a lane. An outage lasts while any lane is down."""

    address: str  # of the broker, without passwords
    _down: set[str] = field(default_factory=set)  # lanes
    _newest: dict[str, tuple[float, str]] = field(default_factory=dict)  # lane → time and cause of its last error
    _logged: set[str] = field(default_factory=set)  # causes, in this outage
    _since_s: float = 0.0  # the beginning of this outage
    _silent: set[str] = field(
        default_factory=set
    )  # lanes without an answer since they were connected again for silence
    _quiet: bool = False  # nothing is logged about this outage

    def error(self, lane: str, text: str, now_s: float) -> None:
        """Note an error of a lane. While the lane is down, log each cause once."""
        cause = explained(text)
        self._newest[lane] = now_s, cause
        if lane in self._down:
            self._log_cause(cause)

    def unanswered(self, lane: str, now_s: float) -> None:
        """Note that a lane is connected again because the broker left a question unanswered."""
        self._newest[lane] = now_s, UNANSWERED

    def answered(self, lane: str) -> None:
        """Note that the broker has answered a question."""
        self._silent.discard(lane)

    def lost(self, lane: str, now_s: float) -> None:
        """Note that a lane is down, and log the beginning of an outage."""
        if lane in self._down:
            return
        first = not self._down
        self._down.add(lane)
        if first:
            error_s, cause = self._newest.get(lane, (now_s, NO_CAUSE))
            if now_s - error_s > JUST_NOW_S:  # an older error, which the connection survived
                cause = NO_CAUSE
            self._since_s = now_s
            self._logged = {cause}
            self._quiet = cause == UNANSWERED and lane in self._silent
            if cause == UNANSWERED:
                self._silent.add(lane)
            if not self._quiet:
                log.warning("the connection to the broker at %s is lost: %s; connecting again", self.address, cause)

    def back(self, lane: str, now_s: float) -> None:
        """Note that a lane is connected, and log the end of the outage if no lane is down."""
        self._down.discard(lane)
        if not self._down and not self._quiet:
            log.warning("connected to the broker at %s again, after %.1f s", self.address, now_s - self._since_s)

    def _log_cause(self, cause: str) -> None:
        if cause not in self._logged and len(self._logged) < MOST_CAUSES:
            self._logged.add(cause)
            self._quiet = False
            log.warning("the broker at %s is out of reach: %s", self.address, cause)


def explained(text: str) -> str:
    """Return the cause of an error in the operator's terms. All attempts that fail for one cause get the same text."""
    lower = text.lower()
    if "authorization" in lower or "authentication" in lower or "does not know" in lower:
        return REFUSED_KEY
    if "refused" in lower or "connect call failed" in lower:
        return NO_SERVER
    if "timeout" in lower or "timed out" in lower:
        return TOO_LATE
    return text.removeprefix("nats: ")[:500]
