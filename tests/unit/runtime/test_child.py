"""What a child answers: always something that can be sent, whatever the user's code returned or raised."""

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
from syncline.runtime.child import Child, Chore, Handler, packed_answer, serve, tell
from syncline.tasks.quadratic import LinearRegression


class Odd(Exception):
    def __str__(self) -> str:
        raise RuntimeError("cannot even say so")


def asked(handler: Handler) -> dict[str, Any]:
    answer: dict[str, Any] = msgpack.unpackb(packed_answer({"period": handler}, {"ask": "period"}))
    return answer


def raising(error: Exception) -> Handler:
    def handler() -> dict[str, Any]:
        raise error

    return handler


def test_an_answer_is_sent_as_it_is() -> None:
    assert asked(lambda: {"steps": 3}) == {"steps": 3}


@pytest.mark.parametrize("odd", [torch.zeros(()), {1, 2}, "caf\udce9", 1 << 80, raising])
def test_an_answer_that_cannot_be_sent_is_an_error(odd: Any) -> None:
    assert asked(lambda: {"loss": odd})["error"].startswith("what 'period' came to cannot be sent: ")


@pytest.mark.parametrize("error", [Odd(), ValueError(os.fsdecode(b"no such file: caf\xe9.csv")), KeyError("x" * 5000)])
def test_an_error_is_told_whatever_it_says_of_itself(error: Exception) -> None:
    told = asked(raising(error))["error"]
    assert told.startswith(type(error).__name__) and "(test_child.py:" in told and len(told) < 1200


def test_an_error_of_the_user_s_names_setting_and_mend_whatever_they_hold() -> None:
    told = asked(raising(ConfigError("task", "caf\udce9.py is not there", "hint caf\udce9.py")))
    assert told == {"error": "caf?.py is not there", "setting": "task", "hint": "hint caf?.py"}


def test_an_error_within_torch_names_the_line_that_called_it() -> None:
    def handler() -> dict[str, Any]:
        torch.nn.Linear(3, 2)(torch.zeros(4, 5))
        return {}

    line = handler.__code__.co_firstlineno + 1
    assert asked(handler)["error"].endswith(f"(test_child.py:{line})")


def test_an_error_in_a_ready_made_task_names_its_line() -> None:
    def handler() -> dict[str, Any]:
        LinearRegression().loss(torch.nn.Linear(3, 2), None)
        return {}

    assert "(quadratic.py:" in asked(handler)["error"]


async def test_a_child_tells_what_it_is_doing_before_it_answers() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    child = Child(cast(Any, SimpleNamespace(exited=asyncio.get_running_loop().create_future())), ours)
    end_fd = theirs.detach()
    seen: list[Any] = []
    go_on = threading.Event()

    def describe() -> dict[str, Any]:
        for doing in ("loads caf\udce9.py", "makes the model"):
            tell(end_fd, doing)
            assert go_on.wait(10)
            go_on.clear()
        return {"doing": "nothing", "elements": 3}

    answering = asyncio.create_task(asyncio.to_thread(serve, end_fd, {"describe": describe}))
    asking = asyncio.create_task(child.ask("describe"))
    while not asking.done():
        await asyncio.sleep(0)
        if child.doing not in ("", *seen):
            seen.append(child.doing)
            go_on.set()
    ours.close()
    await answering
    assert seen == ["loads caf?.py", "makes the model"]
    assert await asking == {"doing": "nothing", "elements": 3}


# -- what a child does while no question waits ---------------------------------------------------------------------------
class Served:
    """A child with one chore, in a thread; `done`: what it has done, in its order."""

    def __init__(self, due_in_s: float, *, asked_before: bool = False) -> None:
        self.ours, theirs = socket.socketpair()
        self.done: list[str] = []
        self.idle = threading.Event()
        self._due_in_s: float | None = due_in_s
        if asked_before:
            self.ask()
        chore = Chore(lambda: self._due_in_s, self._do)
        self._thread = threading.Thread(target=serve, args=(theirs.detach(), {"period": self._period}, chore))
        self._thread.start()

    def ask(self) -> None:
        data = msgpack.packb({"ask": "period"})
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

    def _period(self) -> dict[str, Any]:
        self.done.append("period")
        return {}


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
