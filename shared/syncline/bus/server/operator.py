"""An operator's set: the keys of a fleet and the configuration of its nats-server. This module knows no connection.

```
DIR/broker/nats-server.conf   settings of the server, written once; afterwards the operator edits this file
DIR/broker/accounts.conf      the permissions, included by the other file; written again when an agent is added or revoked
DIR/core/coordinator.nk       for coordinators and for people that submit runs
DIR/agents/<name>.nk          one for each agent
DIR/watch/watch.nk            for people and dashboards
```

Each kind of machine has a directory of its own and needs only the keys in it. `broker` contains public keys only.

*A revoked agent* leaves the file `agents/<name>.revoked` with its public key, so that only `add` brings the name back. The
order of the steps is: write that file, write the accounts without the agent, remove the key. After an interruption at any
point, no later configuration contains the agent, and another call of `revoke` completes the steps.
"""

from __future__ import annotations

import difflib
import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from syncline.bus.server.accounts import (
    WATCH,
    BrokerSettings,
    Identity,
    Keyring,
    accounts_config,
    server_settings,
    write_whole,
)
from syncline.errors import ConfigError
from syncline.wire.subjects import COORDINATOR, checked_name

CONFIG, ACCOUNTS = "nats-server.conf", "accounts.conf"
REVOKED = ".revoked"
_PUBLIC = 0o644  # the mode of files with public keys only; the server often runs as another user
_NUMBER = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True)
class Listed:
    """One identity of a set, as `syncline keys list` shows it."""

    name: str
    account: str
    public_key: str
    revoked: bool = False


class OperatorSet:
    """An existing set of keys. Every change takes a lock and replaces each file as a whole."""

    def __init__(self, directory: Path) -> None:
        """Open a set. Raises ConfigError if the directory contains no set."""
        if not _config(directory).is_file():
            hint = f"Name the directory of a set, or make one: syncline keys make {directory}"
            raise ConfigError("DIR", f"{directory} holds no set of keys (no broker/{CONFIG})", hint)
        self.directory = directory
        self.keyring = Keyring(directory, by_kind=True)

    @classmethod
    def make(
        cls, directory: Path, agents: Sequence[str], settings: BrokerSettings, *, keep: bool = False
    ) -> OperatorSet:
        """Make a set, or complete an existing one.

        Args:
            directory: place of the set; made if missing.
            agents: names that get a key. A revoked agent stays revoked.
            settings: the settings of the nats-server, for a configuration file that does not exist yet.
            keep: whether an existing set is completed. Existing keys and settings do not change.

        Raises:
            ConfigError: the directory contains a set and `keep` is false, a name is not valid, or another process changes the
                set at the same time.
        """
        if _config(directory).is_file() and not keep:
            hint = "Add agents with `syncline keys add`, complete the set with --keep, or use another DIR for a new set"
            raise ConfigError("DIR", f"{directory} holds a set of keys already", hint)
        for agent in agents:
            checked_name("agent", agent)
        (directory / "broker").mkdir(parents=True, exist_ok=True, mode=0o755)
        with _locked(directory):
            keyring = Keyring(directory, by_kind=True)
            gone = _revoked(directory)
            keyring.create([agent for agent in agents if agent not in gone])
            _write_accounts(directory, keyring)
            if not _config(directory).is_file():  # last, because this file marks a complete set
                text = f'{server_settings(settings)}include "{ACCOUNTS}"\n'
                write_whole(_config(directory), text, _PUBLIC)
        return cls(directory)

    def add(self, names: Sequence[str]) -> list[Identity]:
        """Make new keys for agents. A revoked agent gets a new key and is allowed again.

        Returns:
            The new identities, in the order of the names.

        Raises:
            ConfigError: a name is not valid or has a key already (then no key is made), or another process changes the set.
        """
        with _locked(self.directory):
            gone = _revoked(self.directory)
            for name in names:
                checked_name("agent", name)
                if name not in gone and self.keyring.path(name).exists():
                    hint = (
                        f"Use this key, or replace it: syncline keys revoke {self.directory} {name}, then add it again"
                    )
                    raise ConfigError("agent", f"{name!r} has a key already", hint)
            for name in names:
                if name in gone:
                    self.keyring.path(name).unlink(missing_ok=True)  # left by an interrupted revocation
                    _tombstone(self.directory, name).unlink()
            made = [self.keyring.add_agent(name) for name in names]
            _write_accounts(self.directory, self.keyring)
        return made

    def revoke(self, names: Sequence[str]) -> None:
        """Remove agents from the configuration and delete their keys. An agent that is revoked already stays revoked.

        Raises:
            ConfigError: a name is unknown (then no agent is revoked), or another process changes the set.
        """
        with _locked(self.directory):
            gone, agents = _revoked(self.directory), self.keyring.agents
            for name in names:
                if name not in gone and name not in agents:
                    raise self._unknown(name, agents)
            for name in names:
                if name not in gone:
                    write_whole(
                        _tombstone(self.directory, name), self.keyring.identity(name).public_key + "\n", _PUBLIC
                    )
            _write_accounts(self.directory, self.keyring)
            for name in names:
                self.keyring.path(name).unlink(missing_ok=True)

    def listed(self) -> list[Listed]:
        """Return all identities: coordinator, watchers, agents in natural order, and revoked agents at the end."""
        gone = _revoked(self.directory)
        here = [self.keyring.identity(name) for name in (COORDINATOR, WATCH)]
        here += [self.keyring.identity(name) for name in in_order(self.keyring.agents) if name not in gone]
        listed = [Listed(i.name, f"FLEET-{i.name}" if i.account == "FLEET" else i.account, i.public_key) for i in here]
        return listed + [Listed(name, f"FLEET-{name}", gone[name], revoked=True) for name in in_order(gone)]

    @property
    def config(self) -> Path:
        """The path of the server's configuration file."""
        return _config(self.directory)

    def _unknown(self, name: str, agents: Sequence[str]) -> ConfigError:
        if name in (COORDINATOR, WATCH):
            hint = (
                f"To replace it, delete {self.keyring.path(name)} and run: syncline keys make {self.directory} --keep"
            )
            return ConfigError("agent", f"{name!r} is not an agent, and a broker needs this key", hint)
        close = difflib.get_close_matches(name, agents, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"See: syncline keys list {self.directory}"
        return ConfigError("agent", f"there is no key of {name!r} in {self.directory}", hint)


def in_order(names: Sequence[str] | dict[str, str]) -> list[str]:
    """Return names in natural order: a2 before a10."""
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in _NUMBER.split(name)])


def _write_accounts(directory: Path, keyring: Keyring) -> None:
    """Write the permissions of all identities that are not revoked, if the file has another content."""
    gone = _revoked(directory)
    text = accounts_config(i for i in keyring.identities() if i.name not in gone)
    path = directory / "broker" / ACCOUNTS
    if not path.exists() or path.read_text() != text:
        write_whole(path, text, _PUBLIC)


def _config(directory: Path) -> Path:
    return directory / "broker" / CONFIG


def _tombstone(directory: Path, name: str) -> Path:
    """Return the path of the file that marks a revoked agent."""
    return directory / "agents" / f"{name}{REVOKED}"


def _revoked(directory: Path) -> dict[str, str]:
    """Return the revoked agents: name → public key."""
    found = (directory / "agents").glob(f"*{REVOKED}")
    return {path.name.removesuffix(REVOKED): path.read_text().strip() for path in found}


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a set. The kernel releases the lock when the process ends in any way.

    Raises:
        ConfigError: another process holds the lock.
    """
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise ConfigError(
            "DIR", f"another `syncline keys` command changes {directory}", "Wait until that command has ended"
        ) from None
    try:
        yield
    finally:
        os.close(fd)
