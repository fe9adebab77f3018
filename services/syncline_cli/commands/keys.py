"""`syncline keys`: make and revoke the keys of a fleet, and write the configuration of its nats-server.

A set is a directory: one seed file per identity, in a subdirectory per role, so that each machine is given its own part
only, and the configuration of nats-server with the public keys. No command contacts the broker; the operator reloads
it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from syncline.errors import ConfigError
from syncline_cli.options import HELP_NAMES, Json

if TYPE_CHECKING:
    from syncline.bus.server.operator import OperatorSet

app = typer.Typer(no_args_is_help=True, add_completion=False, context_settings=HELP_NAMES)

MAX_AGENTS = 10_000
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(\d+)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_EVERY = re.compile(r"always|\d+(?:ms|s|m|h)")
_ADDRESS = re.compile(r"(?:[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:]+\]):(\d{1,5})")


def _directory(text: str) -> Path:
    """Return the path. Raises ConfigError for an empty name."""
    if not text.strip():
        raise ConfigError("DIR", f"{text!r} is not a directory", "Name one; '.' is the current one")
    return Path(text)


Directory = Annotated[Path, typer.Argument(metavar="DIR", parser=_directory, help="The directory of the set.")]
Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Agents.")]


@app.callback()
def _keys() -> None:
    """Make, add, revoke and list the keys of a fleet, with the configuration of its broker.

    Example: syncline keys make ops --agents 4
    """


@app.command(context_settings=HELP_NAMES, epilog="Example: syncline keys make ops --agents 4 --store /var/lib/nats")
def make(
    directory: Directory,
    agents: Annotated[int, typer.Option(metavar="N", min=0, max=MAX_AGENTS, help="Agents a1 to aN.")] = 0,
    agent: Annotated[list[str] | None, typer.Option(metavar="NAME", help="An agent; repeatable.")] = None,
    listen: Annotated[str, typer.Option(metavar="ADDRESS:PORT", help="Address of the broker.")] = "0.0.0.0:4222",
    monitor: Annotated[
        str, typer.Option(metavar="ADDRESS:PORT", help="Address of the broker's HTTP pages; '' for none.")
    ] = "127.0.0.1:8222",
    store: Annotated[str, typer.Option(metavar="DIR", help="The broker's data; default: DIR/broker/jetstream.")] = "",
    max_store: Annotated[
        str, typer.Option(metavar="SIZE", help="Limit of the data, as 50G; default: 3/4 of the disk.")
    ] = "",
    sync: Annotated[
        str, typer.Option(metavar="TIME", help="Time between syncs to disk: always, 10s; default: 2m.")
    ] = "",
    keep: Annotated[bool, typer.Option("--keep", help="Complete an existing set; change nothing in it.")] = False,
    as_json: Json = False,
) -> None:
    """Make a set: keys of coordinator, watchers and agents, and a broker's configuration."""
    from syncline.bus.server.accounts import BrokerSettings
    from syncline.bus.server.operator import OperatorSet

    host, port = _address("--listen", listen)
    settings = BrokerSettings(
        store_dir=(Path(store).expanduser() if store else directory / "broker" / "jetstream").absolute(),
        host=host,
        port=port,
        max_file_store_bytes=_size(max_store) if max_store else None,
        sync_interval=_every(sync) if sync else "",
        monitor=":".join(map(str, _address("--monitor", monitor))) if monitor else "",
    )
    names = list(dict.fromkeys([*(f"a{i}" for i in range(1, agents + 1)), *(agent or ())]))
    with _files(directory):
        made = OperatorSet.make(directory, names, settings, keep=keep)
    _print_set(made) if as_json else _say_made(made)


@app.command(context_settings=HELP_NAMES, epilog="Example: syncline keys add ops edge-7")
def add(directory: Directory, names: Names, as_json: Json = False) -> None:
    """Make the keys of new agents, and of those that were revoked."""
    with _files(directory):
        opened = _open(directory)
        made = opened.add(list(dict.fromkeys(names)))
    if as_json:
        _print_set(opened)
        return
    for identity in made:
        path = opened.keyring.path(identity.name)
        print(f"{path}: copy it to that machine, and start there")
        print(f"  syncline agent --connect nats://BROKER:4222 --name {identity.name} --key {path.name}")
    print("Next, let the broker reload its configuration; no client is disconnected:")
    print(_reload())


@app.command(context_settings=HELP_NAMES, epilog="Example: syncline keys revoke ops edge-7")
def revoke(directory: Directory, names: Names, as_json: Json = False) -> None:
    """Revoke agents: the broker refuses their keys after it has reloaded."""
    with _files(directory):
        opened = _open(directory)
        opened.revoke(list(dict.fromkeys(names)))
    if as_json:
        _print_set(opened)
        return
    print(f"revoked: {', '.join(names)}. Until the broker reloads its configuration, the key is still valid:")
    print(_reload())


@app.command("list", context_settings=HELP_NAMES, epilog="Example: syncline keys list ops --json")
def list_command(directory: Directory, as_json: Json = False) -> None:
    """List the keys, revoked ones too."""
    with _files(directory):
        opened = _open(directory)
        listed = opened.listed()
    if as_json:
        _print_set(opened)
        return
    width = max(len(line.name) for line in listed)
    for line in listed:
        print(f"{line.name:<{width}}  {line.public_key}  {'revoked' if line.revoked else line.account}")


def _open(directory: Path) -> OperatorSet:
    """Return the set in a directory."""
    from syncline.bus.server.operator import OperatorSet

    return OperatorSet(directory)


def _say_made(made: OperatorSet) -> None:
    """Print the parts of a new set, and how to start the broker."""
    path = made.keyring.path
    print(
        f"{made.directory} holds the keys of {_counted(len(made.keyring.agents))}. Copy to each machine its own part only:"
    )
    for part, owner in (
        (made.config.parent, "the broker: public keys only"),
        (path("coordinator"), "the coordinator, and users who submit runs"),
        (path("NAME"), "one for each agent"),
        (path("watch"), "people and dashboards: this key reads, and can change nothing"),
    ):
        print(f"  {part!s:<{len(str(path('coordinator')))}}  {owner}")
    print("Next, start the broker:")
    print(f"  nats-server -c {made.config}")
    print("or, if the broker already runs with this set, let it reload the configuration:")
    print(_reload())


def _print_set(opened: OperatorSet) -> None:
    """Print the set with the keys that scripts rely on."""
    listed: list[dict[str, Any]] = [
        {"name": line.name, "account": line.account, "public_key": line.public_key, "revoked": line.revoked}
        for line in opened.listed()
    ]
    print(json.dumps({"directory": str(opened.directory), "config": str(opened.config), "keys": listed}))


def _reload() -> str:
    """Return the commands of a reload. The first reload makes a new account known, the second connects its imports (ADR 2)."""
    return (
        "  nats-server --signal reload; sleep 1; nats-server --signal reload\n"
        "(with several servers on the machine: --signal reload=PID; in a container: send SIGHUP, twice)"
    )


@contextmanager
def _files(directory: Path) -> Iterator[None]:
    """Turn an error of the file system into a ConfigError."""
    try:
        yield
    except OSError as error:
        path = error.filename or directory
        raise ConfigError("DIR", f"{path}: {error.strerror or error}", "Use a directory that you may write") from None


def _address(setting: str, text: str) -> tuple[str, int]:
    """Return host and port. Raises ConfigError."""
    found = _ADDRESS.fullmatch(text)
    if found is None or not 0 < int(found[1]) < 1 << 16:
        raise ConfigError(setting, f"{text!r} is not an address with a port", "Write it as 0.0.0.0:4222")
    return text.rpartition(":")[0], int(found[1])


def _size(text: str) -> int:
    """Return bytes; K, M, G and T are powers of 1024. Raises ConfigError."""
    found = _SIZE.fullmatch(text)
    if found is None or not int(found[1]):
        raise ConfigError("--max-store", f"{text!r} is not a size", "Write it as 500M, 50G or 2T")
    return int(found[1]) * _UNITS[found[2].upper()]


def _every(text: str) -> str:
    """Return an interval as nats-server writes it. Raises ConfigError."""
    if not _EVERY.fullmatch(text):
        raise ConfigError("--sync", f"{text!r} is not a time", "Use always, or a time as 10s or 2m")
    return text


def _counted(agents: int) -> str:
    return f"{agents} agent{'' if agents == 1 else 's'}"
