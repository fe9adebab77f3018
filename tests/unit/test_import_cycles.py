"""No two files import each other, directly or through others, imports inside functions included."""

from __future__ import annotations

import ast
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "shared/syncline",
    "services/syncline_coordinator",
    "services/syncline_agent",
    "services/syncline_cli",
    "services/syncline_sim",
)

Imports = Mapping[str, set[str]]  # module → the modules that it imports


def modules_of(package: Path) -> dict[str, Path]:
    """Return the files of a package by the names of their modules."""
    found = {}
    for file in package.rglob("*.py"):
        parts = file.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the import statements under a node, without those that only a type checker reads."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node
    children = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        children = iter(node.orelse)
    for child in children:
        yield from statements(child)


def imported(statement: ast.Import | ast.ImportFrom, known: Mapping[str, Path]) -> Iterator[str]:
    """Yield the known modules that a statement imports."""
    if isinstance(statement, ast.Import):
        names = [alias.name for alias in statement.names]
    else:
        assert statement.level == 0, "the packages use absolute imports"
        members = [f"{statement.module}.{alias.name}" for alias in statement.names]
        names = [member if member in known else str(statement.module) for member in members]
    yield from (name for name in names if name in known)


def imports_of(modules: Mapping[str, Path]) -> Imports:
    found = {}
    for module, file in modules.items():
        tree = ast.parse(file.read_text())
        found[module] = {name for statement in statements(tree) for name in imported(statement, modules)}
    return found


def shortest_cycle(imports: Imports) -> list[str]:
    """Return the modules of a shortest cycle, the first one again at the end; [] if there is none."""
    found = [cycle for module in sorted(imports) if (cycle := _cycle_through(module, imports))]
    return min(found, key=len, default=[])


def _cycle_through(start: str, imports: Imports) -> list[str]:
    importer_of = dict.fromkeys(imports[start], start)
    queue = deque(sorted(imports[start]))
    while queue:
        module = queue.popleft()
        if module == start:
            path = [start]
            while len(path) == 1 or path[-1] != start:
                path.append(importer_of[path[-1]])
            return path[::-1]
        for further in sorted(imports[module] - importer_of.keys()):
            importer_of[further] = module
            queue.append(further)
    return []


def test_no_file_imports_itself_through_others() -> None:
    modules = {name: file for package in PACKAGES for name, file in modules_of(ROOT / package).items()}
    cycle = shortest_cycle(imports_of(modules))
    assert cycle == [], f"import cycle: {' → '.join(cycle)}"


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("import package.b", ["package.a", "package.b", "package.a"]),
        ("from package import b", ["package.a", "package.b", "package.a"]),
        ("def f():\n    from package.b import g", ["package.a", "package.b", "package.a"]),
        ("import package.c\nimport package.b", ["package.a", "package.b", "package.a"]),
        ("import package.c", ["package.a", "package.c", "package.b", "package.a"]),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import package.b", []),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import os\nelse:\n    import package.b",
         ["package.a", "package.b", "package.a"]),
    ],
)  # fmt: skip
def test_a_cycle_is_named(statement: str, expected: list[str], tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    sources = {"__init__": "", "a": statement, "b": "from package.a import f", "c": "import package.b"}
    for name, source in sources.items():
        (package / f"{name}.py").write_text(source)
    assert shortest_cycle(imports_of(modules_of(package))) == expected
