"""A session's updates that the run goes on without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from syncline.runtime.child_messages import PeriodReport, TrainPeriod
from syncline.spec.run_spec import RunSpec, parse
from syncline_agent.identity import AgentIdentity
from syncline_agent.local_period import LocalPeriod
from syncline_agent.session import RunDefinition, Session
from syncline_agent.states import PeriodState
from syncline_agent.training_child import PROGRESS_BYTES, ChildTraining
from unit.stored_run import LAYOUT


@pytest.fixture
def session(bus: Any) -> Session:
    async def never(*_: Any) -> Any:
        raise AssertionError("not asked for here")

    training = ChildTraining(never)
    training._memory.grow(PROGRESS_BYTES + 2 * LAYOUT.blob_bytes)
    made = Session(bus, "r", AgentIdentity("a1", "5" * 32, Path(), None), training, never)
    made._definition = RunDefinition(parse(RunSpec, {"task": "any:Task"}), LAYOUT)
    return made


def ready(epoch: int) -> LocalPeriod:
    question = TrainPeriod(version=2, clock=3, part=0, parts=1)
    return LocalPeriod(question, 2, 1, epoch, PeriodReport(rows=8, steps=4), PeriodState.READY)


async def test_an_update_of_an_earlier_epoch_is_discarded_unsent(session: Session, bus: Any) -> None:
    session._status.epoch = 7
    period = ready(epoch=0)
    await session._send(period)
    assert period.state is PeriodState.DISCARDED and bus.calls == []


@pytest.mark.parametrize("sent", [True, False])
async def test_an_update_that_is_not_offered_counts_for_nothing(
    session: Session, monkeypatch: pytest.MonkeyPatch, sent: bool
) -> None:
    async def send(*_: Any) -> bool:
        return sent

    monkeypatch.setattr(session._sender, "send", send)
    period = ready(epoch=0)
    await session._send(period)
    assert period.state is (PeriodState.OFFERED if sent else PeriodState.DISCARDED)
    assert (session._sent.newest, session._status.acknowledged) == ((3, 3) if sent else (0, 0))
