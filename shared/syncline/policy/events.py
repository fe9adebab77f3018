"""What a policy is told, and what it asks for. A policy holds ids, clocks, versions, weights and times: never a tensor, never
I/O, never a clock of its own. So every scheme, and every failure, is tested without a broker and without waiting."""

from __future__ import annotations

from dataclasses import dataclass

from syncline.policy.reasons import Closed, DropReason, FinishReason

# -- facts ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AgentJoined:
    agent: str


@dataclass(frozen=True, slots=True)
class AgentLost:
    agent: str
    reason: str
    failed: bool = False  # it said itself that it cannot train


@dataclass(frozen=True, slots=True)
class AgentSlow:
    """Its heartbeats arrive and its training makes no progress. `AgentJoined` follows when it moves again."""

    agent: str
    reason: str


@dataclass(frozen=True, slots=True)
class OfferReady:
    """A well-formed update is on the bus."""

    agent: str
    clock: int
    base: int  # version it deviates from
    samples: int = 1  # rows of the agent's part
    steps: int = 1


@dataclass(frozen=True, slots=True)
class UpdateBroken:
    """An offered update turned out to be unusable while it was merged."""

    agent: str
    clock: int
    why: str


@dataclass(frozen=True, slots=True)
class Committed:
    version: int


@dataclass(frozen=True, slots=True)
class TargetReached:
    why: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: at least up to what `WakeAt` asked for."""


PresenceFact = AgentJoined | AgentSlow | AgentLost
Fact = AgentJoined | AgentLost | AgentSlow | OfferReady | UpdateBroken | Committed | TargetReached | Tick

# -- commands ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartRound:
    """Participants train from `version`. Given again for a version, it replaces the participants."""

    version: int
    participants: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LetRun:
    """Participants of an asynchronous run train, each from the newest version, while their clocks allow it.

    An agent may begin a period while its clock and its offset together are not above `gate`; None: no such bound.
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
    """Merge exactly these, in this order, and commit. `late`: participants that were not waited for."""

    updates: tuple[Chosen, ...]
    reason: Closed
    late: tuple[str, ...] = ()


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
class Tell:
    """Say it in the events, as a warning."""

    event: str
    text: str


@dataclass(frozen=True, slots=True)
class Finish:
    """End the run."""

    reason: FinishReason
    failed: bool = False


Command = StartRound | LetRun | Merge | Drop | WakeAt | Tell | Finish
