"""The books of a run: who has which number, what was judged and how, what is offered and not judged, what can be purged.

Everything here can be read again from the bus: the roster blob and the offers after `judged_up_to`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from syncline.bus.base import Stored
from syncline.policy.events import Chosen
from syncline.policy.membership import Numbering
from syncline.spec.run_spec import RunSpec
from syncline.wire import subjects
from syncline.wire.messages import (
    REMEMBERED,
    BlobRef,
    Dropped,
    Head,
    Offer,
    Plan,
    PlanEntry,
    Presence,
    Roster,
    Verdict,
    clipped,
)
from syncline_coordinator.reservation import LOG_REASON_BYTES, most_updates
from syncline_coordinator.retention import Purger

DROPPED_AT_ONCE = 1000  # that a commit record lists beyond what the log reserves for each version, where some is unused


@dataclass(frozen=True, slots=True)
class Offered:
    """An update as a plan will name it, but for its weight; and where its offer stands in the stream."""

    entry: PlanEntry
    seq: int


@dataclass(frozen=True, slots=True)
class Judged:
    """The last judged clock of an agent, and the verdict on it."""

    clock: int = 0
    verdict: Verdict = Verdict.NONE
    merged_before: int = 0  # as in a roster: which of the clocks before it were merged

    def then(self, clock: int, verdict: Verdict) -> Judged:
        """After a verdict, on a newer clock or on one that waited for its merge while a newer one was dropped."""
        merged, apart = verdict == Verdict.MERGED, clock - self.clock
        if apart > REMEMBERED:
            return Judged(clock, verdict)
        if apart > 0:
            known = self.merged_before << 1 | (self.verdict == Verdict.MERGED)
            return Judged(clock, verdict, (known << apart - 1) % (1 << REMEMBERED))
        if merged and -REMEMBERED <= apart < 0:
            return replace(self, merged_before=self.merged_before | 1 << -apart - 1)
        return self


class Ledger:
    def __init__(self, spec: RunSpec, max_agents: int, head: Head, purger: Purger) -> None:
        self._run, self._keep_models, self._purger = spec.name, spec.keep_models, purger
        self._with_outer = spec.states > 0
        self.numbering = Numbering(fixed_parts=spec.partition.parts, max_agents=max_agents)
        self._dropped: list[Dropped] = []  # since the last commit, as far as the log has room for them
        self._dropped_more = 0  # beside those
        self._dropped_room, self._dropped_a_version = DROPPED_AT_ONCE, most_updates(spec, max_agents)
        self.read_up_to = head.offers_seq
        self.last_read: Stored | None = None  # … the message there, as it was read
        self._judged: dict[str, Judged] = {}
        self._read: dict[str, int] = {}  # highest clock of each agent's offers that were found in the stream
        self._offered: dict[str, dict[int, Offered]] = {}  # agent → clock → what it offered
        self._planned: set[tuple[str, int]] = set()  # of those, what the plan in head merges
        self._purge_later: list[tuple[str, BlobRef]] = []
        self._kept = [model for model in (head.previous, head.model) if model is not None]

    # -- rosters -------------------------------------------------------------------------------------------------------
    def restore(self, roster: Roster) -> None:
        """Takes over what a roster says."""
        self.numbering.names = list(roster.agents)
        self._judged = {
            a: Judged(roster.clocks[i], roster.verdict(i), roster.merged_before(i)) for i, a in enumerate(roster.agents)
        }

    def roster(
        self,
        present: set[str],
        participants: tuple[str, ...],
        offsets: dict[str, int],
        presence: Callable[[str], Presence],
    ) -> Roster:
        """Make the roster that opens a round; agents that are new get their numbers.

        Args:
            present: agents that need a number, participants or not.
            presence: the policy's state of an agent.
        """
        here = present.union(participants)  # a participant may have gone since it was named, and will come back
        self.numbering.admit([a for a in here if a not in self.numbering.names])
        names = list(self.numbering.names)
        judged = [self.judged(a) for a in names]
        flags = (Roster.flag(a in participants, j.verdict, j.merged_before) for a, j in zip(names, judged, strict=True))
        return Roster(
            parts=self.numbering.parts,
            agents=names,
            clocks=[j.clock for j in judged],
            flags=bytes(flags),
            presence=bytes(presence(a) for a in names),
            offsets=[offsets.get(a, 0) for a in names] if any(offsets.values()) else [],
        )

    def room_for(self, agent: str, present: set[str]) -> str:
        """'' where the agent can take part, else why not."""
        names = self.numbering.names
        if agent in names:
            return ""
        others = len(present) - (agent in present)  # … that have no number yet get theirs before it
        return self.numbering.room_beside(len(names) + others - (len(present.intersection(names)) if names else 0))

    # -- offers and verdicts -------------------------------------------------------------------------------------------
    def judged(self, agent: str) -> Judged:
        return self._judged.get(agent, Judged())

    def judged_up_to(self) -> int:
        """The sequence number up to which every offer was judged: where a restarted coordinator begins to read."""
        return min((offered.seq - 1 for offered in self._every_offered()), default=self.read_up_to)

    def passed(self, stored: Stored) -> None:
        """A message of the stream of offers was read, whatever it is."""
        self.read_up_to, self.last_read = stored.seq, stored

    def read(self, agent: str, clock: int) -> None:
        """An offer was found in the stream, whatever it may be worth."""
        self._read[agent] = max(clock, self._read.get(agent, 0))

    def misses(self, agent: str, clock: int) -> bool:
        """Whether an offer of that clock was neither read nor judged."""
        return clock > max(self._read.get(agent, 0), self.judged(agent).clock)

    def offer(self, agent: str, offer: Offer, seq: int) -> bool:
        """Notes an offer; False where its clock was judged already, however often it is told."""
        if offer.clock <= self.judged(agent).clock:
            return False
        entry = PlanEntry(
            agent=agent,
            clock=offer.clock,
            weight=0.0,
            blob=offer.blob,
            digest=offer.digest,
            samples=offer.samples,
            steps=offer.steps,
            seconds=offer.seconds,
        )
        self._offered.setdefault(agent, {}).setdefault(offer.clock, Offered(entry, seq))
        return True

    def planned(self, plan: Plan, seq: int) -> None:
        """A plan that was found in head: its updates are offered, from `seq` on."""
        for entry in plan.merged:
            self._offered.setdefault(entry.agent, {})[entry.clock] = Offered(entry, seq)
        self._planned = {(e.agent, e.clock) for e in plan.merged}

    def offered_blobs(self) -> set[str]:
        return {offered.entry.blob.id for offered in self._every_offered()} | {blob.id for _, blob in self._purge_later}

    def forget(self, agent: str, clock: int) -> None:
        """An offer that is refused rather than judged."""
        self._offered.get(agent, {}).pop(clock, None)

    def taken_over(self, kept: list[BlobRef], left_behind: list[str], uncommitted: list[str]) -> None:
        """What a dead coordinator has left: models to keep, the oldest first, prefixes of blobs that can go, and lines of the
        log whose commit was interrupted."""
        self._kept = kept
        for prefix in left_behind:
            self._purger.add(subjects.model_stream(self._run), prefix)
        for line in uncommitted:
            self._purger.add(subjects.log_stream(self._run), line, itself=True)

    def abandoned(self, model: str) -> None:
        """A model that was put in part, by a merge that could not be finished."""
        self._purge_model(model)

    def entries(self, chosen: Sequence[Chosen]) -> list[PlanEntry]:
        """What a plan says of the updates it merges. They stay until they are judged, whatever is dropped meanwhile."""
        self._planned = {(c.agent, c.clock) for c in chosen}
        offered = [self._offered[c.agent][c.clock].entry for c in chosen]
        weighed = [{"lag": c.lag, "weight": c.weight} for c in chosen]
        return [entry.model_copy(update=w) for entry, w in zip(offered, weighed, strict=True)]

    def merged(self, plan: Plan) -> None:
        self._planned.clear()
        for entry in plan.merged:
            self._judge(entry.agent, entry.clock, Verdict.MERGED)

    def drop(self, agent: str, clock: int, reason: str, verdict: Verdict) -> None:
        self._judge(agent, clock, verdict)
        if len(self._dropped) < self._dropped_room:
            self._dropped.append(Dropped(agent=agent, clock=clock, reason=clipped(reason, LOG_REASON_BYTES)))
        else:
            self._dropped_more += 1

    def take_dropped(self) -> tuple[list[Dropped], int]:
        """Return the updates dropped since the last commit, and how many more there were, and forget them."""
        dropped, more = self._dropped, self._dropped_more
        self._dropped, self._dropped_more = [], 0
        left = self._dropped_room - len(dropped)
        self._dropped_room = min(left, DROPPED_AT_ONCE) + self._dropped_a_version
        return dropped, more

    def _judge(self, agent: str, clock: int, verdict: Verdict) -> None:
        mine = self._offered.get(agent, {})
        offered = mine.pop(clock, None)
        if offered is not None:
            self._purge_later.append((agent, offered.entry.blob))
        judged = self._judged[agent] = self.judged(agent).then(clock, verdict)
        for older in [c for c in mine if c < judged.clock and (agent, c) not in self._planned]:
            self._purge_later.append((agent, mine.pop(older).entry.blob))

    def _every_offered(self) -> Iterator[Offered]:
        return (offered for mine in self._offered.values() for offered in mine.values())

    # -- what can go ---------------------------------------------------------------------------------------------------
    def settled(self, before: Head, after: Head) -> None:
        """Head has moved, so that what only the older one named can be purged: judged updates, roster, plan, old models."""
        for agent, blob in self._purge_later:
            self._purger.add(subjects.updates_stream(self._run), subjects.update_prefix(self._run, agent, blob.id))
        self._purge_later.clear()
        if before.roster != after.roster:
            self._purge_record(before.roster)
        if isinstance(before.plan, BlobRef) and before.plan != after.plan:
            self._purge_record(before.plan)
        if after.model is not None and after.model not in self._kept:
            self._kept.append(after.model)
        while len(self._kept) > self._keep_models:
            self._purge_model(self._kept.pop(0).id)

    def _purge_model(self, blob: str) -> None:
        """A model, and the outer state beside it."""
        self._purger.add(subjects.model_stream(self._run), subjects.model_prefix(self._run, blob))
        if self._with_outer:
            self._purger.add(subjects.model_stream(self._run), subjects.outer_prefix(self._run, blob))

    def _purge_record(self, ref: BlobRef | None) -> None:
        if ref is not None:
            self._purger.add(subjects.model_stream(self._run), subjects.model_prefix(self._run, ref.id))
