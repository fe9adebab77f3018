"""A fleet on this machine as an async context manager: the implementation of `syncline.local_fleet`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from syncline.errors import ConfigError
from syncline.tasks import DEFAULT_ALLOWED
from syncline_cli.local_fleet.fleet import FleetSettings, LocalFleet, agent_names
from syncline_cli.local_fleet.preload import start_nursery
from syncline_cli.local_fleet.requirements import check_broker

MAX_AGENTS = 64


@asynccontextmanager
async def local_fleet(
    agents: int, allow_task: tuple[str, ...], task_dir: Path | None, directory: Path | None, threads: int
) -> AsyncIterator[LocalFleet]:
    """See `syncline.local_fleet`."""
    if not 1 <= agents <= MAX_AGENTS:
        raise ConfigError("agents", f"{agents} is out of range", f"Use 1 to {MAX_AGENTS}")
    check_broker("local_fleet")
    settings = FleetSettings(
        tuple(agent_names(agents)),
        directory=directory,
        allow_task=(*DEFAULT_ALLOWED, *allow_task),
        task_dir=task_dir or Path.cwd(),
        threads=threads,
    )
    async with LocalFleet(settings, start_nursery()) as fleet:
        yield fleet
