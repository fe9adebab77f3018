"""Simulated runs that go through the transitions of an agent's session and of its local periods.

Each scenario disturbs one agent's training child in another way. Together they take every transition of the tables, but for
those that NOT_HERE names.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from syncline.policy.states import check_transition
from syncline.runtime.child import ChildDied, Handlers
from syncline.runtime.child_messages import (
    MakeElasticUpdate,
    PrepareRun,
    Question,
    RetrySave,
    SaveReport,
    TrainPeriod,
    UpdateReport,
)
from syncline_agent import child_supervisor, local_period, session_status
from syncline_agent.states import AGENT_SESSION_TRANSITIONS, LOCAL_PERIOD_TRANSITIONS, PeriodState, SessionState
from syncline_sim.inline_children import InlineChild, StubTrainer
from syncline_sim.scenario import Scenario, small_spec
from syncline_sim.seeds import run_seed
from syncline_sim.simulate import simulate

Transition = tuple[Any, Any]
Disturb = Callable[[Question[Any], int], Exception | None]
S, P = SessionState, PeriodState

NOT_HERE: set[Transition] = {
    *((state, S.LEFT) for state in S if state is not S.LEFT),  # goodbyes of stopped processes: a simulation kills them
    (P.READY, P.DISCARDED),  # tests/unit/agent/test_session.py
    (P.SENDING, P.DISCARDED),
}
ELASTIC = {"mix": {"kind": "elastic", "alpha": 0.2}}
ELASTIC_ASYNC = {**ELASTIC, "sync": {"kind": "async"}}
SHORT = {"agents": {"min": 3, "lost_after_s": 2.0}, "stop": {"versions": 40}}
KILLED = ChildDied("process was killed by SIGKILL", from_outside=True)
CRASHED = ChildDied("process was killed by SIGSEGV")


def first(kind: type[Question[Any]], count: int, error: Exception) -> Disturb:
    """The first `count` questions of this kind that agent 3's child is asked end with this error."""
    return lambda question, number: error if isinstance(question, kind) and number <= count else None


def one_after_another(*errors: tuple[type[Question[Any]], Exception]) -> Disturb:
    """The child fails at these questions, in this order; at an elastic update only after a newer center was fetched."""
    left = list(errors)

    def disturb(question: Question[Any], number: int) -> Exception | None:
        stale = isinstance(question, MakeElasticUpdate) and not question.fresh_center
        if left and isinstance(question, left[0][0]) and not stale:
            return left.pop(0)[1]
        return None

    return disturb


DEATHS_UNTIL_OUT = 2  # with OUT_FROM_S
OUT_FROM_S = 0.5
SCENARIOS: dict[str, tuple[dict[str, Any], Disturb]] = {
    "killed again and again while it trains": ({}, first(TrainPeriod, DEATHS_UNTIL_OUT, KILLED)),
    "crashes whenever it trains": ({}, first(TrainPeriod, 99, CRASHED)),
    "killed again and again before it is ready": ({}, first(PrepareRun, DEATHS_UNTIL_OUT, KILLED)),
    "crashes before it is ready": ({}, first(PrepareRun, 99, CRASHED)),
    "crashes after it was killed until the agent is out": (
        {"stop": {"versions": 100}},
        one_after_another((TrainPeriod, KILLED), (PrepareRun, KILLED), *[(PrepareRun, CRASHED)] * 3),
    ),
    "killed once while it makes an elastic update": (ELASTIC, first(MakeElasticUpdate, 1, KILLED)),
    "killed again and again while it makes an elastic update": (
        ELASTIC_ASYNC,
        one_after_another((MakeElasticUpdate, KILLED), *[(PrepareRun, KILLED)] * DEATHS_UNTIL_OUT),
    ),
    "crashes while it makes an elastic update": (
        ELASTIC_ASYNC,
        one_after_another((MakeElasticUpdate, CRASHED), *[(PrepareRun, CRASHED)] * 2),
    ),
    "killed while the disk takes nothing": (ELASTIC, first(RetrySave, 1, KILLED)),
    "the disk takes nothing for a while": (ELASTIC, first(RetrySave, 0, KILLED)),
    "the disk takes nothing for a while, control variates": ({}, first(RetrySave, 0, KILLED)),
}


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch, seen: set[Transition]) -> Any:
    def check(table: Any, before: Any, after: Any) -> None:
        check_transition(table, before, after)
        if before is not after:
            seen.add((before, after))

    with monkeypatch.context() as patch:
        patch.setattr(session_status, "check_transition", check)
        patch.setattr(local_period, "check_transition", check)
        yield patch


def disturb_agent_3(patch: pytest.MonkeyPatch, disturb: Disturb) -> None:
    counts: dict[type[Any], int] = {}
    ask, prepare = InlineChild.ask, StubTrainer.prepare

    def prepared(self: StubTrainer, question: PrepareRun) -> Any:
        return prepare(self, question)

    async def asked(self: InlineChild, question: Question[Any]) -> Any:
        if isinstance(question, PrepareRun):
            self.is_third = question.state_path.startswith("a3/")  # type: ignore[attr-defined]
        if getattr(self, "is_third", False):
            counts[type(question)] = counts.get(type(question), 0) + 1
            error = disturb(question, counts[type(question)])
            if error is not None:
                raise error
        return await ask(self, question)

    patch.setattr(StubTrainer, "prepare", prepared)
    patch.setattr(InlineChild, "ask", asked)


def disk_takes_nothing(patch: pytest.MonkeyPatch) -> None:
    """The first save of every child is blocked, and the first retry still is."""
    leave, questions = StubTrainer._leave, StubTrainer.questions
    full = SaveReport(problem="No space left on device", blocks_offer=True)

    def left(self: StubTrainer, period: TrainPeriod) -> UpdateReport:
        report = leave(self, period)
        if period.clock != 2:
            return report
        self.retries = 0  # type: ignore[attr-defined]
        return UpdateReport(save=full)

    def retry(self: StubTrainer, question: RetrySave) -> SaveReport:
        self.retries += 1  # type: ignore[attr-defined]
        return full if self.retries == 1 else SaveReport()  # type: ignore[attr-defined]

    patch.setattr(StubTrainer, "_leave", left)

    def with_retry(self: StubTrainer) -> Handlers:
        return {**questions(self), RetrySave: partial(retry, self)}

    patch.setattr(StubTrainer, "questions", with_retry)


def test_every_transition_occurs_in_a_simulated_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: set[Transition] = set()
    with recorded(monkeypatch, seen):
        for seed in (0, 7):
            assert not run_seed(seed).problems
    for name, (settings, disturb) in SCENARIOS.items():
        with recorded(monkeypatch, seen) as patch:
            disturb_agent_3(patch, disturb)
            if "killed" in name:
                patch.setattr(child_supervisor, "OUT_FROM_S", OUT_FROM_S)
            if "disk" in name:
                disk_takes_nothing(patch)
            outcome = simulate(Scenario(small_spec(**{**SHORT, **settings})))
            assert not outcome.problems, f"{name}: {outcome.problems}"
    legal = {
        (before, after)
        for table in (AGENT_SESSION_TRANSITIONS, LOCAL_PERIOD_TRANSITIONS)
        for before, following in table.items()
        for after in following
    }
    missing = legal - NOT_HERE - seen
    with capsys.disabled():
        print(f"\n{len(legal & seen)} of {len(legal)} transitions occur; {len(NOT_HERE)} are not looked for here")
    assert not missing, f"no run takes {sorted(f'{type(b).__name__}: {b} → {a}' for b, a in missing)}"
    assert not seen & NOT_HERE
