"""The loader of YAML files for all commands.

The loader follows the core schema of YAML 1.2 instead of YAML 1.1, PyYAML's default: `1e-4` is a number, `12:30` and
`2026-01-31` are texts. Names of settings are always texts. Two equal names in a section are an error; PyYAML would keep the
last one. Limits protect memory, the stack and the conversion of integers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import yaml

from syncline.errors import ConfigError

MAX_BYTES = 1 << 20  # of a file
MAX_DEPTH = 100  # nesting of sections and lists
MAX_VALUES = 100_000  # with all aliases expanded
INTEGERS = range(-(1 << 63), 1 << 64)  # the range of integers in records (msgpack)

_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_INT = re.compile(r"[-+]?[0-9][0-9_]*|0o[0-7_]+|0x[0-9a-fA-F_]+|0b[01_]+")


def read_yaml(path: Path) -> Any:
    """Return the settings in a YAML file: mappings with texts as names, lists, texts, numbers, booleans, None.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or exceeds a limit.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError("spec", f"{path}: {error.strerror}", "Name a YAML file that you can read") from None
    if len(data) > MAX_BYTES:
        problem = f"{path} is larger than {MAX_BYTES >> 20} MiB"
        raise ConfigError("spec", problem, "Keep data in files of their own, and name them in `task_options`")
    try:
        return yaml.load(data.decode(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("spec", f"{path} is not YAML: {error}", "Correct the line that the message names") from None


class _Loader(yaml.SafeLoader):
    """A loader of plain values that checks each limit before the value is built."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # PyYAML's own annotation
    yaml_constructors: ClassVar[dict[Any, Any]] = {}

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # values under a node, by its id; 0 while the node is open

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise _at(event, f"sections are nested more than {MAX_DEPTH} deep", "Write them flatter")
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            self._count(node)
        return node

    def _count(self, node: yaml.Node) -> int:
        """Return the number of values under a node with aliases expanded. Raises ConfigError for too many, or for a cycle."""
        known = self._sizes.get(id(node))
        if known == 0:
            raise _at(node, "an alias is used inside the value that it names", "Write the value out")
        if known is not None:
            return known
        self._sizes[id(node)] = 0
        size = 1 + sum(map(self._count, _children(node)))
        if size > MAX_VALUES:
            problem = f"more than {MAX_VALUES} values, each alias counted as often as it is used"
            raise _at(node, problem, "Use fewer aliases, or keep data in a file of its own")
        self._sizes[id(node)] = size
        return size

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(
            node, yaml.MappingNode
        ):  # another kind of node with the tag of a mapping, which PyYAML refuses
            return dict(super().construct_mapping(node, deep))  # type: ignore[unreachable]
        self._check_names(node)
        self.flatten_mapping(node)
        return {key.value: self._value(key.value, value) for key, value in node.value}

    def _value(self, name: str, node: yaml.Node) -> Any:
        """Build the value of a setting at once, so that an error in it names the whole path of the setting."""
        try:
            return self.construct_object(node, deep=True)
        except ConfigError as error:
            setting = name if error.setting == "spec" else f"{name}.{error.setting}"
            raise ConfigError(setting, error.problem, error.hint) from None

    def _check_names(self, node: yaml.MappingNode) -> None:
        names: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                kind = "list" if isinstance(key, yaml.SequenceNode) else "section"
                raise _at(key, f"a {kind} stands where the name of a setting belongs", "Write a name before the colon")
            if key.value in names:
                line = key.start_mark.line + 1
                raise ConfigError(key.value, f"stands twice, again in line {line}", "Leave one of them")
            names.add(key.value)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _at(place: Any, problem: str, hint: str) -> ConfigError:
    """Return an error about a place in the file, given as a node or as an event of the parser."""
    return ConfigError("spec", f"line {place.start_mark.line + 1}: {problem}", hint)


def _scalar(tag: str, meaning: str, convert: Callable[[str], Any]) -> None:
    """Register `convert` for values of a tag. It raises ValueError with a hint for a text that is not `meaning`."""

    def construct(loader: _Loader, node: yaml.ScalarNode) -> Any:
        text = str(loader.construct_scalar(node))
        try:
            return convert(text)
        except ValueError as error:
            short = text if len(text) <= 40 else f"{text[:20]}… ({len(text)} characters)"
            raise _at(node, f"{short} is not {meaning}", str(error)) from None

    _Loader.add_constructor(f"tag:yaml.org,2002:{tag}", construct)


def _boolean(text: str) -> bool:
    if text.lower() not in yaml.SafeLoader.bool_values:
        raise ValueError("Write true or false")
    return bool(yaml.SafeLoader.bool_values[text.lower()])


def _integer(text: str) -> int:
    plain = text.replace("_", "")
    base = {"0o": 8, "0x": 16, "0b": 2}.get(plain[:2], 10)
    if _INT.fullmatch(text) is None or len(plain) > 70:  # the longest of 64 bits, in base 2, has 66
        raise ValueError("Write digits alone; a larger number, as 1e30, with an exponent")
    value = int(plain, base)
    if value not in INTEGERS:
        raise ValueError("Write a larger number with an exponent, as 1e30")
    return value


def _real(text: str) -> float:
    if _FLOAT.fullmatch(text) is None:
        raise ValueError("Write a number, as 1e-4")
    plain = text.replace("_", "").lower()
    value = float(plain.replace(".inf", "inf").replace(".nan", "nan"))
    if math.isinf(value) and "inf" not in plain:
        raise ValueError("Use at most 1.7e308, or write .inf")
    return value


def _resolvers() -> None:
    """Register the plain scalars that are no texts: the core schema's, and PyYAML's yes, no, on, off and underscores."""
    tag = "tag:yaml.org,2002:"
    for name in ("bool", "null", "merge"):
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items():
            for known, pattern in found:
                if known == tag + name:
                    _Loader.add_implicit_resolver(known, pattern, [first])
    _Loader.add_implicit_resolver(tag + "int", re.compile(rf"(?:{_INT.pattern})$"), list("-+0123456789"))
    _Loader.add_implicit_resolver(tag + "float", re.compile(rf"(?:{_FLOAT.pattern})$"), list("-+.0123456789"))
    for known in ("null", "str", "seq", "map"):
        _Loader.add_constructor(tag + known, yaml.SafeLoader.yaml_constructors[tag + known])
    _Loader.add_constructor(None, yaml.SafeLoader.yaml_constructors[None])


_resolvers()
_scalar("bool", "a boolean", _boolean)
_scalar("int", "a whole number of 64 bits", _integer)
_scalar("float", "a number", _real)
