"""The reason why a followed run does not move, as the public feeds tell it. Pure: time is an argument."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from syncline.observe.fleet_state import FleetState
from syncline.observe.naming import natural_order
from syncline.observe.run_state import RunState
from syncline.policy.membership import FIRST_STEP_S
from syncline.wire.messages import ENDED, Head

QUIET_S = 10.0  # without a change, after which missing agents are reported
WORK_S = 30.0  # the same while every agent is present and training: a step may take its time
LONGEST_S = 600.0  # a report is repeated after twice the time, and at least this often
MAX_NAMED = 5


@dataclass(slots=True)
class Standstill:
    """Detects that the followed run has not moved, and reports why. Call `look` regularly."""

    _seen: tuple[Any, ...] = ()
    _moved_at_s: float = 0.0
    _reported_at_s: float = 0.0
    _heard: int = -1  # number of the coordinator's statuses
    _heard_at_s: float = 0.0

    def look(self, fleet: FleetState, head: Head | None, now_s: float) -> str:
        """Return a report that is due now, or ''.

        Args:
            fleet: the state, with a followed run.
            head: the run's newest head, if the reader may read it.
            now_s: the reader's clock.
        """
        state = fleet.followed
        if (heard := state.statuses + fleet.statuses) != self._heard:
            self._heard, self._heard_at_s = heard, now_s
        if (seen := _progress(fleet, head)) != self._seen:
            self._seen, self._moved_at_s, self._reported_at_s = seen, now_s, 0.0
            return ""
        if state.phase in ENDED or (head is not None and head.phase in ENDED):
            return ""
        still_s = now_s - self._moved_at_s
        text, patience_s = _reason(fleet, head, still_s, now_s - self._heard_at_s)
        reported_after_s = self._reported_at_s - self._moved_at_s if self._reported_at_s else 0.0
        if still_s < max(patience_s, reported_after_s + min(LONGEST_S, max(QUIET_S, reported_after_s))):
            return ""
        self._reported_at_s = now_s
        return text


def _reason(fleet: FleetState, head: Head | None, still_s: float, silent_s: float) -> tuple[str, float]:
    """Return what the run waits for, and how long that is normal.

    Args:
        still_s: seconds without progress.
        silent_s: seconds without a status of the coordinator.
    """
    state, coordinator = fleet.followed, fleet.status
    if silent_s >= QUIET_S:
        return f"no message from the coordinator for {silent_s:.0f} s", QUIET_S
    status = state.status
    if status is None:
        active = coordinator.run if coordinator is not None else ""
        if coordinator is not None and active == state.run:
            doing = coordinator.doing or "loads the task and makes the model"
            return f"the coordinator {doing}, for {still_s:.0f} s", QUIET_S
        return f"queued: {f'run {active} is active' if active else 'the coordinator has not started it'}", QUIET_S
    version = max(state.version, head.version if head is not None else 0)
    if version >= state.versions:
        return f"all {version:,} versions are made; their last evaluation has taken {still_s:.0f} s so far", WORK_S
    if status.phase == "waiting" and status.slow:
        return f"waiting for {_named(status.slow)}: slow, no progress", QUIET_S
    if status.phase == "waiting":
        present = f"{status.agents} of {status.needed} are present"
        return f"waiting for agents: {present}{_starting(state, still_s)}", QUIET_S
    if status.phase == "merging":
        return f"merging version {version + 1:,} for {still_s:.0f} s", WORK_S
    return _training(state, status.lost, still_s), WORK_S


def _training(state: RunState, lost: list[str], still_s: float) -> str:
    """Name the agents whose period is not over."""
    at_work = {
        name: agent.train
        for name, agent in state.agents.items()
        if agent.train is not None and agent.train.state != "waiting" and not agent.failed and name not in lost
    }
    if not at_work:
        return f"waiting for the agents: no version for {still_s:.0f} s"
    first = all(train.clock == train.step == 0 for train in at_work.values())
    patience = (
        f"; an agent loads its data before its first step: dataset() of the task. An agent without a step within "
        f"{FIRST_STEP_S:.0f} s of its start counts as slow"
        if first
        else ""
    )
    return f"waiting for {_named(at_work)}: no step for {still_s:.0f} s{patience}"


def _starting(state: RunState, still_s: float) -> str:
    """Name the agents that are joining the run."""
    names = [name for name, agent in state.agents.items() if agent.train and agent.train.state == "starting"]
    return f"; {_named(names)}: loading the task and making its model for {still_s:.0f} s" if names else ""


def _named(agents: Collection[str]) -> str:
    names = sorted(agents, key=natural_order)
    return ", ".join(names[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")


def _progress(fleet: FleetState, head: Head | None) -> tuple[Any, ...]:
    """Return everything that changes when the run moves."""
    state = fleet.followed
    at = (head.term, head.version, head.round, head.phase) if head is not None else ()
    trains = [(a.train.state, a.train.clock, a.train.step) for a in state.agents.values() if a.train is not None]
    status = (state.status.phase, state.status.agents) if state.status is not None else ()
    return at, trains, status, state.evaluated, fleet.status.run if fleet.status is not None else ""
