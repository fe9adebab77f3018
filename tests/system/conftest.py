from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from harness import Fleet, settings

from syncline.nursery import Nursery
from syncline_cli.local import LocalFleet


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
