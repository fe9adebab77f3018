"""Asynchronous averaging with bounded staleness: updates are gathered in a buffer, and every K of them make a version.

Agents do not wait for each other. The lag τ of an update is the number of versions made since the version from which the agent
trained. An update weighs s(τ), and is never merged with τ > `max_lag`. The buffer is merged

* when it holds K updates ("4 of 4"): the first K in order of arrival,
* `grace_s` after the quorum was reached ("quorum 2 of 4 + 2.0 s"),
* at once when no agent may train before some update is judged, since the buffer would never fill. With fewer updates than the
  merge rule needs, the run waits for more agents instead.

Updates that arrive while a plan is executed wait for the next version. An agent may train while it has fewer than `ahead`
unjudged updates: two where sending overlaps the next period, else one.

With `max_ahead` = s an agent may not begin a period while its clock is more than s ahead of the slowest live agent's *judged*
clock (stale synchronous parallel). That bound is the *gate*. An agent that joins or returns gets an offset to its clock, which
puts it beside the slowest of the others. Where the gate would keep a merge rule from the updates it needs, it is *relaxed*:
pending updates count as judged, and agents without pending updates may train. s = 0 is the synchronous run: every agent waits
for all others, and the versions have the same bits.

The updates of one agent are judged in the order of their clocks. A roster can express no other order, and elastic averaging
relies on it.

Sources: FedBuff (arXiv:2106.06639), FedAsync (arXiv:1903.03934), stale synchronous parallel (Ho et al., NIPS 2013).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from syncline.averaging.staleness import Staleness
from syncline.averaging.weights import Normalize, Weights, weights_of
from syncline.policy.base import Policy, ResumePoint
from syncline.policy.events import Chosen, Command, Drop, LetRun, Merge, OfferReady, WakeAt
from syncline.policy.reasons import (
    Closed,
    NothingUsable,
    NotStarted,
    Replaced,
    StopRequested,
    TooStale,
    Unusable,
    VersionsReached,
)
from syncline.wire.messages import Verdict

OVERLAPPING = 2  # updates of an agent that may wait to be judged, where it sends one while it trains the next


@dataclass(slots=True)
class Broadcast:
    """The last news to the agents: participants, gate and judged clocks."""

    participants: tuple[str, ...] = ()
    gate: int | None = None
    judged: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Asynchronous(Policy):
    """The policy of `sync: {kind: async}`."""

    buffer: int | None  # K, updates; None: one of every live agent at least
    max_lag: int  # versions
    staleness: Staleness
    weights: Weights
    normalize: Normalize | None = None
    max_ahead: int | None = None  # clocks
    overlap: bool = True  # an agent sends while it trains its next period
    quorum: int | None = None  # updates after which the grace period runs
    elastic: bool = False  # updates are elastic differences: each is added whole
    one_each: bool = False  # at most one update of an agent in a merge
    waiting: list[OfferReady] = field(default_factory=list)  # in the order of their arrival
    merging: list[OfferReady] = field(default_factory=list)
    offsets: dict[str, int] = field(default_factory=dict)  # added to an agent's clock where clocks are compared
    broken: set[str] = field(default_factory=set)  # whose newest update since the last commit was unusable
    last_broadcast: Broadcast = field(default_factory=Broadcast)
    closed_by: Closed | None = None  # the buffer that is merging
    gate_relaxed: bool = False  # pending updates count as judged: the rule needs more updates than the gate admits
    dirty: bool = False  # updates were judged since the last broadcast
    runner: str = field(default="", compare=False)  # cache: an agent that may train, as last found

    def resume(self, resume_point: ResumePoint, now_s: float) -> None:
        self.live, self.version = set(resume_point.live & {*resume_point.participants}), resume_point.version
        self.slow = set(resume_point.slow)
        self.offsets = dict(resume_point.offsets)
        self.last_broadcast = Broadcast(resume_point.participants, resume_point.gate, self.ledger.judged_clocks())
        self._enter("open")
        self.started = self.dirty = True
        self.opened_at_s = now_s
        for agent in sorted(resume_point.live - self.live):  # it was about to join
            self._set_beside(agent)
            self.live.add(agent)

    def resume_merge(self, offers: list[OfferReady]) -> None:
        self._enter("merging")
        self.merging = list(offers)
        for offer in offers:
            self.ledger.note_known(offer.agent, offer.clock)
        self.closed_by = self._closed("complete", offers)

    # -- one fact each -------------------------------------------------------------------------------------------------
    def _joined(self, agent: str, now_s: float) -> list[Command]:
        self._set_beside(agent)
        return self._go_on(now_s)

    def _set_beside(self, agent: str) -> None:
        """Give the agent an offset to its clock that puts it beside the slowest of the others."""
        others = [self._clock(a) for a in self.live if a != agent]
        if self.max_ahead is not None and others:
            self.offsets[agent] = max(self.offsets.get(agent, 0), min(others) - self.ledger.judged_clock(agent))

    def _offer(self, offer: OfferReady, now_s: float) -> list[Command]:
        known_clock = self.ledger.known_clock(offer.agent)
        if offer.clock <= known_clock:
            return []  # told twice
        is_second = known_clock > self.ledger.judged_clock(offer.agent)
        if is_second:
            self._insist_on_order(offer, [*self.waiting, *self.merging])
        self.ledger.note_known(offer.agent, offer.clock)
        if not self.started:
            return [self._drop(offer, NotStarted())]
        if (drop := self._too_stale(offer)) is not None:
            return [drop, *self._go_on(now_s)]
        self.waiting.append(offer)
        return [*(self._replaced() if is_second else ()), *self._go_on(now_s)]

    def _broken(self, agent: str, clock: int, why: str, now_s: float) -> list[Command]:
        offer = next((o for o in self.merging if (o.agent, o.clock) == (agent, clock)), None)
        if offer is None:
            return []
        self.merging.remove(offer)
        assert self.closed_by is not None
        closed = replace(self.closed_by, without=(*self.closed_by.without, (agent, why)))
        if any(o.agent == agent and o.clock < clock for o in self.merging):
            self._put_back(offer)
            return [self._plan(self.merging, closed)]
        self.broken.add(agent)
        dropped = self._drop(offer, Unusable(why))
        if self.merging:
            return [dropped, self._plan(self.merging, closed)]
        if self.stop:
            return [dropped, *self._finish(StopRequested(self.stop))]
        if not self.waiting and self.live | self.slow <= self.broken:
            return [dropped, *self._finish(NothingUsable(self.version, agent, why), failed=True)]
        self._enter("open")
        return [dropped, *self._replaced(), *self._let_run(), *self._close(now_s)]

    def _committed(self, now_s: float) -> list[Command]:
        for offer in sorted(self.merging, key=lambda o: (o.agent, o.clock)):
            self._judge(offer, Verdict.MERGED)
        self._enter("open")
        self.merging = []
        self.opened_at_s = now_s
        self.gate_relaxed = False
        self.missed.clear()
        self.broken.clear()
        if self.stop:
            return self._finish(StopRequested(self.stop))
        if self.version >= self.versions:
            return self._go_on(now_s)
        drops: list[Command] = [drop for o in self.waiting if (drop := self._too_stale(o)) is not None]
        self.waiting = [o for o in self.waiting if o.clock > self.ledger.judged_clock(o.agent)]
        return [*drops, *self._replaced(), *self._let_run(), *self._close(now_s)]

    def _put_back(self, offer: OfferReady) -> None:
        """Return an update to the buffer: an older update of the same agent must be judged first."""
        earlier = [i for i, o in enumerate(self.waiting) if o.agent == offer.agent and o.clock < offer.clock]
        self.waiting.insert(max(earlier, default=-1) + 1, offer)

    def _replaced(self) -> list[Command]:
        """Drop older updates of agents that may have only one pending: such an agent started again and forgot them."""
        if self.ahead > 1:
            return []
        newest = {o.agent: o.clock for o in self.waiting}
        merging = {o.agent for o in self.merging}
        older = [o for o in self.waiting if o.clock < newest[o.agent] and o.agent not in merging]
        self.waiting = [o for o in self.waiting if o not in older]
        return [self._drop(o, Replaced(newest[o.agent])) for o in older]

    # -- what follows --------------------------------------------------------------------------------------------------
    def _go_on(self, now_s: float) -> list[Command]:
        if not (self.waiting or self.merging) and (end := self._nobody_can_train()):
            return end
        if self.state != "merging" and self.version >= self.versions:
            return self._finish(VersionsReached(self.versions))
        if not self.started:
            if len(self.live) < self.min_agents:
                return []
            self._enter("open")
            self.started = True
            self.opened_at_s = now_s
        changed = self.dirty or self.gate_relaxed or len(self.live) != len(self.last_broadcast.participants)
        news = self._let_run() if changed and self._is_news() else []
        return [*news, *self._close(now_s)]

    def _close(self, now_s: float) -> list[Command]:
        """Return the merge of the buffer, if a condition for closing it holds."""
        ready = self._ready()
        if self.state != "open" or not ready:
            self.closes_at_s = None
            return []
        nobody_runs = not self._somebody_may_run()
        if self._too_few(ready, self.broken):
            self.closes_at_s = None
            return self._with_too_few(len(ready), now_s) if nobody_runs else []
        if self._full(ready):
            return [self._merge(ready, self._closed("complete", ready))]
        if nobody_runs:
            return [self._merge(ready, self._closed("nobody may run", ready))]
        if self.quorum is None or len(ready) < self.quorum:
            self.closes_at_s = None
            return []
        if self.closes_at_s is None:
            self.closes_at_s = now_s + self.grace()
        if now_s < self.closes_at_s:
            return [WakeAt(self.closes_at_s)]
        return [self._merge(ready, replace(self._closed("quorum", ready), grace_s=self.grace()))]

    def _with_too_few(self, updates: int, now_s: float) -> list[Command]:
        """Relax the gate once, or warn: no agent may train, and the rule needs more updates."""
        if self.max_ahead is not None and not self.gate_relaxed:
            self.gate_relaxed = True
            if self._is_news():
                return [*self._let_run(), *self._close(now_s)]
        return self._tell_too_few(updates)

    def _ready(self) -> list[OfferReady]:
        """Return the updates that a merge would take, in order of arrival."""
        ready = self.waiting
        if self.one_each:
            first: dict[str, OfferReady] = {}
            for offer in self.waiting:
                first.setdefault(offer.agent, offer)
            ready = list(first.values())
        return ready if self.buffer is None else ready[: self.buffer]

    def _full(self, ready: list[OfferReady]) -> bool:
        if self.buffer is None:
            return len(self.live) <= len(ready) and self.live <= {o.agent for o in ready}
        return len(ready) >= self.buffer

    def _merge(self, chosen: list[OfferReady], closed: Closed) -> Merge:
        taken = {(o.agent, o.clock) for o in chosen}
        self.waiting = [o for o in self.waiting if (o.agent, o.clock) not in taken]
        self.merging = list(chosen)
        self._enter("merging")
        self.closes_at_s = None
        return self._plan(chosen, replace(closed, absent=self._absent(self.missed)))

    def _plan(self, offers: list[OfferReady], closed: Closed) -> Merge:
        self.closed_by = closed
        offers = sorted(offers, key=lambda o: (o.agent, o.clock))
        lags = [self.version - o.base for o in offers]
        chosen = tuple(
            Chosen(o.agent, o.clock, lag, weight)
            for o, lag, weight in zip(offers, lags, self._weights(offers, lags), strict=True)
        )
        return Merge(chosen, closed)

    def _weights(self, offers: list[OfferReady], lags: list[int]) -> list[float]:
        """Return (1/K) s(τ_i) for uniform shares, also with fewer than K updates; 1 for each elastic difference."""
        if self.elastic:
            return [1.0] * len(offers)
        shares = weights_of(offers, self.weights, self.normalize)
        part = 1.0 if self.buffer is None else len(offers) / self.buffer
        return [share * part * self.staleness.weight(lag) for share, lag in zip(shares, lags, strict=True)]

    def _too_stale(self, offer: OfferReady) -> Drop | None:
        lag = self.version - offer.base
        if lag <= self.max_lag:
            return None
        return self._drop(offer, TooStale(lag, self.max_lag))

    # -- admission ---------------------------------------------------------------------------------------------------
    def _clock(self, agent: str) -> int:
        """Return the agent's judged clock plus its offset, comparable between agents."""
        return self.ledger.judged_clock(agent) + self.offsets.get(agent, 0)

    def _gate(self) -> int | None:
        """Return the highest clock plus offset with which an agent may begin a period, or None without a bound.

        A relaxed gate counts pending updates as judged, and admits the slowest agent without pending updates: periods that
        were lost on the way may have put all such agents further ahead.
        """
        if self.max_ahead is None or not self.live:
            return None
        if not self.gate_relaxed:
            return min(map(self._clock, self.live)) + self.max_ahead
        ahead = {a: self.ledger.known_clock(a) - self.ledger.judged_clock(a) for a in self.live}
        idle = [self._clock(a) for a in self.live if not ahead[a]]
        slowest = min(self._clock(a) + ahead[a] for a in self.live)
        return max(slowest + self.max_ahead, min(idle, default=0), self.last_broadcast.gate or 0)

    def _may_run(self, agent: str) -> bool:
        """Return whether the agent, as told by the last broadcast, may be training or begin to."""
        told = self.last_broadcast
        clock = max(self.ledger.known_clock(agent), told.judged.get(agent, 0))
        if agent not in told.participants or clock - told.judged.get(agent, 0) >= self.ahead:
            return False
        return told.gate is None or clock + self.offsets.get(agent, 0) <= told.gate

    def _somebody_may_run(self) -> bool:
        if self.runner not in self.live or not self._may_run(self.runner):
            self.runner = next(filter(self._may_run, self.live), "")
        return bool(self.runner)

    @property
    def ahead(self) -> int:
        """Return how many unjudged updates one agent may have."""
        return OVERLAPPING if self.overlap and self.max_ahead != 0 else 1

    def _is_news(self) -> bool:
        told = self.last_broadcast
        if told.participants != tuple(sorted(self.live)) or told.gate != self._gate():
            return True
        return any(self.ledger.judged_clock(a) != told.judged.get(a, 0) for a in self.live)

    def _judge(self, offer: OfferReady, verdict: Verdict) -> None:
        Policy._judge(self, offer, verdict)
        self.dirty = True

    def _let_run(self) -> list[Command]:
        self.dirty = False
        self.last_broadcast = Broadcast(tuple(sorted(self.live)), self._gate(), self.ledger.judged_clocks())
        offsets = tuple(sorted((a, o) for a, o in self.offsets.items() if o))
        return [
            LetRun(
                self.version,
                self.last_broadcast.participants,
                self.last_broadcast.gate,
                offsets,
                self.state == "merging",
            )
        ]

    def _closed(self, by: Literal["complete", "quorum", "nobody may run"], offers: list[OfferReady]) -> Closed:
        if self.buffer is not None:
            return Closed(by, len(offers), self.buffer)
        agents = {o.agent for o in offers}
        return Closed(by, len(agents), len(self.live | agents | self.missed.keys()))

    def validate(self) -> None:
        assert (self.state == "merging") == bool(self.merging), "a merge of nothing, or none where there should be"
        assert self.state != "waiting" or not self.waiting, "a buffer before the start"
        stale = [o for o in self.waiting + self.merging if self.version - o.base > self.max_lag]
        assert not stale or self.state == "ended", "a lag above the bound"
        both = [(o.agent, o.clock) for o in self.waiting + self.merging]
        assert len(both) == len(set(both)), "an update twice"
        assert all(clock > self.ledger.judged_clock(agent) for agent, clock in both), "a judged update waits"
        self._check_presence()
        if self.one_each:
            assert len({o.agent for o in self.merging}) == len(self.merging), "two updates of an agent in a merge"
        if self.state == "open":
            ready = [] if self._too_few(self._ready(), self.broken) else self._ready()
            assert not ready or not self._full(ready), "a full buffer that is not merged"
            assert not ready or any(map(self._may_run, self.live)), "a buffer that nobody can fill"
            assert not self._is_news(), "news that was not told"
        assert self.closes_at_s is None or (self.state == "open" and self.quorum), "a grace period of nothing"
