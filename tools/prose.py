"""Print figures about docstrings and comments: `python tools/prose.py [--worst N] [PATH ...]`.

Three figures per package and in total:

- *vague*: share of the words in `VAGUE` among all words of the docstrings. House style: at most 2 %.
- *prose*: lines of docstrings and lines with only a comment, as a share of all lines. House style: 12 to 25 %.
- *repeats*: docstrings that only repeat the name of their function, class or module.

`--worst N` also lists the N docstrings with the most vague words, and every docstring that repeats a name.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
DEFAULT_PATHS = ("shared", "services", "tools")
SOURCE_ROOTS = ("shared", "services")
VAGUE = frozenset({"what", "who", "whoever", "whatever", "where", "nobody", "none", "there", "it"})
WORD = re.compile(r"[a-z']+")
ARTICLES = frozenset({"a", "an", "the", "of", "s"})
TOOL_COMMENT = re.compile(r"#\s*(fmt:|type:|noqa|pragma|!)")
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Docstring:
    """A docstring, its place, and the name of the object that it describes."""

    path: Path
    line: int
    name: str
    text: str

    def words(self) -> list[str]:
        """Return the words in lower case, in their order."""
        return WORD.findall(self.text.lower())

    def vague(self) -> list[str]:
        """Return the vague words, with repetitions."""
        return [word for word in self.words() if word in VAGUE]

    def repeats_name(self) -> bool:
        """Return whether every word, articles aside, is a part of the name."""
        parts = {stem(part) for part in name_parts(self.name)}
        words = [stem(word) for word in self.words() if word not in ARTICLES]
        return bool(words) and all(word in parts for word in words)


@dataclass
class Figures:
    """Counts over one or several files."""

    lines: int = 0
    prose_lines: int = 0
    docstrings: list[Docstring] = field(default_factory=list)

    def add(self, other: Figures) -> None:
        """Add the counts of `other` to these."""
        self.lines += other.lines
        self.prose_lines += other.prose_lines
        self.docstrings += other.docstrings

    def row(self, title: str) -> str:
        """Return one line of the table."""
        words = sum(len(d.words()) for d in self.docstrings)
        vague = sum(len(d.vague()) for d in self.docstrings)
        repeats = sum(d.repeats_name() for d in self.docstrings)
        vague_share, prose_share = vague / max(words, 1), self.prose_lines / max(self.lines, 1)
        return f"{title:<34} {words:>7} {vague_share:>7.2%} {self.lines:>7} {prose_share:>7.1%} {repeats:>8}"


def stem(word: str) -> str:
    """Return a word without the ending of a plural or of a verb's third person, so that `sends` equals `send`."""
    return word.removesuffix("'s").removesuffix("s")


def name_parts(name: str) -> list[str]:
    """Split `RunHost.close_round` into `run`, `host`, `close`, `round`."""
    return [part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z']+", name)]


def docstrings(path: Path, source: str) -> Iterator[tuple[Docstring, range]]:
    """Yield each docstring of a module's source, with the numbers of its lines."""

    def visit(node: ast.AST, name: str) -> Iterator[tuple[Docstring, range]]:
        if isinstance(node, Documented) and (text := ast.get_docstring(node)) is not None:
            literal = node.body[0]
            numbers = range(literal.lineno, (literal.end_lineno or literal.lineno) + 1)
            yield Docstring(path, literal.lineno, name or path.stem, text), numbers
        for child in ast.iter_child_nodes(node):
            inner = name
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                inner = f"{name}.{child.name}".lstrip(".")
            yield from visit(child, inner)

    yield from visit(ast.parse(source), "")


def comment_lines(source: str) -> set[int]:
    """Return the numbers of the lines with only a comment for readers; comments for tools do not count."""
    comments = (t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT)
    alone = (t for t in comments if t.line.lstrip().startswith("#"))
    return {t.start[0] for t in alone if not TOOL_COMMENT.match(t.string)}


def figures(path: Path) -> Figures:
    """Count one file."""
    source = path.read_text()
    found = list(docstrings(path, source))
    prose = comment_lines(source).union(*(numbers for _, numbers in found))
    return Figures(len(source.splitlines()), len(prose), [docstring for docstring, _ in found])


def package(path: Path) -> str:
    """Return the dotted name of a file's package, or of its directory outside the source roots."""
    parts = path.relative_to(ROOT).parent.parts
    return ".".join(parts[1:] if parts[0] in SOURCE_ROOTS else parts)


def python_files(paths: Iterable[str]) -> list[Path]:
    """Return the Python files at and below the paths, which are relative to the repository."""
    places = [ROOT / path for path in paths]
    return sorted(file for place in places for file in ([place] if place.is_file() else place.rglob("*.py")))


def print_worst(every: list[Docstring], count: int) -> None:
    """Print the `count` docstrings with the most vague words, then those that repeat a name."""
    print(f"\nthe {count} docstrings with the most vague words:")
    for docstring in sorted(every, key=lambda d: -len(d.vague()))[:count]:
        if docstring.vague():
            print(f"{place(docstring)} {docstring.name}: {', '.join(docstring.vague())}: {excerpt(docstring)}")
    print("\ndocstrings that repeat a name:")
    for docstring in every:
        if docstring.repeats_name():
            print(f"{place(docstring)} {docstring.name}: {excerpt(docstring)}")


def place(docstring: Docstring) -> str:
    """Return `file:line` of a docstring."""
    return f"{docstring.path.relative_to(ROOT)}:{docstring.line}"


def excerpt(docstring: Docstring) -> str:
    """Return the first 90 characters of a docstring on one line."""
    return " ".join(docstring.text.split())[:90]


def main() -> None:
    """Parse the arguments and print the figures of each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "paths", nargs="*", metavar="PATH", default=DEFAULT_PATHS, help="default: shared services tools"
    )
    parser.add_argument("--worst", type=int, default=0, metavar="N", help="list the N worst docstrings with file:line")
    arguments = parser.parse_args()
    packages: dict[str, Figures] = defaultdict(Figures)
    total = Figures()
    for path in python_files(arguments.paths):
        counted = figures(path)
        packages[package(path)].add(counted)
        total.add(counted)
    print(f"{'package':<34} {'words':>7} {'vague':>7} {'lines':>7} {'prose':>7} {'repeats':>8}")
    for name, counts in sorted(packages.items()):
        print(counts.row(name))
    print(total.row("total"))
    if arguments.worst:
        print_worst(total.docstrings, arguments.worst)


if __name__ == "__main__":
    main()
