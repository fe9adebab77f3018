"""The service's side of a training child: the request to stop early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from syncline.runtime.child_messages import PeriodReport, Question, TrainPeriod
from syncline.shm import SharedMemory
from syncline_agent.training_child import STOP_EARLY, ChildTraining
from unit.trainers import Child


class Answering:
    """A child that notes the request to stop at each question."""

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory
        self.doing = ""
        self.wished: list[int] = []

    async def ask(self, question: Question[Any]) -> Any:
        self.wished.append(self._memory.view()[STOP_EARLY])
        return PeriodReport()

    async def close(self) -> None:
        pass


async def test_the_wish_is_taken_back_by_whoever_had_it_before_the_next_period_is_asked_for() -> None:
    children: list[Answering] = []

    async def start(memory: SharedMemory) -> Answering:
        children.append(Answering(memory))
        training.stop_early()  # while the child starts: that is about this period
        return children[-1]

    training = ChildTraining(start)
    training.stop_early()
    for clock in (1, 2):
        await training.period(TrainPeriod(version=0, clock=clock, part=0, parts=1))
    assert children[0].wished == [1, 0]


def test_a_wish_that_comes_while_the_data_are_loaded_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = Child(tmp_path / "a1.safetensors", {"local": {"steps": 1000}})
    whole = child.trainer._local.task.dataset

    def slow(part: Any) -> Any:
        child.memory.view()[STOP_EARLY] = 1
        return whole(part)

    monkeypatch.setattr(child.trainer._local.task, "dataset", slow)
    answer = child.period(child.initial_P)
    assert answer.report.stopped and answer.report.steps == 0
    child.memory.view()[STOP_EARLY] = 0
    assert not child.period(child.initial_P).report.stopped
