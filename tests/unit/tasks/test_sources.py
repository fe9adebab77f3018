"""Digests of a task's code: its own files, under the same names everywhere, and no others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from syncline.tasks.base import load_task
from syncline.tasks.sources import differing, digests_of_code

TASK = """
import helper_of_sources
from syncline.tasks.quadratic import LinearRegression

class Mine(LinearRegression):
    pass
"""


def digests(directory: Path, task: str = "mine_of_sources.py:Mine") -> dict[str, str]:
    return digests_of_code(load_task(task, {}, ["*"], directory))


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "helper_of_sources", raising=False)
    (tmp_path / "mine_of_sources.py").write_text(TASK)
    (tmp_path / "helper_of_sources.py").write_text("SCALE = 2\n")
    (tmp_path / "unused.py").write_text("SCALE = 3\n")
    return tmp_path


def test_the_files_are_those_of_the_class_of_its_bases_and_of_what_it_imports_from_its_directory(
    directory: Path,
) -> None:
    assert set(digests(directory)) == {"mine_of_sources.py", "helper_of_sources.py", "quadratic.py"}


def test_a_task_of_a_package_has_the_files_of_its_classes() -> None:
    found = digests(Path("/"), "syncline.tasks.digits:Digits")
    assert set(found) == {"digits.py", "classification.py"}


def test_another_helper_is_a_difference_and_a_file_that_one_side_lacks_is_none(directory: Path) -> None:
    before = digests(directory)
    (directory / "helper_of_sources.py").write_text("SCALE = 5\n")
    after = digests(directory)
    assert differing(after, before) == ["helper_of_sources.py"]
    assert differing(after | {"own.py": "0" * 16}, after) == [] == differing(after, {})
