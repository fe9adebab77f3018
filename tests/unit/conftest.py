"""What unit tests share: a bus that is a dict, a loop whose time jumps instead of passing, and golden files."""

from __future__ import annotations

import asyncio
import json
import selectors
from collections import deque
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import settings

from syncline.bus.base import Entry, Stored
from syncline.errors import AlreadyPut, Conflict, Unreachable

T = TypeVar("T")
GOLDEN = Path(__file__).parent / "golden"

torch.set_num_threads(1)  # small models: a second thread costs more than it does, ten times as much on a busy machine

# The same examples on every run: a red build is about the change. `--hypothesis-profile explore` looks for new ones.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile("steady")


class FakeBus:
    """Messages by subject, written once; keys with revisions. `fail` makes the next calls of an operation fail."""

    max_payload = 1 << 20

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}
        self.keys: dict[str, Entry] = {}
        self.published: list[tuple[str, bytes]] = []
        self.calls: list[tuple[str, str]] = []
        self.under_way = self.most_under_way = 0
        self._faults: dict[str, deque[Exception | None]] = {}
        self._lost_answers: list[str] = []

    def fail(self, operation: str, *errors: Exception | None) -> None:
        """The next calls of the operation raise these, one each, and do nothing; None lets one through."""
        self._faults.setdefault(operation, deque()).extend(errors)

    def lose_answer(self, operation: str) -> None:
        """The next call of the operation does its work, and then says that no answer came."""
        self._lost_answers.append(operation)

    async def put(self, subject: str, data: bytes, *, bulk: bool = False) -> int:
        await self._call("put", subject)
        if subject in self.held:
            raise AlreadyPut(subject)
        self.held[subject] = bytes(data)
        self._answer("put")
        return len(self.held)

    async def get(self, stream: str, subject: str, *, bulk: bool = False) -> Stored | None:
        await self._call("get", f"{stream} {subject}")
        return Stored(subject, self.held[subject], 1, 0.0) if subject in self.held else None

    async def kv_get(self, bucket: str, key: str) -> Entry | None:
        await self._call("kv_get", key)
        return self.keys.get(key)

    async def kv_create(self, bucket: str, key: str, value: bytes) -> int:
        await self._call("kv_create", key)
        return self._write(key, value, 0)

    async def kv_update(self, bucket: str, key: str, value: bytes, revision: int) -> int:
        await self._call("kv_update", key)
        written = self._write(key, value, revision)
        self._answer("kv_update")
        return written

    async def publish(self, subject: str, data: bytes) -> None:
        await self._call("publish", subject)
        self.published.append((subject, data))

    def _write(self, key: str, value: bytes, revision: int) -> int:
        there = self.keys[key].revision if key in self.keys else 0
        if there != revision:
            raise Conflict(f"{key} is at revision {there}, not {revision}")
        self.keys[key] = Entry(value, revision + 1)
        return revision + 1

    def _answer(self, operation: str) -> None:
        if operation in self._lost_answers:
            self._lost_answers.remove(operation)
            raise Unreachable("no answer in time")

    async def _call(self, operation: str, what: str) -> None:
        self.calls.append((operation, what))
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await asyncio.sleep(0)  # others get their turn
        self.under_way -= 1
        error = faults.popleft() if (faults := self._faults.get(operation)) else None
        if error is not None:
            raise error


@pytest.fixture
def bus() -> FakeBus:
    return FakeBus()


class _Jump(selectors.DefaultSelector):  # type: ignore[valid-type, misc]
    """Where the loop would wait, time jumps to the next timer."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("nothing will ever happen: every task waits for another")
        if not ready:
            self.now_s += timeout or 0.0
        return ready


class _JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now_s


@pytest.fixture
def simulated() -> Callable[[Coroutine[Any, Any, T]], tuple[T, float]]:
    """Runs a coroutine in simulated time, which begins at 0; returns its result and the time it took."""

    def run(work: Coroutine[Any, Any, T]) -> tuple[T, float]:
        async def timed() -> tuple[T, float]:
            return await work, asyncio.get_running_loop().time()

        with asyncio.Runner(loop_factory=_JumpingLoop) as runner:
            return runner.run(timed())

    return run


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, Any], None]:
    """Compares with tests/unit/golden/<name>.json, or writes it under --update-golden."""

    def check(name: str, found: Any) -> None:
        path = GOLDEN / f"{name}.json"
        text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
        if request.config.getoption("--update-golden", default=False):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"{path.name} is missing; make it with: pytest tests/unit --update-golden"
        assert json.loads(path.read_text()) == json.loads(text), f"{path.name} differs; if meant: --update-golden"

    return check
