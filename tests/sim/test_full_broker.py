"""A full disk of the broker pauses a run: one event reports the pause, another one its end."""

from __future__ import annotations

import asyncio

import pytest

from syncline.bus.memory.bus import MemoryBus
from syncline.errors import BusError, StoreDown, StreamFull
from syncline.observe.telemetry import Event
from syncline_sim.invariants import Invariants
from syncline_sim.scenario import Scenario, small_spec
from syncline_sim.simulate import simulate

ERRORS = [StreamFull("no space left on device"), StoreDown("no space left on device: the broker has no JetStream")]


@pytest.mark.parametrize("error", ERRORS, ids=["full", "off"])
@pytest.mark.parametrize("subject", [".model.", ".log."])
def test_a_full_disk_is_told_once_and_its_end_too(
    subject: str, error: BusError, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Event] = []
    refused: list[float] = []
    put, on_published = MemoryBus.put, Invariants.on_published

    async def full(self: MemoryBus, at: str, data: bytes, *, bulk: bool = False) -> int:
        now_s = asyncio.get_running_loop().time()
        if subject in at and 0.9 < now_s < 30.0:
            refused.append(now_s)
            raise error
        return await put(self, at, data, bulk=bulk)

    def hear(self: Invariants, at: str, data: bytes) -> None:
        on_published(self, at, data)
        if at.startswith("syncline.v1.fleet.events."):
            told.append(Event.model_validate_json(data))

    monkeypatch.setattr(MemoryBus, "put", full)
    monkeypatch.setattr(Invariants, "on_published", hear)
    outcome = simulate(Scenario(small_spec()))
    assert not outcome.problems, "\n".join([*outcome.problems, *outcome.timeline])
    assert len(refused) > 3, "it tries again and again"
    about = [event for event in told if event.event.startswith("broker-")]
    assert [event.event for event in about] == ["broker-full", "broker-has-room"]
    assert "no space left on device" in about[0].text and "max_file_store" in about[0].text and "run r" in about[0].text
