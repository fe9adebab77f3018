"""The base of all policies: presence of agents, verdicts on their updates, and the time that a version takes.

A policy is a pure state machine with one entry, `handle`: a fact and the time in, commands out. Its states and the transitions
between them are in `states.py`. It owns the presence of agents; its ledger owns their clocks.
"""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from syncline.errors import PeerError
from syncline.policy.events import (
    AgentJoined,
    AgentLost,
    AgentSlow,
    Command,
    Drop,
    Fact,
    Finish,
    OfferReady,
    TargetReached,
    Tick,
    UpdateBroken,
    VersionCommitted,
    Warn,
)
from syncline.policy.ledger import Ledger
from syncline.policy.reasons import DropReason, FinishReason, NoAgentCanTrain, StopRequested, TooFewUpdates, Unusable
from syncline.policy.states import POLICY_TRANSITIONS, State, check_transition
from syncline.policy.story import History, Step
from syncline.wire.messages import Presence, Verdict

MEDIAN_OVER = 9  # versions
FIRST_GRACE_S = 1.0  # while no version has shown how long one takes


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """State of a run that a coordinator takes over, as its head and roster say. The ledger has the clocks."""

    version: int
    participants: tuple[str, ...]
    live: frozenset[str]  # present
    offsets: dict[str, int] = field(default_factory=dict)  # added to agents' clocks where clocks are compared
    gate: int | None = None
    slow: frozenset[str] = frozenset()


@dataclass(slots=True, kw_only=True)
class Policy(ABC):
    min_agents: int  # agents with which the run starts
    versions: int  # commits after which the run is done
    grace_s: float | None = None  # None: the median version
    min_updates: int = 1  # updates that the merge rule needs
    rule: str = "mean"
    warned_version: int = -1  # the version for which too few updates were reported
    version: int = 0
    state: State = "waiting"
    live: set[str] = field(default_factory=set)  # present: waited for
    slow: set[str] = field(default_factory=set)  # heartbeats without progress: not waited for
    started: bool = False  # the run has had its first round
    opened_at_s: float = 0.0  # when the newest version came
    closes_at_s: float | None = None  # end of the grace period, once it runs
    durations_s: deque[float] = field(default_factory=lambda: deque(maxlen=MEDIAN_OVER))
    missed: dict[str, str] = field(default_factory=dict)  # agents lost or slow since the last commit, and why
    ledger: Ledger = field(default_factory=Ledger)  # owns offered and judged clocks
    gone: set[str] = field(default_factory=set)  # agents that were lost and may come back
    failed: dict[str, str] = field(default_factory=dict)  # agents that said they cannot train, and why
    stop: str = ""  # why to finish at the next commit
    history: History = field(default_factory=History, compare=False, repr=False)

    def handle(self, fact: Fact, now_s: float) -> list[Command]:
        """Return the commands that follow from a fact.

        Args:
            now_s: the time, of a clock that does not jump.

        Raises:
            PeerError: a well-behaved agent cannot cause this fact; nothing is changed.
        """
        if self.state == "ended":
            return []
        commands = self._handle(fact, now_s)
        self.history.add(fact, commands, now_s)
        return commands

    def story(self, agent: str) -> list[Step]:
        """Return the recent facts and commands that concern an agent, and those that caused them, the oldest first."""
        return self.history.story(agent)

    def _handle(self, fact: Fact, now_s: float) -> list[Command]:
        match fact:
            case AgentJoined(agent):
                if agent in self.live:
                    return self._go_on(now_s)  # told twice
                was_slow = agent in self.slow
                self.live.add(agent)
                self.slow.discard(agent)
                self.gone.discard(agent)
                self.failed.pop(agent, None)
                self.missed.pop(agent, None)
                commands = self._joined(agent, now_s)
                return self._noted(commands) if was_slow else commands
            case AgentSlow(agent, reason):
                if agent not in self.live:
                    return []
                self.live.discard(agent)
                self.slow.add(agent)
                self.missed[agent] = f"slow: {reason}"
                return self._noted(self._go_on(now_s))
            case AgentLost(agent, reason, failed):
                self.live.discard(agent)
                self.slow.discard(agent)
                self.missed[agent] = reason
                if failed:
                    self.failed[agent] = reason
                    self.gone.discard(agent)
                elif agent not in self.failed:
                    self.gone.add(agent)
                return self._go_on(now_s)
            case OfferReady():
                if fact.base > self.version:
                    raise PeerError(f"{fact.agent}: base {fact.base} is newer than version {self.version}")
                return self._offer(fact, now_s)
            case UpdateBroken(agent, clock, why):
                return self._broken(agent, clock, why, now_s)
            case VersionCommitted(version):
                assert version == self.version + 1, f"commit of version {version} after {self.version}"
                assert self.state == "merging", f"commit of version {version} in a round that is {self.state}"
                self.durations_s.append(now_s - self.opened_at_s)
                self.version = version
                return self._committed(now_s)
            case TargetReached(why):
                self.stop = why
                return [] if self.state == "merging" else self._finish(StopRequested(why))
            case Tick():
                return self._go_on(now_s)

    # -- decisions of each policy --------------------------------------------------------------------------------------
    def _joined(self, agent: str, now_s: float) -> list[Command]:
        return self._go_on(now_s)

    def _noted(self, commands: list[Command]) -> list[Command]:
        """Add a command that writes presence into the roster, unless one of these does."""
        return commands

    @abstractmethod
    def resume(self, resume_point: ResumePoint, now_s: float) -> None:
        """Take over a run. Its unjudged offers follow as facts, and the loss of agents that do not return."""

    @abstractmethod
    def resume_merge(self, offers: list[OfferReady]) -> None:
        """Take over the execution of a plan that head holds; call after `resume`."""

    @abstractmethod
    def _offer(self, offer: OfferReady, now_s: float) -> list[Command]: ...

    @abstractmethod
    def _broken(self, agent: str, clock: int, why: str, now_s: float) -> list[Command]: ...

    @abstractmethod
    def _committed(self, now_s: float) -> list[Command]: ...

    @abstractmethod
    def _go_on(self, now_s: float) -> list[Command]:
        """Open or close a round, merge or end, if a condition for it holds."""

    @abstractmethod
    def validate(self) -> None:
        """Assert the invariants; tests call this after every fact."""

    def _enter(self, state: State) -> None:
        check_transition(POLICY_TRANSITIONS, self.state, state)
        self.state = state

    # -- shared by all policies -----------------------------------------------------------------------------------------------
    def presence(self, agent: str) -> Presence:
        """Return the agent's presence; LOST for an agent that never joined."""
        if agent in self.live:
            return Presence.PRESENT
        return Presence.SLOW if agent in self.slow else Presence.LOST

    def _check_presence(self) -> None:
        """Assert that each agent has one state."""
        states = (self.live, self.slow, self.gone, {*self.failed})
        assert sum(map(len, states)) == len(set().union(*states)), "an agent with two states"

    def _nobody_can_train(self) -> list[Command]:
        """End the run if as many agents as it needs have failed and no other is present, slow or lost."""
        if self.live or self.slow or self.gone or len(self.failed) < self.min_agents or self.version >= self.versions:
            return []
        return self._finish(NoAgentCanTrain(tuple(self.failed.items())), failed=True)

    def _too_few(self, updates: Collection[OfferReady], broken: set[str]) -> bool:
        """Return whether the rule needs more updates. Unusable updates count as received: the rule has excluded them."""
        unusable = len(broken - {o.agent for o in updates}) if broken else 0
        return len(updates) + unusable < self.min_updates

    def _tell_too_few(self, updates: int) -> list[Command]:
        """Warn once for a version that the run waits for more agents."""
        if self.warned_version == self.version:
            return []
        self.warned_version = self.version
        reason = TooFewUpdates(
            self.version, self.rule, self.min_updates, updates, present=len(self.live), slow=len(self.slow)
        )
        return [Warn(reason)]

    def _finish(self, reason: FinishReason, failed: bool = False) -> list[Command]:
        self._enter("ended")
        self.closes_at_s = None
        return [Finish(reason, failed)]

    @staticmethod
    def _insist_on_order(offer: OfferReady, waiting: Iterable[OfferReady]) -> None:
        """Raise PeerError for an offer trained from an older version than a pending one of the same agent."""
        for other in waiting:
            if other.agent == offer.agent and other.base > offer.base:
                raise PeerError(
                    f"{offer.agent}: base {offer.base} is older than {other.base}, that of clock {other.clock}"
                )

    def _judge(self, offer: OfferReady, verdict: Verdict) -> None:
        self.ledger.judge(offer.agent, offer.clock, verdict)

    def _drop(self, offer: OfferReady, reason: DropReason) -> Drop:
        self._judge(offer, Verdict.BROKEN if isinstance(reason, Unusable) else Verdict.LATE)
        return Drop(offer.agent, offer.clock, reason)

    def grace(self) -> float:
        """Return the seconds to wait after the quorum was reached."""
        if self.grace_s is not None:
            return self.grace_s
        return self.median_round_s() or FIRST_GRACE_S

    def median_round_s(self) -> float:
        """Return the median duration of the last versions in seconds; 0 before the first."""
        return statistics.median(self.durations_s) if self.durations_s else 0.0

    def _absent(self, among: Iterable[str]) -> tuple[tuple[str, str], ...]:
        """Return those of these agents that were lost or slow since the last commit, with the reason."""
        return tuple(sorted((agent, self.missed[agent]) for agent in among if agent in self.missed))
