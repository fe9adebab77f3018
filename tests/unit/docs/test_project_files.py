"""The files about the project agree with each other: version, citation, site navigation."""

from __future__ import annotations

import importlib
import re
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

import syncline

ROOT = Path(__file__).parents[3]


def pages_of(entries: list[dict[str, Any]]) -> list[str]:
    """Return the pages of a part of the navigation, in their order."""
    pages = []
    for entry in entries:
        for target in entry.values():
            pages += [target] if isinstance(target, str) else pages_of(target)
    return pages


def test_the_citation_and_the_package_have_the_version_of_the_code() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == syncline.__version__
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"] == ["version"]
    assert version("syncline") == syncline.__version__


def test_every_page_is_in_the_navigation_of_the_site_once() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    pages = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(pages_of(config["nav"])) == sorted(pages)
    assert config["theme"]["font"] is False, "a font of Google's would be loaded over the network"


def test_the_documentation_tools_are_pinned() -> None:
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()[1:]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, requirements in project["optional-dependencies"].items():
        for requirement in requirements:
            name = requirement.partition(">")[0].lower()
            assert name in pinned or name.startswith("syncline["), f"extra {extra}: {name} is not in constraints.txt"


def test_the_api_page_has_every_public_name() -> None:
    shown = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    for path in shown:
        module, _, name = path.rpartition(".")
        assert path == "syncline.errors" or hasattr(importlib.import_module(module), name), f"there is no {path}"
    for name in syncline.__all__:
        public = getattr(syncline, name)
        assert f"{public.__module__}.{name}" in shown, f"docs/api.md does not have {name}"
