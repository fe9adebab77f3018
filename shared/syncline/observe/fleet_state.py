"""The state of a fleet as the public feeds tell it: its coordinator, its runs, and the run that is selected.

Pure: no bus, no terminal, no clock. `syncline run`, `watch`, `demo`, `sim` and the Python client all keep this state.
"""

from __future__ import annotations

import difflib
import math
from collections import deque
from dataclasses import dataclass, field

from syncline.observe.feed import FeedMessage, parse
from syncline.observe.run_state import RunState
from syncline.observe.telemetry import QUEUED_NAMED, Event, FleetStatus
from syncline.spec.run_spec import RunSpec
from syncline.wire.messages import ENDED
from syncline.wire.subjects import FLEET

MAX_RUNS = 32  # remembered; beyond that the run that has been silent longest is forgotten
MAX_RECENT_EVENTS = 60
SILENT_S = 6.0  # an agent or run is silent after this time: each publishes every two seconds
LATE_S = 5.0  # an agent is shown as late at least this long
ABSENT_STATUSES = (
    3  # statuses without the selected run; a coordinator that has just started reads its queue a moment later
)


@dataclass(frozen=True, slots=True)
class RunEvent:
    """An event with the run that it belongs to."""

    run: str
    event: Event


@dataclass(slots=True)
class FleetState:
    """Everything that was heard on the public feeds."""

    selected: str = ""  # the only run to show; '': the run that is active
    runs: dict[str, RunState] = field(default_factory=dict)
    heard_at_s: dict[str, float] = field(default_factory=dict)  # time of each run's newest message
    status: FleetStatus | None = None  # the coordinator's newest
    statuses: int = 0  # number of them so far
    recent: deque[RunEvent] = field(default_factory=lambda: deque(maxlen=MAX_RECENT_EVENTS))
    _shown: str = ""
    _statuses_without: int = 0  # the coordinator's statuses in a row that do not name the selected run

    @classmethod
    def of(cls, run: RunSpec | str) -> FleetState:
        """Return a state that follows one run; with a spec it knows the run's length before the first message."""
        if isinstance(run, str):
            return cls(run, {run: RunState(run, 0)})
        steps = run.local.steps_for(0) if run.local.epochs is None else 0
        return cls(run.name, {run.name: RunState(run.name, run.stop.versions, steps)})

    @property
    def followed(self) -> RunState:
        """The selected run of a state made by `of`."""
        return self.runs[self.selected]

    # -- messages --------------------------------------------------------------------------------------------------
    def handle(self, subject: str, data: bytes, now_s: float) -> FeedMessage | None:
        """Parse and apply one message of the public feeds.

        Args:
            now_s: the time of arrival, by any clock that the reader uses for `shown` and `active` too.

        Returns:
            The message, or None for one that is invalid and changed nothing.
        """
        message = parse(subject, data)
        if message is None:
            return None
        if message.run == FLEET:
            self._on_fleet(message)
        else:
            self._run(message.run, now_s).handle(message, now_s)
        if (event := message.event) is not None and message.run in (FLEET, self.selected or message.run):
            self.recent.append(RunEvent(message.run, event))
        return message

    def _on_fleet(self, message: FeedMessage) -> None:
        if isinstance(message.content, FleetStatus):
            self.status = message.content
            self.statuses += 1
            # A queue at its limit may be cut off: then the absence of a name proves nothing.
            known = self.selected in (self.status.run, *self.status.queued) or len(self.status.queued) >= QUEUED_NAMED
            self._statuses_without = 0 if known else self._statuses_without + 1
        elif self.selected in self.runs:
            self.runs[self.selected].handle(message)

    def _run(self, run: str, now_s: float) -> RunState:
        if run not in self.runs:
            while len(self.runs) >= MAX_RUNS:
                self._forget(min((r for r in self.runs if r not in (self.selected, self._shown)), key=self._heard_at))
            self.runs[run] = RunState(run, 0)
        self.heard_at_s[run] = now_s
        if run == self.selected:
            self._statuses_without = 0
        return self.runs[run]

    def _heard_at(self, run: str) -> float:
        return self.heard_at_s.get(run, -math.inf)

    def _forget(self, run: str) -> None:
        del self.runs[run]
        self.heard_at_s.pop(run, None)

    def reset_absence(self) -> None:
        """Count statuses without the selected run from zero: another source has confirmed that the run exists."""
        self._statuses_without = 0

    # -- derived facts ---------------------------------------------------------------------------------------------
    def shown(self, now_s: float) -> RunState | None:
        """Return the run to show.

        The selected run; else the one shown before, until it is over and another is active; else the last that was heard.
        """
        if self.selected:
            return self.runs.get(self.selected)
        others = [run for run in self.active(now_s) if run != self._shown]
        before = self.runs.get(self._shown)
        if before is None:
            self._shown = max(others or self.runs, key=self._heard_at, default="")
        elif others and self._is_over(before, now_s):
            self._shown = max(others, key=self._heard_at)
        return self.runs.get(self._shown)

    def active(self, now_s: float) -> list[str]:
        """Return the names of the runs that publish and have not ended."""
        return [name for name, state in self.runs.items() if not self._is_over(state, now_s)]

    @property
    def absent(self) -> bool:
        """Whether the coordinator neither drives nor queues the selected run: it ended unheard, or does not exist."""
        state = self.runs.get(self.selected)
        return (
            bool(self.selected)
            and self._statuses_without >= ABSENT_STATUSES
            and (state is None or state.phase not in ENDED)
        )

    def suggestion(self) -> str:
        """Return active runs with a name like the selected one, which is not heard; '' without any run."""
        speaking = [run for run in self.runs if run != self.selected]
        close = difflib.get_close_matches(self.selected, speaking, n=3, cutoff=0.5)
        if close:
            return f"did you mean {' or '.join(close)}?"
        return f"active now: {', '.join(speaking[:3])}" if speaking else ""

    def _is_over(self, state: RunState, now_s: float) -> bool:
        return state.phase in ENDED or now_s - self._heard_at(state.run) > SILENT_S
