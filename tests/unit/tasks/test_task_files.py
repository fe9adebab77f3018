"""Tasks of several files: files beside a task file can be imported, also by processes that the task starts.

They shadow no module, and the working directory is never on the path.
"""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from syncline.errors import ConfigError
from syncline.tasks.base import Task, load_task

TASK = """
import queue
from helper_of_task import WIDTH

class Mine:
    def __init__(self, data="rows.csv"):
        self.data = data
    def model(self): return WIDTH
    def dataset(self, part): return []
    def loss(self, model, batch): return queue.Queue

def double(x):
    return 2 * x
"""


@pytest.fixture(autouse=True)
def nothing_stays_imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make `tasks/mine.py` with a helper beside the file, and a file with the name of a module of Python."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.py").write_text(TASK)
    (tmp_path / "tasks" / "helper_of_task.py").write_text("WIDTH = 7\n")
    (tmp_path / "tasks" / "queue.py").write_text("raise RuntimeError('it shadows the standard library')\n")
    return tmp_path


def load(path: str, folder: Path, **more: Any) -> Any:
    return load_task(path, {}, ["*"], folder, **more)


def test_a_helper_beside_the_task_file_is_imported_and_shadows_nothing(folder: Path) -> None:
    task: Any = load("tasks/mine.py:Mine", folder)
    assert task.model() == 7
    assert sys.path[-1] == str(folder / "tasks")
    sys.modules.pop("queue")
    assert task.loss(None, None).__module__ == "queue"
    import queue

    assert Path(queue.__file__).parent != folder / "tasks"


def test_a_task_file_may_have_the_name_of_another_module(folder: Path) -> None:
    (folder / "tasks" / "json.py").write_text(TASK)
    (folder / "my-task.v2.py").write_text(TASK.replace("from helper_of_task import WIDTH", "WIDTH = 8"))
    import json

    assert load("tasks/json.py:Mine", folder).model() == 7
    assert sys.modules["json"] is json
    assert load("my-task.v2.py:Mine", folder).model() == 8


def test_a_task_file_that_has_changed_is_loaded_as_it_is_now(folder: Path) -> None:
    assert load("tasks/mine.py:Mine", folder).model() == 7
    (folder / "tasks" / "mine.py").write_text(TASK.replace("return WIDTH", "return WIDTH + 1_000"))
    assert load("tasks/mine.py:Mine", folder).model() == 1_007


def test_a_module_that_is_not_installed_is_looked_for_in_the_task_directory(folder: Path) -> None:
    (folder / "own_package").mkdir()
    (folder / "own_package" / "task.py").write_text("from . import rest\n" + TASK.replace("helper_of_task", ".rest"))
    (folder / "own_package" / "rest.py").write_text("WIDTH = 9\n")
    before = [*sys.path]
    load("syncline.tasks.noop:Noop", folder)
    assert sys.path == before, "an installed one does not need it"
    assert load("own_package.task:Mine", folder).model() == 9
    assert sys.path == [*before, str(folder)]


def test_a_module_that_is_missing_is_named_with_both_places_where_it_may_be(folder: Path) -> None:
    (folder / "tasks" / "helper_of_task.py").rename(folder / "helper_of_task.py")
    with pytest.raises(ConfigError) as error:
        load("tasks/mine.py:Mine", folder)
    assert str(error.value) == (
        f"task: 'tasks/mine.py:Mine' needs the module 'helper_of_task', which is neither installed here nor in "
        f"{folder / 'tasks'}. Install it, or put it there, for the coordinator and every agent"
    )


@pytest.mark.parametrize("line", ["from . import helper_of_task", "from .helper_of_task import WIDTH"])
def test_a_relative_import_is_refused_with_what_to_write_instead(line: str, folder: Path) -> None:
    (folder / "tasks" / "mine.py").write_text(f"{line}\n")
    with pytest.raises(ConfigError, match=r"relative import, .* Write `import helper` for the file helper\.py"):
        load("tasks/mine.py:Mine", folder)


@pytest.mark.parametrize(("path", "place"), [("tasks/mine.py:Mine", "tasks"), ("syncline.tasks.noop:Noop", "")])
def test_the_process_enters_the_directory_of_the_task_before_its_code_runs(path: str, place: str, folder: Path) -> None:
    entered: list[Path] = []
    (folder / "tasks" / "helper_of_task.py").write_text("raise RuntimeError('too early')\n")

    def enter(directory: Path) -> None:
        entered.append(directory)
        (folder / "tasks" / "helper_of_task.py").write_text("WIDTH = 10\n")

    load(path, folder, enter=enter)
    assert entered == [folder / place]


def test_a_directory_is_not_entered_for_a_task_that_is_not_allowed_or_not_there(folder: Path) -> None:
    entered: list[Path] = []
    for path, allowed in (("tasks/mine.py:Mine", []), ("nowhere/mine.py:Mine", ["*"])):
        with pytest.raises(ConfigError):
            load_task(path, {}, allowed, folder, enter=entered.append)
    assert entered == []


def test_a_task_that_is_not_derived_from_task_is_pickled_and_copied(folder: Path) -> None:
    task = load("tasks/mine.py:Mine", folder)
    for other in (pickle.loads(pickle.dumps(task)), copy.copy(task)):
        assert type(other) is type(task) and isinstance(other, Task)
        assert vars(other) == {"data": "rows.csv"}


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_process_that_a_task_starts_can_import_the_task(method: str, folder: Path) -> None:
    double = sys.modules[type(load("tasks/mine.py:Mine", folder)).__module__].double
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map_async(double, [1, 2]).get(60) == [2, 4]


@pytest.mark.parametrize(
    ("start", "paths"), [("-m", None), ("-P -m", ":/nowhere"), ("-P -m", "/nowhere:")], ids=["-m", "first", "last"]
)
def test_the_command_has_no_working_directory_on_its_path(start: str, paths: str | None, folder: Path) -> None:
    (folder / "tasks" / "yaml.py").write_text("raise RuntimeError('it shadows an installed package')\n")
    (folder / "tasks" / "spec.yaml").write_text("task: [unclosed\n")
    command = [sys.executable, *start.split(), "syncline_cli", "run", "spec.yaml", "--local", "2"]
    environment = {} if paths is None else {"PYTHONPATH": paths}
    ran = subprocess.run(
        command, cwd=folder / "tasks", env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 2 and ran.stderr.startswith("error: spec: "), ran.stderr
