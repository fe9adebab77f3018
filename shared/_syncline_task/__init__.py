"""The package that task files are imported into, so that processes which a task starts can import its classes as well.

The task file `my_task.py` becomes the module `_syncline_task.my_task_0123456789abcdef`. A module of its own name would
shadow others: a file may be called `queue.py`. The digits are a digest of the file's path.

Python's multiprocessing and its relatives send names of classes and functions to the processes that they start, and
`sys.path`, which the task's directory is on. There the import of this package is enough to find the file by its name.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType


def module_name(file: Path) -> str:
    """Return the name that a task file is imported under. `file`: absolute, and free of symbolic links."""
    stem = re.sub(r"\W", "_", file.stem)
    return f"{__name__}.{stem}_{hashlib.sha256(bytes(file)).hexdigest()[:16]}"


class _TaskFiles(MetaPathFinder):
    """Finds a task file by the name of its module, in the directories of `sys.path`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.rpartition(".")[0] != __name__:
            return None
        for directory in map(Path, reversed(sys.path)):  # the task's directory is the last, as a rule
            for file in directory.glob("*.py") if directory.is_dir() else ():
                if module_name(file) == fullname:
                    return spec_from_file_location(fullname, file)
        return None


sys.meta_path.append(_TaskFiles())
