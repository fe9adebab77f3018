"""What unit tests share: a bus that is a dict, a loop whose time jumps instead of passing, and golden files."""

from __future__ import annotations

import asyncio
import json
import selectors
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import settings

from unit.fake_bus import FakeBus

T = TypeVar("T")
GOLDEN = Path(__file__).parent / "golden"

torch.set_num_threads(1)  # small models: a second thread costs more than it does, ten times as much on a busy machine

# The same examples on every run: a red build is about the change. `--hypothesis-profile explore` looks for new ones.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile("steady")


@pytest.fixture
def bus() -> FakeBus:
    return FakeBus()


class _Jump(selectors.DefaultSelector):
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
