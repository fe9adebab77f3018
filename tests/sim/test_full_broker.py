"""A full disk of the broker pauses a run: one event reports the pause, another one its end."""

from __future__ import annotations

import asyncio

import pytest

from syncline.bus.memory.bus import MemoryBus
from syncline.errors import BrokerFull, BusError, DiskFull, StoreDown, StreamFull, Unreachable
from syncline.observe.telemetry import Event
from syncline.wire import subjects
from syncline_sim.invariants import Invariants
from syncline_sim.scenario import Scenario, small_spec
from syncline_sim.simulate import simulate

FULL_S = (0.9, 40.0)
DISK = "Free some of the disk that holds the broker's store, and start nats-server again"
ERRORS = {
    "disk": (DiskFull("no space left on device"), DISK),
    "off": (StoreDown("the broker has no JetStream"), DISK),
    "account": (BrokerFull("resource limits exceeded"), "Raise max_file of the account"),
    "stream": (StreamFull("maximum bytes exceeded"), "or raise max_file_store"),
}


def is_full() -> bool:
    return FULL_S[0] < asyncio.get_running_loop().time() < FULL_S[1]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """What a simulation tells of the fleet, besides what its coordinator is up to."""
    heard: list[Event] = []
    on_published = Invariants.on_published

    def hear(self: Invariants, at: str, data: bytes) -> None:
        on_published(self, at, data)
        if at.startswith("syncline.v1.fleet.events."):
            event = Event.model_validate_json(data)
            heard.extend([event] if event.event.startswith("broker-") else [])

    monkeypatch.setattr(Invariants, "on_published", hear)
    return heard


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("subject", [".model.", ".log."])
def test_a_broker_that_refuses_the_coordinator_is_told_once_and_its_end_too(
    subject: str, kind: str, told: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    error, hint = ERRORS[kind]
    refused: list[BusError] = []
    put = MemoryBus.put

    async def full(self: MemoryBus, at: str, data: bytes, *, bulk: bool = False) -> int:
        if subject in at and is_full():
            refused.append(error)
            raise error
        return await put(self, at, data, bulk=bulk)

    monkeypatch.setattr(MemoryBus, "put", full)
    outcome = simulate(Scenario(small_spec()))
    assert not outcome.problems, "\n".join([*outcome.problems, *outcome.timeline])
    assert len(refused) > 3, "it tries again and again"
    assert [event.event for event in told] == ["broker-full", "broker-has-room"]
    for part in ("run r waits", str(error), hint):
        assert part in told[0].text


def test_a_full_disk_that_only_agents_meet_is_found_and_told(
    told: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """nats-server leaves their puts unanswered, and the coordinator puts nothing before it has updates."""
    put, check_store = MemoryBus.put, MemoryBus.check_store
    looks: list[tuple[str, ...]] = []

    async def unanswered(self: MemoryBus, at: str, data: bytes, *, bulk: bool = False) -> int:
        if ".update." in at and is_full():
            await asyncio.sleep(5.0)
            raise Unreachable(f"{at}: no answer within 5 s")
        return await put(self, at, data, bulk=bulk)

    async def check(self: MemoryBus, *streams: str) -> None:
        await check_store(self, *streams)
        if is_full():
            looks.append(streams)
            if subjects.updates_stream("r") in streams:
                raise DiskFull("no space left on device")

    monkeypatch.setattr(MemoryBus, "put", unanswered)
    monkeypatch.setattr(MemoryBus, "check_store", check)
    outcome = simulate(Scenario(small_spec()))
    assert not outcome.problems, "\n".join([*outcome.problems, *outcome.timeline])
    assert len(looks) > 3 and all(streams[0] == "KV_syncline-runs" for streams in looks)
    assert [event.event for event in told] == ["broker-full", "broker-has-room"]
    for part in ("run r waits", "no space left on device", DISK):
        assert part in told[0].text
