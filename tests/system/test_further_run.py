"""A fleet that `run --local --stay` left up takes further runs, of the same directory, without another option."""

from __future__ import annotations

from pathlib import Path

import pytest

from system.command import Command
from system.test_pages import asked, in_another_terminal

pytestmark = pytest.mark.timeout(180)

TASK = "from syncline.tasks.noop import Noop\n\n\nclass {name}(Noop):\n    pass\n"
SPEC = "task: {task}\ntask_options: {{params: 10}}\nagents: {{min: 1}}\nstop: {{versions: 2}}\nlocal: {{steps: 0}}\n"


def test_a_further_run_finds_the_fleet_and_its_task_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "first.py").write_text(TASK.format(name="First"))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "second.py").write_text(TASK.format(name="Second"))
    (tmp_path / "a.yaml").write_text(SPEC.format(task="first.py:First"))
    (tmp_path / "b.yaml").write_text(SPEC.format(task="sub/second.py:Second"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "first.py").write_text(TASK.format(name="First"))
    (tmp_path / "other" / "c.yaml").write_text(SPEC.format(task="first.py:First"))
    running = Command(tmp_path, ("run", "a.yaml", "--local", "1", "--stay"))
    try:
        running.says("the fleet stays up")
        assert "2 versions" in asked(running, "syncline", "run", "b.yaml", "--name", "second")
        assert "second" in asked(running, "syncline", "ls")
        refused = in_another_terminal(running, "syncline", "run", "other/c.yaml")
        _, said = refused.communicate(timeout=60)
        assert refused.returncode == 2
        assert said.startswith(f"error: task: 'first.py:First' lies in {tmp_path / 'other'}, and the local fleet looks")
    finally:
        running.stop()
