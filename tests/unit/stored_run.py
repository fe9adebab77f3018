"""A run as it lies on the bus, made without a coordinator: head, spec, manifest, models and the log."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt
import xxhash

from syncline.bus.base import Bus
from syncline.bus.blobs import put_blob, put_record
from syncline.bus.commits import put_commit
from syncline.model.manifest import Entry, Manifest
from syncline.spec.run_spec import RunSpec
from syncline.wire import subjects
from syncline.wire.messages import BlobRef, Committed, Dropped, Head, Plan, PlanEntry, Roster, Submit, encode
from syncline_coordinator.reservation import RUNS, Reservation

RUN = "digits-1"
LAYOUT = Manifest(
    dtype="fp32",
    elements=6,
    chunk_elements=4,
    tensors=[
        Entry(name="fc.weight", shape=[2, 2], offset=0, elements=4),
        Entry(name="fc.bias", shape=[2], offset=4, elements=2),
    ],
    local=["bn.num_batches_tracked"],
)


def center(version: int) -> npt.NDArray[np.float32]:
    """What the flat center of that version is here."""
    return np.arange(6, dtype=np.float32) + np.float32(version)


async def bucket(bus: Bus) -> None:
    await bus.ensure_bucket(RUNS)


async def submitted(bus: Bus, run: str = RUN, head: Head | None = None) -> RunSpec:
    """The run's spec and streams, and its first head."""
    spec = RunSpec(name=run, task="syncline.tasks.digits:Digits")
    await bucket(bus)
    for stream in Reservation.of(spec, LAYOUT, 4).streams(run):
        await bus.ensure_stream(stream)
    said = encode(Submit(spec=spec.model_dump(mode="json")))
    await bus.kv_create(subjects.RUNS_BUCKET, subjects.spec_key(run), said)
    await bus.kv_create(subjects.RUNS_BUCKET, subjects.head_key(run), encode(head or waiting(run)))
    return spec


def waiting(run: str = RUN) -> Head:
    return Head(run=run, term=1, version=0, phase="waiting")


async def lose_head(bus: Bus, run: str = RUN) -> None:
    await bus.purge(f"KV_{subjects.RUNS_BUCKET}", f"$KV.{subjects.RUNS_BUCKET}.{subjects.head_key(run)}")


class StoredRun:
    """Versions 0 … `versions` of a run; `purge(v)` takes the chunks of one away."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.models: list[BlobRef] = []

    async def make(self, versions: int) -> StoredRun:
        await submitted(self.bus)
        manifest = await put_record(self.bus, partial(subjects.model_prefix, RUN), encode(LAYOUT))
        roster = Roster(
            parts=2, agents=["a1", "a2"], clocks=[versions] * 2, flags=bytes([3, 3]), presence=bytes([2, 0])
        )
        listed = await put_record(self.bus, partial(subjects.model_prefix, RUN), encode(roster))
        for version in range(versions + 1):
            self.models.append(await self._put(center(version).tobytes(), LAYOUT.chunk_bytes))
            if version:
                await self.log(version, term=1)
        head = Head(
            run=RUN,
            term=1,
            version=versions,
            phase="training",
            digest=digest_of(versions),
            model=self.models[-1],
            previous=self.models[-2] if versions else None,
            manifest=manifest,
            roster=listed,
            reason="2 of 2",
        )
        await self.write(head)
        return self

    async def write(self, head: Head) -> None:
        there = await self.bus.kv_get(subjects.RUNS_BUCKET, subjects.head_key(RUN))
        assert there is not None
        await self.bus.kv_update(subjects.RUNS_BUCKET, subjects.head_key(RUN), encode(head), there.revision)

    async def log(self, version: int, term: int, digest: str = "") -> None:
        await put_commit(self.bus, commit(version, term, self.models[version], digest))

    async def purge(self, version: int) -> None:
        prefix = subjects.model_prefix(RUN, self.models[version].id)
        await self.bus.purge(subjects.model_stream(RUN), f"{prefix}.>")

    async def _put(self, data: bytes, chunk_bytes: int) -> BlobRef:
        prefix = partial(subjects.model_prefix, RUN)
        return (await put_blob(self.bus, prefix, memoryview(data), chunk_bytes))[0]


def commit(version: int, term: int, model: BlobRef, digest: str = "") -> Committed:
    merged = [
        PlanEntry(
            agent=f"a{i}",
            clock=version,
            lag=i - 1,
            weight=0.5,
            blob=model,
            digest=b"d" * 32,
            samples=449,
            steps=20,
            seconds=1.25 * i,
        )
        for i in (1, 2)
    ]
    return Committed(
        run=RUN,
        term=term,
        version=version,
        digest=digest or digest_of(version),
        model=model,
        plan=Plan(version=version, reason="quorum 2 of 3 + 1.0 s", merged=merged, late=["a3"]),
        dropped=[Dropped(agent="a4", clock=version, reason="late: the round of version 0 is closed")],
        bytes_up=2_000_000,
        bytes_down=1_000_000,
        phases_s={"collect": 1.5, "merge": 0.25},
    )


def digest_of(version: int) -> str:
    return xxhash.xxh3_128_hexdigest(center(version).data)
