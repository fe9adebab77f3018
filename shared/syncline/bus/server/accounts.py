"""Permissions on the bus: keys, and the nats-server configuration with their public halves.

This module knows no connection and no process. The embedded broker and an operator's own nats-server get the same text, so the
demo and production have the same permissions.

* `CORE`: the account of coordinators and operators. It has JetStream and no restriction.
* `FLEET`: the agents, each in an account of its own, `FLEET-<agent>`. Such an account has no JetStream, and its agent reaches
  only the subjects of CORE that the account imports.
* `WATCH`: the account of people and dashboards. It receives metrics and events, and publishes nothing.

Permissions alone do not suffice, because a permission guards the subject of a message and not its *reply* subject:

* In one account with the coordinator, an agent could make JetStream write to any subject: it would name `head` as the reply
  subject of its own put.
* In one account with other agents, an agent could have genuine answers delivered to them as if they were notifies.
* By naming `_INBOX.>` as the reply subject, an agent could make nats-server (2.15.1) lose the routes of all other answers.
  A few such messages a second would stop the whole fleet.

Across the border of an account, an answer reaches only the account that asked.

`tests/bus/test_stolen_key.py` tries these attacks. Two tasks remain for the readers of the bus. The broker accepts any token in
the place of a run's name, `*` and `>` too, so a reader must check a name that it takes from a subject. And a header can contain
commands, so streams that agents write to must not allow roll-ups, per-message lifetimes or schedules.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import nkeys

from syncline.errors import ConfigError
from syncline.files import replacing
from syncline.wire.subjects import COORDINATOR, PREFIX, RUNS_BUCKET, checked_name

Account = Literal["CORE", "FLEET", "WATCH"]
Kind = Literal["service", "stream"]
WATCH = "watch"
SUFFIX = ".nk"
AGENT_CONNECTIONS = 256  # an agent has two, and the server counts broken ones for some minutes
MAX_PAYLOAD_BYTES = (1 << 20) + (64 << 10)  # a chunk of 1 MiB, its frame and its headers
_ACCOUNT_OF: dict[str, Account] = {COORDINATOR: "CORE", WATCH: "WATCH"}  # all other names are agents
_PLACE: dict[Account, str] = {"CORE": "core", "FLEET": "agents", "WATCH": "watch"}  # of an operator's keyring
# The server starts a new log file at this size and keeps three, so that refused clients cannot fill the disk.
LOG_BYTES = 16 << 20
_SEED_BYTES = 4096  # bytes to read of a key file; a seed has 58

_AGENTS = f"{PREFIX}.*.agent.>"
_GET_MODEL = f"$JS.API.DIRECT.GET.*.{PREFIX}.*.model.>"
_GET_RUNS = f"$JS.API.DIRECT.GET.KV_{RUNS_BUCKET}.$KV.{RUNS_BUCKET}.>"
_NOTIFY = f"{PREFIX}.*.notify"
_METRICS = f"{PREFIX}.*.metrics.>"
_EVENTS = f"{PREFIX}.*.events.*"


@dataclass(frozen=True, slots=True)
class Identity:
    """A user of the broker: a name, its account and its key pair."""

    name: str
    account: Account
    public_key: str
    seed: str = field(repr=False)  # the private half

    @classmethod
    def of(cls, name: str, seed: str) -> Identity:
        """Return the identity with this name and seed. Raises ValueError if the seed is not a user's seed."""
        return cls(name, _ACCOUNT_OF.get(name, "FLEET"), public_key_of(seed), seed)

    @classmethod
    def new(cls, name: str) -> Identity:
        """Return an identity with a new random key."""
        return cls.of(name, nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER).decode())

    def sign(self, data: bytes) -> bytes:
        """Return the Ed25519 signature of the data, 64 bytes."""
        return bytes(nkeys.from_seed(bytearray(self.seed.encode())).sign(data))


@dataclass(frozen=True, slots=True)
class BrokerSettings:
    """The settings of a nats-server for Syncline, besides its accounts."""

    store_dir: Path
    port: int = 4222
    host: str = "127.0.0.1"
    name: str = "syncline"
    max_payload_bytes: int = MAX_PAYLOAD_BYTES
    max_file_store_bytes: int | None = None  # None: the server's default, three quarters of the disk
    sync_interval: str = (
        ""  # time between two syncs to disk, "always" or "10s"; empty: the server's default, two minutes
    )
    monitor: str = ""  # address and port of the server's HTTP pages, "127.0.0.1:8222"; empty: no HTTP
    log_path: Path | None = None  # None: standard error
    pid_path: Path | None = None


class Keyring:
    """A directory with one seed file `<name>.nk` per identity: `coordinator`, `watch`, and every agent.

    The name determines the account: `coordinator` belongs to CORE, `watch` to WATCH, and every other name is an agent. An
    operator's keyring has one directory for each kind, so that a machine or container gets only the keys of its own kind.
    """

    def __init__(self, directory: Path, *, by_kind: bool | None = None) -> None:
        """Open a keyring. The directory need not exist.

        Args:
            directory: place of the key files.
            by_kind: whether each kind of identity has a directory of its own. None: as found on the disk.
        """
        self.directory = directory
        self.by_kind = (directory / _PLACE["CORE"]).is_dir() if by_kind is None else by_kind
        self._read: dict[str, Identity] = {}
        self._names: dict[str, str] = {}

    def create(self, agents: Sequence[str] = ()) -> Keyring:
        """Make the missing keys of the coordinator, the watchers and these agents; keep existing keys. Idempotent.

        Raises:
            ConfigError: a name is not a valid agent name, or an existing key file cannot be used.
        """
        for name in (COORDINATOR, WATCH, *(checked_name("agent", a) for a in agents)):
            self._ensure(name)
        return self

    def add_agent(self, name: str) -> Identity:
        """Return the identity of an agent; make its key if the keyring has none. Raises ConfigError as `create` does."""
        return self._ensure(checked_name("agent", name))

    @property
    def agents(self) -> list[str]:
        """The names of all agents with a key, sorted. Raises ConfigError for a key file with another name."""
        place = self._place("FLEET")
        stems = sorted(path.name.removesuffix(SUFFIX) for path in place.glob(f"*{SUFFIX}"))
        return [checked_name(f"key file in {place}", stem) for stem in stems if stem not in _ACCOUNT_OF]

    def path(self, name: str) -> Path:
        """Return the path of an identity's key file, which need not exist."""
        return self._place(_ACCOUNT_OF.get(name, "FLEET")) / f"{name}{SUFFIX}"

    def identity(self, name: str) -> Identity:
        """Return the identity of this name.

        Raises:
            ConfigError: the key file is missing, contains no user seed, or other users can access it; or the name is not valid.
        """
        if name not in self._read:
            if name not in _ACCOUNT_OF:
                checked_name("agent", name)
            made = Identity.of(name, read_seed(self.path(name)))
            self._read[name] = made
            self._names[made.public_key] = name
        return self._read[name]

    def identities(self) -> list[Identity]:
        """Return all identities: the coordinator, the watchers, and the agents sorted by name."""
        return [self.identity(name) for name in (COORDINATOR, WATCH, *self.agents)]

    @property
    def names(self) -> Mapping[str, str]:
        """Public key → name, a live view. The broker's log names clients only by their keys."""
        self.identities()
        return MappingProxyType(self._names)

    def agent_of_key(self, public_key: str) -> str | None:
        """Return the name with this public key, or None for an unknown key."""
        return self.names.get(public_key)

    def _place(self, account: Account) -> Path:
        return self.directory / _PLACE[account] if self.by_kind else self.directory

    def _ensure(self, name: str) -> Identity:
        path = self.path(name)
        for directory in (self.directory, path.parent):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            write_whole(path, Identity.new(name).seed + "\n")
        return self.identity(name)


def read_seed(path: Path) -> str:
    """Return the user seed in a key file.

    Raises:
        ConfigError: the file is missing, contains no user seed, or other users can access it. The error quotes no content.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(_SEED_BYTES)
    except OSError as error:
        hint = "Name the key file that was made for this broker and this name"
        raise ConfigError("key file", f"{path}: {error.strerror or error}", hint) from None
    if mode & 0o077:
        problem = f"{path} can be read or written by other users (mode {mode:04o})"
        raise ConfigError("key file", problem, f"Run: chmod 600 {path}")
    seed = content.decode("ascii", "replace").strip()
    try:
        public_key_of(seed)
    except ValueError:  # the error must not quote the content, which may be a secret
        hint = "The file should have one line that begins with SU. Copy it again, or make a new key"
        raise ConfigError("key file", f"{path} contains no nkey user seed", hint) from None
    return seed


def public_key_of(seed: str) -> str:
    """Return the public key `U…` of a user seed `SU…`.

    Raises:
        ValueError: the text is not a user's seed, or its checksum does not match.
    """
    try:
        prefix, raw = nkeys.decode_seed(seed.encode())
        whole = nkeys.encode_seed(
            bytes(raw), prefix
        ).decode()  # nkeys does not verify the checksum; encoding again does
        public = nkeys.from_seed(bytearray(seed.encode())).public_key.decode()
    except (nkeys.NkeysError, ValueError) as error:
        raise ValueError("not a seed") from error
    if prefix != nkeys.PREFIX_BYTE_USER or whole != seed:
        raise ValueError("not a user's seed")
    return str(public)


def write_whole(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace a file as a whole or not at all.

    Args:
        path: the file to replace or create.
        text: the new content.
        mode: the permissions of the new file. Before they are set, only the owner can read the file.

    Raises:
        OSError: the file cannot be written; an existing file is unchanged.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with (
        replacing(path, f".{path.name}.{os.getpid()}") as fresh,
        os.fdopen(os.open(fresh, flags, 0o600), "w") as file,
    ):
        os.fchmod(file.fileno(), mode)
        file.write(text)


def accounts_config(identities: Iterable[Identity]) -> str:
    """Return the `accounts` block of a nats-server configuration. The text has public keys only and is no secret."""
    of: dict[Account, list[Identity]] = {"CORE": [], "FLEET": [], "WATCH": []}
    for identity in identities:
        of[identity.account].append(identity)
    agents = of["FLEET"]
    return "".join(["accounts {\n", _core(of["CORE"]), *map(_fleet, agents), _watch(of["WATCH"], agents), "}\n"])


def _core(users: Sequence[Identity]) -> str:
    lists = {
        "users": [f"{{nkey: {user.public_key}}}" for user in users],
        "exports": _exports("service", _AGENTS, _GET_MODEL, _GET_RUNS) + _exports("stream", _NOTIFY, _METRICS, _EVENTS),
    }
    return _account("CORE", lists, "jetstream: enabled")


def _fleet(agent: Identity) -> str:
    """Return one agent's account: the requests that CORE answers, the notifies, and the agent's own metrics and events."""
    requests = (f"{PREFIX}.*.agent.{agent.name}.>", _GET_MODEL, _GET_RUNS)
    feeds = _feeds(agent)
    receives = (f"_INBOX.{agent.name}.>", _NOTIFY)
    lists = {
        "users": [_user(agent.public_key, f"allow: {_listed(*requests, *feeds)}", receives)],
        "imports": _imports("service", "CORE", *requests) + _imports("stream", "CORE", _NOTIFY),
        "exports": _exports("stream", *feeds),
    }
    return _account(_account_name(agent), lists, f"limits: {{max_connections: {AGENT_CONNECTIONS}}}")


def _watch(users: Sequence[Identity], agents: Sequence[Identity]) -> str:
    feeds = [line for agent in agents for line in _imports("stream", _account_name(agent), *_feeds(agent))]
    lists = {
        "users": [_user(user.public_key, 'deny: ">"', (_METRICS, _EVENTS)) for user in users],
        "imports": _imports("stream", "CORE", _METRICS, _EVENTS) + feeds,
    }
    return _account("WATCH", lists)


def server_config(settings: BrokerSettings, identities: Iterable[Identity]) -> str:
    """Return a whole nats-server configuration. `nats-server -c` reads the file at the start and again on SIGHUP."""
    return server_settings(settings) + accounts_config(identities)


def server_settings(settings: BrokerSettings) -> str:
    """Return a nats-server configuration without its accounts."""
    jetstream = [f"store_dir: {_quoted(settings.store_dir)}"]
    if settings.max_file_store_bytes is not None:
        jetstream.append(f"max_file_store: {settings.max_file_store_bytes}")
    if settings.sync_interval:
        jetstream.append(f"sync_interval: {_quoted(settings.sync_interval)}")
    lines = [
        f"server_name: {_quoted(settings.name)}",
        f"listen: {_quoted(f'{settings.host}:{settings.port}')}",
        f"max_payload: {settings.max_payload_bytes}",
        'write_deadline: "60s"  # a slow link may need this long for a window of chunks',
    ]
    if settings.log_path is not None:
        lines += [f"log_file: {_quoted(settings.log_path)}", f"logfile_size_limit: {LOG_BYTES}", "logfile_max_num: 3"]
    if settings.pid_path is not None:
        lines.append(f"pid_file: {_quoted(settings.pid_path)}")
    if settings.monitor:
        lines.append(f"http: {_quoted(settings.monitor)}")
    return "\n".join([*lines, "jetstream {", *(f"  {line}" for line in jetstream), "}", ""])


def _account_name(agent: Identity) -> str:
    return f"FLEET-{agent.name}"


def _feeds(agent: Identity) -> tuple[str, str]:
    """Return the subjects of an agent's metrics and events."""
    return f"{PREFIX}.*.metrics.{agent.name}.>", f"{PREFIX}.*.events.{agent.name}"


def _user(public_key: str, publish: str, subscribe: Iterable[str]) -> str:
    """Return a user with permissions. `publish`: an `allow` or `deny` clause; `subscribe`: the allowed subjects."""
    return (
        f"{{nkey: {public_key}, permissions: {{publish: {{{publish}}}, subscribe: {{allow: {_listed(*subscribe)}}}}}}}"
    )


def _exports(kind: Kind, *subjects: str) -> list[str]:
    return [f'{{{kind}: "{subject}"}}' for subject in subjects]


def _imports(kind: Kind, account: str, *subjects: str) -> list[str]:
    return [f'{{{kind}: {{account: "{account}", subject: "{subject}"}}}}' for subject in subjects]


def _account(name: str, lists: Mapping[str, Sequence[str]], *settings: str) -> str:
    """Return the block of one account: its settings, then its lists of users, imports and exports."""
    body = [f"    {setting}\n" for setting in settings]
    for key, items in lists.items():
        body.append(f"    {key}: [\n" + "".join(f"      {item}\n" for item in items) + "    ]\n")
    return f'  "{name}" {{\n{"".join(body)}  }}\n'


def _listed(*subjects: str) -> str:
    return json.dumps(subjects)


def _quoted(value: Path | str) -> str:
    return json.dumps(str(value), ensure_ascii=False)
