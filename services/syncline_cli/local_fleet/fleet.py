"""A local fleet: the embedded broker, a coordinator and agents on this machine, each a process.

Used by `syncline demo`, `run --local`, `bench`, `syncline.local_fleet` and the tests. One nursery imports torch once and forks
all services. All processes end, and the temporary directory is removed, when this process ends, even by SIGKILL.
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
TASK_DIR = "task.dir"  # a file in the fleet's directory that names the directory of task files
URL = "broker.url"  # a file in the fleet's directory with the broker's address, for other commands on this machine


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """The settings of a local fleet."""

    agents: tuple[str, ...]  # names
    directory: Path | None = None  # None: a temporary one, removed at the end
    port: int = 0  # of the broker; 0: any free one
    allow_task: tuple[str, ...] = DEFAULT_ALLOWED  # patterns
    task_dir: Path = field(default_factory=Path.cwd)
    threads: int = 1  # of torch, in each service
    device: str = "auto"
    max_file_store_bytes: int | None = None  # None: three quarters of the free disk
    max_payload_bytes: int = MAX_PAYLOAD_BYTES


class LocalFleet:
    """Starts all processes on entry and ends them on exit.

    Call `preload` as early as possible: it starts importing torch in the background.
    """

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
        """Start the nursery, which imports torch, the services and `modules`."""
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
        """End the services, then the broker. Stopping twice changes nothing."""
        try:
            await self._nursery.close(STOP_S)
        finally:
            await self.broker.stop()

    # -- services ------------------------------------------------------------------------------------------------------
    async def start_coordinator(self) -> Worker:
        """Start the coordinator; also used to start it again after its end."""
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
        """Start an agent; `changes` replace fields of AgentOptions."""
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
        """Send a signal to a service; a service that has ended ignores it."""
        try:
            self.workers[name].signal(which)
        except NurseryDied:
            pass

    async def kill(self, name: str) -> None:
        """Kill a service and wait for its end."""
        self.signal(name, signal.SIGKILL)
        await self.workers[name].exited

    def _log(self, name: str) -> str:
        return str(self.broker.directory / "logs" / f"{name}.log")

    # -- connections ---------------------------------------------------------------------------------------------------
    async def connect(self, name: str) -> Bus:
        """Connect to the broker with the key of the coordinator, of `watch`, or of an agent."""
        identity = self.broker.keyring.identity(name)
        return await connect(self.broker.url, name, identity.seed)

    @property
    def watch_command(self) -> str:
        """The command that watches this fleet from a second terminal; a temporary directory is found without options."""
        if self.settings.directory is None:
            return "syncline watch"
        return f"syncline watch --connect {self.broker.url} --key {self.broker.keyring.path('watch')}"

    @staticmethod
    async def ask_coordinator(bus: Bus, subject: str, question: bytes, patience_s: float = 60.0) -> bytes:
        """Ask the coordinator, and ask again while it starts. Raises NoResponders after `patience_s`."""
        deadline = asyncio.get_running_loop().time() + patience_s
        while True:
            try:
                return await bus.request(subject, question, patience_s)
            except NoResponders:
                if asyncio.get_running_loop().time() > deadline:
                    raise
            await asyncio.sleep(0.05)


def check_room(settings: FleetSettings) -> None:
    """Raise ConfigError at the start of a fleet if the disk has no room for any run."""
    if settings.max_file_store_bytes is not None:
        return
    wanted = (settings.directory or Path(tempfile.gettempdir())).absolute()
    place = next(path for path in (wanted, *wanted.parents) if path.exists())
    free = shutil.disk_usage(place).free
    needed = LEAST_BYTES * 4 // 3  # the broker takes three quarters of the free space
    if free >= needed:
        return
    problem = f"{place} has {free >> 20} MiB free, a fleet on this machine needs {needed >> 20} MiB at least"
    if settings.directory is None:
        raise ConfigError("TMPDIR", problem, "Free some, or set TMPDIR to a directory on a larger disk")
    raise ConfigError("--directory", problem, "Free some, or name one on a larger disk")


def agent_names(count: int) -> Sequence[str]:
    """Return a1, a2, … ."""
    return [f"a{i}" for i in range(1, count + 1)]
