"""What must hold in every run, whatever goes wrong, checked as each message reaches a stream.

It holds what happens against the `Chronicle` of what happened before. A violation is noted in plain words; the world stops.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import xxhash

from syncline.averaging.staleness import Hinge, Polynomial
from syncline.bus.base import Stored
from syncline.model.manifest import Manifest
from syncline.observe.telemetry import Event
from syncline.wire import subjects
from syncline.wire.dtypes import DTYPES
from syncline.wire.messages import (
    ENDED,
    MAX_HEAD_BYTES,
    REMEMBERED,
    Head,
    Heartbeat,
    LogLine,
    Plan,
    PlanEntry,
    Presence,
    Roster,
    Verdict,
    decode,
)
from syncline_sim.books import is_line
from syncline_sim.chronicle import Chronicle
from syncline_sim.oracle import Vector, next_center

ROUNDING = {"fp32": 1e-4, "fp64": 1e-11}


class Invariants(Chronicle):
    """`stored` and `purged` for all that happens in the streams of one run."""

    # -- what happens --------------------------------------------------------------------------------------------------
    def stored(self, stream: str, message: Stored) -> str:
        """What the timeline says of it: heads and offers."""
        run = self.spec.name
        if message.subject.endswith(f".{subjects.head_key(run)}"):
            return self._on_head(message.data)
        if stream in (subjects.updates_stream(run), subjects.model_stream(run)):
            self.lost.discard(message.subject)
            known = self.chunks.setdefault(message.subject, message.data)
            self._insist(known == message.data, f"{message.subject} was written twice, with different content")
        elif stream == subjects.offers_stream(run):
            return self._on_offer(message)
        elif stream == subjects.log_stream(run):
            self._on_log(message)
        return ""

    def _on_log(self, message: Stored) -> None:
        """A line, or a chunk of a record. A term puts one line for a version, but one that was lost may be put again."""
        self.lost.discard(message.subject)
        self.gone.discard(message.subject)
        self.chunks[message.subject] = message.data
        if is_line(message.subject):
            line = decode(LogLine, message.data)
            self._insist(
                message.subject == subjects.log_record(self.spec.name, line.version, line.term), "a line elsewhere"
            )
            self.lines[line.version, line.term] = line

    def purged(self, stream: str, removed: Iterable[str]) -> None:
        """Only what head names no more may go, and of updates only those that it calls judged."""
        names = list(removed)
        self.gone.update(names)
        if self.head is None or not names:
            return
        if stream == subjects.model_stream(self.spec.name):
            for what, ref in self._named(self.head):
                self._insist(not self._misses(ref) or self.incomplete, f"{what} was purged while head named it")
        elif stream == subjects.updates_stream(self.spec.name):
            for subject in names:
                self._on_purged_update(subjects.agent_of(subject), subject.split(".")[6])
        elif stream == subjects.log_stream(self.spec.name):
            for version, term in {tuple(map(int, subject.split(".")[4:6])) for subject in names}:
                self._insist(self.committed.get(version) != term, f"the record of version {version} was purged")

    def heard(self, beat: Heartbeat) -> None:
        """Check what the sender of a heartbeat has seen. An agent gives up only where its child crashes again and again."""
        gave_up = beat.state == "failed" and "crashed" not in beat.reason
        self._insist(not gave_up, f"session {beat.session[:6]} gave up: {beat.reason}")
        line, now = beat.seen_epoch, (beat.seen_term, beat.seen_version)
        known, before = self.seen.get(beat.session, (line, (0, 0)))
        if self.reborn and line != known:
            before = (0, 0)
        if not beat.seen_term:  # it has left the run, perhaps because that was gone, and begins with it
            self.seen.pop(beat.session, None)
        else:
            self._insist(now >= before, f"session {beat.session[:6]} saw {before} and then {now}")
            self.seen[beat.session] = line, max(before, now)

    def answered(self, agent: str, heard_s: float) -> None:
        self.answered_s[agent] = max(heard_s, self.answered_s.get(agent, heard_s))

    def told(self, subject: str, data: bytes) -> None:
        """An agent that is heard of is not lost, however slow it is."""
        if subject != subjects.events(self.spec.name, subjects.COORDINATOR):
            return
        event = Event.model_validate_json(data)
        if event.event != "agent-lost" or event.agent not in self.answered_s:
            return
        silent_s = event.time_s - self.answered_s[event.agent]
        self._insist("no progress" not in event.text, f"a slow agent counts as lost: {event.text}")
        heard = "not heard of" in event.text and silent_s < self.spec.agents.lost_after_s
        self._insist(not heard, f"{event.text}, and it was answered {silent_s:.1f} s before")

    def wrote(self, who: str, head: Head) -> None:
        """Head was changed. A term belongs to one coordinator, once the run has begun."""
        begun = self.head is not None and self.head.model is not None
        if begun and head.phase != "failed":
            known = self.writers.setdefault(head.term, who)
            self._insist(known == who, f"term {head.term} is {known}'s, and {who} writes under it")

    # -- head ----------------------------------------------------------------------------------------------------------
    def _on_head(self, data: bytes) -> str:
        self._insist(len(data) <= MAX_HEAD_BYTES, f"head has {len(data)} bytes")
        head, before = decode(Head, data), self.head
        self.heads.append(head)
        if before is not None:
            step = (head.term - before.term, head.version - before.version)
            anew = self.was_set_back and head.epoch != before.epoch and step[0] > 0 and step[1] == 0
            goes_on = head.epoch == before.epoch and step in ((0, 0), (0, 1), (1, 0))
            self._insist(anew or goes_on, f"{_short(before)} was followed by {_short(head)}")
            if anew:  # clocks are given again, and offers of the line before count for nothing
                for books in (self.offers, self.offer_seqs, self.sessions, self.may_begin, self.levels):
                    books.clear()
        roster = self._record(Roster, head.roster) if head.roster is not None else None
        if roster is not None and self.roster is not None:
            self._compare(self.roster, roster)
        if before is not None and head.version == before.version + 1:
            self._on_commit(before, head, roster)
        if roster is not None:
            self._check_verdicts(head, roster)
            self._check_gate(head, roster)
        if head.plan is not None and (before is None or head.plan != before.plan):
            self._on_plan(head, before)
        lost = before is not None and before.plan is not None and head.plan is None
        if lost and before is not None and (head.term, head.version) == (before.term, before.version):
            self._check_given_up(head, roster)
        self.roster = roster
        self._insist(head.phase != "merging" or head.plan is not None, "head is merging without a plan")
        for what, ref in self._named(head):
            self.incomplete |= self._misses(ref) and any(ref.id in subject for subject in self.lost)
            self._insist(not self._misses(ref) or self.incomplete, f"{_short(head)} names a {what} that is not there")
        if roster is not None:
            self._insist(
                head.phase != "training" or any(map(roster.participant, range(len(roster.agents)))),
                "head is training without a participant",
            )
            if head.phase != "failed":  # nobody reads on from it
                self._check_offers_seq(head, roster)
        where = f"{_short(head)} round {head.round} offers up to {head.offers_seq}"
        return f"head: {where} {head.digest[:8]} {head.reason}"

    def _on_plan(self, head: Head, before: Head | None) -> None:
        old = self.plan if before is not None and before.plan is not None else None
        held = head.plan
        assert held is not None
        plan = self.plan = decode(Plan, held) if isinstance(held, bytes) else self._record(Plan, held)
        self._insist(plan.version == head.version + 1, f"at version {head.version} the plan is for {plan.version}")
        names = [(e.agent, e.clock) for e in plan.merged]
        self._insist(names == sorted(set(names)), f"the plan's order is {names}")
        self._insist(bool(names), "the plan merges nothing")
        most = self.spec.sync.buffer_size(self.spec.agents.min) if self.spec.sync.kind == "async" else None
        self._insist(most is None or len(names) <= most, f"a merge of {len(names)} updates, and K = {most}")
        if old is not None:
            fewer = {(e.agent, e.clock) for e in plan.merged} < {(e.agent, e.clock) for e in old.merged}
            self._insist(fewer, f"the plan of version {plan.version} was replaced by another one")
        for entry in plan.merged:
            weight = self._weight(entry, plan)
            self._insist(abs(entry.weight - weight) < 1e-12, f"{entry.agent} has weight {entry.weight}, not {weight}")
            self._check_entry(head, entry)

    def _weight(self, entry: PlanEntry, plan: Plan) -> float:
        """What the formulas say that an update counts."""
        spec, n = self.spec, len(plan.merged)
        if spec.mix.kind == "elastic":
            return 1.0
        total = sum(e.samples for e in plan.merged)
        share = 1 / n if spec.merge.weights == "uniform" or not total else entry.samples / total
        if spec.sync.kind == "rounds":
            return share
        size, s, lag = spec.sync.buffer_size(spec.agents.min), spec.sync.staleness_or_default, entry.lag
        stale = 1.0
        if isinstance(s, Polynomial):
            stale = float((1 + lag) ** -s.a)
        elif isinstance(s, Hinge) and lag > s.b:
            stale = 1 / (s.a * (lag - s.b) + 1)
        return share * (n / size if size else 1.0) * stale

    def _check_entry(self, head: Head, entry: PlanEntry) -> None:
        what = f"{entry.agent}'s update of clock {entry.clock}"
        told = [o for o in self.offers.get((entry.agent, entry.clock), []) if o.blob == entry.blob]
        self._insist(bool(told), f"{what} is in a plan and was never offered")
        self._insist(all(o.base == head.version - entry.lag for o in told), f"{what} has the lag {entry.lag}")
        most = self.spec.sync.lag_bound(self.spec.agents.min) if self.spec.sync.kind == "async" else 0
        self._insist(entry.lag <= most, f"{what} is merged {entry.lag} versions late")
        self._insist((entry.agent, entry.clock) not in self.merged, f"{what} is planned again")
        number = self.roster.number(entry.agent) if self.roster is not None else None
        if number is None or self.roster is None:
            self._insist(False, f"{what} is in a plan, its agent in no roster")
            return
        if self.spec.sync.kind == "rounds":
            self._insist(self.roster.participant(number), f"{what} is in a plan, its agent no participant")
        self._insist(self.roster.clocks[number] < entry.clock, f"{what} is in a plan and was judged before")

    def _on_commit(self, before: Head, head: Head, roster: Roster | None) -> None:
        plan = self.plan
        if plan is None or before.plan is None or plan.version != head.version:
            self._insist(False, f"version {head.version} was committed without a plan")
            return
        self.committed[head.version] = head.term
        record = self._commit_record(head.version, head.term)
        self._insist(record is not None, f"version {head.version} was committed without a record")
        self._insist(record is None or record.plan == plan, f"version {head.version}: its record is not its plan")
        for i, agent in enumerate(roster.agents if roster is not None else ()):
            waited_for = roster is not None and roster.participant(i)
            here = roster is not None and roster.state(i) == Presence.PRESENT
            self._insist(here or not waited_for, f"{_short(head)}: {agent} is not present, and to take part")
        for entry in plan.merged:
            known = self.merged.setdefault((entry.agent, entry.clock), head.version)
            self._insist(known == head.version, f"{entry.agent}'s clock {entry.clock} is merged a second time")
            number = roster.number(entry.agent) if roster is not None else None
            told = roster.clocks[number] if roster is not None and number is not None else 0
            self._insist(told >= entry.clock, f"{entry.agent}'s clock {entry.clock} is merged, its roster says {told}")
        for drop in record.dropped if record is not None else ():
            twice = {(drop.agent, drop.clock)} & (self.dropped | self.merged.keys())
            self._insist(not twice, f"{drop.agent}'s clock {drop.clock} is judged a second time: {drop.reason}")
            self.dropped.add((drop.agent, drop.clock))
        self._insist(head.plan is None, f"version {head.version} still has the plan that made it")
        self._check_center(before, head, plan)

    def _check_center(self, before: Head, head: Head, plan: Plan) -> None:
        """The center and the outer state beside it are what the formulas make of the bytes that passed by."""
        assert head.manifest is not None and head.model is not None and before.model is not None
        layout = self._record(Manifest, head.manifest)
        data = self._content("model", head.model)
        self._insist(xxhash.xxh3_128_hexdigest(data) == head.digest, f"version {head.version}: a wrong digest")
        dtype, close = DTYPES[layout.dtype].little_endian, ROUNDING[layout.dtype]
        center, *updates = (
            np.frombuffer(self._content(what, ref), dtype).astype(np.float64)
            for what, ref in (("model", before.model), *((f"agent.{e.agent}.update", e.blob) for e in plan.merged))
        )
        if self.spec.mix.kind == "elastic":
            self._note_taken(plan, updates, layout.buffers)
        weights, buffers = [e.weight for e in plan.merged], layout.buffers
        expected, self.kept = next_center(self.spec, center, updates, weights, self.kept, before.version, buffers)
        right = np.allclose(np.frombuffer(data, dtype), expected, rtol=close, atol=close)
        self._insist(right, f"version {head.version}: the center is not what its updates and its rule make")
        if self.kept:
            there = np.frombuffer(self._content("outer", self._outer(head.model)), dtype)
            right = np.allclose(there, np.concatenate(self.kept), rtol=close, atol=close)
            self._insist(right, f"version {head.version}: the outer state is not what its updates make")

    def _note_taken(self, plan: Plan, updates: list[Vector], buffers: list[slice]) -> None:
        """Note which elastic differences the center has taken up; buffers are no part of them."""
        for entry, update in zip(plan.merged, updates, strict=True):
            difference = update.copy()
            for buffer in buffers:
                difference[buffer] = 0
            self.taken[entry.agent, entry.clock] = difference

    def _compare(self, old: Roster, new: Roster) -> None:
        self._insist(new.agents[: len(old.agents)] == old.agents, f"{old.agents} were numbered anew: {new.agents}")
        for i, agent in enumerate(old.agents[: len(new.agents)]):
            was, now = (old.clocks[i], old.verdict(i)), (new.clocks[i], new.verdict(i))
            self._insist(now[0] >= was[0], f"{agent}'s judged clock went back from {was[0]} to {now[0]}")
            if now[1] == Verdict.BROKEN and now != was:
                self._insist(
                    self._diverged(agent, now[0]), f"{agent}'s update of clock {now[0]} is called broken, and is not"
                )
            self._insist(now[0] > was[0] or now == was, f"{agent}'s clock {was[0]} was judged {was[1]}, now {now[1]}")

    def _diverged(self, agent: str, clock: int) -> bool:
        """Whether one of the agent's updates of that clock is no number, or lost."""
        if any(offer.blob.id in subject for offer in self.offers.get((agent, clock), ()) for subject in self.lost):
            return True
        blobs = [self._content(f"agent.{agent}.update", offer.blob) for offer in self.offers.get((agent, clock), ())]
        return any(bool(np.isnan(np.frombuffer(blob, DTYPES["fp64"].little_endian)).any()) for blob in blobs)

    def _check_verdicts(self, head: Head, roster: Roster) -> None:
        """What a roster says was merged is what was merged; of the last clocks, that is all that an agent will know."""
        for i, agent in enumerate(roster.agents):
            clock, before = roster.clocks[i], roster.merged_before(i)
            told = [roster.verdict(i) == Verdict.MERGED, *(bool(before >> k & 1) for k in range(REMEMBERED))]
            for k, merged in enumerate(told):
                right = merged == ((agent, clock - k) in self.merged)
                self._insist(right, f"{_short(head)} calls {agent}'s clock {clock - k} merged: {merged}")

    def _check_gate(self, head: Head, roster: Roster) -> None:
        """The gate is `max_ahead` above the slowest participant; whoever joins stands beside the slowest of the others."""
        bound = self.spec.sync.max_ahead if self.spec.sync.kind == "async" else None
        level = {a: roster.clocks[i] + roster.offset(i) for i, a in enumerate(roster.agents) if roster.participant(i)}
        expected = min(level.values()) + bound if bound is not None and level else None
        lifted = self.spec.merge.min_updates() > 1 and (head.gate or 0) > (expected or 0)  # for want of updates
        self._insist(head.gate == expected or lifted, f"{_short(head)}: the gate is {head.gate}, not {expected}")
        for agent in level.keys() - self.levels.keys() if self.levels and bound is not None else ():
            others = (
                min(level[a] for a in self.levels.keys() & level.keys()) if self.levels.keys() & level.keys() else 0
            )
            self._insist(level[agent] >= others, f"{agent} joins at {level[agent]}, and the slowest stands at {others}")
        self.levels = level
        if head.gate is not None:
            for agent in level:
                i = roster.agents.index(agent)
                self.may_begin[agent] = max(self.may_begin.get(agent, 0), head.gate - roster.offset(i))

    def _check_given_up(self, head: Head, roster: Roster | None) -> None:
        """A plan went without a new version: only where every update in it was found unusable."""
        for entry in self.plan.merged if self.plan is not None else ():
            number = roster.number(entry.agent) if roster is not None else None
            judged = roster is not None and number is not None and roster.clocks[number] >= entry.clock
            self._insist(judged or head.phase in ENDED, f"{_short(head)}: the plan is gone, and nothing was merged")

    def _check_offers_seq(self, head: Head, roster: Roster) -> None:
        """Whoever starts from this head reads on behind `offers_seq`: nothing unjudged may lie before it."""
        for seq, (agent, clock) in self.offer_seqs.items():
            number = roster.number(agent)
            if seq <= head.offers_seq and number is not None:
                judged = clock <= roster.clocks[number]
                self._insist(judged, f"offers_seq {head.offers_seq} is beyond {agent}'s unjudged clock {clock}")

    # -- offers and purges ---------------------------------------------------------------------------------------------
    def _on_offer(self, message: Stored) -> str:
        agent, offer = self._note_offer(message)
        if self.head is None or offer.epoch != self.head.epoch or offer.base > self.head.version:
            return f"{agent} offers clock {offer.clock} for a version {offer.base} that is lost"
        sessions = self.sessions[agent]
        may_begin = self.may_begin.get(agent)
        in_turn = (
            offer.clock == 1 or (agent, offer.clock - 1) in self.offers
        )  # else it finished one that was never sent
        if may_begin is not None and len(sessions) == 1 and in_turn:
            self._insist(offer.clock - 1 <= may_begin, f"{agent} began clock {offer.clock}, its gate was {may_begin}")
        prefix = subjects.update_prefix(self.spec.name, agent, offer.blob.id)
        names = [f"{prefix}.{k}" for k in range(offer.blob.chunks)]
        self._insist(all(n in self.chunks for n in names), f"{agent} offers clock {offer.clock} without all its chunks")
        self._insist(not self.gone & {*names} or self._judged(agent) >= offer.clock, f"{agent}'s chunks were purged")
        return f"{agent} offers clock {offer.clock} for version {offer.base}"

    def _on_purged_update(self, agent: str, blob: str) -> None:
        for clock, offers in ((c, o) for (a, c), o in self.offers.items() if a == agent):
            if any(offer.blob.id == blob for offer in offers):
                fine = clock <= self._judged(agent)
                self._insist(fine, f"{agent}'s update of clock {clock} was purged and not judged")

    def _insist(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(problem)


def _short(head: Head) -> str:
    return f"term {head.term} version {head.version} {head.phase}"
