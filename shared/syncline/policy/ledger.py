"""Offered and judged clocks of a run's agents, and the agents' numbers. The only owner of both; pure.

An agent numbers its updates by a *clock*, 1, 2, 3 … An offer is *found* when the coordinator reads it from the stream of
offers, *known* when the policy has handled it, and *judged* once, when the policy decides to merge or drop the update. The
policy judges; the coordinator reads offers in, writes verdicts into rosters, and purges the blobs of judged updates.

Everything here can be read again from the bus: the roster blob, and the offers after `judged_up_to`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from syncline.policy.events import Chosen
from syncline.policy.membership import Numbering
from syncline.wire.messages import REMEMBERED, BlobRef, Offer, Plan, PlanEntry, Presence, Roster, Verdict


@dataclass(frozen=True, slots=True)
class Judged:
    """The last judged clock of an agent, and the verdict on it."""

    clock: int = 0
    verdict: Verdict = Verdict.NONE
    merged_before: int = 0  # bit k: whether clock − 1 − k was merged, as in a roster

    def then(self, clock: int, verdict: Verdict) -> Judged:
        """Return what is known after one more verdict.

        The clock may be older than the last one: an update waits for its merge while a newer one is dropped.
        """
        merged, apart = verdict == Verdict.MERGED, clock - self.clock
        if apart > REMEMBERED:
            return Judged(clock, verdict)
        if apart > 0:
            known = self.merged_before << 1 | (self.verdict == Verdict.MERGED)
            return Judged(clock, verdict, (known << apart - 1) % (1 << REMEMBERED))
        if merged and -REMEMBERED <= apart < 0:
            return replace(self, merged_before=self.merged_before | 1 << -apart - 1)
        return self


@dataclass(frozen=True, slots=True)
class Offered:
    """An unjudged update: its entry in a plan, still without lag and weight, and its sequence number in the stream."""

    entry: PlanEntry
    seq: int


@dataclass(slots=True)
class Ledger:
    """Every agent's offered and judged clocks in one run."""

    numbering: Numbering = field(default_factory=Numbering)
    _judged: dict[str, Judged] = field(default_factory=dict)
    _read: dict[str, int] = field(default_factory=dict)  # highest clock of each agent's offers found in the stream
    _known: dict[str, int] = field(default_factory=dict)  # highest clock of each agent's offers that the policy handled
    _offered: dict[str, dict[int, Offered]] = field(default_factory=dict)  # agent → clock → unjudged update
    _planned: set[tuple[str, int]] = field(default_factory=set)  # (agent, clock) of those that the plan in head merges
    _purgeable: list[tuple[str, BlobRef]] = field(default_factory=list)  # judged since the last `take_purgeable`

    # -- verdicts ------------------------------------------------------------------------------------------------------
    def judged(self, agent: str) -> Judged:
        """Return the last verdict on the agent's updates."""
        return self._judged.get(agent, Judged())

    def judged_clock(self, agent: str) -> int:
        """Return the agent's last judged clock, 0 before the first."""
        judged = self._judged.get(agent)
        return judged.clock if judged is not None else 0

    def judged_clocks(self) -> dict[str, int]:
        """Return the last judged clock of every agent that has one."""
        return {agent: judged.clock for agent, judged in self._judged.items()}

    def judge(self, agent: str, clock: int, verdict: Verdict) -> None:
        """Record the policy's verdict on an update.

        Older updates of the agent are judged with it, unless the plan in head merges them.
        """
        offered = self._offered.get(agent, {})
        update = offered.pop(clock, None)
        if update is not None:
            self._purgeable.append((agent, update.entry.blob))
        self._planned.discard((agent, clock))
        judged = self._judged[agent] = self.judged(agent).then(clock, verdict)
        for older in [c for c in offered if c < judged.clock and (agent, c) not in self._planned]:
            self._purgeable.append((agent, offered.pop(older).entry.blob))

    # -- offers --------------------------------------------------------------------------------------------------------
    def found(self, agent: str, clock: int) -> None:
        """Note that an offer of this clock is in the stream, acceptable or not."""
        self._read[agent] = max(clock, self._read.get(agent, 0))

    def misses(self, agent: str, clock: int) -> bool:
        """Return whether an offer of that clock was neither found in the stream nor judged."""
        return clock > max(self._read.get(agent, 0), self.judged_clock(agent))

    def offer(self, agent: str, offer: Offer, seq: int) -> bool:
        """Note an acceptable offer; return False where its clock was judged already.

        Args:
            seq: its sequence number in the stream of offers.
        """
        if offer.clock <= self.judged_clock(agent):
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

    def refuse(self, agent: str, clock: int) -> None:
        """Forget an offer that the policy refused to handle: it is not judged."""
        self._offered.get(agent, {}).pop(clock, None)

    def known_clock(self, agent: str) -> int:
        """Return the newest clock of the agent that the policy has handled or judged."""
        return max(self._known.get(agent, 0), self.judged_clock(agent))

    def note_known(self, agent: str, clock: int) -> None:
        """Note that the policy handles this offer."""
        self._known[agent] = max(clock, self._known.get(agent, 0))

    def judged_up_to(self, read_up_to: int) -> int:
        """Return the sequence number up to which every offer was judged. A restarted coordinator reads on after it.

        Args:
            read_up_to: sequence number of the last message that was read.
        """
        return min((offered.seq - 1 for offered in self._unjudged()), default=read_up_to)

    # -- plans ---------------------------------------------------------------------------------------------------------
    def plan_entries(self, chosen: Sequence[Chosen]) -> list[PlanEntry]:
        """Return the entries of a plan that merges these updates. They stay until the plan is executed."""
        self._planned = {(c.agent, c.clock) for c in chosen}
        entries = [self._offered[c.agent][c.clock].entry for c in chosen]
        return [entry.changed(lag=c.lag, weight=c.weight) for entry, c in zip(entries, chosen, strict=True)]

    def resume_plan(self, plan: Plan, seq: int) -> None:
        """Take over a plan that was found in head.

        Args:
            seq: the first sequence number in the stream of offers at which its updates can be.
        """
        for entry in plan.merged:
            self._offered.setdefault(entry.agent, {})[entry.clock] = Offered(entry, seq)
        self._planned = {(e.agent, e.clock) for e in plan.merged}

    # -- blobs ---------------------------------------------------------------------------------------------------------
    def needed_blobs(self) -> set[str]:
        """Return the ids of blobs of updates that are unjudged, or judged and not yet given to `take_purgeable`."""
        return {offered.entry.blob.id for offered in self._unjudged()} | {blob.id for _, blob in self._purgeable}

    def take_purgeable(self) -> list[tuple[str, BlobRef]]:
        """Return agent and blob of each update judged since the last call.

        Call it after head says so: a coordinator that takes over before needs the blobs.
        """
        purgeable, self._purgeable = self._purgeable, []
        return purgeable

    # -- rosters -------------------------------------------------------------------------------------------------------
    def restore(self, roster: Roster) -> None:
        """Take over the numbers and verdicts of a roster."""
        self.numbering.names = list(roster.agents)
        self._judged = {
            a: Judged(roster.clocks[i], roster.verdict(i), roster.merged_before(i)) for i, a in enumerate(roster.agents)
        }

    def roster(
        self,
        present: Iterable[str],
        participants: tuple[str, ...],
        offsets: dict[str, int],
        presence: Callable[[str], Presence],
    ) -> Roster:
        """Make the roster that opens a round; agents that are new get their numbers.

        Args:
            present: agents that need a number, participants or not.
            participants: these need a number too, lost ones included: they may return.
            offsets: added to agents' clocks where clocks are compared.
            presence: the policy's state of an agent.
        """
        self.numbering.admit([a for a in {*present, *participants} if a not in self.numbering.names])
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

    def why_no_room(self, agent: str, present: set[str]) -> str:
        """Return why the agent cannot take part beside those that are present, or ''."""
        names = self.numbering.names
        if agent in names:
            return ""
        unnumbered = len(present - {agent}) - len(present.intersection(names))  # they get their numbers before it
        return self.numbering.why_no_room(len(names) + unnumbered)

    def _unjudged(self) -> Iterator[Offered]:
        return (offered for updates in self._offered.values() for offered in updates.values())
