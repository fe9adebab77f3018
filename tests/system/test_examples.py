"""The Python examples run as they are, from another directory, and print what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]


def run(example: str, *arguments: str, cwd: Path) -> list[str]:
    """Run an example to its end and return the lines that it printed."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / example), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_a_task_of_ones_own_is_trained_followed_and_exported(tmp_path: Path) -> None:
    *followed, merged, written = run("own_task.py", "mine.safetensors", cwd=tmp_path)
    last = re.fullmatch(r"version (\d+): accuracy (0\.\d+|1\.000)", followed[-1])
    assert last is not None and int(last[1]) == 20 and float(last[2]) > 0.9
    assert re.fullmatch(r"version 20 was made of: (a\d [01]\.\d\d(, )?){2,3}", merged)
    assert written == "wrote mine.safetensors"
    assert sorted(load_file(tmp_path / "mine.safetensors")) == ["0.bias", "0.weight", "2.bias", "2.weight"]


def test_ways_of_averaging_are_compared_on_one_fleet(tmp_path: Path) -> None:
    lines = run("compare_averaging.py", cwd=tmp_path)
    assert [line.split()[0] for line in lines] == ["rounds", "asynchronous", "momentum"]
    for line in lines:
        found = re.fullmatch(r"\w+ +accuracy (0\.\d{3})  \d\.\d\d MB up", line)
        assert found is not None and float(found[1]) > 0.5, line


def test_every_python_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"own_task.py", "compare_averaging.py"}
