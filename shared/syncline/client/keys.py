"""Key files of one set: the place of one role's key beside another's."""

from __future__ import annotations

from pathlib import Path

from syncline.bus.server.accounts import SUFFIX, WATCH
from syncline.wire.subjects import COORDINATOR


def watch_key(key: str) -> str:
    """Return the watchers' key file of the set that `key` belongs to, or `key` itself if the set has none."""
    return _beside(key, WATCH, WATCH) or key


def coordinator_key(key: str) -> str:
    """Return the coordinator's key file of the set that `key` belongs to, or the usual place of one."""
    return _beside(key, COORDINATOR, "core") or f"core/{COORDINATOR}{SUFFIX}"


def _beside(key: str, role: str, kind: str) -> str:
    """Return a role's key file, as `syncline keys` and local fleets place it; '' if the file does not exist."""
    directory, name = Path(key).parent, f"{role}{SUFFIX}"
    near = (directory / name, directory.parent / kind / name) if key else ()
    return next((str(path) for path in near if path.is_file()), "")
