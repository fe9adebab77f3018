"""Answers of a child: always a record that can be sent, for any result or error of the user's code."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
from types import SimpleNamespace
from typing import Any, cast

import msgpack
import pytest
import torch

from syncline.errors import ConfigError
from syncline.runtime.child import Child, ChildFailed, Chore, Handler, answer_in, answered, serve, tell
from syncline.runtime.child_messages import (
    CopyCenter,
    EvaluateCenter,
    EvaluationReport,
    Failed,
    PeriodReport,
    PrepareRun,
    TrainPeriod,
    encode,
)
from syncline.tasks.quadratic import LinearRegression

PERIOD = TrainPeriod(version=3, clock=2, part=0, parts=1, verdicts={1: True})


class Odd(Exception):
    def __str__(self) -> str:
        raise RuntimeError("cannot even say so")


def asked(handler: Handler) -> Any:
    """Ask for a period; both messages travel as bytes."""
    return answer_in(answered({TrainPeriod: handler}, encode(PERIOD)), PERIOD)


def failure(handler: Handler) -> ChildFailed:
    with pytest.raises(ChildFailed) as caught:
        asked(handler)
    return caught.value


def raising(error: Exception) -> Handler:
    def handler(question: TrainPeriod) -> PeriodReport:
        raise error

    return handler


def test_question_and_answer_travel_unchanged() -> None:
    seen: list[TrainPeriod] = []
    report = PeriodReport(steps=3, loss=0.5, evaluation=EvaluationReport(metrics={"auc": 0.25}, skipped={"auc": 2}))

    def handler(question: TrainPeriod) -> PeriodReport:
        seen.append(question)
        return report

    assert asked(handler) == report
    assert seen == [PERIOD]


def test_a_loss_that_is_not_finite_travels() -> None:
    loss = asked(lambda question: PeriodReport(loss=float("nan"))).loss
    assert loss != loss


@pytest.mark.parametrize(("field", "odd"), [("steps", -1), ("steps", 1 << 80), ("advice", {1, 2}), ("loss", "1")])
def test_a_result_of_a_wrong_type_is_an_error_that_names_the_field(field: str, odd: Any) -> None:
    assert field in failure(lambda question: PeriodReport(**{field: odd})).problem


def test_an_answer_that_cannot_be_encoded_is_an_error() -> None:
    unchecked = PeriodReport.model_construct(loss=1 << 80)
    assert failure(lambda question: unchecked).problem.startswith("the answer 'period' cannot be sent: ")


def test_text_of_files_travels_whatever_their_names() -> None:
    assert asked(lambda question: PeriodReport(advice=["caf\udce9"])).advice == ["caf?"]


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", msgpack.packb([1]), msgpack.packb({"t": "period", "steps": "3"}), encode(CopyCenter())]
)
def test_data_that_is_no_answer_to_the_question_is_an_error(data: bytes) -> None:
    with pytest.raises(ChildFailed, match=r"^the answer to 'train-period' cannot be read: "):
        answer_in(data, PERIOD)


def test_a_question_without_a_handler_is_an_error() -> None:
    question = EvaluateCenter(version=0)
    with pytest.raises(ChildFailed, match="'evaluate-center'"):
        answer_in(answered({TrainPeriod: raising(ValueError())}, encode(question)), question)


@pytest.mark.parametrize("error", [Odd(), ValueError(os.fsdecode(b"no such file: caf\xe9.csv")), KeyError("x" * 5000)])
def test_an_error_is_told_whatever_it_says_of_itself(error: Exception) -> None:
    told = failure(raising(error)).problem
    assert told.startswith(type(error).__name__) and "(test_child.py:" in told and len(told) < 1200


def test_an_error_of_the_user_s_names_setting_and_hint_whatever_they_hold() -> None:
    error = failure(raising(ConfigError("task", "caf\udce9.py is not there", "hint caf\udce9.py")))
    assert (error.problem, error.setting, error.hint) == ("caf?.py is not there", "task", "hint caf?.py")


def test_a_spec_with_settings_of_another_version_is_the_users_error() -> None:
    data = msgpack.packb({"t": "prepare-run", "spec": {"task": "a:B", "new_setting": 1}, "manifest": b""})
    failed = msgpack.unpackb(answered({PrepareRun: raising(ValueError())}, data))
    assert failed["t"] == Failed.kind and failed["setting"] == "new_setting"


def test_an_error_within_torch_names_the_line_that_called_it() -> None:
    def handler(question: TrainPeriod) -> PeriodReport:
        torch.nn.Linear(3, 2)(torch.zeros(4, 5))
        return PeriodReport()

    line = handler.__code__.co_firstlineno + 1
    assert failure(handler).problem.endswith(f"(test_child.py:{line})")


def test_an_error_in_a_ready_made_task_names_its_line() -> None:
    def handler(question: TrainPeriod) -> PeriodReport:
        LinearRegression().loss(torch.nn.Linear(3, 2), None)
        return PeriodReport()

    assert "(quadratic.py:" in failure(handler).problem


async def test_a_child_tells_what_it_is_doing_before_it_answers() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    child = Child(cast(Any, SimpleNamespace(exited=asyncio.get_running_loop().create_future())), ours)
    end_fd = theirs.detach()
    seen: list[Any] = []
    go_on = threading.Event()

    def period(question: TrainPeriod) -> PeriodReport:
        for doing in ("loads caf\udce9.py", "makes the model"):
            tell(end_fd, doing)
            assert go_on.wait(10)
            go_on.clear()
        return PeriodReport(steps=3)

    answering = asyncio.create_task(asyncio.to_thread(serve, end_fd, {TrainPeriod: period}))
    asking = asyncio.create_task(child.ask(PERIOD))
    while not asking.done():
        await asyncio.sleep(0)
        if child.doing not in ("", *seen):
            seen.append(child.doing)
            go_on.set()
    ours.close()
    await answering
    assert seen == ["loads caf?.py", "makes the model"]
    assert await asking == PeriodReport(steps=3)


# -- what a child does while no question waits ---------------------------------------------------------------------------
class Served:
    """A child with one chore, in a thread; `done` lists its work in order."""

    def __init__(self, due_in_s: float, *, asked_before: bool = False) -> None:
        self.ours, theirs = socket.socketpair()
        self.done: list[str] = []
        self.idle = threading.Event()
        self._due_in_s: float | None = due_in_s
        if asked_before:
            self.ask()
        chore = Chore(lambda: self._due_in_s, self._do)
        self._thread = threading.Thread(target=serve, args=(theirs.detach(), {TrainPeriod: self._period}, chore))
        self._thread.start()

    def ask(self) -> None:
        data = encode(PERIOD)
        self.ours.sendall(struct.pack("<I", len(data)) + data)

    def answered(self) -> bool:
        return len(self.ours.recv(4)) == 4

    def hang_up(self) -> None:
        self.ours.close()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _do(self) -> None:
        self._due_in_s = None
        self.done.append("chore")
        self.idle.set()

    def _period(self, question: TrainPeriod) -> PeriodReport:
        self.done.append("period")
        return PeriodReport()


def test_a_child_does_its_chore_while_no_question_waits_and_answers_afterwards() -> None:
    child = Served(0.0)
    assert child.idle.wait(30)
    child.ask()
    assert child.answered()
    child.hang_up()
    assert child.done == ["chore", "period"]


def test_a_question_that_waits_comes_before_a_chore_that_is_due() -> None:
    child = Served(-1.0, asked_before=True)
    assert child.idle.wait(30)
    child.hang_up()
    assert child.done == ["period", "chore"]


def test_a_chore_that_is_due_later_keeps_neither_a_question_waiting_nor_the_end() -> None:
    child = Served(3600.0)
    child.ask()
    assert child.answered()
    child.hang_up()
    assert child.done == ["period"]
