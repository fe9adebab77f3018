"""The service's side of the training child: starts the child, asks it, and starts another one after its death. Knows no bus.

Service and child share a memory of `PROGRESS_BYTES` for the progress, then the inbox with the coded center, then the outboxes
with coded updates. Each box has `blob_bytes` of the run's manifest.
"""

from __future__ import annotations

import struct
from typing import NamedTuple, Protocol

from syncline.policy.asynchronous import OVERLAPPING
from syncline.runtime.child import Asked, ChildDied, ChildFailed, Start
from syncline.runtime.child_messages import (
    A,
    DescribeDevice,
    DeviceDescription,
    MakeElasticUpdate,
    PeriodReport,
    PrepareRun,
    Question,
    RetrySave,
    RunPrepared,
    SaveReport,
    TrainPeriod,
    UpdateReport,
)
from syncline.shm import SharedMemory
from syncline.spec.run_spec import RunSpec
from syncline.spec.sections import Async

PROGRESS = struct.Struct("<QQB7xQQ")  # the fields of ChildProgress, with STOP_EARLY between the second and the third
PROGRESS_BYTES = 64
STOP_EARLY = 16  # offset of the byte by which the service asks the child to end the period
STEPS_EXPECTED = 24  # offset of ChildProgress.steps
SAVE_AGAIN_S = 30.0  # until a save is tried again that the disk did not take


class ChildProgress(NamedTuple):
    """Progress of the training child."""

    steps_ever: int  # since its process began; batches of an evaluation count too
    step: int  # made in this period
    steps: int  # of this period; an estimate if the period is given in seconds; 0: not known yet
    rows: int  # of this agent's part


def outboxes(spec: RunSpec) -> int:
    """Return how many updates of an agent may be on their way at once: one is sent while the next one is made."""
    return OVERLAPPING if isinstance(spec.sync, Async) and spec.sync.overlap else 1


class Training(Protocol):
    """The training child as a session sees it. Its questions raise ConfigError, ChildFailed or ChildDied."""

    async def describe(self) -> DeviceDescription: ...
    async def prepare(self, question: PrepareRun) -> RunPrepared: ...
    async def period(self, question: TrainPeriod) -> PeriodReport:
        """Train a period. A wish to stop early counts for this period from the call on, also before the child begins."""
        ...

    async def make_elastic_update(self, question: MakeElasticUpdate) -> UpdateReport: ...
    async def retry_save(self, question: RetrySave) -> SaveReport: ...
    def inbox(self, nbytes: int) -> memoryview: ...
    def outbox(self, nbytes: int, number: int) -> memoryview: ...
    def progress(self) -> ChildProgress: ...
    def stop_early(self) -> None: ...
    async def close(self) -> None: ...


class ChildTraining:
    """A training child in a process of its own, with the tensors in shared memory."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._memory = SharedMemory()
        self._memory.grow(PROGRESS_BYTES)
        self._child: Asked | None = None

    async def describe(self) -> DeviceDescription:
        return await self._ask(DescribeDevice())

    async def prepare(self, question: PrepareRun) -> RunPrepared:
        return await self._ask(question)

    async def period(self, question: TrainPeriod) -> PeriodReport:
        self._memory.view()[STOP_EARLY] = (
            0  # reset here and not in the child, which begins later than this period's wish
        )
        return await self._ask(question)

    async def make_elastic_update(self, question: MakeElasticUpdate) -> UpdateReport:
        return await self._ask(question)

    async def retry_save(self, question: RetrySave) -> SaveReport:
        return await self._ask(question)

    def inbox(self, nbytes: int) -> memoryview:
        return self._memory.view()[PROGRESS_BYTES : PROGRESS_BYTES + nbytes]

    def outbox(self, nbytes: int, number: int) -> memoryview:
        begin = PROGRESS_BYTES + (1 + number) * nbytes
        return self._memory.view()[begin : begin + nbytes]

    def progress(self) -> ChildProgress:
        steps_ever, step, _, steps, rows = PROGRESS.unpack_from(self._memory.view(), 0)
        return ChildProgress(steps_ever, step, steps, rows)

    def stop_early(self) -> None:
        """Ask the child to end the period after the step that is under way."""
        self._memory.view()[STOP_EARLY] = 1

    async def close(self) -> None:
        if self._child is not None:
            child, self._child = self._child, None
            await child.close()

    async def _ask(self, question: Question[A]) -> A:
        if self._child is None:
            self._child = await self._start(self._memory)
        try:
            return await self._child.ask(question)
        except ChildFailed as error:
            if error.config is not None:
                raise error.config from None
            raise
        except ChildDied:
            await self.close()
            raise
