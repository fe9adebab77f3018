"""docs/where.md names places and tests that exist, and the names in these places."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ADDITIONS = {
    "codec", "merge rule", "transport", "command", "data source", "page element", "metric", "record field",
    "simulated fault", "invariant", "task", "tracker", "privacy step", "run setting",
}  # fmt: skip
ROW = re.compile(r"^\| ([a-z ]+) \| `([^`]+)` \| (.+) \| `([^`]+)` \|$", re.MULTILINE)
ROWS: list[tuple[str, str, str, str]] = ROW.findall((ROOT / "docs" / "where.md").read_text())


def test_every_kind_of_addition_has_one_row() -> None:
    assert sorted(row[0] for row in ROWS) == sorted(ADDITIONS)


@pytest.mark.parametrize(("addition", "place", "steps", "test"), ROWS, ids=[row[0] for row in ROWS])
def test_the_place_and_its_test_exist(addition: str, place: str, steps: str, test: str) -> None:
    assert (ROOT / place).exists() and (ROOT / test).is_file()
    files = [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).glob("*.py"))
    if addition == "transport":
        files.append(ROOT / "tests/bus/contract_kit.py")
    sources = "\n".join(file.read_text() for file in files)
    for name in re.findall(r"`([A-Z]\w+)`", steps):
        assert re.search(rf"\b{name}\b", sources), f"{addition}: {place} does not have {name}"
    for path in re.findall(r"`((?:tests|tools)/[^`]+)`", steps):
        assert (ROOT / path).exists(), f"{addition}: there is no {path}"


@pytest.mark.parametrize(("addition", "place", "steps", "test"), ROWS, ids=[row[0] for row in ROWS])
def test_the_test_imports_from_the_package_of_the_place(addition: str, place: str, steps: str, test: str) -> None:
    package = Path(place).parent if place.endswith(".py") else Path(place)
    dotted = ".".join(package.parts[1:])
    assert re.search(rf"\b{re.escape(dotted)}\b", (ROOT / test).read_text()), f"{test} imports nothing of {dotted}"
