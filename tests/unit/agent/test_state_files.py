"""The files with an agent's states of runs, and their removal."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from syncline.errors import Unreachable
from syncline.wire import subjects
from syncline.wire.messages import Head, Phase, encode
from syncline_agent.state_files import LOOKED_AT, UNKNOWN_KEPT, StateFiles


@pytest.fixture
def shelf(bus: Any, tmp_path: Path) -> StateFiles:
    return StateFiles(bus, tmp_path, "a1")


def keep(directory: Path, *runs: str, agent: str = "a1") -> None:
    """Make files of runs, each newer than the one before."""
    for age, run in enumerate(reversed(runs)):
        path = directory / run / f"{agent}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_text(run)
        os.utime(path, (10_000 - age, 10_000 - age))


def kept(directory: Path, agent: str = "a1") -> set[str]:
    return {path.parent.name for path in directory.glob(f"*/{agent}.safetensors")}


def tidied(bus: Any, shelf: StateFiles, run: str = "now", **heads: Phase) -> None:
    async def play() -> None:
        for name, phase in heads.items():
            head = Head(run=name, term=1, version=0, phase=phase)
            await bus.kv_create(subjects.RUNS_BUCKET, subjects.head_key(name), encode(head))
        await shelf.tidy(run)

    asyncio.run(play())


def test_what_is_kept_of_runs_that_are_over_goes_with_their_directories(
    bus: Any, shelf: StateFiles, tmp_path: Path
) -> None:
    keep(tmp_path, "done", "failed", "waiting", "training", "merging", "now")
    (tmp_path / "done" / "a1.new").write_text("half")
    phases: tuple[Phase, ...] = ("done", "failed", "waiting", "training", "merging")
    tidied(bus, shelf, **{phase: phase for phase in phases})
    assert kept(tmp_path) == {"waiting", "training", "merging", "now"} == {p.name for p in tmp_path.iterdir()}


def test_what_others_keep_in_the_same_directory_stays(bus: Any, shelf: StateFiles, tmp_path: Path) -> None:
    keep(tmp_path, "done")
    keep(tmp_path, "done", agent="a2")
    tidied(bus, shelf, done="done")
    assert (kept(tmp_path), kept(tmp_path, "a2")) == (set(), {"done"})


def test_the_run_that_an_agent_begins_with_is_none_that_is_over(bus: Any, shelf: StateFiles, tmp_path: Path) -> None:
    """The broker may have lost the record of the run's end."""
    keep(tmp_path, "now")
    tidied(bus, shelf, now="done")
    assert kept(tmp_path) == {"now"}


def test_of_runs_that_the_bus_does_not_know_the_newest_stay(bus: Any, shelf: StateFiles, tmp_path: Path) -> None:
    runs = [f"r{i}" for i in range(UNKNOWN_KEPT + 3)]
    keep(tmp_path, "training", *runs)
    tidied(bus, shelf, training="training")
    assert kept(tmp_path) == {"training", *runs[-UNKNOWN_KEPT:]}


def test_so_many_are_looked_at_each_time_and_in_the_end_all_have_gone(
    bus: Any, shelf: StateFiles, tmp_path: Path
) -> None:
    runs = [f"r{i}" for i in range(LOOKED_AT + 3)]
    keep(tmp_path, *runs)
    for left in (UNKNOWN_KEPT + 3, UNKNOWN_KEPT):
        tidied(bus, shelf)
        assert len(kept(tmp_path)) == left


def test_what_the_bus_does_not_say_now_is_asked_another_time(
    bus: Any, shelf: StateFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nobody(*_: Any) -> None:
        raise Unreachable("nobody answers")

    keep(tmp_path, *(f"r{i}" for i in range(UNKNOWN_KEPT + 3)))
    monkeypatch.setattr(bus, "kv_get", nobody)
    asyncio.run(shelf.tidy("now"))
    assert len(kept(tmp_path)) == UNKNOWN_KEPT + 3


def test_directories_that_are_no_runs_are_left_alone(bus: Any, shelf: StateFiles, tmp_path: Path) -> None:
    keep(tmp_path, *(f"My Models {i}" for i in range(UNKNOWN_KEPT + 3)))
    tidied(bus, shelf)
    assert len(kept(tmp_path)) == UNKNOWN_KEPT + 3


def test_what_cannot_be_removed_is_no_error(shelf: StateFiles, tmp_path: Path) -> None:
    asyncio.run(shelf.remove("never-was"))
    shelf.path("odd").mkdir(parents=True)
    asyncio.run(shelf.remove("odd"))
    assert shelf.path("odd").is_dir()


def test_an_agent_has_its_shelf_without_torch() -> None:
    subprocess.run(
        [sys.executable, "-c", "import sys, syncline_agent.state_files; assert 'torch' not in sys.modules"], check=True
    )
