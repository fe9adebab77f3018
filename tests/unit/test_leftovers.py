"""What a dead coordinator has left: which models are kept, and which blobs belong to nobody."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from syncline.bus.base import Stored, StreamState
from syncline.wire import subjects
from syncline.wire.messages import BlobRef, Committed, Head, Plan, encode
from syncline_coordinator.leftovers import kept_models, leftovers


def ref(n: int) -> BlobRef:
    return BlobRef(id=f"{n:032x}", size=10, chunks=1)


def head(version: int, **more: Any) -> Head:
    previous = ref(version - 1) if version else None
    return Head(run="r", term=3, version=version, phase="training", model=ref(version), previous=previous, **more)


def record(version: int, term: int, model: BlobRef) -> bytes:
    plan = Plan(version=version, reason="all", merged=[])
    return encode(
        Committed(run="r", term=term, version=version, digest="", model=model, plan=plan,
                  bytes_up=0, bytes_down=0, phases_s={})
    )  # fmt: skip


class LogBus:
    """A log, and the subjects of a model stream."""

    def __init__(self, records: list[bytes], held: list[str] | None = None) -> None:
        self.records, self.held = records, held or []

    async def state(self, stream: str, subjects_filter: str = "") -> StreamState:
        return StreamState(0, 0, 1, len(self.records), dict.fromkeys(self.held, 1))

    async def read(self, stream: str, from_seq: int, limit: int) -> list[Stored]:
        records = list(enumerate(self.records, 1))[from_seq - 1 : from_seq - 1 + limit]
        return [Stored("", data, seq, 0.0) for seq, data in records]


Ask = Callable[..., Awaitable[list[BlobRef]]]


@pytest.mark.parametrize("keep", [2, 3, 5])
async def test_the_models_of_the_last_versions_are_kept_the_oldest_first(keep: int) -> None:
    bus: Any = LogBus([record(v, 1, ref(v)) for v in range(1, 30)])
    assert await kept_models(bus, head(29), keep) == [ref(v) for v in range(30 - keep, 30)]


async def test_a_record_of_a_version_that_was_not_committed_keeps_nothing() -> None:
    bus: Any = LogBus([record(1, 1, ref(1)), record(2, 1, ref(2)), record(3, 2, ref(77))])
    assert await kept_models(bus, head(2), 3) == [ref(1), ref(2)]


async def test_of_several_records_of_one_version_the_last_terms_counts() -> None:
    """Its coordinator was killed before the commit, or came back after it was replaced."""
    records = [
        record(1, 1, ref(71)),
        record(1, 2, ref(1)),
        record(2, 2, ref(2)),
        record(3, 2, ref(3)),
        record(1, 1, ref(72)),
    ]
    bus: Any = LogBus(records)
    assert await kept_models(bus, head(3), 3) == [ref(1), ref(2), ref(3)]


async def test_without_a_log_there_is_what_head_names() -> None:
    bus: Any = LogBus([])
    assert await kept_models(bus, head(0), 2) == [ref(0)] and await kept_models(bus, head(5), 3) == [ref(4), ref(5)]


async def test_blobs_that_nobody_names_are_left_over() -> None:
    now = head(5, manifest=ref(50), roster=ref(51), plan=ref(52))
    model, outer = (lambda n: subjects.model_prefix("r", ref(n).id)), (lambda n: subjects.outer_prefix("r", ref(n).id))
    named = [model(n) for n in (3, 4, 5, 50, 51, 52)] + [outer(n) for n in (3, 4, 5)]
    alone = sorted([model(2), outer(2), model(6), outer(6), model(60)])
    bus: Any = LogBus([], [f"{prefix}.{k}" for prefix in (*named, *alone) for k in range(3)])
    assert await leftovers(bus, now, [ref(3), ref(4), ref(5)]) == alone
