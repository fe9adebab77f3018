"""A real nats-server per test, on a free port, owned by the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

import pytest
from nats.aio.client import Client

from syncline.bus.server.accounts import Identity
from syncline.bus.server.embedded import EmbeddedBroker

pytest.register_assert_rewrite("bus.contract_store", "bus.contract_core", "bus.contract_failures")


async def until(true: Callable[[], bool | Awaitable[bool]], what: str, timeout_s: float = 10.0) -> None:
    """Returns as soon as it is so, and fails the test where it does not become so."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while True:
        answer = true()
        if answer if isinstance(answer, bool) else await answer:
            return
        assert asyncio.get_running_loop().time() < deadline, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(0.01)


async def flushed(*clients: Client) -> None:
    """The broker has dealt with all that these clients sent. (One flush of nats-py may overtake what is still queued.)"""
    for client in clients:
        await client.flush()
        await client.flush()


class Connect(Protocol):
    """Connects a bare client."""

    async def __call__(self, broker: EmbeddedBroker, who: str | Identity) -> Client: ...


@pytest.fixture
def eventually() -> Callable[..., Awaitable[None]]:
    return until


@pytest.fixture
def flush() -> Callable[..., Awaitable[None]]:
    return flushed


@pytest.fixture
async def broker() -> AsyncIterator[EmbeddedBroker]:
    async with EmbeddedBroker(agents=["a1", "a2"]) as started:
        yield started


async def _quiet(_: Exception) -> None:
    """A refusal is looked for in the broker's log."""


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    clients: list[Client] = []

    async def connected(broker: EmbeddedBroker, who: str | Identity) -> Client:
        identity = broker.keyring.identity(who) if isinstance(who, str) else who

        options: dict[str, Any] = {"nkeys_seed_str": identity.seed, "inbox_prefix": f"_INBOX.{identity.name}".encode()}
        client = Client()
        clients.append(client)  # before it connects: one that is refused must be closed too
        await client.connect(
            broker.url, name=identity.name, error_cb=_quiet, allow_reconnect=False, connect_timeout=5, **options
        )
        return client

    yield connected
    for client in clients:
        await client.close()
