"""docs/your-own-task.md and docs/first-steps.md are done: files written, commands typed in order, in several terminals.

A person's terminals are processes here; nothing else is changed, but that `pkill` may kill no other fleet's agent.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from system.command import SYNCLINE, Command, until
from system.dockerfile import ROOT

pytestmark = pytest.mark.timeout(300)

OWN_TASK, FIRST_STEPS = ROOT / "docs" / "your-own-task.md", ROOT / "docs" / "first-steps.md"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def typed(page: Path) -> list[list[str]]:
    """The words of every command on the page."""
    return [line.removeprefix("$ ").split() for block in blocks(page, "console") for line in block.splitlines()]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    task, check, *_ = blocks(OWN_TASK, "python")
    (tmp_path / "my_task.py").write_text(task)
    (tmp_path / "check.py").write_text(check)
    (tmp_path / "mine.yaml").write_text(blocks(OWN_TASK, "yaml")[0])
    return tmp_path


@pytest.fixture
def running(place: Path) -> Iterator[Command]:
    run = typed(OWN_TASK)[0]
    assert run == ["syncline", "run", "mine.yaml", "--local", "3", "--stay"]
    command = Command(place, tuple(run[1:]))
    yield command
    command.stop()


def in_another_terminal(running: Command, *words: str) -> subprocess.Popen[str]:
    assert words[0] == "syncline"
    environ = {k: v for k, v in os.environ.items() if not k.startswith("SYNCLINE_")}
    environ |= {"TMPDIR": str(running.temporary), "XDG_CACHE_HOME": str(running.place / "cache")}
    return subprocess.Popen(
        [*SYNCLINE, *words[1:]],
        cwd=running.place,
        env=environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def asked(running: Command, *words: str) -> str:
    """The answer of a command that has to succeed."""
    process = in_another_terminal(running, *words)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, f"{words}: {out}{err}"
    return out


def kill(running: Command, name: str) -> None:
    """`pkill -9 name`, for the processes of this run alone."""
    own = [int(line.split()[0]) for line in running.processes()]
    found = [pid for pid in own if _name_of(pid) == name]
    assert found, f"no process is called {name}"
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it went with the one before


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


@pytest.mark.skipif(sys.platform != "linux", reason="a process has a name of its own on Linux only")
def test_a_task_of_ones_own_from_the_file_to_plain_pytorch(place: Path, running: Command) -> None:
    _, watch, pkill, why, export = typed(OWN_TASK)[:5]
    running.says("/60")
    watcher = in_another_terminal(running, *watch)
    assert pkill[:2] == ["pkill", "-9"]
    kill(running, pkill[2])
    running.says("the fleet stays up")
    shown, _ = watcher.communicate(timeout=30)
    assert watcher.returncode == 0 and "a2 lost" in shown and "60 versions" in shown, shown

    assert "run mine, version 60" in asked(running, *why)
    answers = [json.loads(asked(running, *why, str(v), "--json")) for v in (1, 60)]
    assert [sorted(e["agent"] for e in a["merged"]) for a in answers] == [["a1", "a2", "a3"], ["a1", "a3"]]
    without = next(a for v in range(2, 60) if "a2" in (a := json.loads(asked(running, *why, str(v), "--json")))["late"])
    assert "a2 not heard of" in without["closed_by"]

    said = json.loads(asked(running, *export, "--json"))
    assert said["version"] == 60
    accuracy = re.search(r"60 versions, accuracy (0\.\d+)", running.out + running.err)
    python = subprocess.run(
        [sys.executable, "check.py"], cwd=place, capture_output=True, text=True, timeout=60, check=True
    )
    assert accuracy is not None and float(python.stdout) == pytest.approx(float(accuracy[1]), abs=5e-4)
    assert float(python.stdout) > 0.9

    running.process.send_signal(signal.SIGINT)
    running.ended(within_s=10)
    until(lambda: not running.processes(), 5, lambda: f"left behind: {running.processes()}")


def test_the_scripts_the_page_calls_are_installed() -> None:
    assert (Path(sysconfig.get_path("scripts")) / "syncline").exists()


def test_the_first_steps(tmp_path: Path) -> None:
    demo, activate, run, *asks, simulate = typed(FIRST_STEPS)
    assert demo == ["make", "demo"], "that one has tests of its own"
    assert activate == ["source", ".venv/bin/activate"]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    first, fleet = blocks(FIRST_STEPS, "yaml")
    assert yaml.safe_load(first) == yaml.safe_load((ROOT / "examples" / "digits.yaml").read_text())
    (tmp_path / "fleet.yaml").write_text(fleet)
    running = Command(tmp_path, tuple(run[1:]))
    try:
        running.says("the fleet stays up")
        ls, why, why_three, export = (asked(running, *words) for words in asks)
    finally:
        running.stop()
    assert "first" in ls and "done" in ls
    assert "run first, version 40" in why and "run first, version 3" in why_three
    assert "version 40 of first" in export and (tmp_path / "first.safetensors").exists()
    assert "40 versions" in asked(running, *simulate)
