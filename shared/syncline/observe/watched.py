"""The runs that speak on the public feeds, and which of them is looked at. Pure: no bus, no terminal, no clock."""

from __future__ import annotations

import difflib
import math
from collections import deque
from dataclasses import dataclass, field

from pydantic import ValidationError

from syncline.observe.run_state import RunState
from syncline.observe.telemetry import QUEUED_NAMED, Event, FleetStatus
from syncline.wire.messages import ENDED
from syncline.wire.subjects import COORDINATOR, FLEET, NAME, PREFIX

MAX_RUNS = 32  # that are remembered; of more, those go that have been silent longest
RECENT = 60  # events that are kept to be shown
SILENT_S = 6.0  # an agent, or a run, that has said nothing for so long: both say something every two seconds
LATE_S = 5.0  # an agent is shown as late at least so long
ABSENT = 3  # statuses without the wanted run: a coordinator that was just started knows its queue a moment later


@dataclass(frozen=True, slots=True)
class Said:
    """An event, and of which run."""

    run: str
    event: Event


@dataclass(frozen=True, slots=True)
class Heard:
    """A message that was understood."""

    run: str
    who: str
    what: str  # of a metric; `event` for an event
    event: Event | None = None


@dataclass(slots=True)
class Watched:
    """Everything that was heard. `wanted`: the only run to look at, or '' for whichever goes on."""

    wanted: str = ""
    runs: dict[str, RunState] = field(default_factory=dict)
    heard_at_s: dict[str, float] = field(default_factory=dict)
    fleet: FleetStatus | None = None
    recent: deque[Said] = field(default_factory=lambda: deque(maxlen=RECENT))
    _shown: str = ""
    _without: int = 0  # statuses of the coordinator in a row that know nothing of the wanted run

    # -- facts ---------------------------------------------------------------------------------------------------------
    def on_message(self, subject: str, data: bytes, now_s: float) -> Heard | None:
        """A message on `….metrics.<who>.<what>` or `….events.<who>`; None for one that is none, or of no run we know."""
        match subject.removeprefix(f"{PREFIX}.").split("."):
            case [run, "metrics", who, what] if run == FLEET:
                return self._of_fleet(run, who, what, data)
            case [run, "metrics", who, what] if (state := self._run(run, now_s)) is not None:
                state.on_metric(who, what, data, now_s)
                return Heard(run, who, what)
            case [run, "events", who] if run == FLEET or (state := self._run(run, now_s)) is not None:
                event = (RunState(run, 0) if run == FLEET else self.runs[run]).on_event(run, data, who)
                if event is not None and run in (FLEET, self.wanted or run):
                    self.recent.append(Said(run, event))
                return None if event is None else Heard(run, who, "event", event)
        return None

    def _of_fleet(self, run: str, who: str, what: str, data: bytes) -> Heard | None:
        if (who, what) != (COORDINATOR, FleetStatus.what):
            return None
        try:
            self.fleet = FleetStatus.model_validate_json(data)
        except ValidationError:
            return None
        busy = (self.fleet.run, *self.fleet.queued)
        known = self.wanted in busy or len(self.fleet.queued) >= QUEUED_NAMED  # of a longer queue, not all are named
        self._without = 0 if known else self._without + 1
        return Heard(run, who, what)

    def _run(self, run: str, now_s: float) -> RunState | None:
        if run not in self.runs:
            if not NAME.fullmatch(run):
                return None
            while len(self.runs) >= MAX_RUNS:
                self._forget(min((r for r in self.runs if r not in (self.wanted, self._shown)), key=self._silence))
            self.runs[run] = RunState(run, 0)
        self.heard_at_s[run] = now_s
        if run == self.wanted:
            self._without = 0
        return self.runs[run]

    def _silence(self, run: str) -> float:
        return self.heard_at_s[run]

    def _forget(self, run: str) -> None:
        del self.runs[run], self.heard_at_s[run]

    def look_again(self) -> None:
        """The wanted run is there after all."""
        self._without = 0

    # -- what follows --------------------------------------------------------------------------------------------------
    def shown(self, now_s: float) -> RunState | None:
        """The wanted run; else the one looked at before, until another goes on and it does not; else the last that spoke."""
        if self.wanted:
            return self.runs.get(self.wanted)
        going = [run for run in self.going(now_s) if run != self._shown]
        before = self.runs.get(self._shown)
        if before is None:
            self._shown = max(going or self.runs, key=self._silence, default="")
        elif going and self._is_over(before, now_s):
            self._shown = max(going, key=self._silence)
        return self.runs.get(self._shown)

    def going(self, now_s: float) -> list[str]:
        """Runs that speak and have not ended."""
        return [name for name, state in self.runs.items() if not self._is_over(state, now_s)]

    @property
    def absent(self) -> bool:
        """The coordinator has neither to do with the wanted run, nor will have: it ended unheard, or there is none."""
        state = self.runs.get(self.wanted)
        return bool(self.wanted) and self._without >= ABSENT and (state is None or state.phase not in ENDED)

    def near(self) -> str:
        """What may have been meant by the wanted run, of which nothing is heard."""
        speaking = [run for run in self.runs if run != self.wanted]
        close = difflib.get_close_matches(self.wanted, speaking, n=3, cutoff=0.5)
        if close:
            return f"did you mean {' or '.join(close)}?"
        return f"speaking now: {', '.join(speaking[:3])}" if speaking else ""

    def _is_over(self, state: RunState, now_s: float) -> bool:
        return state.phase in ENDED or now_s - self.heard_at_s.get(state.run, -math.inf) > SILENT_S
