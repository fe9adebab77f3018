"""docs/extending.md is done, step by step, on a copy of the sources; then the contract tests run on what was added."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "extending.md").read_text()
ADDED = ("mid_range", "bounded", "exponential")
TESTS = (
    "averaging/test_merge.py",
    "averaging/test_outer.py",
    "averaging/test_staleness.py",
    "coordinator/test_reducer.py",
)


def follow(page: str, root: Path) -> int:
    """Does what every block of code on the page says; returns how many there are."""
    blocks = re.findall(r"```python\n# (?:(\w+) in )?(\S+)\n(.*?)```", page, re.DOTALL)
    for place, name, code in blocks:
        (root / name).write_text(inserted((root / name).read_text(), place, code))
    return len(blocks)


def inserted(source: str, place: str, code: str) -> str:
    """A class before the registry, a line into it, or a case into a function."""
    if not place:
        head, found, tail = re.split(r"^([A-Z]+: dict\[str, type)", source, maxsplit=1, flags=re.MULTILINE)
        return f"{head}{code}\n\n{found}{tail}"
    begin = rf"^({place}: .* = \{{\n)" if place.isupper() else rf"^(def {place}\(.*?^    match [^\n]*\n)"
    head, found, tail = re.split(begin, source, maxsplit=1, flags=re.MULTILINE | (0 if place.isupper() else re.DOTALL))
    return f"{head}{found}{code}{tail}"


def test_the_page_adds_a_rule_an_optimiser_and_a_weight_that_keep_every_contract(tmp_path: Path) -> None:
    for part in ("shared/syncline", "services/syncline_coordinator", "services/syncline_sim", "tests/unit"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert follow(PAGE, tmp_path) == 8
    (settings,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(f"task: a.b:C\nagents: {{min: 4}}\n{settings}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "shared"), str(tmp_path / "services")])}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=110
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
        return done.stdout

    read = "from pathlib import Path; from syncline.spec.run_spec import load_spec; print(repr(load_spec(Path('mine.yaml'))))"
    spec = run("-c", read)
    assert all(name in spec for name in ("MidRange", "Bounded", "Exponential"))
    tests = [str(tmp_path / "tests" / "unit" / name) for name in TESTS]
    report = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", " or ".join(ADDED), "-rA", *tests)
    for name in ADDED:
        assert report.count(f"[{name}") > 1 or report.count(f"-{name}") > 1, f"no contract was run on {name}"


IMPORTS = """
from typing import ClassVar, Literal
from pydantic import Field
from syncline.averaging.merge import Rule, scales
from syncline.averaging.outer import Outer
from syncline.averaging.staleness import Staleness
"""
PLAY = """
from pathlib import Path
from syncline.spec.run_spec import load_spec
from syncline_sim.fleet import run_fleet
result = run_fleet(load_spec(Path("mine.yaml")))
print(result.phase, result.versions)
"""


def package(place: Path, code: str, points: str) -> None:
    """An installed one, as pip leaves it."""
    (place / "averaging.py").write_text(code)
    (place / "averaging-1.0.dist-info").mkdir()
    (place / "averaging-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: averaging\nVersion: 1.0\n"
    )
    (place / "averaging-1.0.dist-info" / "entry_points.txt").write_text(points)


def with_package(place: Path, code: str) -> subprocess.CompletedProcess[str]:
    paths = [str(place), *sys.path]
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=place,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        text=True,
        capture_output=True,
        timeout=110,
    )


def test_an_installed_package_brings_its_own_and_a_run_is_made_with_them(tmp_path: Path) -> None:
    classes = re.findall(r"```python\n# \S+\n(class .*?)```", PAGE, re.DOTALL)
    (points,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    points = re.sub(r'\[project\.entry-points\."(.*?)"\]', r"[\1]", points).replace('"', "")
    package(tmp_path, "from __future__ import annotations\n" + IMPORTS + "\n\n".join(classes), points)
    (settings,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    task = "task: syncline.tasks.quadratic:LinearRegression\nagents: {min: 2}\nstop: {versions: 2}\n"
    (tmp_path / "mine.yaml").write_text(task + settings)
    done = with_package(tmp_path, PLAY)
    assert done.stdout == "done 2\n", done.stderr[-3000:]


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import no_such_module", "cannot be loaded: ModuleNotFoundError"),
        ("MidRange = dict", "is not a class of Rule"),
        ("class MidRange(Rule):\n    rule: Literal['median'] = 'median'", "has rule = 'median'"),
    ],
)
def test_a_package_that_brings_something_else_is_named(tmp_path: Path, code: str, problem: str) -> None:
    package(tmp_path, IMPORTS + code, "[syncline.merge_rules]\nmid_range = averaging:MidRange\n")
    done = with_package(tmp_path, "import syncline.spec.run_spec")
    assert "syncline.merge_rules: entry point 'mid_range'" in done.stderr and problem in done.stderr
