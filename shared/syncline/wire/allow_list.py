"""The tasks that a machine may run: patterns of task paths, from the operator's `--allow-task`. Imports no torch."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import PurePath

from syncline.errors import ConfigError

MAX_PATTERNS = 100
MAX_PATTERN_CHARS = 200
EVERYTHING = "*"


def is_allowed(path: str, patterns: Sequence[str]) -> bool:
    """Return whether a pattern admits a task, `package.module:Class` or `file.py:Class`.

    A pattern is compared with the whole path and with the part before the colon. A pattern of modules admits no file,
    and a relative pattern admits no file outside the task directory: only "*" admits everything. No wildcard leaves its
    directory by `..`.
    """
    module_path = path.rpartition(":")[0]
    if path in patterns or module_path in patterns:
        return True
    if ".." in PurePath(module_path.replace("\\", "/")).parts:
        return False
    same_kind = [p for p in patterns if p == EVERYTHING or _kind(p.partition(":")[0]) == _kind(module_path)]
    return any(fnmatch.fnmatchcase(text, p) for p in same_kind for text in (path, module_path))


def is_file(module_path: str) -> bool:
    """Return whether the part of a task path before the colon names a file, and not a module."""
    return module_path.endswith(".py") or "/" in module_path or "\\" in module_path


def check_patterns(patterns: Sequence[str]) -> None:
    """Check the number and the length of the patterns against the limits of the `hello` record.

    Raises:
        ConfigError: there are too many patterns, or one is too long.
    """
    if len(patterns) > MAX_PATTERNS:
        problem = f"{len(patterns)} patterns are more than {MAX_PATTERNS}, the ready-made tasks included"
        raise ConfigError("--allow-task", problem, "Use wildcards, as 'my_tasks/*.py:*'")
    for pattern in patterns:
        if len(pattern) > MAX_PATTERN_CHARS:
            problem = f"{pattern[:60]!r}… has {len(pattern)} characters, at most {MAX_PATTERN_CHARS} are possible"
            raise ConfigError("--allow-task", problem, "Use a wildcard, or a path relative to --task-dir")


def _kind(module_path: str) -> tuple[bool, bool]:
    return is_file(module_path), PurePath(module_path).is_absolute()
