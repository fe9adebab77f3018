"""Reports of a run and of its coordinator: commit records, metrics, events and advice. Nothing here decides."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from syncline.bus.base import Bus
from syncline.bus.server.violations import ViolationLog
from syncline.errors import BusError, StoreDown, StreamFull
from syncline.observe.telemetry import Pace, Round, Telemetry
from syncline.policy.advice import Norms
from syncline.policy.events import Drop
from syncline.policy.reasons import TooStale
from syncline.policy.words import drop_words
from syncline.spec.run_spec import RunSpec
from syncline.wire import subjects
from syncline.wire.messages import Committed, Dropped, Head, Offer, Plan, clipped
from syncline_coordinator.merge.reducer import MergedVersion
from syncline_coordinator.policies import adviser_of
from syncline_coordinator.reservation import LOG_REASON_BYTES, most_updates, stream_names

MAX_LATE_NAMED = 20
MAX_METRICS_NAMED = 8
ROUND_METRIC_S = 0.1  # between two metrics of rounds, at least
MAX_SPARE_DROPPED = 1000  # dropped updates that one record may list because earlier records had fewer


@dataclass(frozen=True, slots=True)
class MergeDone:
    """A plan that was executed: the next version is on the bus, and not committed yet."""

    plan: Plan
    merged: MergedVersion
    seconds: float


class RunReport:
    """Makes the commit records, metrics, events and advice of one run.

    A commit record lists the updates that were dropped since the previous one, as far as the log has space for them, and
    counts the others. Times are those of the event loop.

    Args:
        max_agents: the most agents in the run; the log reserves space for their updates.
    """

    def __init__(self, spec: RunSpec, telemetry: Telemetry, max_agents: int) -> None:
        self._telemetry = telemetry
        self._is_elastic = spec.mix.kind == "elastic"
        self._has_drift = spec.merge.rule == "mean" and not self._is_elastic
        self._adviser = adviser_of(spec)
        self._target = spec.stop.target
        self._pace = Pace(ROUND_METRIC_S)
        self._opened_s = 0.0  # when the round was opened, or the last version committed
        self._collect_s = 0.0  # from then to the plan
        self._bytes_up = 0  # of all updates so far
        self._bytes_down = 0  # of all versions so far
        self._dropped: list[Dropped] = []  # since the last commit
        self._dropped_unlisted = 0  # since the last commit, beyond the limit
        self._dropped_limit = MAX_SPARE_DROPPED
        self._dropped_per_version = most_updates(spec, max_agents)  # the log reserves space for so many

    def round_opened(self, now_s: float) -> None:
        """Note the beginning of a round."""
        self._opened_s = now_s

    def plan_made(self, now_s: float) -> None:
        """Note the end of collecting updates."""
        self._collect_s = now_s - self._opened_s

    def update_offered(self, agent: str, offer: Offer) -> None:
        """Note an offer that was accepted."""
        self._adviser.offered(agent, offer.samples, offer.seconds)

    async def update_dropped(self, drop: Drop) -> None:
        """Publish the event of a dropped update, and list the update in the next commit record."""
        if len(self._dropped) < self._dropped_limit:
            reason = clipped(drop_words(drop.reason), LOG_REASON_BYTES)
            self._dropped.append(Dropped(agent=drop.agent, clock=drop.clock, reason=reason))
        else:
            self._dropped_unlisted += 1
        lag = drop.reason.lag if isinstance(drop.reason, TooStale) else 0
        self._adviser.judged(drop.agent, lag, merged=False, too_stale=lag > 0)
        text = f"{drop.agent}: update of clock {drop.clock} dropped: {drop_words(drop.reason)}"
        await self._telemetry.event("update-dropped", text, level="warning", agent=drop.agent)

    async def target_metric_missing(self, known: Iterable[str]) -> None:
        """Publish once that evaluations have no metric of the name in `stop.target`, so that the run does not stop by it.

        Args:
            known: names of the metrics that the evaluation has.
        """
        target, self._target = self._target, None
        if target is not None:
            names = ", ".join(sorted(known)[:MAX_METRICS_NAMED])
            text = (
                f"stop.target.metric: there is no {target.metric!r}; known: {names}. The run goes on to stop.versions"
            )
            await self._telemetry.event("advice", text, level="warning")

    def commit_record(self, head: Head, done: MergeDone) -> Committed:
        """Make the record of a commit. Forgets the dropped updates: call once for each version.

        Args:
            head: as it is before the commit.
        """
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
            norm=min(done.merged.norm, sys.float_info.max),  # ‖D‖² may overflow although no ‖Δ_i‖² does
            bytes_up=done.merged.bytes_got,
            bytes_down=done.merged.bytes_put,
            phases_s={"collect": self._collect_s, "merge": done.seconds},
        )

    def _take_dropped(self) -> tuple[list[Dropped], int]:
        """Return the dropped updates that are listed, and the number of those that are not, and forget both."""
        dropped = self._dropped
        unlisted = self._dropped_unlisted
        self._dropped = []
        self._dropped_unlisted = 0
        spare = self._dropped_limit - len(dropped)
        self._dropped_limit = min(spare, MAX_SPARE_DROPPED) + self._dropped_per_version
        return dropped, unlisted

    async def version_committed(self, done: MergeDone, now_s: float, *, last: bool) -> None:
        """Publish the metric of a committed version, and new advice.

        Args:
            last: no round follows, so that this metric must not be left out.
        """
        plan = done.plan
        merged = done.merged
        self._bytes_up += merged.bytes_got
        self._bytes_down += merged.bytes_put
        seconds = now_s - self._opened_s
        self._opened_s = now_s
        drift = merged.drift([e.weight for e in plan.merged]) if self._has_drift else None
        if self._pace.due(now_s) or last:
            metric = Round(
                version=plan.version,
                closed_by=plan.reason,
                merged=len(plan.merged),
                late=plan.late[:MAX_LATE_NAMED],
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
        norms = None if self._is_elastic else Norms(lengths, drift)  # an elastic difference is a distance, not a step
        for advice in self._adviser.committed(norms):
            await self._telemetry.event("advice", advice.text, level="warning", agent=advice.agent)


REFUSALS_S = 0.25


async def report_refusals(log: Path | None, names: Mapping[str, str], events: Telemetry) -> None:
    """Publish an event for each permission violation in the broker's log, until cancelled. Return at once without a log.

    Args:
        log: path of the broker's log.
        names: of agents, by public key.
    """
    violations = ViolationLog(log, dict(names)) if log is not None else None
    while violations is not None:
        for violation in violations.read():
            text = f"{violation.source}: {violation.action} on {violation.subject} was refused by the broker"
            await events.event("refused", text, level="warning", agent=violation.source)
        await asyncio.sleep(REFUSALS_S)


STORAGE_CHECK_S = 5.0


class StorageAlarm:
    """Publishes one event when the broker does not store any more, and one when a version was stored again."""

    def __init__(self, events: Telemetry) -> None:
        self._events = events
        self._is_full = False

    async def watch(self, bus: Bus, driven: Callable[[], tuple[str, int]]) -> None:
        """Check the broker's store while the run makes no progress, until cancelled.

        The coordinator may have nothing to write: it waits for updates, and a put has no answer while the disk is full.

        Args:
            bus: connected with the coordinator's key.
            driven: returns the name of the run that is driven, or "", and its version.
        """
        while True:
            before = driven()
            await asyncio.sleep(STORAGE_CHECK_S)
            if (now := driven()) != before:
                continue
            run, _ = now
            try:
                await bus.check_store(f"KV_{subjects.RUNS_BUCKET}", *(stream_names(run) if run else ()))
            except (StreamFull, StoreDown) as error:
                await self.raise_alarm(run, error)
            except BusError:
                pass  # the bus is out of reach, or the run's streams were just deleted

    async def raise_alarm(self, run: str, error: StreamFull | StoreDown) -> None:
        """Publish that the broker cannot store, unless the alarm is raised already. `run`: the one that waits, or ""."""
        if not self._is_full:
            self._is_full = True
            waits = f", and run {run} waits" if run else ""
            goes_on = ". The run goes on by itself then" if run else ""
            text = f"the broker stores nothing{waits}: {error}. {error.hint}{goes_on}"
            await self._events.event("broker-full", text, level="error")

    async def clear(self) -> None:
        """End the alarm: a version was stored completely."""
        if self._is_full:
            self._is_full = False
            await self._events.event("broker-has-room", "the broker stores new versions again", level="warning")
