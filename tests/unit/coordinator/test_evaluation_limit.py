"""The center is evaluated beside the merging, and an evaluation that never ends holds up nobody for ever."""

from __future__ import annotations

import asyncio
from typing import Any

from syncline.observe.telemetry import Event, Telemetry
from syncline.runtime.child_messages import Done, EvaluateCenter, Question
from syncline_coordinator.evaluation import Evaluation


class Child:
    """Its first evaluation never ends."""

    def __init__(self) -> None:
        self.asked: list[Question[Any]] = []
        self.closed = False
        self.doing = ""

    async def ask(self, question: Question[Any]) -> Any:
        self.asked.append(question)
        if isinstance(question, EvaluateCenter):
            await asyncio.Event().wait()
        return Done()

    async def close(self) -> None:
        self.closed = True


class Told(Telemetry):
    def __init__(self) -> None:
        self.events: list[Event] = []

    async def event(self, event: str, text: str, *, level: Any = "info", agent: str = "") -> None:
        self.events.append(Event(event=event, level=level, text=text, agent=agent))


async def test_an_evaluation_that_never_ends_is_ended_and_told_and_none_follows() -> None:
    children, told = [Child(), Child()], Told()
    results: list[int] = []
    first, second = children

    async def start() -> Child:
        return second

    center = Evaluation(first, start, told, lambda version, metrics: results.append(version), longest_s=0.0)
    center.offer(1)
    await center.copied()
    await center.last(3)
    (event,) = told.events
    assert event.event == "evaluation-failed" and "version 1: no result within 0 s" in event.text
    assert "Correct the task's metrics()" in event.text
    assert first.closed and not second.asked and results == []
    await center.close()
    assert second.closed
