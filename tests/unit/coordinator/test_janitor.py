"""Which blobs the janitor lets go: those that do not grow any more. Time is an argument."""

from __future__ import annotations

from typing import Any

from syncline.bus.base import StreamState
from syncline.bus.blobs import UNOFFERED_S
from syncline.observe.telemetry import Telemetry
from syncline.wire import subjects
from syncline_coordinator.retention import LOOK_S, Janitor, Purger

RUN = "r"


class Held(dict[tuple[str, str], int]):
    """The updates stream: chunks by (agent, blob). It is the bus that the janitor looks at, and what it has purged."""

    def __init__(self, bus: Any) -> None:
        super().__init__()
        self.publish = bus.publish
        self.purged: list[str] = []

    async def state(self, stream: str, _: str) -> StreamState:
        assert stream == subjects.updates_stream(RUN)
        names = [f"{subjects.update_prefix(RUN, *blob)}.{k}" for blob, chunks in self.items() for k in range(chunks)]
        return StreamState(len(names), 0, 1, len(names), dict.fromkeys(names, 1))

    def add(self, _: str, prefix: str) -> None:
        self.purged.append(prefix)


def janitor(held: Any, offered: set[str]) -> Janitor:
    purger: Purger = held
    return Janitor(held, RUN, purger, Telemetry(held, RUN, subjects.COORDINATOR), lambda: offered)


async def test_a_blob_that_still_grows_is_on_its_way_however_long_that_takes(bus: Any) -> None:
    held = Held(bus)
    looks = janitor(held, set())
    for look in range(60):  # twenty minutes, a chunk in each hundred seconds
        held["a1", "b"] = 1 + look // 5
        await looks.look(look * LOOK_S)
    assert held.purged == []


async def test_a_blob_that_has_stopped_growing_goes_after_a_time_counted_from_its_last_chunk(bus: Any) -> None:
    held, now_s = Held(bus), 0.0
    looks = janitor(held, set())
    for chunks in (1, 2, 3):
        held["a1", "b"] = chunks
        await looks.look(now_s := now_s + 100.0)
    await looks.look(now_s + UNOFFERED_S)
    assert held.purged == []
    await looks.look(now_s + UNOFFERED_S + 1.0)
    assert held.purged == [subjects.update_prefix(RUN, "a1", "b")]


async def test_what_is_offered_stays_and_counts_anew_where_it_is_offered_no_more(bus: Any) -> None:
    held, offered = Held(bus), {"b"}
    looks = janitor(held, offered)
    held["a1", "b"] = 3
    await looks.look(0.0)
    await looks.look(10 * UNOFFERED_S)
    offered.clear()
    await looks.look(10 * UNOFFERED_S + 1.0)
    assert held.purged == []


async def test_an_agent_that_keeps_many_growing_blobs_is_named_all_the_same(bus: Any) -> None:
    held = Held(bus)
    looks = janitor(held, set())
    for chunks in (1, 2):
        held.update({("a1", name): chunks for name in "xyz"})
        await looks.look(chunks * LOOK_S)
    assert [b"over-quota" in data for _, data in bus.published] == [True]
