"""Both buses keep the contract, and the contract notices a bus that does not."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from contract import MAX_STORE_BYTES, Contract

from syncline.bus.base import Bus
from syncline.bus.embedded import EmbeddedBroker
from syncline.bus.memory import MemoryBroker
from syncline.bus.nats import Connection, NatsBus
from syncline.bus.violations import Violation


class NatsBackend:
    def __init__(self, broker: EmbeddedBroker) -> None:
        self._broker, self._log = broker, broker.violations()
        self._violations: list[Violation] = []
        self.buses: list[NatsBus] = []

    async def connect(self, who: str, name: str = "") -> Bus:
        key = self._broker.keyring.identity(who)
        self.buses.append(await NatsBus.connect(Connection(self._broker.url, name or who, key.seed)))
        return self.buses[-1]

    async def stop(self) -> None:
        await self._broker.kill()

    async def start(self) -> None:
        await self._broker.restart()

    def violations(self) -> list[Violation]:
        self._violations += self._log.read()
        return self._violations


class MemoryBackend:
    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self.buses: list[Bus] = []

    async def connect(self, who: str, name: str = "") -> Bus:
        account = {"coordinator": "CORE", "watch": "WATCH"}.get(who, "FLEET")
        self.buses.append(self._broker.connect(f"{who} {len(self.buses)}", account, who, inbox=name))
        return self.buses[-1]

    async def stop(self) -> None:
        self._broker.stop()

    async def start(self) -> None:
        self._broker.start()

    def violations(self) -> list[Violation]:
        return self._broker.violations


class TestNats(Contract):
    @pytest.fixture
    async def backend(self) -> AsyncIterator[NatsBackend]:
        async with EmbeddedBroker(agents=["a1", "a2"], max_file_store_bytes=MAX_STORE_BYTES) as broker:
            backend = NatsBackend(broker)
            yield backend
            for bus in backend.buses:
                await bus.close()


class TestMemory(Contract):
    @pytest.fixture
    async def backend(self) -> AsyncIterator[MemoryBackend]:
        backend = MemoryBackend(MemoryBroker(max_store_bytes=MAX_STORE_BYTES))
        yield backend
        for bus in backend.buses:
            await bus.close()
