"""Digests of the files of a task's code, to compare the code of two machines."""

from __future__ import annotations

import abc
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import xxhash

from syncline.model.manifest import MAX_CODE_FILES
from syncline.tasks.base import Task

MAX_FILE_BYTES = 1 << 22
INSTALLED = ("site-packages", "dist-packages")  # directories of packages


def digests_of_code(task: Task) -> dict[str, str]:
    """Return the xxh3-64 of each file of the task's code, by its name.

    The files are those of the task's class and its base classes, and the modules imported from the directory of a task file.
    Names are the same on every machine; line endings make no difference.
    """
    found: dict[str, str] = {}
    for name, file in sorted(_files(task)):
        if len(found) < MAX_CODE_FILES and (digest := _digest(file)):
            found[name] = digest
    return found


def differing(here: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    """Return the names of the files that both machines have with different content."""
    return [name for name in here if there.get(name, here[name]) != here[name]]


def _files(task: Task) -> set[tuple[str, Path]]:
    own = type(task)
    modules = [sys.modules.get(c.__module__) for c in own.__mro__ if c not in (Task, abc.ABC, object)]
    files = {Path(file) for m in modules if (file := getattr(m, "__file__", None))}
    main = getattr(sys.modules.get(own.__module__), "__file__", None)
    if main is None:
        return {(file.name, file) for file in files}
    directory = Path(main).parent
    is_installed = (directory / "__init__.py").exists() or not set(INSTALLED).isdisjoint(directory.parts)
    beside = set() if is_installed else set(_beside(directory))
    return {(_name(file, directory), file) for file in files | beside}


def _beside(directory: Path) -> Iterator[Path]:
    """Yield the files of imported modules in the directory and below it, without installed packages."""
    prefix = f"{directory}{os.sep}"
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if not file or not file.startswith(
            prefix
        ):  # a cheap test first: a simulation checks thousands of modules for each agent
            continue
        parts = Path(file).relative_to(directory).parts
        if not any(part.startswith(".") or part in INSTALLED for part in parts):
            yield Path(file)


def _name(file: Path, directory: Path) -> str:
    return file.relative_to(directory).as_posix() if file.is_relative_to(directory) else file.name


def _digest(file: Path) -> str:
    """Return the digest of a file; '' for a file that is no Python source or cannot be read."""
    try:
        if file.suffix == ".py" and file.stat().st_size <= MAX_FILE_BYTES:
            return str(xxhash.xxh3_64_hexdigest(file.read_bytes().replace(b"\r\n", b"\n")))
    except OSError:
        pass
    return ""
