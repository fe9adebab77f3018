"""What a dead coordinator has left: which models are kept, and which blobs belong to nobody."""

from __future__ import annotations

from typing import Any

import pytest

from syncline.bus.base import StreamConfig, StreamState
from syncline.bus.commits import put_commit
from syncline.bus.memory.bus import MemoryBroker, MemoryBus
from syncline.wire import subjects
from syncline.wire.chunks import LEAST_PAYLOAD_BYTES
from syncline.wire.messages import BlobRef, Committed, Head, Plan, PlanEntry
from syncline_coordinator.retention import kept_models, leftovers, uncommitted


def ref(n: int) -> BlobRef:
    return BlobRef(id=f"{n:032x}", size=10, chunks=1)


def head(version: int, **more: Any) -> Head:
    previous = ref(version - 1) if version else None
    return Head(run="r", term=3, version=version, phase="training", model=ref(version), previous=previous, **more)


def record(version: int, term: int, model: BlobRef, updates: int = 0) -> Committed:
    entry = PlanEntry(agent="a1", clock=1, weight=1.0, blob=model, digest=b"d" * 32)
    plan = Plan(version=version, reason="all", merged=[entry] * updates)
    return Committed(run="r", term=term, version=version, digest="", model=model, plan=plan,
                     bytes_up=0, bytes_down=0, phases_s={})  # fmt: skip


async def log_of(*records: Committed) -> MemoryBus:
    """A bus with the log of these commits."""
    bus = MemoryBroker(max_payload=LEAST_PAYLOAD_BYTES).connect("coordinator")
    await bus.ensure_stream(StreamConfig(subjects.log_stream("r"), ("syncline.v1.r.log.>",), 1 << 20, 1, "refuse"))
    for each in records:
        await put_commit(bus, each)
    return bus


class ModelBus:
    """The subjects of a model stream."""

    def __init__(self, held: list[str]) -> None:
        self.held = held

    async def state(self, stream: str, subjects_filter: str = "") -> StreamState:
        return StreamState(0, 0, 1, 0, dict.fromkeys(self.held, 1))


@pytest.mark.parametrize("keep", [2, 3, 5])
@pytest.mark.parametrize("updates", [0, 100])
async def test_the_models_of_the_last_versions_are_kept_the_oldest_first(keep: int, updates: int) -> None:
    bus = await log_of(*(record(v, 1, ref(v), updates) for v in range(1, 30)))
    assert await kept_models(bus, head(29), keep) == [ref(v) for v in range(30 - keep, 30)]


async def test_a_record_of_a_version_that_was_not_committed_keeps_nothing() -> None:
    bus = await log_of(record(1, 1, ref(1)), record(2, 1, ref(2)), record(3, 2, ref(77)))
    assert await kept_models(bus, head(2), 3) == [ref(1), ref(2)]


async def test_of_several_records_of_one_version_the_last_terms_counts() -> None:
    """Its coordinator was killed before the commit, or came back after it was replaced."""
    bus = await log_of(
        record(1, 1, ref(71)), record(1, 2, ref(1)), record(2, 2, ref(2)), record(3, 2, ref(3)), record(1, 1, ref(72))
    )
    assert await kept_models(bus, head(3), 3) == [ref(1), ref(2), ref(3)]


async def test_without_a_log_there_is_what_head_names() -> None:
    bus = await log_of()
    assert await kept_models(bus, head(0), 2) == [ref(0)] and await kept_models(bus, head(5), 3) == [ref(4), ref(5)]


async def test_what_an_interrupted_commit_left_in_the_log_is_found_and_what_counts_is_not() -> None:
    """With its chunks, be there a line that names them or not."""
    bus = await log_of(
        record(4, 1, ref(74), 100),  # a coordinator that was replaced put it late
        record(4, 2, ref(4), 100),
        record(5, 2, ref(5), 100),
        record(6, 1, ref(6), 100),
        record(6, 2, ref(6)),
    )
    await bus.purge(subjects.log_stream("r"), subjects.log_record("r", 6, 1))  # killed between the record and its line
    assert await uncommitted(bus, head(5)) == [subjects.log_record("r", v, t) for v, t in ((4, 1), (6, 1), (6, 2))]


async def test_blobs_that_nobody_names_are_left_over() -> None:
    now = head(5, manifest=ref(50), roster=ref(51), plan=ref(52))

    def model(n: int) -> str:
        return subjects.model_prefix("r", ref(n).id)

    def outer(n: int) -> str:
        return subjects.outer_prefix("r", ref(n).id)

    named = [model(n) for n in (3, 4, 5, 50, 51, 52)] + [outer(n) for n in (3, 4, 5)]
    alone = sorted([model(2), outer(2), model(6), outer(6), model(60)])
    bus: Any = ModelBus([f"{prefix}.{k}" for prefix in (*named, *alone) for k in range(3)])
    assert await leftovers(bus, now, [ref(3), ref(4), ref(5)]) == alone
