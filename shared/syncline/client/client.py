"""The Python client: submit, follow, list, stop and export runs.

    async with syncline.connect("nats://hub:4222", key="core/coordinator.nk") as client:
        await client.submit(syncline.load_spec(Path("digits.yaml")))
        async for progress in client.follow("digits"):
            print(progress.version, progress.metrics)
        await client.export("digits", Path("digits.safetensors"))

The command line uses the same functions; it only draws what they return.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from syncline.bus.base import Bus
from syncline.bus.connect import PATIENCE_S
from syncline.bus.connect import connect as connect_bus
from syncline.bus.server.accounts import WATCH, read_seed
from syncline.bus.tls import Tls
from syncline.client import export, history, runs
from syncline.client.follow import HeadFollower, Progress, RunFollower
from syncline.client.keys import watch_key
from syncline.client.runs import RunSummary
from syncline.client.stop import StopResult, stop
from syncline.client.story import story
from syncline.client.submit import Say, say_nothing, submit
from syncline.errors import RunFailed
from syncline.extras import missing_extra
from syncline.observe.fleet_state import FleetState
from syncline.spec.run_spec import RunSpec
from syncline.wire.messages import Committed, Head

DEFAULT_URL = "nats://127.0.0.1:4222"
CONNECTION_NAME = "client"


class Client:
    """Runs on one broker. Made by `connect` and `local_fleet`; any number of calls may be in progress at a time."""

    def __init__(self, bus: Bus, feed_bus: Bus | None = None, *, url: str = "") -> None:
        """
        Args:
            bus: a connection with a coordinator's key.
            feed_bus: a connection with a watcher's key, which hears the agents' metrics; default: `bus`.
            url: the broker's address, for information.
        """
        self.url = url
        self._bus = bus
        self._feed_bus = bus if feed_bus is None else feed_bus

    async def submit(self, spec: RunSpec, *, patience_s: float = 60.0, say: Say = say_nothing) -> list[str]:
        """Submit a run and wait until the coordinator has accepted it.

        Args:
            spec: the run's settings, from `load_spec` or `RunSpec(...)`; its name must be new on the broker.
            patience_s: time to wait for a coordinator that is not up.
            say: receives reports of what the coordinator is doing.

        Returns:
            Warnings about the settings.

        Raises:
            ConfigError: the run is refused; names the setting, its value and a hint.
            NoResponders: no coordinator is up within `patience_s`.
        """
        return list((await submit(self._bus, spec, patience_s=patience_s, say=say)).warnings)

    async def follow(self, run: str) -> AsyncIterator[Progress]:
        """Yield the run's progress whenever a version, a metric or an event arrives; end with the run.

        Raises:
            ConfigError: no such run.
            RunFailed: the run failed. The last progress, with the failed head, was yielded before.
        """
        await runs.head_of(self._bus, run)
        spec = await runs.spec_of(self._bus, run)
        follower = RunFollower(self._bus, self._feed_bus, FleetState.of(run if spec is None else spec))
        await follower.open()
        try:
            async for progress in follower.updates(spec):
                yield progress
        finally:
            await follower.close()
        _raise_if_failed(follower.head)

    async def wait(self, run: str) -> Head:
        """Wait for the end of a run and return its last head.

        Raises:
            ConfigError: no such run.
            RunFailed: the run failed.
        """
        await runs.head_of(self._bus, run)
        head = await HeadFollower(self._bus, run).until_ended()
        _raise_if_failed(head)
        return head

    async def runs(self) -> list[RunSummary]:
        """Return all runs on the broker, the newest first."""
        return await runs.summaries(self._bus)

    def history(self, run: str, first: int = 1, last: int | None = None) -> AsyncIterator[Committed]:
        """Yield the commits `first` to `last` (default: the newest): merged updates with their weights, drops, phases.

        Raises:
            ConfigError: no such run, or the log does not hold a version.
        """
        return history.commits(self._bus, run, first, last)

    async def story(self, run: str, agent: str) -> list[str]:
        """Return the coordinator's recent decisions about an agent, one on each line, while the run goes on.

        Raises:
            ConfigError: no such run, or no recent decision about this agent.
            NoResponders: no coordinator is up.
        """
        return await story(self._bus, run, agent)

    async def stop(self, run: str, by: str = "") -> StopResult:
        """Stop a run and wait for its end; its models and its log are kept.

        Args:
            by: the name in the run's reason; default: user@host.

        Raises:
            ConfigError: no such run.
            NoResponders: no coordinator is up.
        """
        return await stop(self._bus, run, by)

    async def model(self, run: str, version: int | None = None) -> export.Model:
        """Return a center's tensors by name, as numpy arrays; `version` None: the newest.

        Raises:
            ConfigError: no such run, or the version is not kept.
        """
        return await export.fetch(self._bus, run, version)

    async def export(self, run: str, file: Path, version: int | None = None) -> export.Model:
        """Write a center to a safetensors file that plain PyTorch loads, and return the same tensors.

        Raises:
            ConfigError: no such run, the version is not kept, or the file cannot be written.
        """
        model = await self.model(run, version)
        export.save(model, file)
        return model


def _raise_if_failed(head: Head | None) -> None:
    if head is not None and head.phase != "done":
        raise RunFailed(f"run {head.run}: {head.reason}")


@asynccontextmanager
async def connect(
    url: str = DEFAULT_URL,
    *,
    key: str | Path = "",
    watch: str | Path = "",
    tls: Tls | None = None,
    patience_s: float = PATIENCE_S,
) -> AsyncIterator[Client]:
    """Connect to a broker.

    Args:
        url: one server, or several of a cluster with commas between them.
        key: the coordinator's key file; '' for a broker without accounts.
        watch: the watchers' key file, which hears the agents' metrics; default: `watch.nk` of the set of `key`.
        tls: certificate files.
        patience_s: time to try for the first connection.

    Raises:
        ConfigError: a key file cannot be used.
        Denied: the broker refuses the key.
        Unreachable: no broker answers.
    """
    feed_key = str(watch) or watch_key(str(key))
    seed = read_seed(Path(key)) if key else ""
    feed_seed = read_seed(Path(feed_key)) if feed_key else ""
    bus = await connect_bus(url, CONNECTION_NAME, seed, tls=tls, patience_s=patience_s)
    try:
        if feed_seed == seed:
            yield Client(bus, url=url)
            return
        feed_bus = await connect_bus(url, WATCH, feed_seed, tls=tls, patience_s=patience_s)
        try:
            yield Client(bus, feed_bus, url=url)
        finally:
            await feed_bus.close()
    finally:
        await bus.close()


@asynccontextmanager
async def local_fleet(
    agents: int = 2,
    *,
    allow_task: Sequence[str] = (),
    task_dir: Path | None = None,
    directory: Path | None = None,
    threads: int = 1,
) -> AsyncIterator[Client]:
    """Start a broker, a coordinator and agents on this machine, each a process, and connect to them.

    All processes end with the context, or with this process. Enter it before starting other threads.

    Args:
        agents: number of agents, named a1, a2, ….
        allow_task: tasks that the services may run besides `syncline.tasks.*`, as `module:Class` or `file.py:Class`; `*` is a
            wildcard.
        task_dir: the directory of task files; default: the current one.
        directory: keeps the broker's data, keys and logs; default: a temporary directory, removed at the end.
        threads: of torch, in each service.

    Raises:
        ConfigError: the extra `local` is not installed, or the disk has no room for a run.
    """
    try:
        # By name: the services import this library, so that a plain import would be a cycle.
        context = importlib.import_module("syncline_cli.local_fleet.context")
    except ModuleNotFoundError as error:
        raise missing_extra("local_fleet", error.name or "syncline_cli", "local") from None
    async with context.local_fleet(agents, tuple(allow_task), task_dir, directory, threads) as up:
        bus = await up.connect("coordinator")
        try:
            feed_bus = await up.connect(WATCH)
            try:
                yield Client(bus, feed_bus, url=up.broker.url)
            finally:
                await feed_bus.close()
        finally:
            await bus.close()
