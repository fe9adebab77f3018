"""Why a run that is followed does not move: who or what it waits for, as the public feeds tell. Pure: time is an argument."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from syncline.observe.run_state import RunState
from syncline.policy.membership import FIRST_STEP_S
from syncline.wire.messages import ENDED, Head
from syncline_cli.ui.display import natural

QUIET_S = 10.0  # without a change, after which it is said who is missing
WORK_S = 30.0  # the same where everybody is there and at work: a step may take its time
LONGEST_S = 600.0  # it is said again after twice the time, and at least so often
NAMED = 5


@dataclass(slots=True)
class Standstill:
    """Looks at a run every now and then, and says what it waits for when it has not moved for long."""

    _seen: tuple[Any, ...] = ()
    _moved_at_s: float = 0.0
    _said_at_s: float = 0.0
    _heard: int = -1  # words of the coordinator
    _heard_at_s: float = 0.0

    def look(self, state: RunState, head: Head | None, now_s: float) -> str:
        """What to say now, or ''."""
        if (heard := state.statuses + state.fleet_statuses) != self._heard:
            self._heard, self._heard_at_s = heard, now_s
        if (seen := _moves(state, head)) != self._seen:
            self._seen, self._moved_at_s, self._said_at_s = seen, now_s, 0.0
            return ""
        if state.phase in ENDED or (head is not None and head.phase in ENDED):
            return ""
        still_s = now_s - self._moved_at_s
        text, patience_s = self._why(state, head, still_s, now_s - self._heard_at_s)
        said_after_s = self._said_at_s - self._moved_at_s if self._said_at_s else 0.0
        if still_s < max(patience_s, said_after_s + min(LONGEST_S, max(QUIET_S, said_after_s))):
            return ""
        self._said_at_s = now_s
        return text

    def _why(self, state: RunState, head: Head | None, still_s: float, silent_s: float) -> tuple[str, float]:
        """What it waits for, and how long that is nothing to speak of."""
        if silent_s >= QUIET_S:
            return f"nothing is heard of the coordinator for {silent_s:.0f} s", QUIET_S
        status, fleet = state.status, state.fleet
        if status is None:
            active = fleet.run if fleet is not None else ""
            if active == state.run:
                doing = fleet.doing if fleet is not None and fleet.doing else "loads the task and makes the model"
                return f"the coordinator {doing}, for {still_s:.0f} s", QUIET_S
            return f"queued: {f'run {active} goes on first' if active else 'the coordinator has not begun it'}", QUIET_S
        version = max(state.version, head.version if head is not None else 0)
        if version >= state.versions:
            return f"all {version:,} versions are made; their last evaluation has taken {still_s:.0f} s so far", WORK_S
        if status.phase == "waiting" and status.slow:
            return f"waiting for {_named(status.slow)}: slow, no progress", QUIET_S
        if status.phase == "waiting":
            return (
                f"waiting for agents: {status.agents} of {status.needed} are here{_starting(state, still_s)}",
                QUIET_S,
            )
        if status.phase == "merging":
            return f"merging version {version + 1:,} for {still_s:.0f} s", WORK_S
        return _training(state, status.lost, still_s), WORK_S


def _training(state: RunState, lost: list[str], still_s: float) -> str:
    """Whose period is not over."""
    at_work = {
        name: agent.train
        for name, agent in state.agents.items()
        if agent.train is not None and agent.train.state != "waiting" and not agent.failed and name not in lost
    }
    if not at_work:
        return f"waiting for the agents: no version for {still_s:.0f} s"
    first = all(train.clock == train.step == 0 for train in at_work.values())
    patience = (
        f"; their data are loaded before the first one: dataset() of the task. One that makes none within "
        f"{FIRST_STEP_S:.0f} s of its start counts as slow"
        if first
        else ""
    )
    return f"waiting for {_named(at_work)}: no step for {still_s:.0f} s{patience}"


def _starting(state: RunState, still_s: float) -> str:
    """Say which agents are on their way into the run."""
    names = [name for name, agent in state.agents.items() if agent.train and agent.train.state == "starting"]
    return f"; {_named(names)}: loading the task and making its model for {still_s:.0f} s" if names else ""


def _named(agents: Collection[str]) -> str:
    names = sorted(agents, key=natural)
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _moves(state: RunState, head: Head | None) -> tuple[Any, ...]:
    """All that changes where something happens."""
    where = (head.term, head.version, head.round, head.phase) if head is not None else ()
    trains = [(a.train.state, a.train.clock, a.train.step) for a in state.agents.values() if a.train is not None]
    status = (state.status.phase, state.status.agents) if state.status is not None else ()
    return (where, trains, status, state.evaluated, state.fleet.run if state.fleet is not None else "")
