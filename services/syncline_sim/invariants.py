"""The invariants of every run under all faults, checked as each message reaches a stream.

Each message is compared with the `ObservedRun` before it. A violation is appended to `problems`, and the cluster stops.
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
from syncline_sim.child_factories import StubChildFactory
from syncline_sim.faults import Crash, Down, Faults, RollBack, Twin
from syncline_sim.inline_children import StubState
from syncline_sim.observed_run import ObservedRun
from syncline_sim.observer import is_line
from syncline_sim.reference_merge import Vector, expected_center
from syncline_sim.scenario import Scenario

ROUNDING = {"fp32": 1e-4, "fp64": 1e-11}
CLOSE = 1e-9  # allowed difference between given and merged elastic differences, element by element


class Invariants(ObservedRun):
    """An observer that checks the invariants of one run."""

    # -- events --------------------------------------------------------------------------------------------------------
    def on_stored(self, stream: str, message: Stored) -> str:
        """Check a stored message. Return the timeline's line for a head or an offer."""
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
        """Check a line or a chunk of a record. A term puts one line per version; a lost line may be put again."""
        self.lost.discard(message.subject)
        self.gone.discard(message.subject)
        self.chunks[message.subject] = message.data
        if is_line(message.subject):
            line = decode(LogLine, message.data)
            self._insist(
                message.subject == subjects.log_record(self.spec.name, line.version, line.term), "a line elsewhere"
            )
            self.lines[line.version, line.term] = line

    def on_purged(self, stream: str, removed: Iterable[str]) -> None:
        """Check that head refers to no purged blob, and that purged updates are judged."""
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

    def on_heartbeat(self, beat: Heartbeat) -> None:
        """Check that a session never sees an older version, and gives up only if its child crashes again and again."""
        gave_up = beat.state == "failed" and "crashed" not in beat.reason
        self._insist(not gave_up, f"session {beat.session[:6]} gave up: {beat.reason}")
        epoch = beat.seen_epoch
        now = (beat.seen_term, beat.seen_version)
        known_epoch, before = self.seen.get(beat.session, (epoch, (0, 0)))
        if self.resubmitted and epoch != known_epoch:
            before = (0, 0)
        if not beat.seen_term:  # the agent has left the run, perhaps because the run was lost, and starts it anew
            self.seen.pop(beat.session, None)
        else:
            self._insist(now >= before, f"session {beat.session[:6]} saw {before} and then {now}")
            self.seen[beat.session] = epoch, max(before, now)

    def on_heartbeat_answered(self, agent: str, heard_s: float) -> None:
        self.answered_s[agent] = max(heard_s, self.answered_s.get(agent, heard_s))

    def on_published(self, subject: str, data: bytes) -> None:
        """Check that an agent whose heartbeats arrive is not counted as lost, however slow it is."""
        if subject != subjects.events(self.spec.name, subjects.COORDINATOR):
            return
        event = Event.model_validate_json(data)
        if event.event != "agent-lost" or event.agent not in self.answered_s:
            return
        silent_s = event.time_s - self.answered_s[event.agent]
        self._insist("no progress" not in event.text, f"a slow agent counts as lost: {event.text}")
        heard = "not heard of" in event.text and silent_s < self.spec.agents.lost_after_s
        self._insist(not heard, f"{event.text}, and it was answered {silent_s:.1f} s before")

    def on_head_written(self, connection: str, head: Head) -> None:
        """Check that one connection alone writes head under a term, once the run has begun."""
        begun = self.head is not None and self.head.model is not None
        if begun and head.phase != "failed":
            known = self.writers.setdefault(head.term, connection)
            self._insist(known == connection, f"term {head.term} is {known}'s, and {connection} writes under it")

    # -- head ----------------------------------------------------------------------------------------------------------
    def _on_head(self, data: bytes) -> str:
        self._insist(len(data) <= MAX_HEAD_BYTES, f"head has {len(data)} bytes")
        head, before = decode(Head, data), self.head
        self.heads.append(head)
        if before is not None:
            step = (head.term - before.term, head.version - before.version)
            anew = self.has_rolled_back and head.epoch != before.epoch and step[0] > 0 and step[1] == 0
            goes_on = head.epoch == before.epoch and step in ((0, 0), (0, 1), (1, 0))
            self._insist(anew or goes_on, f"{_short(before)} was followed by {_short(head)}")
            if anew:  # a new epoch counts clocks from 1 again; offers of the previous epoch are void
                for table in (self.offers, self.offer_seqs, self.sessions, self.clock_bounds, self.levels):
                    table.clear()
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
            if head.phase != "failed":  # no coordinator continues from a failed head
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
        """Return the weight of an update by the formulas."""
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
        """Check the center and the state vectors against the formulas, applied to the bytes on the bus."""
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
        weights = [e.weight for e in plan.merged]
        expected, self.state_vectors = expected_center(
            self.spec, center, updates, weights, self.state_vectors, before.version, layout.buffers
        )
        right = np.allclose(np.frombuffer(data, dtype), expected, rtol=close, atol=close)
        self._insist(right, f"version {head.version}: the center is not what its updates and its rule make")
        if self.state_vectors:
            there = np.frombuffer(self._content("outer", self._outer(head.model)), dtype)
            right = np.allclose(there, np.concatenate(self.state_vectors), rtol=close, atol=close)
            self._insist(right, f"version {head.version}: the outer state is not what its updates make")

    def _note_taken(self, plan: Plan, updates: list[Vector], buffers: list[slice]) -> None:
        """Record the elastic differences that the center has taken up, with zeros in the places of buffers."""
        for entry, update in zip(plan.merged, updates, strict=True):
            difference = update.copy()
            for buffer in buffers:
                difference[buffer] = 0
            self.taken[entry.agent, entry.clock] = difference

    def _compare(self, old: Roster, new: Roster) -> None:
        """Check that agents keep their numbers and that judged clocks and verdicts never change back."""
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
        """Return whether one of the agent's updates of that clock holds a NaN or was lost."""
        if any(offer.blob.id in subject for offer in self.offers.get((agent, clock), ()) for subject in self.lost):
            return True
        blobs = [self._content(f"agent.{agent}.update", offer.blob) for offer in self.offers.get((agent, clock), ())]
        return any(bool(np.isnan(np.frombuffer(blob, DTYPES["fp64"].little_endian)).any()) for blob in blobs)

    def _check_verdicts(self, head: Head, roster: Roster) -> None:
        """Check the roster's bits of merged clocks. Agents learn the verdicts of their last clocks from these bits alone."""
        for i, agent in enumerate(roster.agents):
            clock, before = roster.clocks[i], roster.merged_before(i)
            told = [roster.verdict(i) == Verdict.MERGED, *(bool(before >> k & 1) for k in range(REMEMBERED))]
            for k, merged in enumerate(told):
                right = merged == ((agent, clock - k) in self.merged)
                self._insist(right, f"{_short(head)} calls {agent}'s clock {clock - k} merged: {merged}")

    def _check_gate(self, head: Head, roster: Roster) -> None:
        """Check that the gate is `max_ahead` above the slowest participant, and that a new one joins at least at that level."""
        bound = self.spec.sync.max_ahead if self.spec.sync.kind == "async" else None
        level = {a: roster.clocks[i] + roster.offset(i) for i, a in enumerate(roster.agents) if roster.participant(i)}
        expected = min(level.values()) + bound if bound is not None and level else None
        # A rule that needs several updates may have to open the gate further, so that fast agents send enough of them.
        gate_relaxed = self.spec.merge.min_updates() > 1 and (head.gate or 0) > (expected or 0)
        self._insist(head.gate == expected or gate_relaxed, f"{_short(head)}: the gate is {head.gate}, not {expected}")
        for agent in level.keys() - self.levels.keys() if self.levels and bound is not None else ():
            others = (
                min(level[a] for a in self.levels.keys() & level.keys()) if self.levels.keys() & level.keys() else 0
            )
            self._insist(level[agent] >= others, f"{agent} joins at {level[agent]}, and the slowest stands at {others}")
        self.levels = level
        if head.gate is not None:
            for agent in level:
                i = roster.agents.index(agent)
                self.clock_bounds[agent] = max(self.clock_bounds.get(agent, 0), head.gate - roster.offset(i))

    def _check_given_up(self, head: Head, roster: Roster | None) -> None:
        """Check a plan that was given up without a new version: every update in it must have been unusable."""
        for entry in self.plan.merged if self.plan is not None else ():
            number = roster.number(entry.agent) if roster is not None else None
            judged = roster is not None and number is not None and roster.clocks[number] >= entry.clock
            self._insist(judged or head.phase in ENDED, f"{_short(head)}: the plan is gone, and nothing was merged")

    def _check_offers_seq(self, head: Head, roster: Roster) -> None:
        """Check that every offer up to `offers_seq` is judged: a coordinator that takes over reads only later ones."""
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
        bound = self.clock_bounds.get(agent)
        # Without an offer of the previous clock the agent has finished a period that was never offered.
        in_turn = offer.clock == 1 or (agent, offer.clock - 1) in self.offers
        if bound is not None and len(sessions) == 1 and in_turn:
            self._insist(offer.clock - 1 <= bound, f"{agent} began clock {offer.clock}, its gate was {bound}")
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
        """Append a problem unless the condition holds."""
        if not holds:
            self.problems.append(problem)


def _short(head: Head) -> str:
    return f"term {head.term} version {head.version} {head.phase}"


# -- after the run -----------------------------------------------------------------------------------------------------
def elastic_conservation_problems(
    scenario: Scenario, faults: Faults, children: StubChildFactory, invariants: Invariants
) -> list[str]:
    """Return the agents of an elastic run whose local model lost a difference, or gave it up twice.

    An agent's W_i is its first value, plus the sum of its training steps, minus the differences that the center has taken up.
    Agents that lost their disk or had two processes at once are skipped; after a power failure of the broker all are skipped,
    because merged differences may be lost.
    """
    if scenario.spec.mix.kind != "elastic" or any(isinstance(f, RollBack) for f in faults.items):
        return []
    unclear = {f.service for f in faults.items if isinstance(f, Twin) or (isinstance(f, Crash | Down) and not f.disk)}
    states = {agent: children.kept(scenario.spec.name, agent) for agent in scenario.agents if agent not in unclear}
    return [
        problem
        for agent, state in states.items()
        if state is not None
        for problem in _conservation_problems(agent, state, invariants)
    ]


def _conservation_problems(agent: str, state: StubState, invariants: Invariants) -> list[str]:
    given = np.frombuffer(state.trained) - np.frombuffer(state.own)
    taken = sum(map(np.frombuffer, state.pending.values()), np.zeros_like(given))
    for (name, clock), update in invariants.taken.items():
        if name == agent and clock <= state.clock and clock not in state.pending:
            taken = taken + update
    apart = float(np.abs(given - taken).max(initial=0.0))
    return [f"{agent} gave up {apart:.3g} more or less than was merged of it"] if apart > CLOSE else []
