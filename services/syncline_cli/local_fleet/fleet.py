"""A whole fleet on this machine: the embedded broker, a coordinator and agents, each a process of its own.

Used by `syncline demo`, `run --local`, `bench` and the tests. One nursery imports torch once and forks all services; when
this process goes, however it goes, all of them go, and the temporary directory with them.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from syncline.bus.base import Bus
from syncline.bus.connect import connect
from syncline.bus.server.accounts import MAX_PAYLOAD_BYTES
from syncline.bus.server.embedded import EmbeddedBroker
from syncline.errors import ConfigError, NoResponders
from syncline.runtime.nursery import Nursery, NurseryDied, Worker
from syncline.tasks import DEFAULT_ALLOWED
from syncline.wire.subjects import COORDINATOR
from syncline_agent.options import AgentOptions
from syncline_coordinator.options import CoordinatorOptions
from syncline_coordinator.reservation import LEAST_BYTES

PRELOAD = (
    "torch",
    "syncline_agent.app",
    "syncline_agent.trainer",
    "syncline_coordinator.app",
    "syncline_coordinator.evaluator",
)
STOP_S = 3.0
TASK_DIR = "task.dir"  # a file beside the next one: where the fleet looks for task files
URL = "broker.url"  # a file in the fleet's directory with the broker's address, so that others on this machine find it


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """What the fleet looks like. `directory` None: a temporary one, removed at the end."""

    agents: tuple[str, ...]
    directory: Path | None = None
    port: int = 0
    allow_task: tuple[str, ...] = DEFAULT_ALLOWED
    task_dir: Path = field(default_factory=Path.cwd)
    threads: int = 1
    device: str = "auto"
    max_file_store_bytes: int | None = None  # None: what the broker finds on the disk
    max_payload_bytes: int = MAX_PAYLOAD_BYTES


class LocalFleet:
    """An async context manager. `preload()` starts importing torch; call it as early as possible, outside the loop."""

    def __init__(self, settings: FleetSettings, nursery: Nursery) -> None:
        self.settings, self._nursery = settings, nursery
        self.broker = EmbeddedBroker(
            settings.directory,
            port=settings.port,
            agents=settings.agents,
            max_file_store_bytes=settings.max_file_store_bytes,
            max_payload_bytes=settings.max_payload_bytes,
        )
        self.workers: dict[str, Worker] = {}

    @staticmethod
    def preload(*modules: str) -> Nursery:
        return Nursery.start((*PRELOAD, *modules))

    async def __aenter__(self) -> LocalFleet:
        self._nursery.open()
        try:
            check_room(self.settings)
            await self.broker.start()
            (self.broker.directory / TASK_DIR).write_text(str(self.settings.task_dir.resolve()))
            (self.broker.directory / URL).write_text(f"{self.broker.url}\n")
            for sub in ("logs", "state"):
                (self.broker.directory / sub).mkdir(exist_ok=True)
            await self.start_coordinator()
            await asyncio.gather(*(self.start_agent(name) for name in self.settings.agents))
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Everything ends: services first, then the broker."""
        try:
            await self._nursery.close(STOP_S)
        finally:
            await self.broker.stop()

    # -- services ------------------------------------------------------------------------------------------------------
    async def start_coordinator(self) -> Worker:
        settings, keys = self.settings, self.broker.keyring
        options = CoordinatorOptions(
            connect=self.broker.url,
            key=str(keys.path(COORDINATOR)),
            threads=settings.threads,
            allow_task=settings.allow_task,
            task_dir=str(settings.task_dir),
            broker_log=str(self.broker.log_path),
            keys=str(keys.directory),
            log_file=self._log(COORDINATOR),
        )
        return await self._start(COORDINATOR, "syncline_coordinator.app:run_forked", asdict(options))

    async def start_agent(self, name: str, **changes: Any) -> Worker:
        settings, keys = self.settings, self.broker.keyring
        options = AgentOptions(
            name=name,
            connect=self.broker.url,
            key=str(keys.path(name)),
            state_dir=str(self.broker.directory / "state"),
            device=settings.device,
            threads=settings.threads,
            allow_task=settings.allow_task,
            task_dir=str(settings.task_dir),
            log_file=self._log(name),
        )
        return await self._start(name, "syncline_agent.app:run_forked", {**asdict(options), **changes})

    async def _start(self, name: str, target: str, options: dict[str, Any]) -> Worker:
        worker = self.workers[name] = await self._nursery.fork(target, options)
        return worker

    def signal(self, name: str, which: signal.Signals) -> None:
        try:
            self.workers[name].signal(which)
        except NurseryDied:
            pass

    async def kill(self, name: str) -> None:
        self.signal(name, signal.SIGKILL)
        await self.workers[name].exited

    def _log(self, name: str) -> str:
        return str(self.broker.directory / "logs" / f"{name}.log")

    # -- connections ---------------------------------------------------------------------------------------------------
    async def connect(self, name: str) -> Bus:
        """A bus connection as the coordinator, as `watch`, or as an agent."""
        identity = self.broker.keyring.identity(name)
        return await connect(self.broker.url, name, identity.seed)

    @property
    def watch_command(self) -> str:
        """What to type in a second terminal. A fleet in a temporary directory is found by itself."""
        if self.settings.directory is None:
            return "syncline watch"
        return f"syncline watch --connect {self.broker.url} --key {self.broker.keyring.path('watch')}"

    @staticmethod
    async def ask_coordinator(bus: Bus, subject: str, question: bytes, patience_s: float = 60.0) -> bytes:
        """One question to the coordinator, asked again while it is still coming up. Raises NoResponders after that."""
        deadline = asyncio.get_running_loop().time() + patience_s
        while True:
            try:
                return await bus.request(subject, question, patience_s)
            except NoResponders:
                if asyncio.get_running_loop().time() > deadline:
                    raise
            await asyncio.sleep(0.05)


def check_room(settings: FleetSettings) -> None:
    """Raises ConfigError where the disk has no room for a run: at once, and not when the first one is submitted."""
    if settings.max_file_store_bytes is not None:
        return
    wanted = (settings.directory or Path(tempfile.gettempdir())).absolute()
    place = next(path for path in (wanted, *wanted.parents) if path.exists())
    free, needed = (
        shutil.disk_usage(place).free,
        LEAST_BYTES * 4 // 3,
    )  # the broker takes three quarters of what is free
    if free >= needed:
        return
    problem = f"{place} has {free >> 20} MiB free, a fleet on this machine needs {needed >> 20} MiB at least"
    if settings.directory is None:
        raise ConfigError("TMPDIR", problem, "Free some, or set TMPDIR to a directory on a larger disk")
    raise ConfigError("--directory", problem, "Free some, or name one on a larger disk")


def agent_names(count: int) -> Sequence[str]:
    return [f"a{i}" for i in range(1, count + 1)]
