"""Facts that a policy handles, and the commands that it returns.

A policy holds ids, clocks, versions, weights and times: no tensor, no I/O and no clock of its own. So every scheme and every
failure is tested without a broker and without waiting.
"""

from __future__ import annotations

from dataclasses import dataclass

from syncline.policy.reasons import Closed, DropReason, FinishReason, TooFewUpdates

# -- facts ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AgentJoined:
    """An agent is present: new, returned, or making progress again."""

    agent: str


@dataclass(frozen=True, slots=True)
class AgentLost:
    """An agent is gone: silent, leaving, or unable to train."""

    agent: str
    reason: str
    failed: bool = False  # the agent said itself that it cannot train


@dataclass(frozen=True, slots=True)
class AgentSlow:
    """An agent's heartbeats arrive and its training makes no progress. `AgentJoined` follows with its next progress."""

    agent: str
    reason: str


@dataclass(frozen=True, slots=True)
class OfferReady:
    """An acceptable offer was read: the update lies on the bus."""

    agent: str
    clock: int
    base: int  # version it deviates from
    samples: int = 1  # rows of the agent's part
    steps: int = 1


@dataclass(frozen=True, slots=True)
class UpdateBroken:
    """The merge under way found an update that it cannot use."""

    agent: str
    clock: int
    why: str


@dataclass(frozen=True, slots=True)
class VersionCommitted:
    """The merge under way has become this version."""

    version: int


@dataclass(frozen=True, slots=True)
class TargetReached:
    """The run is to end: its target is reached, or an operator stopped it."""

    why: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed, at least up to the last `WakeAt`."""


PresenceFact = AgentJoined | AgentSlow | AgentLost
Fact = AgentJoined | AgentLost | AgentSlow | OfferReady | UpdateBroken | VersionCommitted | TargetReached | Tick

# -- commands ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartRound:
    """Let participants train from `version`. A second one for a version replaces the participants."""

    version: int
    participants: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LetRun:
    """Let participants of an asynchronous run train, each from the newest version, while their clocks allow.

    An agent may begin a period while its clock plus its offset is at most `gate`; None: no bound.
    """

    version: int
    participants: tuple[str, ...]
    gate: int | None = None
    offsets: tuple[tuple[str, int], ...] = ()  # of agents' clocks, where not 0
    merging: bool = False  # a plan is being executed, and stands


@dataclass(frozen=True, slots=True)
class Chosen:
    """One update of a merge and its weight."""

    agent: str
    clock: int
    lag: int
    weight: float


@dataclass(frozen=True, slots=True)
class Merge:
    """Merge exactly these updates, in this order, and commit."""

    updates: tuple[Chosen, ...]
    reason: Closed
    late: tuple[str, ...] = ()  # participants that were not waited for


@dataclass(frozen=True, slots=True)
class Drop:
    """Judge an update without merging it."""

    agent: str
    clock: int
    reason: DropReason


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Send a Tick at this time. A later WakeAt replaces an earlier one."""

    at_s: float


@dataclass(frozen=True, slots=True)
class Warn:
    """Publish a warning event."""

    reason: TooFewUpdates


@dataclass(frozen=True, slots=True)
class Finish:
    """End the run."""

    reason: FinishReason
    failed: bool = False


Command = StartRound | LetRun | Merge | Drop | WakeAt | Warn | Finish
