"""`syncline keys`: who may log into the broker. Makes key files and the nats-server configuration that knows them."""

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
    if not text.strip():
        raise ConfigError("DIR", f"{text!r} names no directory", "Name one; the current one is '.'")
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
    listen: Annotated[str, typer.Option(metavar="ADDRESS:PORT", help="Where the broker listens.")] = "0.0.0.0:4222",
    monitor: Annotated[
        str, typer.Option(metavar="ADDRESS:PORT", help="The broker's health and figures by HTTP; '' for none.")
    ] = "127.0.0.1:8222",
    store: Annotated[str, typer.Option(metavar="DIR", help="The broker's data; default: DIR/broker/jetstream.")] = "",
    max_store: Annotated[
        str, typer.Option(metavar="SIZE", help="Most that it may hold, as 50G; default: 3/4 of the disk.")
    ] = "",
    sync: Annotated[
        str, typer.Option(metavar="TIME", help="How often it syncs to disk: always, 10s; default: 2m.")
    ] = "",
    keep: Annotated[bool, typer.Option("--keep", help="Complete a set that is there; change nothing in it.")] = False,
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
        print(f"{path}: give it to that machine, which starts with")
        print(f"  syncline agent --connect nats://BROKER:4222 --name {identity.name} --key {path.name}")
    print("Next, have the broker read its configuration again; nobody is disconnected:")
    print(_reload())


@app.command(context_settings=HELP_NAMES, epilog="Example: syncline keys revoke ops edge-7")
def revoke(directory: Directory, names: Names, as_json: Json = False) -> None:
    """Take agents out: the key is worth nothing once the broker has reloaded."""
    with _files(directory):
        opened = _open(directory)
        opened.revoke(list(dict.fromkeys(names)))
    if as_json:
        _print_set(opened)
        return
    print(f"revoked: {', '.join(names)}. Until the broker reads its configuration again, the key is still good:")
    print(_reload())


@app.command("list", context_settings=HELP_NAMES, epilog="Example: syncline keys list ops --json")
def list_command(directory: Directory, as_json: Json = False) -> None:
    """Show everybody who has a key, and who had one."""
    with _files(directory):
        opened = _open(directory)
        listed = opened.listed()
    if as_json:
        _print_set(opened)
        return
    wide = max(len(line.name) for line in listed)
    for line in listed:
        print(f"{line.name:<{wide}}  {line.public_key}  {'revoked' if line.revoked else line.account}")


def _open(directory: Path) -> OperatorSet:
    from syncline.bus.server.operator import OperatorSet

    return OperatorSet(directory)


def _say_made(made: OperatorSet) -> None:
    path = made.keyring.path
    print(
        f"{made.directory} holds the keys of {_counted(len(made.keyring.agents))}. Give each machine its own part alone:"
    )
    for what, whose in (
        (made.config.parent, "the broker: public keys only"),
        (path("coordinator"), "the coordinator, and whoever submits runs"),
        (path("NAME"), "one for each agent"),
        (path("watch"), "people and dashboards: it reads, and can change nothing"),
    ):
        print(f"  {what!s:<{len(str(path('coordinator')))}}  {whose}")
    print("Next, start the broker:")
    print(f"  nats-server -c {made.config}")
    print("or, where it runs already with this set, have it read the configuration again:")
    print(_reload())


def _print_set(opened: OperatorSet) -> None:
    listed: list[dict[str, Any]] = [
        {"name": line.name, "account": line.account, "public_key": line.public_key, "revoked": line.revoked}
        for line in opened.listed()
    ]
    print(json.dumps({"directory": str(opened.directory), "config": str(opened.config), "keys": listed}))


def _reload() -> str:
    """Twice: with the first reload the server knows a new account, with the second its imports reach who is there (ADR 2)."""
    return (
        "  nats-server --signal reload; sleep 1; nats-server --signal reload\n"
        "(where several run on the machine: --signal reload=PID; in a container: send SIGHUP, twice)"
    )


@contextmanager
def _files(directory: Path) -> Iterator[None]:
    """What the file system refuses is the user's to hint."""
    try:
        yield
    except OSError as error:
        where = error.filename or directory
        raise ConfigError("DIR", f"{where}: {error.strerror or error}", "Use a directory that you may write") from None


def _address(setting: str, text: str) -> tuple[str, int]:
    found = _ADDRESS.fullmatch(text)
    if found is None or not 0 < int(found[1]) < 1 << 16:
        raise ConfigError(setting, f"{text!r} is no address and port", "Write it as 0.0.0.0:4222")
    return text.rpartition(":")[0], int(found[1])


def _size(text: str) -> int:
    found = _SIZE.fullmatch(text)
    if found is None or not int(found[1]):
        raise ConfigError("--max-store", f"{text!r} is no size", "Write it as 500M, 50G or 2T")
    return int(found[1]) * _UNITS[found[2].upper()]


def _every(text: str) -> str:
    if not _EVERY.fullmatch(text):
        raise ConfigError("--sync", f"{text!r} is no time", "Use always, or a time as 10s or 2m")
    return text


def _counted(agents: int) -> str:
    return f"{agents} agent{'' if agents == 1 else 's'}"
