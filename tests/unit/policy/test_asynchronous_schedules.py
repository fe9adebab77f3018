"""Random schedules for the policy of asynchronous runs: whatever happens, nothing is merged twice and every run can end."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncline.averaging.staleness import Constant, Hinge, Polynomial
from syncline.averaging.weights import weights_of
from syncline.errors import PeerError
from syncline.policy.asynchronous import Asynchronous
from syncline.policy.base import ResumePoint
from syncline.policy.events import (
    AgentJoined,
    AgentLost,
    AgentSlow,
    Chosen,
    Command,
    Drop,
    Fact,
    Finish,
    LetRun,
    Merge,
    OfferReady,
    TargetReached,
    Tick,
    UpdateBroken,
    VersionCommitted,
    WakeAt,
    Warn,
)
from syncline.policy.words import REASON_CHARS, closed_words
from unit.ledgers import ledger_at

NAMES = ("a1", "a2", "a3", "a4", "a5")
ACTS = ("train",) * 8 + ("deliver",) * 6 + ("join",) * 3 + ("commit",) * 4 + ("hear",) * 2 + (
    "lose", "fail", "slow", "future", "back", "again", "restart", "broken", "broken elsewhere", "tick", "target", "take over",
)  # fmt: skip
Act = tuple[str, str, float]
Update = tuple[str, int]  # agent and clock


@dataclass(frozen=True)
class Written:
    """What head and its roster say: all that survives a coordinator."""

    version: int = 0
    participants: tuple[str, ...] = ()
    live: frozenset[str] = frozenset()
    slow: frozenset[str] = frozenset()
    judged: dict[str, int] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)
    gate: int | None = None
    plan: tuple[Chosen, ...] = ()


@dataclass
class Agent:
    """One agent, as its session goes about it."""

    heard: Written = Written()
    clock: int = 0  # finished, as it remembers
    handed: int = 0  # newest that this process has sent
    outbox: list[OfferReady] = field(default_factory=list)
    periods: int = 0

    def due(self, name: str, ahead: int) -> bool:
        heard = self.heard
        judged = heard.judged.get(name, 0)
        position = max(self.handed, judged)
        if name not in heard.participants or position - judged >= ahead:
            return False
        return heard.gate is None or position + heard.offsets.get(name, 0) <= heard.gate


class Fleet:
    """Agents and a shell around a policy: who may run as the commands said, and what became of every update."""

    def __init__(self, policy: Asynchronous) -> None:
        self.policy, self.fresh, self.now_s = policy, copy.deepcopy(policy), 0.0
        self.agents: dict[str, Agent] = {name: Agent() for name in NAMES}
        self.live: set[str] = set()
        self.slow: set[str] = set()  # an update that they have finished is delivered
        self.written = Written()
        self.stream: list[OfferReady] = []  # every offer that was let through, in its order
        self.verdicts: dict[Update, str] = {}
        self.unwritten: set[Update] = set()  # verdicts that no roster tells of yet
        self.plan: tuple[Chosen, ...] = ()
        self.wake_at_s: float | None = None
        self.finished: Finish | None = None
        self.restarted: set[str] = set()
        self.seen: set[str] = set()  # what this schedule has shown, in a word each

    def act(self, what: str, who: str, seconds: float) -> None:
        self.now_s += seconds
        agent = self.agents[who]
        match what:
            case "join":
                self.live.add(who)
                self.slow.discard(who)
                self.tell(AgentJoined(who))
            case "slow" if who in self.live:
                self.live.discard(who)
                self.slow.add(who)
                self.tell(AgentSlow(who, "no progress for 5.1 s"))
            case "lose" | "fail":
                self.live.discard(who)
                self.slow.discard(who)
                self.tell(AgentLost(who, "gone", failed=what == "fail"))
            case "hear":
                agent.heard = self.written
            case "train" if who in self.live:
                self.train(who, late=seconds > 1)
            case "deliver" if agent.outbox and self.policy.started:
                self.deliver(agent.outbox.pop(0))
            case "restart":  # what was not sent is lost; what it had finished it may remember, or not
                agent.outbox.clear()
                agent.handed, self.restarted = 0, self.restarted | {who}
                agent.clock = max(0, agent.clock - int(seconds))
            case "future" if self.finished is None:
                self.refused(OfferReady(who, self.newest(who) + 1, self.policy.version + 1))
            case "back" if self.finished is None:
                waiting = [o for o in (*self.policy.waiting, *self.policy.merging) if o.agent == who and o.base > 0]
                if waiting:
                    self.refused(OfferReady(who, self.newest(who) + 1, max(o.base for o in waiting) - 1))
            case "again" if self.stream:
                before = copy.deepcopy(self.policy)
                self.tell(self.stream[int(seconds * 10) % len(self.stream)])
                assert self.finished or before == self.policy, "an offer told twice changed something"
            case "broken" if self.plan:
                update = self.plan[int(seconds * 10) % len(self.plan)]
                self.tell(UpdateBroken(update.agent, update.clock, "bad"))
            case "broken elsewhere":
                self.tell(UpdateBroken(who, self.newest(who) + 5, "bad"))
            case "commit":
                self.commit()
            case "target" if seconds > 1:
                self.tell(TargetReached("good enough"))
            case "tick":
                self.tell(Tick())
            case "take over" if self.policy.started and self.finished is None:
                self.take_over()

    # -- agents --------------------------------------------------------------------------------------------------------
    def newest(self, who: str) -> int:
        return max([self.agents[who].clock, *(o.clock for o in self.stream if o.agent == who)])

    def train(self, who: str, *, late: bool = False) -> None:
        """One period; `late`: from what it has heard before, else from the newest there is."""
        agent = self.agents[who]
        if not late:
            agent.heard = self.written
        if not agent.due(who, self.policy.ahead):
            return
        self.check_gate(who, late)
        judged = agent.heard.judged.get(who, 0)
        agent.clock = max(agent.clock, judged, agent.handed) + 1
        agent.handed = agent.clock
        agent.periods += 1
        steps, samples = 1 + agent.clock % 3, len(who) + agent.clock % 2
        agent.outbox.append(OfferReady(who, agent.clock, agent.heard.version, samples, steps))

    def check_gate(self, who: str, late: bool) -> None:
        """No start with c − min > s, by the verdicts and offsets that were told."""
        bound, agent = self.policy.max_ahead, self.agents[who]
        if bound is None or late or who in self.restarted:
            return
        clocks = dict(self.written.judged)
        if self.policy.gate_relaxed:  # for want of updates what waits counts too
            for offer in self.stream:
                clocks[offer.agent] = max(offer.clock, clocks.get(offer.agent, 0))
        level = {a: clocks.get(a, 0) + self.written.offsets.get(a, 0) for a in self.written.participants}
        mine = max(agent.handed, self.written.judged.get(who, 0)) + self.written.offsets.get(who, 0)
        assert mine - min(level.values()) <= bound, f"{who} starts {mine} beside {level}"

    def deliver(self, offer: OfferReady) -> None:
        waiting = [o for o in (*self.policy.waiting, *self.policy.merging) if o.agent == offer.agent]
        older = any(o.agent == offer.agent and o.clock >= offer.clock for o in self.stream)  # it is not looked at
        if any(o.base > offer.base for o in waiting) and offer.clock > max(o.clock for o in waiting):
            self.refused(offer)
            return
        if not older:
            self.stream.append(offer)
        self.tell(offer)

    def refused(self, offer: OfferReady) -> None:
        before = copy.deepcopy(self.policy)
        with pytest.raises(PeerError):
            self.policy.handle(offer, self.now_s)
        assert self.policy == before, "a refused fact changed something"

    # -- the shell -----------------------------------------------------------------------------------------------------
    def commit(self) -> None:
        if not self.plan:
            return
        plan, self.plan = self.plan, ()
        for update in plan:
            self.judge((update.agent, update.clock), "merged")
        if self.finished is None:
            self.tell(VersionCommitted(self.policy.version + 1), committing=True)

    def take_over(self) -> None:
        """Another coordinator: it knows what head says, looks at it (a Tick), and is told the offers that it calls unjudged."""
        w = self.written
        for update in self.unwritten:
            del self.verdicts[update]
        self.unwritten = set()
        new = copy.deepcopy(self.fresh)
        new.ledger = ledger_at(w.judged)
        new.resume(ResumePoint(w.version, w.participants, w.live, dict(w.offsets), w.gate, w.slow), self.now_s)
        self.live, self.slow, self.plan, self.wake_at_s = set(w.live), set(w.slow), w.plan, None
        if w.plan:
            by = {(o.agent, o.clock): o for o in self.stream}
            new.resume_merge([replace(by[c.agent, c.clock], base=w.version - c.lag) for c in w.plan])
        self.policy = new
        self.tell(Tick())
        for offer in [o for o in self.stream if o.clock > w.judged.get(o.agent, 0)]:
            if self.finished is None:
                try:
                    self.tell(offer)
                except PeerError:  # what was judged between them before is not, now
                    self.stream.remove(offer)

    def tell(self, fact: Fact, *, committing: bool = False) -> None:
        version = self.policy.version
        commands = self.policy.handle(fact, self.now_s)
        self.policy.validate()
        assert self.policy.version == version + committing
        if committing:
            start = next((c for c in commands if isinstance(c, LetRun)), None)
            for drop in [c for c in commands if isinstance(c, Drop)]:
                self.obey(drop)
            self.write(start, ())
            commands = [c for c in commands if not isinstance(c, Drop) and c is not start]
        for command in commands:
            self.obey(command)

    def write(self, start: LetRun | None, plan: tuple[Chosen, ...]) -> None:
        """Head and roster, in one step."""
        judged: dict[str, int] = {}
        for who, clock in self.verdicts:
            judged[who] = max(clock, judged.get(who, 0))
        participants = start.participants if start is not None else ()
        gate, offsets = (start.gate, dict(start.offsets)) if start is not None else (None, {})
        version = self.policy.version
        live, slow = frozenset(self.live), frozenset(self.slow)
        self.written = Written(version, participants, live, slow, judged, offsets, gate, plan)
        self.unwritten = set()

    def obey(self, command: Command) -> None:
        assert self.finished is None, "a command after the end"
        match command:
            case LetRun(version, participants, gate, offsets, merging):
                assert version == self.policy.version and list(participants) == sorted(set(participants))
                assert (gate is None) == (self.policy.max_ahead is None or not participants)
                assert merging == bool(self.plan)
                self.seen |= {name for name, there in (("a gate", gate), ("an offset", offsets)) if there}
                self.write(command, self.plan if merging else ())
            case Merge():
                self.check_merge(command)
                self.plan = command.updates
                self.written = replace(self.written, plan=self.plan)
            case Drop(agent, clock, reason):
                self.seen.add(type(reason).__name__)
                self.judge((agent, clock), "dropped")
                self.unwritten.add((agent, clock))
                self.plan = tuple(c for c in self.plan if (c.agent, c.clock) != (agent, clock))
            case Warn():
                self.seen.add("too-few-updates")
            case WakeAt(at_s):
                assert at_s > self.now_s, "a wake-up for now"
                self.wake_at_s = at_s
            case Finish():
                self.finished, self.plan = command, ()

    def check_merge(self, merge: Merge) -> None:
        self.seen.add(merge.reason.by)  # "complete", "quorum" or "nobody may run"
        self.seen |= {"without"} if merge.reason.without else set()
        policy, names = self.policy, [(c.agent, c.clock) for c in merge.updates]
        assert len(closed_words(merge.reason)) <= REASON_CHARS
        assert names == sorted(set(names)) and names, "not in the order of names and clocks"
        assert policy.buffer is None or len(names) <= policy.buffer, "more than K"
        assert self.plan or len(names) + len(policy.broken) >= policy.min_updates, "fewer than the rule needs"
        assert not policy.one_each or len({a for a, _ in names}) == len(names), "two of an agent"
        by = {(o.agent, o.clock): o for o in self.stream}
        offers = [by[name] for name in names]
        assert [c.lag for c in merge.updates] == [policy.version - o.base for o in offers]
        assert all(0 <= c.lag <= policy.max_lag for c in merge.updates), "a lag above the bound"
        shares = weights_of(offers, policy.weights, policy.normalize)
        part = 1.0 if policy.buffer is None else len(offers) / policy.buffer
        expected = [
            1.0 if policy.elastic else s * part * policy.staleness.weight(c.lag)
            for s, c in zip(shares, merge.updates, strict=True)
        ]
        assert [c.weight for c in merge.updates] == pytest.approx(expected, rel=1e-12)
        if not self.plan and not policy.one_each:
            judged: dict[
                str, int
            ] = {}  # a drop that no roster told of before a takeover is told by the next one's clock
            for who, clock in self.verdicts:
                judged[who] = max(clock, judged.get(who, 0))
            order = [(o.agent, o.clock) for o in self.stream if o.clock > judged.get(o.agent, 0)]
            assert set(order[: len(names)]) == set(names), "not the first in the order of arrival"

    def judge(self, update: Update, verdict: str) -> None:
        who, clock = update
        assert update not in self.verdicts, f"{update} was judged twice: {self.verdicts[update]}, then {verdict}"
        later = [c for w, c in self.verdicts if w == who and c > clock]
        assert not later, f"{update} is {verdict} after the verdict on clock {later}"
        self.verdicts[update] = verdict

    # -- the end -------------------------------------------------------------------------------------------------------
    def until_the_end(self) -> None:
        """From here on nothing goes wrong: somebody new comes, everybody works, and the run must end; who is live, runs."""
        self.restarted |= self.agents.keys()
        for fresh in ("b1", "b2", "b3")[: max(self.policy.min_agents, self.policy.min_updates)]:
            self.agents[fresh] = Agent()
            self.act("join", fresh, 0.0)
        before = {who: self.agents[who].periods for who in self.live}
        for turn in range(60):
            for who in sorted(self.live):
                if self.finished is None:
                    self.train(who)
                    self.act("deliver", who, 0.1)
            if self.finished is None and self.wake_at_s is not None:
                self.now_s = max(self.now_s, self.wake_at_s)
                self.act("tick", "a1", 0.0)
            self.commit()
            if self.finished is not None:
                return
            if turn == 20:
                idle = [
                    who for who, periods in before.items() if who in self.live and self.agents[who].periods == periods
                ]
                assert not idle, f"{idle} never run: {self.policy}"
        raise AssertionError(f"the run never ends: {self.policy}")


def judged_once_and_can_end(policy: Asynchronous, schedule: Sequence[Act]) -> Fleet:
    fleet = Fleet(policy)
    for act in schedule:
        fleet.act(*act)
    if fleet.finished is None:
        fleet.until_the_end()
    return fleet


# -- drawn by Hypothesis -----------------------------------------------------------------------------------------------
def made(**chosen: Any) -> Asynchronous:
    """With what `guardrails` and `spec` would not let pass put right."""
    if chosen["buffer"] is not None and chosen["buffer"] < chosen["min_updates"]:
        chosen["min_updates"] = 1
    if chosen["max_ahead"] == 0:
        chosen["buffer"] = None
    if chosen["quorum"] is not None and chosen["buffer"] is not None:
        chosen["quorum"] = min(chosen["quorum"], chosen["buffer"])
    return Asynchronous(**chosen)


CHOICES: dict[str, tuple[Any, ...]] = {
    "min_agents": (1, 2, 3),
    "buffer": (None, 1, 2, 3, 5),
    "max_lag": (0, 1, 3, 16),
    "staleness": (Constant(), Polynomial(a=0.5), Hinge(a=10.0, b=1)),
    "weights": ("uniform", "uniform", "samples", "steps"),
    "normalize": (None, None, "fednova"),
    "max_ahead": (None, None, 0, 1, 3),
    "overlap": (True, True, False),
    "quorum": (None, None, 1, 2),
    "grace_s": (None, 0.0, 1.0),
    "elastic": (False, False, True),
    "one_each": (False, False, True),
    "min_updates": (1, 1, 1, 2, 3),
    "versions": (1, 2, 4, 8, 30),
}
acts = st.lists(
    st.tuples(st.sampled_from(ACTS), st.sampled_from(NAMES), st.sampled_from([0.0, 0.3, 1.1, 2.0])),
    min_size=5, max_size=60,
)  # fmt: skip


@settings(max_examples=200)
@given(st.builds(made, **{name: st.sampled_from(values) for name, values in CHOICES.items()}), acts)
def test_whatever_happens_every_update_is_judged_once_and_the_run_can_end(
    policy: Asynchronous, schedule: list[Act]
) -> None:
    judged_once_and_can_end(policy, schedule)


# -- drawn by seeds ----------------------------------------------------------------------------------------------------
def drawn(seed: int) -> tuple[Asynchronous, list[Act]]:
    draw = random.Random(seed)
    policy = made(**{name: draw.choice(values) for name, values in CHOICES.items()})
    kinds = draw.choice((ACTS, ACTS, [a for a in ACTS if a not in ("fail", "broken")]))
    length = draw.randint(10, 120)
    return policy, [(draw.choice(kinds), draw.choice(NAMES), draw.choice([0.0, 0.3, 1.1, 2.0])) for _ in range(length)]


def play(seeds: range) -> list[Fleet]:
    fleets = []
    for seed in seeds:
        policy, schedule = drawn(seed)
        try:
            fleets.append(judged_once_and_can_end(policy, schedule))
        except (AssertionError, PeerError) as error:
            error.add_note(f"seed {seed}, {drawn(seed)[0]}")
            raise
    return fleets


def test_two_thousand_longer_schedules_end_just_as_well_and_reach_every_corner() -> None:
    fleets = play(range(2000))
    assert set().union(*(fleet.seen for fleet in fleets)) == {
        "a gate", "an offset", "nobody may run", "quorum", "without", "too-few-updates",
        "TooStale", "Replaced", "Unusable", "complete",
    }  # fmt: skip
    ends = [fleet.finished for fleet in fleets if fleet.finished is not None]
    assert len(ends) == 2000 and 1400 < sum(not end.failed for end in ends) < 2000


@pytest.mark.long
@pytest.mark.parametrize("thousands", range(2, 20, 6))
def test_many_thousands_end_just_as_well(thousands: int) -> None:
    play(range(1000 * thousands, 1000 * (thousands + 6)))
