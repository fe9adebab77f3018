"""A nats-server as a child process on this machine, for the demo, local runs and tests.

The broker has the accounts and the configuration of a production broker. Its life ends with the Python process that started it;
`syncline.bus.server.process` explains how. This module knows processes and files, not the bus port.

*One broker per store.* Two servers on one JetStream store destroy it, and a second server opens the store before it notices
that its port is taken. So the directory is locked. The server inherits the lock, which is therefore held until the last
process that uses the store has ended.
"""

from __future__ import annotations

import asyncio
import base64
import fcntl
import json
import os
import secrets
import signal
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from syncline.bus.server.accounts import (
    MAX_PAYLOAD_BYTES,
    BrokerSettings,
    Identity,
    Keyring,
    server_config,
    write_whole,
)
from syncline.bus.server.process import (
    BROKER_SHELL,
    HOST,
    PortTaken,
    ServerProcess,
    Watchdog,
    check_free,
    free_port,
    server_binary,
)
from syncline.bus.server.violations import LogTail, ViolationLog
from syncline.errors import ConfigError, Unavailable
from syncline.wire.subjects import COORDINATOR

TEMPORARY = "syncline-broker-"  # prefix of the names of directories that are removed at the end
CONFIG = "broker.conf"
READY_S = 30.0  # a large store is read before the server listens
GRACE_S = 5.0  # between SIGTERM and SIGKILL
LOCK_S = 7.0  # wait for the lock this long: a broker whose owner was killed needs up to GRACE_S to end
_ASK_S = 2.0  # time limit of one login and question
_PAUSE_S = (0.005, 0.1)  # the first and the longest pause between two checks
_PORTS_TRIED = 5
_TAIL_LINES = 12


class EmbeddedBroker:
    """A broker with JetStream on a loopback port: `async with EmbeddedBroker() as broker:`."""

    # These three exist once the broker has started.
    port: int
    directory: Path
    keyring: Keyring

    def __init__(
        self,
        directory: Path | None = None,
        *,
        port: int = 0,
        agents: Sequence[str] = (),
        sync_interval: str = "",
        max_file_store_bytes: int | None = None,
        max_payload_bytes: int = MAX_PAYLOAD_BYTES,
    ) -> None:
        """Describe a broker; `start` runs it.

        Args:
            directory: place of configuration, keys, log and store, kept at the end. None: a temporary one, removed at the end.
            port: the TCP port; 0: a free one.
            agents: names of agents that get a key at the start.
            sync_interval: see `BrokerSettings`.
            max_file_store_bytes: room for all streams; None: the server's default, three quarters of the disk.
            max_payload_bytes: the size of the largest message.

        Raises:
            ConfigError: `port` is out of range.
        """
        if not 0 <= port < 1 << 16:
            raise ConfigError("port", f"{port} is out of range", "Use 1 to 65535, or 0 for a free port")
        self._given = directory
        self._fixed_port = port
        self._agents = tuple(agents)
        self._sync_interval = sync_interval
        self._max_file_store_bytes = max_file_store_bytes
        self._max_payload_bytes = max_payload_bytes
        self._loaded = ""  # the configuration that the running server has read
        self._lock: int | None = None
        self._watchdog: Watchdog | None = None
        self._process: ServerProcess | None = None
        self._changing = asyncio.Lock()

    # -- life ------------------------------------------------------------------------------------------------------
    async def __aenter__(self) -> EmbeddedBroker:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> EmbeddedBroker:
        """Start the broker and wait until its JetStream answers.

        Returns:
            This object.

        Raises:
            ConfigError: the port is taken, another broker uses the directory, or nats-server is not installed.
            Unavailable: the server ended, or was not ready within `READY_S`. The error contains the end of its log.
        """
        assert self._watchdog is None, "started already"
        binary = server_binary()
        try:
            temporary = Path(tempfile.gettempdir(), f"{TEMPORARY}{secrets.token_hex(8)}")
            self.directory = (self._given or temporary).resolve()
            self._watchdog = Watchdog(str(self.directory) if self._given is None else "")
            self._make_directory()  # after the watchdog, which removes a temporary directory
            await self._lock_directory()
            self.keyring = Keyring(self.directory / "keys").create(self._agents)
            await self._launch_on_some_port(binary)
        except BaseException:
            await self.stop()
            raise
        return self

    async def stop(self) -> None:
        """End the broker, after `GRACE_S` by force, and remove a temporary directory. Idempotent."""
        try:
            await self._end(signal.SIGTERM)
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None
            watchdog, self._watchdog = self._watchdog, None
            if watchdog is not None:
                await watchdog.end()

    async def kill(self) -> None:
        """End the broker's process without warning, by SIGKILL. `restart` starts the broker again."""
        await self._end(signal.SIGKILL)

    async def restart(self) -> None:
        """Stop the broker if it runs, and start it with the same port, store and keys. Raises errors as `start` does."""
        async with self._changing:
            await self._end(signal.SIGTERM)
            await self._launch(server_binary())

    async def add_agent(self, name: str) -> Identity:
        """Add one agent, as `add_agents` does."""
        return (await self.add_agents([name]))[0]

    async def add_agents(self, names: Sequence[str]) -> list[Identity]:
        """Make the missing keys of these agents, and wait until the broker accepts them. Other clients stay connected.

        Raises:
            ConfigError: a name is not a valid agent name.
            Unavailable: the broker ended, or did not load the new configuration.
        """
        async with self._changing:
            identities = [self.keyring.add_agent(name) for name in names]
            await self._reload()
        return identities

    # -- properties ------------------------------------------------------------------------------------------------
    @property
    def url(self) -> str:
        """The address for clients."""
        return f"nats://{HOST}:{self.port}"

    @property
    def log_path(self) -> Path:
        return self.directory / "broker.log"

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        assert self._process is not None, "not running"
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code of a server that ended by itself; None while the server runs, and after `stop` or `kill`."""
        return None if self._process is None else self._process.poll()

    def violations(self) -> ViolationLog:
        """Return a reader of the operations that the broker refuses from now on, with the names of the clients."""
        return ViolationLog(self.log_path, self.keyring.names, from_end=True)

    # -- starting --------------------------------------------------------------------------------------------------
    def _make_directory(self) -> None:
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=self._given is not None)
        except OSError as error:
            raise ConfigError("broker directory", f"{self.directory}: {error.strerror}", "Use another") from None

    async def _lock_directory(self) -> None:
        lock = self._lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)

        async def locked() -> bool:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        if not await _until(locked, LOCK_S):
            problem = f"another broker runs in {self.directory}"
            raise ConfigError("broker directory", problem, "Stop that broker, or use another directory")

    async def _launch_on_some_port(self, binary: Path) -> None:
        for left in reversed(range(1 if self._fixed_port else _PORTS_TRIED)):
            self.port = self._fixed_port or free_port()
            try:
                await self._launch(binary)
            except PortTaken:  # by another process, between the search for a free port and the server's start
                if not left:
                    raise
            else:
                return

    async def _launch(self, binary: Path) -> None:
        """Start the server on `self.port` and wait until its JetStream answers. Raises PortTaken and Unavailable."""
        assert self._watchdog is not None and self._lock is not None, "not started"
        check_free(self.port)
        self._loaded = self._write_config()
        log = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        tail = LogTail(self.log_path, from_end=True)
        try:
            self._process = ServerProcess(
                ["/bin/sh", "-c", BROKER_SHELL, "nats-server", str(binary), "-c", str(self.directory / CONFIG)],
                stdin=subprocess.DEVNULL,
                stdout=self._watchdog.pipe,
                stderr=log,
                pass_fds=[self._lock],
                start_new_session=True,
            )
        finally:
            os.close(log)
        coordinator = self.keyring.identity(COORDINATOR)

        async def ready() -> bool:
            self._check_running(tail)
            return await _jetstream_answers(self.port, coordinator)

        if not await _until(ready, READY_S):
            raise Unavailable(f"nats-server was not ready within {READY_S:g} s{_ending(tail.read())}")

    def _check_running(self, tail: LogTail) -> None:
        """Raise PortTaken or Unavailable if the server has ended. `tail`: the log since its start."""
        assert self._process is not None
        if self._process.poll() is None:
            return
        lines = tail.read()
        if any("address already in use" in line for line in lines):
            raise PortTaken(self.port)
        raise Unavailable(f"nats-server ended with code {self._process.returncode}{_ending(lines)}")

    def _write_config(self) -> str:
        """Write the configuration file and return its text."""
        settings = BrokerSettings(
            store_dir=self.directory / "jetstream",
            host=HOST,
            port=self.port,
            sync_interval=self._sync_interval,
            max_payload_bytes=self._max_payload_bytes,
            max_file_store_bytes=self._max_file_store_bytes,
            log_path=self.log_path,
            pid_path=self.directory / "broker.pid",
        )
        text = server_config(settings, self.keyring.identities())
        write_whole(self.directory / CONFIG, text)
        return text

    # -- changing and ending ---------------------------------------------------------------------------------------
    async def _reload(self) -> None:
        """Make the running server read the configuration, if the configuration has changed.

        One reload is not enough: after the first, nats-server 2.15 knows a new account, but requests that the account imports
        from CORE do not reach subscribers that were connected before. The second reload connects them. (nats-server issue 8560
        is of the same family.)
        """
        tail = LogTail(self.log_path, from_end=True)
        text = self._write_config()
        if self._process is None or text == self._loaded:
            return  # the server reads the file at its next start, or has read the same text already
        for _ in range(2):
            await self._reload_once(self._process, tail)
        self._loaded = text

    async def _reload_once(self, process: ServerProcess, tail: LogTail) -> None:
        self._check_running(tail)
        process.send_signal(signal.SIGHUP)

        async def reloaded() -> bool:
            lines = tail.read()
            if failed := [line for line in lines if "Failed to reload" in line]:
                raise Unavailable(f"the broker did not take the new agents: {failed[-1]}")
            self._check_running(tail)
            return any("Reloaded server configuration" in line for line in lines)

        if not await _until(reloaded, READY_S):
            raise Unavailable(f"the broker did not take the new agents within {READY_S:g} s")

    async def _end(self, by: signal.Signals) -> None:
        """Send a signal to the server if it runs, then SIGKILL after `GRACE_S`, and wait for its end."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            if process.poll() is None:
                process.send_signal(by)
            async with asyncio.timeout(GRACE_S):
                await process.ended()
        except (ProcessLookupError, TimeoutError):
            pass
        finally:
            if process.poll() is None:
                process.kill()
        await process.ended()
        if self._watchdog is not None:
            self._watchdog.forget()


def _ending(lines: Sequence[str]) -> str:
    """Return the end of an error text: the last lines of the log."""
    return ". Its log ends with:\n" + "\n".join(lines[-_TAIL_LINES:]) if lines else ", and its log is empty"


async def _until(condition: Callable[[], Awaitable[bool]], timeout_s: float) -> bool:
    """Check a condition with growing pauses. Return True once it holds, and False after `timeout_s`."""
    clock = asyncio.get_running_loop().time
    deadline = clock() + timeout_s
    pause, longest = _PAUSE_S
    while not await condition():
        if clock() > deadline:
            return False
        await asyncio.sleep(pause)
        pause = min(longest, 2 * pause)
    return True


async def _jetstream_answers(port: int, identity: Identity) -> bool:
    """Return whether the server accepts this identity and its JetStream answers.

    An open port or an accepted login does not imply that JetStream is ready. The function speaks the few lines of the NATS
    protocol itself, because a client library would retry and log by its own rules.
    """
    inbox = f"_INBOX.{identity.name}.ready"
    question = f"SUB {inbox} 1\r\nPUB $JS.API.INFO {inbox} 0\r\n\r\n"
    try:
        async with asyncio.timeout(_ASK_S):
            reader, writer = await asyncio.open_connection(HOST, port)
            try:
                writer.write(_connect_line(await reader.readline(), identity) + question.encode())
                while (line := await reader.readline()) and not line.startswith((b"MSG ", b"-ERR ")):
                    pass
                return line.startswith(b"MSG ") and b'"error"' not in await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError, KeyError):
        return False


def _connect_line(info_line: bytes, identity: Identity) -> bytes:
    """Return the CONNECT line that answers the server's INFO line: it contains the signed nonce."""
    info = json.loads(info_line.removeprefix(b"INFO "))
    signature = base64.urlsafe_b64encode(identity.sign(info["nonce"].encode())).rstrip(b"=").decode()
    login = {"nkey": identity.public_key, "sig": signature, "name": "syncline ready?", "lang": "python", "version": "1"}
    return f"CONNECT {json.dumps({**login, 'verbose': False, 'pedantic': False})}\r\n".encode()
