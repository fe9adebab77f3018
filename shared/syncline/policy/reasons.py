"""Why a policy decided: typed reasons with their figures. `words.py` turns them into text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# -- why an update was dropped -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RoundClosed:
    """The round of the version from which the update was trained is closed."""

    base: int


@dataclass(frozen=True, slots=True)
class NotParticipant:
    """The agent is no participant of the round of this version."""

    version: int


@dataclass(frozen=True, slots=True)
class Replaced:
    """The agent started again and offered another update instead."""

    by_clock: int


@dataclass(frozen=True, slots=True)
class TooStale:
    """The update's lag, the number of versions since the one from which it was trained, exceeds `max_lag`."""

    lag: int
    max_lag: int


@dataclass(frozen=True, slots=True)
class NotStarted:
    """The run had not started."""


@dataclass(frozen=True, slots=True)
class Unusable:
    """The update could not be merged: its blob is gone, or holds invalid values."""

    problem: str


DropReason = RoundClosed | NotParticipant | Replaced | TooStale | NotStarted | Unusable

# -- why a merge was decided ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Closed:
    """Why a round or a buffer was closed.

    `complete`: all that were waited for are in. `quorum`: the grace period after the quorum has ended. `nobody may run`: no
    agent may train before these updates are judged.
    """

    by: Literal["complete", "quorum", "nobody may run"]
    updates: int  # that were in
    expected: int
    grace_s: float | None = None  # where it was closed by a quorum
    absent: tuple[tuple[str, str], ...] = ()  # agents lost or slow since the last commit, and why
    without: tuple[tuple[str, str], ...] = ()  # agents whose update turned out to be unusable, and why


# -- warnings ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TooFewUpdates:
    """A version waits for more agents: the merge rule needs more updates than the present agents can send."""

    version: int
    rule: str
    needed: int
    received: int
    present: int  # agents
    slow: int  # agents, beside those


# -- why a run ends ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class VersionsReached:
    """The run has made `stop.versions`."""

    versions: int


@dataclass(frozen=True, slots=True)
class StopRequested:
    """The run's target was reached, or an operator stopped it."""

    why: str


@dataclass(frozen=True, slots=True)
class NoAgentCanTrain:
    """So many agents have failed that the run cannot begin or go on."""

    failed: tuple[tuple[str, str], ...]  # agent and its reason


@dataclass(frozen=True, slots=True)
class NothingUsable:
    """Every update of a version was unusable."""

    version: int
    agent: str  # of the last
    problem: str


FinishReason = VersionsReached | StopRequested | NoAgentCanTrain | NothingUsable
