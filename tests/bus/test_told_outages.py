"""What a service logs while a real broker is away, refuses its key, and is back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest

from syncline.bus.nats.bus import NatsBus
from syncline.bus.nats.lane import Connection
from syncline.bus.nats.outage import NO_SERVER, REFUSED_KEY
from syncline.bus.server.accounts import Identity
from syncline.bus.server.embedded import EmbeddedBroker

Eventually = Callable[..., Awaitable[None]]


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    logging.getLogger("nats").setLevel(logging.CRITICAL)  # as services have it
    return lambda: [
        r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "broker" in r.getMessage()
    ]


async def test_a_broker_that_goes_and_comes_back_is_told_in_three_warnings(
    broker: EmbeddedBroker, eventually: Eventually, warnings: Callable[[], list[str]]
) -> None:
    bus = await NatsBus.connect(Connection(broker.url, "a1", broker.keyring.identity("a1").seed))
    try:
        await broker.kill()
        await eventually(lambda: len(warnings()) == 2, "the loss and its cause")
        await broker.restart()
        await eventually(lambda: "again, after" in warnings()[-1], "that it is back")
    finally:
        await bus.close()
    lost, away, back = warnings()
    assert lost.startswith(f"the connection to the broker at {broker.url} is lost: ") and away.endswith(NO_SERVER)
    assert back.startswith(f"connected to the broker at {broker.url} again, after ")


async def test_a_revoked_key_is_told_once_with_what_to_do(
    broker: EmbeddedBroker, eventually: Eventually, warnings: Callable[[], list[str]]
) -> None:
    identity: Identity = broker.keyring.identity("a1")
    bus = await NatsBus.connect(Connection(broker.url, "a1", identity.seed))
    try:
        broker.keyring.path("a1").unlink()
        await broker.add_agent("a3")  # which has the broker read its accounts again
        await eventually(lambda: any(REFUSED_KEY in line for line in warnings()), "the refusal")
        await asyncio.sleep(1.0)  # attempts to connect again meanwhile
    finally:
        await bus.close()
    assert sum(REFUSED_KEY in line for line in warnings()) == 1
    assert len(set(warnings())) == len(warnings()), "the loss, and each cause, once"
