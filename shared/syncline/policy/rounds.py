"""Synchronous rounds: every participant trains from version v, and an event closes the round.

A round closes

* when the update of every live participant is in ("4 of 4"), or
* `grace_s` after the quorum was reached ("quorum 3 of 4 + 2.0 s"); the other participants are named as late.

An agent that joins takes part from the next round. One that returns takes part at once in the round that it was in. When no
update is awaited and the quorum is not reached, all other live agents are asked to train for this round. Without other live
agents the round closes with the updates at hand, unless the merge rule needs more: then the run waits for more agents.

A slow agent is not waited for: its update is merged if the round is still open when the update arrives. While every agent is
slow and no update is in, the round stays open. A late update is dropped with that reason, and its agent continues from the
newest version. When all updates of a merge turn out to be unusable, the round is opened again for the agents that have sent
none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from syncline.averaging.weights import Normalize, Weights, weights_of
from syncline.policy.base import Policy, ResumePoint
from syncline.policy.events import Chosen, Command, Drop, Merge, OfferReady, StartRound, WakeAt
from syncline.policy.reasons import (
    Closed,
    DropReason,
    NothingUsable,
    NotParticipant,
    Replaced,
    RoundClosed,
    StopRequested,
    Unusable,
    VersionsReached,
)
from syncline.wire.messages import Verdict

ASKED_AGAIN = 3  # times in a round, an agent that could not know that its clock was judged


@dataclass(slots=True, kw_only=True)
class Rounds(Policy):
    """The policy of `sync: {kind: rounds}`."""

    quorum: int | None  # updates; None: every live participant
    sample: float | None  # share of the live agents drawn for a round
    weights: Weights
    normalize: Normalize | None = None
    elastic: bool = False  # updates are elastic differences: each is added whole
    seed: int
    participants: tuple[str, ...] = ()
    offers: dict[str, OfferReady] = field(default_factory=dict)
    closed_by: Closed | None = None  # the round that is merging
    broken: set[str] = field(default_factory=set)  # agents whose update of this version was unusable
    retries: list[str] = field(default_factory=list)  # agents asked again for this version, once for each time
    no_more_expected: set[str] = field(default_factory=set)  # agents whose update of this version was dropped

    def resume(self, resume_point: ResumePoint, now_s: float) -> None:
        self.live, self.slow = set(resume_point.live), set(resume_point.slow)
        self.version, self.participants = resume_point.version, resume_point.participants
        self.started = True
        self._enter("open" if self.participants else "waiting")
        self.opened_at_s = now_s

    def resume_merge(self, offers: list[OfferReady]) -> None:
        self._enter("merging")
        self.offers = {o.agent: o for o in offers}
        self.participants = tuple(sorted({*self.participants, *self.offers}))
        self.closed_by = self._closed("complete")

    # -- one fact each -------------------------------------------------------------------------------------------------
    def _noted(self, commands: list[Command]) -> list[Command]:
        left = tuple(p for p in self.participants if p not in self.no_more_expected)
        if self.state != "open" or not left or any(isinstance(c, StartRound) for c in commands):
            return commands
        self.participants = left
        return [*commands, StartRound(self.version, left)]

    def _offer(self, offer: OfferReady, now_s: float) -> list[Command]:
        agent = offer.agent
        known = self.offers.get(agent)
        used_up = offer.clock <= self.ledger.judged_clock(agent) and offer.base == self.version and known is None
        if (
            used_up and agent in {*self.participants} - self.no_more_expected
        ):  # by another process of its name; this one was not told
            if self.state == "open" and self.retries.count(agent) < ASKED_AGAIN:
                self.retries.append(agent)
                return [StartRound(self.version, self.participants)]  # with a roster that says so: it trains once more
            self.no_more_expected.add(agent)
            return self._go_on(now_s)
        if offer.clock <= max(known.clock if known is not None else 0, self.ledger.judged_clock(agent)):
            return []  # told twice
        self._insist_on_order(offer, filter(None, [self.offers.get(offer.agent)]))
        if offer.base < self.version or self.state == "merging":
            return [self._drop(offer, RoundClosed(offer.base))]
        if agent not in self.participants:
            return [self._drop(offer, NotParticipant(self.version))]
        self.offers[agent] = offer
        self.no_more_expected.discard(agent)
        self.broken.discard(agent)
        replaced = [] if known is None else [Drop(agent, known.clock, Replaced(offer.clock))]
        return [*replaced, *self._go_on(now_s)]

    def _broken(self, agent: str, clock: int, why: str, now_s: float) -> list[Command]:
        offer = self.offers.get(agent)
        if offer is None or offer.clock != clock:
            return []
        del self.offers[agent]
        self.broken.add(agent)
        dropped = self._drop(offer, Unusable(why))
        if self.state == "merging" and self.offers:
            assert self.closed_by is not None
            return [dropped, self._plan(replace(self.closed_by, without=(*self.closed_by.without, (agent, why))))]
        if self.stop:
            return [dropped, *self._finish(StopRequested(self.stop))]
        if not (self.offers or self._awaited() or self._others() or self.slow - self.no_more_expected):
            return [dropped, *self._finish(NothingUsable(self.version, agent, why), failed=True)]
        if self.state == "open":
            return [dropped, *self._go_on(now_s)]
        self._enter("open")
        return [dropped, self._ask_others(self.slow), *self._go_on(now_s)]

    def _committed(self, now_s: float) -> list[Command]:
        for _, offer in sorted(self.offers.items()):
            self._judge(offer, Verdict.MERGED)
        self._enter("waiting")
        self.participants, self.offers, self.missed, self.no_more_expected, self.broken = (), {}, {}, set(), set()
        self.retries.clear()
        if self.stop:
            return self._finish(StopRequested(self.stop))
        return self._go_on(now_s)

    # -- what follows --------------------------------------------------------------------------------------------------
    def _go_on(self, now_s: float) -> list[Command]:
        if self.state in ("merging", "ended"):
            return []
        if not self.offers and (end := self._nobody_can_train()):
            return end
        return self._open(now_s) if self.state == "waiting" else self._close(now_s)

    def _open(self, now_s: float) -> list[Command]:
        if self.version >= self.versions:
            return self._finish(VersionsReached(self.versions))
        if len(self.live) < (1 if self.started else self.min_agents) or not self._others():
            return []
        self._enter("open")
        self.started = True
        self.opened_at_s = now_s
        self.participants = self._draw()
        return [StartRound(self.version, self.participants)]

    def _close(self, now_s: float) -> list[Command]:
        enough = bool(self.offers) and not self._too_few(self.offers.values(), self.broken)
        reached = enough and len(self.offers) >= (self.quorum or 1)
        if not self._awaited():
            if reached or (enough and not self._others()):
                return [self._merge(self._closed("complete"))]
            if self._others():
                return [self._ask_others()]
            return self._tell_too_few(len(self.offers)) if self.offers else []
        if self.quorum is None or not reached:
            self.closes_at_s = None
            return []
        if self.closes_at_s is None:
            self.closes_at_s = now_s + self.grace()
        if now_s < self.closes_at_s:
            return [WakeAt(self.closes_at_s)]
        return [self._merge(replace(self._closed("quorum"), grace_s=self.grace()))]

    def _awaited(self) -> bool:
        """Return whether the update of a participant is awaited. Stops at the first, since every offer asks."""
        return any(
            p in self.live and p not in self.offers and p not in self.no_more_expected for p in self.participants
        )

    def _others(self) -> set[str]:
        """Return the live agents that were not asked to train for this round."""
        return self.live - {*self.participants} - self.no_more_expected

    def _ask_others(self, slow: Iterable[str] = ()) -> StartRound:
        """Let every other live agent train for this round, as the quorum is not reached and no update is awaited.

        An agent whose update was unusable is a participant no longer: a coordinator that takes over would wait in vain.

        Args:
            slow: agents that train for this round when they make progress again.
        """
        self.participants = tuple(sorted({*self.participants, *self._others(), *slow} - self.no_more_expected))
        return StartRound(self.version, self.participants)

    def _merge(self, closed: Closed) -> Merge:
        self._enter("merging")
        self.closes_at_s = None
        return self._plan(replace(closed, absent=self._absent({*self.participants} - {*self.offers})))

    def _plan(self, closed: Closed) -> Merge:
        self.closed_by = closed
        offers = [self.offers[agent] for agent in sorted(self.offers)]
        whole = [1.0] * len(offers)
        shares = whole if self.elastic else weights_of(offers, self.weights, self.normalize)
        chosen = tuple(Chosen(o.agent, o.clock, self.version - o.base, w) for o, w in zip(offers, shares, strict=True))
        late = tuple(p for p in self.participants if p not in self.offers and p not in self.no_more_expected)
        return Merge(chosen, closed, late)

    def _drop(self, offer: OfferReady, reason: DropReason) -> Drop:
        if offer.base == self.version and offer.agent not in self.offers:
            self.no_more_expected.add(offer.agent)
        return Policy._drop(self, offer, reason)

    def _closed(self, by: Literal["complete", "quorum"]) -> Closed:
        return Closed(by, len(self.offers), len(self.participants))

    def _draw(self) -> tuple[str, ...]:
        """Return the participants of a round: all live agents, or a share drawn by seed and version alone."""
        everyone = sorted(self._others())
        if self.sample is None:
            return tuple(everyone)
        count = max(self.min_updates, self.quorum or 1, round(self.sample * len(everyone)))
        return tuple(sorted(sorted(everyone, key=lambda a: _lot(self.seed, self.version, a))[:count]))

    def validate(self) -> None:
        """Assert the invariants; tests call this after every fact."""
        assert set(self.offers) <= set(self.participants), "an offer of a non-participant"
        assert all(o.base == self.version for o in self.offers.values()), "an offer of another version"
        assert (self.state == "open") <= bool(self.participants), "an open round without participants"
        assert (self.state == "merging") <= bool(self.offers), "a merge of nothing"
        assert not self.broken & set(self.offers), "an update both broken and offered"
        assert self.started or self.state in ("waiting", "ended"), "a round before the start"
        assert not self.no_more_expected & set(self.offers), "an update both dropped and offered"
        self._check_presence()
        if self.state == "open":
            enough = not self._too_few(self.offers.values(), self.broken)
            could = (self.offers and enough) or self._others()
            assert self._awaited() or not could, "a round that could close or ask others"
        assert self.closes_at_s is None or (self.state == "open" and self.quorum), "a grace period of nothing"


def _lot(seed: int, version: int, agent: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{version}:{agent}".encode(), digest_size=8).digest()
