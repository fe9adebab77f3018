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
nobody is left to wait for and the quorum is not reached, whoever else is live is asked to train for this round; where nobody
is, the round closes with what is in. An update that is late is dropped with that reason, and the agent goes on from the
newest version. When all updates of a merge turn out to be unusable, the round is opened again for those that have sent none.
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
from syncline.engine.weights import Normalize, Weights, weights_of
from syncline.errors import PeerError

MEDIAN_OVER_ROUNDS = 9
FIRST_GRACE_S = 1.0  # while no round has shown how long one takes
REASON_CHARS = 1000  # reasons travel in records with limits, and some of the words in them are the agents' own
ABSENT_NAMED, ABSENT_CHARS = 5, 100


@dataclass(slots=True)
class Rounds:
    """The policy of `sync: {kind: rounds}`. `handle` is its one entry: a fact and the time in, commands out."""

    min_agents: int  # agents with which the run starts
    quorum: int | None  # updates; None: every live participant
    grace_s: float | None  # None: the median round
    sample: float | None  # share of the live agents drawn for a round
    weights: Weights
    versions: int  # commits after which the run is done
    seed: int
    normalize: Normalize | None = None  # of the weights
    version: int = 0
    state: Literal["waiting", "open", "merging", "ended"] = "waiting"
    live: set[str] = field(default_factory=set)
    participants: tuple[str, ...] = ()
    offers: dict[str, OfferReady] = field(default_factory=dict)
    started: bool = False  # the run has had its first round
    opened_at_s: float = 0.0
    closes_at_s: float | None = None  # end of the grace period, once it runs
    durations_s: deque[float] = field(default_factory=lambda: deque(maxlen=MEDIAN_OVER_ROUNDS))
    closed_by: str = ""  # what closed the round that is merging
    lost: dict[str, str] = field(default_factory=dict)  # participants lost in this round, and why
    spent: set[str] = field(default_factory=set)  # their update of this version was dropped: no other is to be expected
    judged: dict[str, int] = field(default_factory=dict)  # last judged clock of each agent
    away: set[str] = field(default_factory=set)  # agents that were lost and may come back
    failed: dict[str, str] = field(default_factory=dict)  # agents that said they cannot train, and why
    stop: str = ""  # why to finish at the next commit

    def handle(self, fact: Fact, now_s: float) -> list[Command]:
        """Raises PeerError, and changes nothing, for a fact that a well-behaved agent cannot cause."""
        if self.state == "ended":
            return []
        match fact:
            case AgentJoined(agent):
                self.live.add(agent)
                self.away.discard(agent)
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

    def resume(self, version: int, participants: tuple[str, ...], live: set[str], now_s: float) -> None:
        """A coordinator takes over an open round; offers are told again as facts, and losses of those that do not return."""
        self.live = set(live)
        self.version, self.participants, self.started = version, participants, True
        self.state, self.opened_at_s = "open" if participants else "waiting", now_s

    def resume_merge(self, offers: dict[str, OfferReady]) -> None:
        """After `resume`: the plan that was found is being executed."""
        self.offers, self.state = offers, "merging"
        self.participants = tuple(sorted({*self.participants, *offers}))
        self.closed_by = self._count()

    # -- one fact each -------------------------------------------------------------------------------------------------
    def _lost(self, agent: str, reason: str, failed: bool, now_s: float) -> list[Command]:
        self.live.discard(agent)
        if agent in self.participants:
            self.lost[agent] = reason
        if failed:
            self.failed[agent] = reason
            self.away.discard(agent)
        elif agent not in self.failed:
            self.away.add(agent)
        return self._go_on(now_s)

    def _offer(self, offer: OfferReady, now_s: float) -> list[Command]:
        agent = offer.agent
        if offer.base > self.version:
            raise PeerError(f"{agent}: base {offer.base} is newer than version {self.version}")
        known = self.offers.get(agent)
        if offer.clock <= max(known.clock if known is not None else 0, self.judged.get(agent, 0)):
            return []  # told twice
        if offer.base < self.version or self.state == "merging":
            return [self._drop(offer, f"late: the round of version {offer.base} is closed")]
        if agent not in self.participants:
            return [self._drop(offer, f"not a participant of the round of version {self.version}")]
        self.offers[agent] = offer
        self.spent.discard(agent)
        replaced = (
            [] if known is None else [Drop(agent, known.clock, f"replaced by clock {offer.clock} of the same agent")]
        )
        return [*replaced, *self._go_on(now_s)]

    def _broken(self, agent: str, clock: int, why: str, now_s: float) -> list[Command]:
        offer = self.offers.get(agent)
        if offer is None or offer.clock != clock:
            return []
        del self.offers[agent]
        dropped = self._drop(offer, why, broken=True)
        if self.state == "merging" and self.offers:
            return [dropped, self._merge(f"{self.closed_by}; without {agent}: {_brief(why)}")]
        if self.stop:
            return [dropped, *self._finish(self.stop)]
        if not (self.offers or self._awaited() or self._others()):
            every = f"every update of version {self.version} was dropped; the last: {agent}: {why}"
            return [dropped, *self._finish(every, failed=True)]
        if self.state == "open":
            return [dropped, *self._go_on(now_s)]
        self.state = "open"
        return [dropped, self._ask_others(), *self._go_on(now_s)]

    def _committed(self, version: int, now_s: float) -> list[Command]:
        assert version == self.version + 1, f"commit of version {version} after {self.version}"
        assert self.state == "merging", f"commit of version {version} in a round that is {self.state}"
        self.durations_s.append(now_s - self.opened_at_s)
        for offer in self.offers.values():
            self._judge(offer)
        self.version, self.state = version, "waiting"
        self.participants, self.offers, self.lost, self.spent = (), {}, {}, set()
        if self.stop:
            return self._finish(self.stop)
        return self._go_on(now_s)

    # -- what follows --------------------------------------------------------------------------------------------------
    def _go_on(self, now_s: float) -> list[Command]:
        """Opens or closes the round if it is time."""
        if self.state in ("merging", "ended"):
            return []
        if not self.offers and not self.live and not self.away and len(self.failed) >= self.min_agents:
            return self._finish("no agent can train: " + "; ".join(f"{a}: {w}" for a, w in self.failed.items()), True)
        return self._open(now_s) if self.state == "waiting" else self._close(now_s)

    def _open(self, now_s: float) -> list[Command]:
        if self.version >= self.versions:
            return self._finish(f"{self.versions} versions")
        if len(self.live) < (1 if self.started else self.min_agents) or not self._others():
            return []
        self.state, self.started, self.opened_at_s = "open", True, now_s
        self.participants = self._draw()
        return [StartRound(self.version, self.participants)]

    def _close(self, now_s: float) -> list[Command]:
        reached = len(self.offers) >= (self.quorum or 1)
        if not self._awaited():
            if self.offers and (reached or not self._others()):
                return [self._merge(self._count() + self._absent())]
            return [self._ask_others()] if self._others() else []
        if self.quorum is None or not reached:
            self.closes_at_s = None
            return []
        if self.closes_at_s is None:
            self.closes_at_s = now_s + self.grace()
        if now_s < self.closes_at_s:
            return [WakeAt(self.closes_at_s)]
        return [self._merge(f"quorum {self._count()} + {self.grace():.1f} s" + self._absent())]

    def _awaited(self) -> list[str]:
        """Participants whose update is still to come."""
        return [p for p in self.participants if p in self.live and p not in self.offers and p not in self.spent]

    def _others(self) -> set[str]:
        """Who else could train for this round: live agents that are not asked yet."""
        return self.live - {*self.participants} - self.spent

    def _ask_others(self) -> StartRound:
        """Nobody is left to wait for and the quorum is not reached: whoever else is live trains for this round."""
        self.participants = tuple(sorted({*self.participants, *self._others()}))
        return StartRound(self.version, self.participants)

    def _merge(self, reason: str) -> Merge:
        self.state, self.closes_at_s, self.closed_by = "merging", None, _brief(reason, REASON_CHARS)
        offers = [self.offers[agent] for agent in sorted(self.offers)]
        weights = weights_of(offers, self.weights, self.normalize)
        chosen = tuple(
            Chosen(o.agent, o.clock, self.version - o.base, weight) for o, weight in zip(offers, weights, strict=True)
        )
        late = tuple(p for p in self.participants if p not in self.offers and p not in self.spent)
        return Merge(chosen, self.closed_by, late)

    def _drop(self, offer: OfferReady, reason: str, broken: bool = False) -> Drop:
        self._judge(offer)
        if offer.base == self.version and offer.agent not in self.offers:
            self.spent.add(offer.agent)
        return Drop(offer.agent, offer.clock, reason, broken)

    def _judge(self, offer: OfferReady) -> None:
        self.judged[offer.agent] = max(offer.clock, self.judged.get(offer.agent, 0))

    def _finish(self, reason: str, failed: bool = False) -> list[Command]:
        self.state = "ended"
        return [Finish(reason, failed)]

    def grace(self) -> float:
        """Seconds to wait for the rest after the quorum."""
        if self.grace_s is not None:
            return self.grace_s
        return self.median_round_s() or FIRST_GRACE_S

    def median_round_s(self) -> float:
        """Of the last rounds; 0 before the first."""
        return statistics.median(self.durations_s) if self.durations_s else 0.0

    def _count(self) -> str:
        return f"{len(self.offers)} of {len(self.participants)}"

    def _absent(self) -> str:
        gone = [f"{a} {_brief(why)}" for a, why in sorted(self.lost.items()) if a not in self.offers]
        more = [f"and {len(gone) - ABSENT_NAMED} more"] if len(gone) > ABSENT_NAMED else []
        return f" ({'; '.join([*gone[:ABSENT_NAMED], *more])})" if gone else ""

    def _draw(self) -> tuple[str, ...]:
        """The participants of a round: all live agents, or a share drawn by the seed and the version alone."""
        everyone = sorted(self._others())
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
        assert not self.spent & set(self.offers), "an update both dropped and offered"
        assert not self.live & {*self.away, *self.failed}, "somebody both here and gone"
        if self.state == "open":
            assert self._awaited() or not (self.offers or self._others()), "a round that could close or ask others"
        assert self.closes_at_s is None or (self.state == "open" and self.quorum), "a grace period of nothing"


def _brief(text: str, chars: int = ABSENT_CHARS) -> str:
    return text if len(text) <= chars else text[: chars - 1] + "…"


def _lot(seed: int, version: int, agent: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{version}:{agent}".encode(), digest_size=8).digest()
