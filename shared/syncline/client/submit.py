"""Submitting a run: hand it to the coordinator and wait for the verdict."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from syncline.bus.base import Bus
from syncline.errors import ConfigError, NoResponders, Unreachable
from syncline.spec.run_spec import RunSpec
from syncline.spec.submission import submission
from syncline.wire import subjects
from syncline.wire.messages import ENDED, Head, Submit, Submitted, decode, encode

ANSWER_S = 20.0  # a live coordinator answers a submission within a quarter of this time
SILENT_S = 120.0  # without an answer of a coordinator that was up, after which the submission fails
QUIET_S = 10.0  # before the first report of what the coordinator is doing
RETRY_S = 0.5  # after a lost connection
RETRY_ABSENT_S = 0.05  # while the coordinator starts

Say = Callable[[str, str], None]  # takes a level (hint, warning, error) and a text for people


def say_nothing(level: str, text: str) -> None:
    """Ignore a report."""


def _now_s() -> float:
    return asyncio.get_running_loop().time()


async def submit(bus: Bus, spec: RunSpec, *, patience_s: float = 60.0, say: Say = say_nothing) -> Submitted:
    """Submit a run and wait for the verdict as long as the coordinator answers: it loads the task first.

    Args:
        bus: a connection with a coordinator's key.
        spec: the run's settings; the name must be new.
        patience_s: time to wait for a coordinator that is not up.
        say: receives reports of what the coordinator is doing, at growing intervals.

    Returns:
        The accepted run's name and warnings.

    Raises:
        ConfigError: the coordinator refuses the run.
        NoResponders: no coordinator is up within `patience_s`.
        BusError: the coordinator has not answered for SILENT_S.
    """
    question = encode(submission(spec))
    wait = _Wait(say)
    answer_lost = False
    deadline_s = _now_s() + patience_s
    while True:
        try:
            answer = decode(Submitted, await bus.request(subjects.submit(), question, ANSWER_S))
        except NoResponders:
            if _now_s() > deadline_s:
                raise
            await asyncio.sleep(RETRY_ABSENT_S)
        except Unreachable:
            if wait.silent_s() > SILENT_S:
                raise
            answer_lost = True
            await asyncio.sleep(RETRY_S)
        else:
            if not answer.doing:
                break
            wait.on_answer(answer.doing)
            deadline_s = _now_s() + max(patience_s, SILENT_S)  # the coordinator was up: it may be restarted
    if answer.run:
        return answer
    if answer_lost and answer.setting == "name" and await _is_stored(bus, spec):
        return Submitted(run=spec.name, warnings=[*spec.warnings])  # an earlier try was accepted, and its answer lost
    raise ConfigError(answer.setting, answer.problem, answer.hint)


async def _is_stored(bus: Bus, spec: RunSpec) -> bool:
    """Tell whether the broker holds an active run of this name with exactly these settings."""
    head = await bus.kv_get(subjects.RUNS_BUCKET, subjects.head_key(spec.name))
    stored = await bus.kv_get(subjects.RUNS_BUCKET, subjects.spec_key(spec.name))
    if head is None or stored is None or decode(Head, head.value).phase in ENDED:
        return False
    return decode(Submit, stored.value).spec == submission(spec).spec


@dataclass(slots=True)
class _Wait:
    """Reports what the coordinator is doing: after QUIET_S, when that changes, and after twice the time."""

    _say: Say
    _began_s: float = field(default_factory=_now_s)
    _answered_s: float = field(default_factory=_now_s)
    _doing: str = ""
    _doing_since_s: float = 0.0
    _next_report_s: float = QUIET_S  # from the beginning

    def on_answer(self, doing: str) -> None:
        now_s, before_s = _now_s(), self._answered_s
        self._answered_s = now_s
        if doing != self._doing:
            self._doing, self._doing_since_s = doing, before_s
            self._next_report_s = min(self._next_report_s, max(QUIET_S, now_s - self._began_s))
        if now_s - self._began_s >= self._next_report_s:
            self._say("hint", f"waiting for the coordinator: it {doing}, for {now_s - self._doing_since_s:.0f} s")
            self._next_report_s = 2 * (now_s - self._began_s)

    def silent_s(self) -> float:
        return _now_s() - self._answered_s
