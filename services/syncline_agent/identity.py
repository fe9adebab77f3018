"""The identity of an agent: a name and a key, given by its options or claimed from a directory of keys. Imports no torch.

`--scale agent=8` starts eight containers with the same settings. With `--name auto` each claims a key of the directory that
`--key` names, and becomes the agent of that key. A claim is a lock on the key file, held by the service: the kernel releases
the lock when the process ends, however that happens, and locking needs no right to write. Every process and container of one
machine sees the locks; machines of one fleet need a directory each.

A restarted container takes the name that its host had last, otherwise the first free one, so that the same names stay in use.
The files of an agent carry its name, so a shared state directory follows the name.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from syncline.bus.server.accounts import SUFFIX, write_whole
from syncline.bus.server.operator import in_order
from syncline.errors import ConfigError
from syncline.wire.signing import Signer
from syncline.wire.subjects import AUTO, checked_name

_HOST = ".host"  # <state>/<name>.host holds the host that had the name last


@dataclass(frozen=True, slots=True)
class AgentIdentity:
    """An agent as this process represents it."""

    agent: str
    session: str  # random id of this process life
    state_dir: Path
    signer: Signer | None  # None: the run accepts unsigned offers


@dataclass(frozen=True, slots=True)
class ClaimedName:
    """A name and its key file.

    Attributes:
        lock_fd: descriptor of the lock; −1: a name from the options needs none.
    """

    name: str
    key: str
    lock_fd: int = -1


def claim(name: str, key: str, state_dir: Path, host: str = "") -> ClaimedName:
    """Return the name and key that `--name` and `--key` ask for.

    Args:
        name: the name, or `auto` for one of the directory `key`.
        key: a key file, a directory of key files, or empty for a run without keys.
        host: the name of this host; empty: ask the operating system.

    Raises:
        ConfigError: the directory has no free key, or the state directory cannot be written. The latter is checked here
            because another process of this name makes way for this one soon after.
    """
    if name != AUTO:
        checked_name("--name", name)
        _writable(state_dir)
        return ClaimedName(name, str(Path(key, f"{name}{SUFFIX}")) if key and Path(key).is_dir() else key)
    if not key:
        raise ConfigError("--key", "none is named", "With --name auto it is a directory of agents' keys")
    if not Path(key).is_dir():
        raise ConfigError("--key", f"{key} is no directory", "With --name auto it is a directory of agents' keys")
    return _free_key(Path(key), state_dir, host or socket.gethostname())


def _free_key(directory: Path, state_dir: Path, host: str) -> ClaimedName:
    names = in_order([path.name.removesuffix(SUFFIX) for path in directory.glob(f"*{SUFFIX}")])
    if not names:
        raise ConfigError("--key", f"{directory} holds no keys", "Make some: syncline keys make DIR --agents N")
    for name in sorted(
        names, key=_had_before(state_dir, host)
    ):  # the sort is stable: names without a host keep their order
        path = directory / f"{name}{SUFFIX}"
        fd = _lock(path)
        if fd >= 0:
            _remember(state_dir, checked_name(f"key file in {directory}", name), host)
            return ClaimedName(name, str(path), fd)
    hint = "Start fewer agents, or make more keys: syncline keys add DIR NAME"
    raise ConfigError("--key", f"all {len(names)} keys in {directory} are in use on this machine", hint)


def _had_before(state_dir: Path, host: str) -> Callable[[str], bool]:
    """Return a sort key that puts the names that this host had last in front."""

    def other(name: str) -> bool:
        try:
            return (state_dir / f"{name}{_HOST}").read_text() != host
        except (OSError, ValueError):
            return True

    return other


def _remember(state_dir: Path, name: str, host: str) -> None:
    _writable(state_dir)
    try:
        write_whole(state_dir / f"{name}{_HOST}", host)
    except OSError as error:
        raise _unusable(state_dir, error) from None


def _writable(state_dir: Path) -> None:
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(state_dir, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(state_dir))
    except OSError as error:
        raise _unusable(state_dir, error) from None


def _unusable(state_dir: Path, error: OSError) -> ConfigError:
    problem = f"{error.filename or state_dir}: {error.strerror}"
    return ConfigError("--state-dir", problem, "Use a directory that you may write")


def _lock(path: Path) -> int:
    """Return a descriptor that holds the lock on the file; −1: another process holds it, or the file was replaced."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1  # the key was revoked just now
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_ino == path.stat().st_ino:
            return fd
    except OSError:
        pass
    os.close(fd)
    return -1
