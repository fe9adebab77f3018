"""Synchronous rounds: every participant trains from version v, and the round closes on the event that completes it.

A round of version v is in one of these states:

    waiting   fewer agents than the run starts with, or none to train
    open      participants train; offers are gathered
    merging   the plan is decided; what arrives now is late
    ended     nothing more is asked for

It closes

* when every live participant's update is in ("4 of 4"), or
* `grace_s` after the quorum was reached ("quorum 3 of 4 + 2.0 s"), the rest being named as late.

An agent that joins takes part from the next round; one that comes back takes part at once in the round it was in. When
nobody is left to wait for and the quorum is not reached, whoever is live is asked to train for this round. An update that is
late is dropped with that reason, and the agent goes on from the newest version.
"""

from __future__ import annotations

import hashlib
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from syncline.engine.events import (
    AgentJoined,
    AgentLost,
    Chosen,
    Command,
    Committed,
    Drop,
    Fact,
    Finish,
    Merge,
    OfferReady,
    StartRound,
    TargetReached,
    Tick,
    UpdateBroken,
    WakeAt,
)
from syncline.errors import PeerError

MEDIAN_OVER_ROUNDS = 9


@dataclass(slots=True)
class Rounds:
    """The policy of `sync: {kind: rounds}`. `handle` is its one entry: a fact and the time in, commands out."""

    min_agents: int  # agents with which the run starts
    quorum: int | None  # updates; None: every live participant
    grace_s: float | None  # None: the median round
    sample: float | None  # share of the live agents drawn for a round
    weights: Literal["uniform", "samples"]
    versions: int  # commits after which the run is done
    seed: int
    version: int = 0
    state: Literal["waiting", "open", "merging", "ended"] = "waiting"
    live: set[str] = field(default_factory=set)
    participants: tuple[str, ...] = ()
    offers: dict[str, OfferReady] = field(default_factory=dict)
    started: bool = False  # the run has had its first round
    opened_at_s: float = 0.0
    closes_at_s: float | None = None  # end of the grace period, once it runs
    durations_s: deque[float] = field(default_factory=lambda: deque(maxlen=MEDIAN_OVER_ROUNDS))
    lost: dict[str, str] = field(default_factory=dict)  # participants lost in this round, and why
    failed: dict[str, str] = field(default_factory=dict)  # agents that said they cannot train, and why
    stop: str = ""  # why to finish at the next commit

    def handle(self, fact: Fact, now_s: float) -> list[Command]:
        """Raises PeerError, and changes nothing, for a fact that a well-behaved agent cannot cause."""
        if self.state == "ended":
            return []
        match fact:
            case AgentJoined(agent):
                self.live.add(agent)
                self.failed.pop(agent, None)
                self.lost.pop(agent, None)
                return self._go_on(now_s)
            case AgentLost(agent, reason, failed):
                return self._lost(agent, reason, failed, now_s)
            case OfferReady():
                return self._offer(fact, now_s)
            case UpdateBroken(agent, clock, why):
                return self._broken(agent, clock, why, now_s)
            case Committed(version):
                return self._committed(version, now_s)
            case TargetReached(why):
                self.stop = why
                return [] if self.state == "merging" else self._finish(why)
            case Tick():
                return self._go_on(now_s)

    def resume(self, version: int, participants: tuple[str, ...], now_s: float) -> None:
        """A coordinator takes over an open round; offers are told again as facts."""
        self.version, self.participants, self.started = version, participants, True
        self.state, self.opened_at_s = "open" if participants else "waiting", now_s

    def resume_merge(self, offers: dict[str, OfferReady]) -> None:
        """After `resume`: the plan that was found is being executed."""
        self.offers, self.state = offers, "merging"
        self.participants = tuple(sorted({*self.participants, *offers}))

    # -- one fact each -------------------------------------------------------------------------------------------------
    def _lost(self, agent: str, reason: str, failed: bool, now_s: float) -> list[Command]:
        self.live.discard(agent)
        if agent in self.participants:
            self.lost[agent] = reason
        if failed:
            self.failed[agent] = reason
        if self.failed and not self.live and not self.offers and self.state != "merging":
            return self._finish("no agent can train: " + "; ".join(f"{a}: {w}" for a, w in self.failed.items()), True)
        return self._go_on(now_s)

    def _offer(self, offer: OfferReady, now_s: float) -> list[Command]:
        agent = offer.agent
        if offer.base > self.version:
            raise PeerError(f"{agent}: base {offer.base} is newer than version {self.version}")
        known = self.offers.get(agent)
        if known is not None and known.clock >= offer.clock:
            return []  # told twice
        if offer.base < self.version or self.state == "merging":
            return [Drop(agent, offer.clock, f"late: the round of version {offer.base} is closed")]
        if agent not in self.participants:
            return [Drop(agent, offer.clock, f"not a participant of the round of version {self.version}")]
        self.offers[agent] = offer
        replaced: list[Command] = (
            [] if known is None else [Drop(agent, known.clock, f"replaced by clock {offer.clock} of the same agent")]
        )
        return [*replaced, *self._go_on(now_s)]

    def _broken(self, agent: str, clock: int, why: str, now_s: float) -> list[Command]:
        offer = self.offers.get(agent)
        if offer is None or offer.clock != clock:
            return []
        del self.offers[agent]
        dropped = Drop(agent, clock, why, broken=True)
        if not self.offers:
            every = f"every update of version {self.version} was dropped; the last: {agent}: {why}"
            return [dropped, *self._finish(every, failed=True)]
        if self.state == "merging":
            return [dropped, self._merge(f"{len(self.offers)} of {len(self.participants)}, without {agent}: {why}")]
        self.participants = tuple(p for p in self.participants if p != agent)
        return [dropped, *self._go_on(now_s)]

    def _committed(self, version: int, now_s: float) -> list[Command]:
        assert version == self.version + 1, f"commit of version {version} after {self.version}"
        self.durations_s.append(now_s - self.opened_at_s)
        self.version, self.state = version, "waiting"
        self.participants, self.offers, self.lost, self.closes_at_s = (), {}, {}, None
        if self.stop or version >= self.versions:
            return self._finish(self.stop or f"{self.versions} versions")
        return self._go_on(now_s)

    # -- what follows --------------------------------------------------------------------------------------------------
    def _go_on(self, now_s: float) -> list[Command]:
        """Opens or closes the round if it is time."""
        if self.state == "waiting":
            ready = len(self.live) >= (1 if self.started else self.min_agents)
            return self._open(now_s) if ready else []
        if self.state != "open":
            return []
        missing = [p for p in self.participants if p not in self.offers and p in self.live]
        needed = len(self.offers) + len(missing) if self.quorum is None else self.quorum
        if len(self.offers) >= max(1, needed):
            if not missing:
                return [self._merge(self._count() + self._absent())]
            return self._grace(now_s)
        if not missing:
            return self._ask_others(now_s)
        return []

    def _grace(self, now_s: float) -> list[Command]:
        if self.closes_at_s is None:
            self.closes_at_s = now_s + self.grace()
        if now_s < self.closes_at_s:
            return [WakeAt(self.closes_at_s)]
        return [self._merge(f"quorum {self._count()} + {self.grace():.1f} s" + self._absent())]

    def _open(self, now_s: float) -> list[Command]:
        self.state, self.started, self.opened_at_s = "open", True, now_s
        self.participants = self._draw()
        return [StartRound(self.version, self.participants)]

    def _ask_others(self, now_s: float) -> list[Command]:
        """Nobody is left to wait for and the quorum is not reached: whoever else is live trains for this round."""
        others = tuple(sorted(self.live - set(self.participants)))
        if not others:
            return []
        self.participants = tuple(sorted({*self.offers, *others}))
        return [StartRound(self.version, self.participants)]

    def _merge(self, reason: str) -> Merge:
        self.state = "merging"
        offers = [self.offers[agent] for agent in sorted(self.offers)]
        total = sum(o.samples for o in offers)
        chosen = tuple(
            Chosen(o.agent, o.clock, self.version - o.base, self._weight(o, len(offers), total)) for o in offers
        )
        return Merge(chosen, reason, tuple(p for p in self.participants if p not in self.offers))

    def _weight(self, offer: OfferReady, n: int, total: int) -> float:
        return 1.0 / n if self.weights == "uniform" or total == 0 else offer.samples / total

    def _finish(self, reason: str, failed: bool = False) -> list[Command]:
        self.state = "ended"
        return [Finish(reason, failed)]

    def grace(self) -> float:
        """Seconds to wait for the rest after the quorum."""
        if self.grace_s is not None:
            return self.grace_s
        return statistics.median(self.durations_s) if self.durations_s else 1.0

    def _count(self) -> str:
        return f"{len(self.offers)} of {len(self.participants)}"

    def _absent(self) -> str:
        gone = [f"{a} {why}" for a, why in sorted(self.lost.items()) if a not in self.offers]
        return f" ({'; '.join(gone)})" if gone else ""

    def _draw(self) -> tuple[str, ...]:
        """The participants of a round: all live agents, or a share drawn by the seed and the version alone."""
        everyone = sorted(self.live)
        if self.sample is None:
            return tuple(everyone)
        count = max(1, self.quorum or 1, round(self.sample * len(everyone)))
        return tuple(sorted(sorted(everyone, key=lambda a: _lot(self.seed, self.version, a))[:count]))

    def validate(self) -> None:
        """What always holds; tests call it after every fact."""
        assert set(self.offers) <= set(self.participants), "an offer of a non-participant"
        assert all(o.base == self.version for o in self.offers.values()), "an offer of another version"
        assert (self.state == "open") <= bool(self.participants), "an open round without participants"
        assert (self.state == "merging") <= bool(self.offers), "a merge of nothing"
        assert self.started or self.state in ("waiting", "ended"), "a round before the start"


def _lot(seed: int, version: int, agent: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{version}:{agent}".encode(), digest_size=8).digest()
