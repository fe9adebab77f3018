"""What a run and its coordinator report: commit records, metrics, status, events and advice. Decides nothing."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from syncline.bus.server.violations import ViolationLog
from syncline.errors import StoreDown, StreamFull
from syncline.observe.telemetry import Pace, Round, Telemetry
from syncline.policy.advice import Norms
from syncline.policy.events import Drop
from syncline.policy.reasons import TooStale
from syncline.policy.words import drop_words
from syncline.spec.run_spec import RunSpec
from syncline.wire.messages import Committed, Dropped, Head, Offer, Plan, clipped
from syncline_coordinator.merge.reducer import Merged
from syncline_coordinator.policies import adviser_of
from syncline_coordinator.reservation import LOG_REASON_BYTES, most_updates

LATE_NAMED = 20
METRICS_NAMED = 8
ROUNDS_S = 0.1  # at most so often
DROPPED_AT_ONCE = 1000  # listed beyond what the log reserves for each version, where some is unused


@dataclass(frozen=True, slots=True)
class MergeDone:
    plan: Plan
    merged: Merged
    seconds: float


class RunReport:
    """Commit records, metrics, events and advice of one run. Times are the event loop's.

    A commit record lists the updates that were dropped since the last one, as far as the log has room for them.
    """

    def __init__(self, spec: RunSpec, telemetry: Telemetry, max_agents: int) -> None:
        self._telemetry, self._elastic = telemetry, spec.mix.kind == "elastic"
        self._is_mean = spec.merge.rule == "mean" and not self._elastic
        self._adviser, self._target = adviser_of(spec), spec.stop.target
        self._pace = Pace(ROUNDS_S)
        self._opened_s = self._collect_s = 0.0
        self._bytes_up = self._bytes_down = 0
        self._dropped: list[Dropped] = []  # since the last commit
        self._dropped_more = 0  # beside those listed
        self._dropped_room = DROPPED_AT_ONCE
        self._dropped_per_version = most_updates(spec, max_agents)  # the log reserves room for so many

    def opened(self, now_s: float) -> None:
        """A round has been opened, or a version committed."""
        self._opened_s = now_s

    def decided(self, now_s: float) -> None:
        self._collect_s = now_s - self._opened_s

    def offered(self, agent: str, offer: Offer) -> None:
        self._adviser.offered(agent, offer.samples, offer.seconds)

    async def dropped(self, drop: Drop) -> None:
        if len(self._dropped) < self._dropped_room:
            reason = clipped(drop_words(drop.reason), LOG_REASON_BYTES)
            self._dropped.append(Dropped(agent=drop.agent, clock=drop.clock, reason=reason))
        else:
            self._dropped_more += 1
        lag = drop.reason.lag if isinstance(drop.reason, TooStale) else 0
        self._adviser.judged(drop.agent, lag, merged=False, too_stale=lag > 0)
        text = f"{drop.agent}: update of clock {drop.clock} dropped: {drop_words(drop.reason)}"
        await self._telemetry.event("update-dropped", text, level="warning", agent=drop.agent)

    async def no_such_metric(self, known: Iterable[str]) -> None:
        """Says once that the run will not stop by what `stop.target` names."""
        target, self._target = self._target, None
        if target is not None:
            names = ", ".join(sorted(known)[:METRICS_NAMED])
            text = (
                f"stop.target.metric: there is no {target.metric!r}; known: {names}. The run goes on to stop.versions"
            )
            await self._telemetry.event("advice", text, level="warning")

    def record(self, head: Head, done: MergeDone) -> Committed:
        """Make the record of a commit. `head`: as it is before the commit."""
        dropped, dropped_more = self._take_dropped()
        return Committed(
            run=head.run,
            term=head.term,
            version=done.plan.version,
            digest=done.merged.digest,
            model=done.merged.model,
            plan=done.plan,
            dropped=dropped,
            dropped_more=dropped_more,
            norms=list(done.merged.norms),
            norm=min(done.merged.norm, sys.float_info.max),  # D may be too long to be squared where no update is
            bytes_up=done.merged.bytes_got,
            bytes_down=done.merged.bytes_put,
            phases_s={"collect": self._collect_s, "merge": done.seconds},
        )

    def _take_dropped(self) -> tuple[list[Dropped], int]:
        """Return the updates dropped since the last commit, and how many more there were, and forget them."""
        dropped, more = self._dropped, self._dropped_more
        self._dropped, self._dropped_more = [], 0
        left = self._dropped_room - len(dropped)
        self._dropped_room = min(left, DROPPED_AT_ONCE) + self._dropped_per_version
        return dropped, more

    async def committed(self, done: MergeDone, now_s: float, *, last: bool) -> None:
        """A version is there. `last`: nobody trains for another."""
        plan, merged = done.plan, done.merged
        self._bytes_up += merged.bytes_got
        self._bytes_down += merged.bytes_put
        seconds, self._opened_s = now_s - self._opened_s, now_s
        drift = merged.drift([e.weight for e in plan.merged]) if self._is_mean else None
        if self._pace.due(now_s) or last:
            metric = Round(
                version=plan.version,
                closed_by=plan.reason,
                merged=len(plan.merged),
                late=plan.late[:LATE_NAMED],
                seconds=seconds,
                collect_s=self._collect_s,
                merge_s=done.seconds,
                norm=merged.norm,
                drift=drift,
                bytes_up=self._bytes_up,
                bytes_down=self._bytes_down,
            )
            await self._telemetry.metric(metric)
        for entry in plan.merged:
            self._adviser.judged(entry.agent, entry.lag, merged=True)
        lengths = {e.agent: norm for e, norm in zip(plan.merged, merged.norms, strict=False)}
        norms = None if self._elastic else Norms(lengths, drift)  # an elastic difference tells where an agent is
        for advice in self._adviser.committed(norms):
            await self._telemetry.event("advice", advice.text, level="warning", agent=advice.agent)


REFUSALS_S = 0.25


async def tell_refusals(log: Path | None, names: Mapping[str, str], events: Telemetry) -> None:
    """`names`: by public key. Without a log there is nothing to tell."""
    violations = ViolationLog(log, dict(names)) if log is not None else None
    while violations is not None:
        for violation in violations.read():
            text = f"{violation.who}: {violation.what} on {violation.subject} was refused by the broker"
            await events.event("refused", text, level="warning", agent=violation.who)
        await asyncio.sleep(REFUSALS_S)


MORE_ROOM = (
    "Free some of the disk that holds its JetStream store, or raise max_file_store. A nats-server whose log says that "
    "JetStream was disabled must be started again. The run goes on by itself then"
)


class Room:
    def __init__(self, events: Telemetry) -> None:
        self._events = events
        self._is_full = False

    async def refused(self, run: str, error: StreamFull | StoreDown) -> None:
        """A write of this run found no room."""
        if not self._is_full:
            self._is_full = True
            text = f"the broker stores nothing, and run {run} waits: {error}. {MORE_ROOM}"
            await self._events.event("broker-full", text, level="error")

    async def committed(self) -> None:
        """A version was written as a whole, so that there is room."""
        if self._is_full:
            self._is_full = False
            await self._events.event("broker-has-room", "the broker takes new versions again", level="warning")
