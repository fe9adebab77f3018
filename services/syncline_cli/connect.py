"""The broker that a command uses: the named one, else that of a local fleet, which `demo` or `run --local` has started.

A local fleet is found by its temporary directory, which is removed with it. Directories of other users are ignored.
"""

from __future__ import annotations

import os
import shlex
import stat
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from syncline.bus.address import masked
from syncline.bus.base import Bus
from syncline.bus.connect import connect, connection_problem
from syncline.bus.server.accounts import SUFFIX, read_seed
from syncline.bus.server.embedded import TEMPORARY
from syncline.bus.tls import Tls
from syncline.client.submit import Say, submit
from syncline.errors import BusError, ConfigError, Denied, NoResponders, Unavailable
from syncline.spec.run_spec import RunSpec
from syncline.wire import subjects
from syncline.wire.allow_list import is_file
from syncline.wire.messages import Submitted
from syncline.wire.subjects import COORDINATOR
from syncline_cli.local_fleet.fleet import TASK_DIR, URL
from syncline_cli.options import DEFAULT_URL
from syncline_cli.process import run_interruptible, silence_logging

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BrokerChoice:
    """A broker and the key file to use there."""

    url: str = field(repr=False)  # as given, passwords included; `shown` is for people
    key: str  # '': a broker without accounts
    found: bool = False  # a local fleet that the user did not name; it may end with its run
    named: bool = True  # False: neither the user nor a local fleet named this broker
    tls: Tls = field(default_factory=Tls)

    @property
    def shown(self) -> str:
        """The address without passwords."""
        return masked(self.url)

    async def connect(self, identity: str, seed: str) -> Bus:
        """Connect to this broker, as `syncline.bus.connect` does."""
        return await connect(self.url, identity, seed, tls=self.tls)


def choose_broker(connect: str, key: str, role: str = COORDINATOR, tls: Tls | None = None) -> BrokerChoice:
    """Return the broker to use.

    Args:
        connect: the address that the user named, or ''.
        key: the key file that the user named, or ''.
        role: the role whose key of a local fleet is used.
        tls: certificate files.

    Raises:
        ConfigError: the user named no broker, and several local fleets are up.
    """
    fleets, tls = local_fleets(), tls or Tls()
    if connect:
        own = next((str(_key(d, role)) for d, url in fleets if url == connect), "")
        return BrokerChoice(connect, key or own, tls=tls)
    if not fleets or key:
        return BrokerChoice(DEFAULT_URL, key, named=bool(key), tls=tls)
    if len(fleets) > 1:
        urls = ", ".join(sorted(url for _, url in fleets))
        raise ConfigError("--connect", f"several local fleets are up: {urls}", "Name one of them")
    directory, url = fleets[0]
    return BrokerChoice(url, str(_key(directory, role)), found=True)


def local_fleets() -> list[tuple[Path, str]]:
    """Return directory and address of every local fleet of this user."""
    found = []
    for directory in sorted(Path(tempfile.gettempdir()).glob(f"{TEMPORARY}*")):
        try:
            about = directory.lstat()
            if stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and not about.st_mode & 0o077:
                url = (directory / URL).read_text()
                if url.endswith("\n"):  # written completely
                    found.append((directory, url.strip()))
        except OSError:
            pass  # the fleet is starting, or has just ended
    return found


def check_task_dir(at: BrokerChoice, task: str, spec: Path) -> None:
    """Refuse a task file for a local fleet that searches another directory, and might load another file of the same name.

    Raises:
        ConfigError: the broker is a local fleet's, and its task directory is not that of the settings file.
    """
    module = task.rpartition(":")[0]
    wanted = spec.resolve().parent
    for directory, url in local_fleets():
        if url == at.url and is_file(module) and not Path(module).is_absolute():
            there = Path((directory / TASK_DIR).read_text())
            if there != wanted:
                problem = f"{task!r} lies in {wanted}, and the local fleet looks for task files in {there}"
                raise ConfigError("task", problem, f"Start another fleet for it: syncline run {spec} --local 4")


def ask(at: BrokerChoice, work: Callable[[Bus], Awaitable[T]]) -> T:
    """Connect with a command's key, await `work(bus)` and return its result.

    Raises:
        ConfigError: every problem with the broker or the key.
        Interrupted: a signal ended the work.
    """
    silence_logging()
    seed = read_seed(Path(at.key)) if at.key else ""
    results: list[T] = []

    async def connect_and_work() -> int:
        try:
            bus = await at.connect("cli", seed)
        except BusError as error:
            raise connection_error(error, at) from None
        try:
            results.append(await work(bus))
        except Denied as error:
            raise ConfigError("--key", str(error), "Use the coordinator's key") from None
        except BusError as error:
            raise connection_problem(error, at.url) from None
        finally:
            await bus.close()
        return 0

    run_interruptible(connect_and_work)
    return results[0]


async def submit_remote(bus: Bus, spec: RunSpec, at: BrokerChoice, say: Say) -> Submitted:
    """Submit a run on a given broker; every problem with the broker becomes a ConfigError."""
    try:
        return await submit(bus, spec, patience_s=5.0, say=say)
    except NoResponders:
        await _check_jetstream(bus, at.url)
        start = f"syncline coordinator --connect {at.shown}" + (f" --key {at.key}" if at.key else "")
        hint = f"Start one with `{start}`, or name another broker with --connect"
        raise ConfigError("--connect", f"no coordinator answers on {at.shown}", hint) from None
    except Denied as error:
        raise ConfigError("--key", f"the key may not submit runs: {error}", "Use the coordinator's key") from None
    except BusError as error:
        raise connection_problem(error, at.url) from None


async def _check_jetstream(bus: Bus, url: str) -> None:
    """Raise ConfigError if the broker has no JetStream: then no coordinator can start there."""
    try:
        await bus.state(f"KV_{subjects.RUNS_BUCKET}")
    except Unavailable as error:
        if "JetStream" in str(error):
            raise connection_problem(error, url) from None
    except BusError:
        pass


def connection_error(error: BusError, at: BrokerChoice) -> ConfigError:
    """Return the error for a person who cannot connect; without a named broker its hint tells how to start one."""
    if at.named or isinstance(error, Denied):
        return connection_problem(error, at.url)
    hint = "Start one with `syncline demo` or `syncline run SPEC.yaml --local 4`, or name a broker: --connect URL"
    return ConfigError("--connect", f"no local fleet is up on this machine, and {error}", hint)


def command_with_options(command: str, connect: str, key: str, tls: Tls | None = None) -> str:
    """Return the command with the options that reach this broker, less those that environment variables set already."""
    words = [command]
    if connect not in (DEFAULT_URL, os.environ.get("SYNCLINE_NATS_URL")):
        words.append(f"--connect {shlex.quote(masked(connect))}")
    if key and key != os.environ.get("SYNCLINE_KEY"):
        words.append(f"--key {key}")
    for name, file in asdict(tls or Tls()).items():
        if file and file != os.environ.get(f"SYNCLINE_TLS_{name.upper()}"):
            words.append(f"--tls-{name} {shlex.quote(file)}")
    return " ".join(words)


def _key(directory: Path, role: str) -> Path:
    return directory / "keys" / f"{role}{SUFFIX}"
