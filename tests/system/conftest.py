from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from syncline.bus.server.process import server_binary
from syncline.runtime.nursery import Nursery
from syncline_cli.local_fleet.fleet import LocalFleet
from system.command import until
from system.harness import Fleet, settings


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All system tests of a module share one event loop, so that they can share one fleet."""
    for item in items:
        if "system" in item.path.parts:
            item.add_marker(pytest.mark.system)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    yield LocalFleet.preload("torch._dynamo")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(nursery: Nursery) -> AsyncIterator[Fleet]:
    """Four agents, a coordinator and a broker, for all tests of a module."""
    async with LocalFleet(settings(4), nursery) as local:
        opened = await Fleet.open(local)
        yield opened
        await opened.close()


@pytest.fixture(scope="module")
def bare_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A nats-server without JetStream and without accounts."""
    log = tmp_path_factory.mktemp("bare") / "log"
    with log.open("wb") as out:
        server = subprocess.Popen([str(server_binary()), "-a", "127.0.0.1", "-p", "-1"], stderr=out)
    try:
        until(lambda: "Server is ready" in log.read_text(), 10.0, log.read_text)
        line = next(line for line in log.read_text().splitlines() if "Listening for client connections" in line)
        yield f"nats://{line.rpartition(' ')[2]}"
    finally:
        server.terminate()
        server.wait()
