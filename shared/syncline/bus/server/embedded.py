"""A nats-server on this machine, owned by this process, for the demo, local runs and tests. Independent of the bus
port.

The server has the accounts and the configuration of a production broker. The process that started the server ends it: a
broker lives as long as its Python process, and no longer; `syncline.bus.server.process` says how.

*One broker per store.* Two servers on one JetStream store ruin the store, and a second server opens the store before it
finds its port taken. The server inherits a lock on the directory, so that the lock is held until the last process that
uses the directory has ended.
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

TEMPORARY = "syncline-broker-"  # how the name of a directory that is removed at the end begins
CONFIG = "broker.conf"
READY_S = 30.0  # a large store is read before the server listens
GRACE_S = 5.0  # between SIGTERM and SIGKILL
LOCK_S = 7.0  # a broker whose owner was killed needs up to GRACE_S to end
_ASK_S = 2.0
_PAUSE_S = (0.005, 0.1)  # the first and the longest pause between two questions
_PORTS_TRIED = 5
_TAIL_LINES = 12


class EmbeddedBroker:
    """A broker with JetStream on a free loopback port, for the body of `async with EmbeddedBroker() as broker:`.

    `directory` holds configuration, keys, log and store, and stays; None takes a temporary one, removed at the end.
    """

    port: int
    directory: Path
    keyring: Keyring  # these three once started

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
        if not 0 <= port < 1 << 16:
            raise ConfigError("port", f"{port} is not a port", "Use 1 to 65535, or 0 for any that is free")
        self._given, self._fixed_port, self._agents = directory, port, tuple(agents)
        self._sync_interval, self._max_file_store_bytes = sync_interval, max_file_store_bytes
        self._max_payload_bytes = max_payload_bytes
        self._loaded = ""  # the configuration that the server has
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
        """Start the broker, and return when JetStream answers.

        Raises:
            ConfigError: the port is taken, the directory is in use, or nats-server is not installed.
            Unavailable: the server did not come up. Holds the end of its log.
        """
        assert self._watchdog is None, "started already"
        binary = server_binary()
        try:
            temporary = Path(tempfile.gettempdir(), f"{TEMPORARY}{secrets.token_hex(8)}")
            self.directory = (self._given or temporary).resolve()
            self._watchdog = Watchdog(str(self.directory) if self._given is None else "")
            self._make_directory()  # only now that there is somebody to remove it
            await self._lock_directory()
            self.keyring = Keyring(self.directory / "keys").create(self._agents)
            await self._launch_on_some_port(binary)
        except BaseException:
            await self.stop()
            raise
        return self

    async def stop(self) -> None:
        """Ends the broker, by force if need be, and removes a temporary directory. Stopping twice changes nothing."""
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
        """End the broker's process like a power failure. `restart` starts the broker again."""
        await self._end(signal.SIGKILL)

    async def restart(self) -> None:
        """Stop the broker if necessary, and start the broker again with the same port, store and keys."""
        async with self._changing:
            await self._end(signal.SIGTERM)
            await self._launch(server_binary())

    async def add_agent(self, name: str) -> Identity:
        """Make the agent's key, and return when the broker knows the key. No client is disconnected."""
        return (await self.add_agents([name]))[0]

    async def add_agents(self, names: Sequence[str]) -> list[Identity]:
        async with self._changing:
            identities = [self.keyring.add_agent(name) for name in names]
            await self._reload()
        return identities

    # -- for other modules ------------------------------------------------------------------------------------------
    @property
    def url(self) -> str:
        return f"nats://{HOST}:{self.port}"

    @property
    def log_path(self) -> Path:
        return self.directory / "broker.log"

    @property
    def pid(self) -> int:
        assert self._process is not None, "not running"
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Return the exit code of a server that ended unasked; None while the server runs."""
        return None if self._process is None else self._process.poll()

    def violations(self) -> ViolationLog:
        """Return a reader of the broker's refusals from now on, with the names of the refused."""
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
            raise ConfigError("broker directory", problem, "Stop that one, or use another directory")

    async def _launch_on_some_port(self, binary: Path) -> None:
        for left in reversed(range(1 if self._fixed_port else _PORTS_TRIED)):
            self.port = self._fixed_port or free_port()
            try:
                await self._launch(binary)
            except PortTaken:  # between our asking for a free one and the server's using it
                if not left:
                    raise
            else:
                return

    async def _launch(self, binary: Path) -> None:
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
        assert self._process is not None
        if self._process.poll() is None:
            return
        lines = tail.read()
        if any("address already in use" in line for line in lines):
            raise PortTaken(self.port)
        raise Unavailable(f"nats-server ended with code {self._process.returncode}{_ending(lines)}")

    def _write_config(self) -> str:
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
        """Reload the configuration twice.

        With the first reload nats-server 2.15 knows a new account, but the account's service imports do not reach the
        subscribers in CORE; with the second they do (the same family as nats-server issue 8560).
        """
        tail = LogTail(self.log_path, from_end=True)
        text = self._write_config()
        if self._process is None or text == self._loaded:
            return  # it is read at the next start, or read already
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
    return ". Its log ends with:\n" + "\n".join(lines[-_TAIL_LINES:]) if lines else ", and its log says nothing"


async def _until(true: Callable[[], Awaitable[bool]], timeout_s: float) -> bool:
    """Asks, with growing pauses, until the answer is yes; False when the time is over."""
    clock = asyncio.get_running_loop().time
    deadline = clock() + timeout_s
    pause, longest = _PAUSE_S
    while not await true():
        if clock() > deadline:
            return False
        await asyncio.sleep(pause)
        pause = min(longest, 2 * pause)
    return True


async def _jetstream_answers(port: int, who: Identity) -> bool:
    """Logs in and asks JetStream about our account, in the few words of the NATS protocol that this takes: a port that
    is open, or a server that lets us in, is not yet one that stores."""
    inbox = f"_INBOX.{who.name}.ready"
    question = f"SUB {inbox} 1\r\nPUB $JS.API.INFO {inbox} 0\r\n\r\n"
    try:
        async with asyncio.timeout(_ASK_S):
            reader, writer = await asyncio.open_connection(HOST, port)
            try:
                writer.write(_connect_line(await reader.readline(), who) + question.encode())
                while (line := await reader.readline()) and not line.startswith((b"MSG ", b"-ERR ")):
                    pass
                return line.startswith(b"MSG ") and b'"error"' not in await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError, KeyError):
        return False


def _connect_line(info_line: bytes, who: Identity) -> bytes:
    """The answer to the server's greeting: its nonce, signed."""
    info = json.loads(info_line.removeprefix(b"INFO "))
    signature = base64.urlsafe_b64encode(who.sign(info["nonce"].encode())).rstrip(b"=").decode()
    login = {"nkey": who.public_key, "sig": signature, "name": "syncline ready?", "lang": "python", "version": "1"}
    return f"CONNECT {json.dumps({**login, 'verbose': False, 'pedantic': False})}\r\n".encode()
