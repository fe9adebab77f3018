"""An operator's set: the keys of a fleet, and the configuration of the nats-server that knows them.

```
DIR/broker/nats-server.conf   settings of the server, written once: from then on the operator's own file
DIR/broker/accounts.conf      permissions, included by the other file; written anew whenever an agent comes or goes
DIR/core/coordinator.nk       for coordinators, and for users who submit runs
DIR/agents/<name>.nk          one for each agent
DIR/watch/watch.nk            for people and dashboards
```

Each kind of machine has a directory, because each should hold its own keys alone. `broker` holds public keys only.

*A revoked agent* leaves `agents/<name>.revoked`, its public key, so that the name stays taken until an operator adds
the agent again. That file is written first, the accounts without the agent after it, and the key is removed last. After
any interruption the agent is in no configuration that is written later, and a repeated revocation completes the work.
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
_PUBLIC = 0o644  # public keys only, and the server often runs as another user
_NUMBER = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True)
class Listed:
    """One line of a set."""

    name: str
    account: str
    public_key: str
    revoked: bool = False


class OperatorSet:
    """An existing set. Every change is made under a lock, and each file is replaced as a whole."""

    def __init__(self, directory: Path) -> None:
        """Open a set. Raises ConfigError if the directory holds no set."""
        if not _config(directory).is_file():
            hint = f"Name the directory of a set, or make one: syncline keys make {directory}"
            raise ConfigError("DIR", f"{directory} holds no set of keys (no broker/{CONFIG})", hint)
        self.directory = directory
        self.keyring = Keyring(directory, by_kind=True)

    @classmethod
    def make(
        cls, directory: Path, agents: Sequence[str], settings: BrokerSettings, *, keep: bool = False
    ) -> OperatorSet:
        """Make a new set, or with `keep` add the missing parts to an existing one without changing its files.

        Agents that were revoked stay revoked.

        Raises:
            ConfigError: a set exists, and `keep` is not given.
        """
        if _config(directory).is_file() and not keep:
            hint = (
                "Add agents with `syncline keys add`, or complete the set with --keep; to begin anew, use another DIR"
            )
            raise ConfigError("DIR", f"{directory} holds a set of keys already", hint)
        for agent in agents:
            checked_name("agent", agent)
        (directory / "broker").mkdir(parents=True, exist_ok=True, mode=0o755)
        with _locked(directory):
            keyring = Keyring(directory, by_kind=True)
            gone = _revoked(directory)
            keyring.create([agent for agent in agents if agent not in gone])
            _write_accounts(directory, keyring)
            if not _config(directory).is_file():  # the last one, because it says that there is a set
                text = f'{server_settings(settings)}include "{ACCOUNTS}"\n'
                write_whole(_config(directory), text, _PUBLIC)
        return cls(directory)

    def add(self, names: Sequence[str]) -> list[Identity]:
        """Make new keys, also for agents that were revoked. Raises ConfigError, before any change, if an agent has a
        key.
        """
        with _locked(self.directory):
            gone = _revoked(self.directory)
            for name in names:
                checked_name("agent", name)
                if name not in gone and self.keyring.path(name).exists():
                    hint = (
                        f"Use its key, or replace it: syncline keys revoke {self.directory} {name}, then add it again"
                    )
                    raise ConfigError("agent", f"{name!r} has a key already", hint)
            for name in names:
                if name in gone:
                    self.keyring.path(name).unlink(missing_ok=True)  # of a revocation that was interrupted
                    _tombstone(self.directory, name).unlink()
            made = [self.keyring.add_agent(name) for name in names]
            _write_accounts(self.directory, self.keyring)
        return made

    def revoke(self, names: Sequence[str]) -> None:
        """Remove agents from the configuration. Raises ConfigError, before any change, if an agent is unknown."""
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
        """Everybody, agents in their natural order, those that were revoked at the end."""
        gone = _revoked(self.directory)
        here = [self.keyring.identity(name) for name in (COORDINATOR, WATCH)]
        here += [self.keyring.identity(name) for name in in_order(self.keyring.agents) if name not in gone]
        listed = [Listed(i.name, f"FLEET-{i.name}" if i.account == "FLEET" else i.account, i.public_key) for i in here]
        return listed + [Listed(name, f"FLEET-{name}", gone[name], revoked=True) for name in in_order(gone)]

    @property
    def config(self) -> Path:
        return _config(self.directory)

    def _unknown(self, name: str, agents: Sequence[str]) -> ConfigError:
        if name in (COORDINATOR, WATCH):
            hint = (
                f"To replace it, delete {self.keyring.path(name)} and run: syncline keys make {self.directory} --keep"
            )
            return ConfigError(
                "agent", f"{name!r} is not an agent, and the broker cannot do without this account", hint
            )
        close = difflib.get_close_matches(name, agents, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"See: syncline keys list {self.directory}"
        return ConfigError("agent", f"there is no key of {name!r} in {self.directory}", hint)


def in_order(names: Sequence[str] | dict[str, str]) -> list[str]:
    """a2 before a10."""
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in _NUMBER.split(name)])


def _write_accounts(directory: Path, keyring: Keyring) -> None:
    gone = _revoked(directory)
    text = accounts_config(i for i in keyring.identities() if i.name not in gone)
    path = directory / "broker" / ACCOUNTS
    if not path.exists() or path.read_text() != text:
        write_whole(path, text, _PUBLIC)


def _config(directory: Path) -> Path:
    return directory / "broker" / CONFIG


def _tombstone(directory: Path, name: str) -> Path:
    return directory / "agents" / f"{name}{REVOKED}"


def _revoked(directory: Path) -> dict[str, str]:
    """Name → public key."""
    found = (directory / "agents").glob(f"*{REVOKED}")
    return {path.name.removesuffix(REVOKED): path.read_text().strip() for path in found}


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One change at a time; the kernel lets go of the lock however the process ends."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise ConfigError("DIR", f"another syncline keys is at work in {directory}", "Wait for it") from None
    try:
        yield
    finally:
        os.close(fd)
