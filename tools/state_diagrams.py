"""Print docs/states.md from the code: `python tools/state_diagrams.py`. A test compares the page with this output.

Every table of transitions in the product is drawn: a dict on module level whose name ends with `TRANSITIONS`. Three shapes of
tables are known:

- state → the states that may follow,
- state → {event: the state that follows},
- (state, event) → the state that follows.

The comment lines right above a table are its description.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SOURCE_ROOTS = ("shared", "services")
SUFFIX = "TRANSITIONS"

INTRO = """# States

<!-- Written by `make docs` from the tables of transitions in the code; changes made by hand are lost. -->

Each part that has states keeps them as a table: a dict that names the legal transitions. A transition that is not in the
table is a programming error and raises an assertion.
"""


@dataclass(frozen=True)
class Table:
    """A table of transitions and its place.

    Attributes:
        path: file in the repository.
        name: name of the dict.
        comment: the comment lines above the dict, without the signs.
        edges: (state, label, next state), in the order of the table; the label is an event, or empty.
        states: every state, in the order of the table.
    """

    path: str
    name: str
    comment: list[str]
    edges: list[tuple[str, str, str]]
    states: list[str]

    @property
    def title(self) -> str:
        """Return a heading: `AGENT_SESSION_TRANSITIONS` becomes "Agent session"."""
        words = self.name.removesuffix(SUFFIX).strip("_").replace("_", " ").lower()
        return (words or Path(self.path).stem.replace("_", " ")).capitalize()


def tables() -> list[Table]:
    """Return the tables of the product in the order of their files."""
    return [table for root in SOURCE_ROOTS for file in sorted((ROOT / root).rglob("*.py")) for table in tables_of(file)]


def tables_of(file: Path) -> Iterator[Table]:
    """Yield the tables of one file. The module is imported only if it has one."""
    source = file.read_text()
    if SUFFIX not in source:
        return
    lines = source.splitlines()
    for node in ast.parse(source).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            if isinstance(target, ast.Name) and target.id.endswith(SUFFIX):
                relative = file.relative_to(ROOT)
                module = importlib.import_module(".".join(relative.with_suffix("").parts[1:]))
                edges, states = read(getattr(module, target.id))
                yield Table(str(relative), target.id, comment_above(lines, node.lineno), edges, states)


def read(table: Mapping[Any, Any]) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Return the edges and the states of a table of any of the three shapes."""
    edges: list[tuple[str, str, str]] = []
    states: dict[str, None] = {}
    for key, value in table.items():
        if isinstance(key, tuple):
            state, event = key
            edges.append((text(state), text(event), text(value)))
        elif isinstance(value, Mapping):
            edges += [(text(key), text(event), text(following)) for event, following in value.items()]
        else:
            following_states = sorted(value, key=list(table).index)
            edges += [(text(key), "", text(following)) for following in following_states]
        states[text(key[0] if isinstance(key, tuple) else key)] = None
    states.update(dict.fromkeys(following for _, _, following in edges))
    return edges, list(states)


def text(value: Any) -> str:
    """Return the name of a state or an event."""
    if isinstance(value, Enum):
        return value.name.lower()
    return value.__name__ if isinstance(value, type) else str(value)


def comment_above(lines: list[str], number: int) -> list[str]:
    """Return the comment lines directly above the line with this number (from 1)."""
    found: list[str] = []
    for line in reversed(lines[: number - 1]):
        if not line.startswith("#"):
            break
        found.append(line.removeprefix("#").removeprefix(" "))
    return found[::-1]


def section(table: Table) -> Iterator[str]:
    """Yield the lines of one table's section."""
    yield f"## {table.title}\n"
    yield f"`{table.name}` in `{table.path}`.\n"
    if table.comment:
        yield "```text\n" + "\n".join(table.comment) + "\n```\n"
    final = [state for state in table.states if all(edge[0] != state for edge in table.edges)]
    diagram = ["stateDiagram-v2", f"    [*] --> {node(table.states[0])}"]
    diagram += [f"    {node(state)}: {state}" for state in table.states if node(state) != state]
    diagram += [f"    {node(a)} --> {node(b)}" + (f": {label}" if label else "") for a, label, b in table.edges]
    diagram += [f"    {node(state)} --> [*]" for state in final]
    yield "```mermaid\n" + "\n".join(diagram) + "\n```\n"
    yield "| state | may be followed by |\n|---|---|"
    for state in table.states:
        following = [b + (f" ({label})" if label else "") for a, label, b in table.edges if a == state]
        yield f"| {state} | {', '.join(following) or 'nothing: an end'} |"
    yield ""


def node(state: str) -> str:
    """Return an identifier for mermaid, which takes no spaces and no hyphens."""
    return state.replace(" ", "_").replace("-", "_")


def page() -> str:
    """Return the whole page."""
    return "\n".join([INTRO, *(line for table in tables() for line in section(table))]).rstrip() + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
