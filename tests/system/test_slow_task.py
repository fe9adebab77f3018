"""A task whose first model() takes long: the run goes on when it is made, and what is waited for is said meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from system.command import Command

pytestmark = pytest.mark.timeout(180)

TASK = """
import pathlib
import time

from syncline.tasks.noop import Noop


class FirstDownload(Noop):
    def model(self):
        cache = pathlib.Path("weights.cache")
        if not cache.exists():
            time.sleep(13)
            cache.touch()
        return super().model()
"""


def test_the_first_load_of_a_task_is_waited_for_and_told_of(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(TASK)
    spec = "task: task.py:FirstDownload\ntask_options: {params: 10}\nstop: {versions: 2}\nlocal: {steps: 0}\n"
    (tmp_path / "spec.yaml").write_text(spec)
    command = Command(tmp_path, ("run", "spec.yaml", "--local", "1"))
    try:
        command.says("it makes the model: model() of task.py:FirstDownload, for ")
        assert command.ended() == 0, command.out + command.err
    finally:
        command.stop()
    assert "2 versions" in command.out
