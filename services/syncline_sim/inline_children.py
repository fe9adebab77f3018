"""Children without processes: an adapter that answers inside the simulation's process, and stubs of trainer and evaluator."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from syncline.model.manifest import ALIGN_ELEMENTS, Entry, Manifest
from syncline.runtime.child import ChildDied, Chore, Handlers, Start, answer_in, answered
from syncline.runtime.child_messages import (
    A,
    CopyCenter,
    DescribeDevice,
    DeviceDescription,
    Doing,
    Done,
    EvaluateCenter,
    EvaluationReport,
    MakeElasticUpdate,
    MakeModel,
    ModelLayout,
    PeriodReport,
    PrepareRun,
    Question,
    RunPrepared,
    TrainPeriod,
    UpdateReport,
    WriteInitialModel,
    encode,
)
from syncline.shm import SharedMemory
from syncline.spec.run_spec import RunSpec
from syncline.wire import messages
from syncline.wire.dtypes import DTYPES
from syncline_agent.local_update import local_update_of
from syncline_agent.training_child import PROGRESS_BYTES, ChildProgress, ChildTraining, outboxes

TASK = "syncline_sim.stubs:Stub"  # the task's name in specs of stubs; the stubs load no task
SLICES = 4  # reports of progress in a period
Seconds = Callable[[Question[Any]], float]  # question → its virtual duration
Vector = NDArray[np.float64]


class InlineChild:
    """A child with the interface of a process. Questions and answers pass through msgpack, as between processes.

    Args:
        handlers: the functions that answer questions, by name.
        memory: the memory shared with the service.
        seconds: gives the virtual duration of a question.
        chore: work between questions. It is done as soon as it is due and no question waits, and takes no virtual time.
    """

    def __init__(self, handlers: Handlers, memory: SharedMemory, seconds: Seconds, chore: Chore | None = None) -> None:
        self._handlers, self._memory, self._seconds, self._chore = handlers, memory, seconds, chore
        self._chore_timer: asyncio.TimerHandle | None = None
        self._lock = asyncio.Lock()
        self._died = asyncio.Event()
        self.doing = ""
        self._held_s = 0.0  # additional duration of the next step

    async def ask(self, question: Question[A]) -> A:
        data = encode(question)
        async with self._lock:
            self._cancel_chore()
            if await self._pass_time(question):
                data = answered(self._handlers, data)
                self._schedule_chore()
            else:
                data = encode(PeriodReport(stopped=True))
        answer = answer_in(data, question)
        assert not isinstance(answer, Doing)
        return answer

    async def close(self) -> None:
        self._end()

    def die(self) -> None:
        """Die as a process killed by the kernel."""
        self._end()

    def hold(self, seconds: float) -> None:
        """Prolong the current step, or else the next one, by so many seconds."""
        self._held_s += seconds

    def update_progress(self) -> None:
        """Bring the progress in the shared memory up to date, before the service reads it."""

    def stop(self) -> None:
        """Take note of the service's request to end the period, which is in the shared memory."""

    def _end(self) -> None:
        self._died.set()
        self._cancel_chore()

    def _schedule_chore(self) -> None:
        due_in_s = None if self._chore is None or self._died.is_set() else self._chore.due_in_s()
        if due_in_s is not None:
            self._chore_timer = asyncio.get_running_loop().call_later(max(0.0, due_in_s), self._do_chore)

    def _do_chore(self) -> None:
        assert self._chore is not None
        self._chore.do()
        self._schedule_chore()

    def _cancel_chore(self) -> None:
        if self._chore_timer is not None:
            self._chore_timer.cancel()
            self._chore_timer = None

    async def _pass_time(self, question: Question[Any]) -> bool:
        """Let the duration of a question pass, and report progress during a period.

        Returns:
            False if the service ended the period early.
        """
        seconds = self._seconds(question)
        if not isinstance(question, TrainPeriod):
            await self._pause(seconds)
            return True
        view = self._memory.view()
        view[8:16] = bytes(8)
        for _ in range(SLICES):
            await self._pause(seconds / SLICES)
            while self._held_s:
                held_s, self._held_s = self._held_s, 0.0
                await self._pause(held_s)
            ever, steps = struct.unpack_from("<QQ", view)
            struct.pack_into("<QQ", view, 0, ever + 1, steps + 1)
            if view[16]:
                return False
        return True

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._died.wait()
        except TimeoutError:
            return
        self._check_alive()

    def _check_alive(self) -> None:
        if self._died.is_set():
            raise ChildDied("process was killed by SIGKILL", from_outside=True)


class InlineTraining(ChildTraining):
    """A ChildTraining with explicit `discard` of its memory: no process ends here that would free it."""

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        self._discarded = False

    def die(self) -> None:
        if isinstance(self._child, InlineChild):
            self._child.die()

    def hold(self, seconds: float) -> None:
        if isinstance(self._child, InlineChild):
            self._child.hold(seconds)

    def progress(self) -> ChildProgress:
        if isinstance(self._child, InlineChild):
            self._child.update_progress()
        return super().progress()

    def stop_early(self) -> None:
        super().stop_early()
        if isinstance(self._child, InlineChild):
            self._child.stop()

    def discard(self) -> None:
        if not self._discarded:
            self._discarded = True
            self._memory.close()


class StubEvaluator:
    """An evaluator whose model is a vector and whose only metric is the mean of the center."""

    def __init__(self, memory: SharedMemory) -> None:
        self._memory, self._elements = memory, 0
        self._copy: Vector = np.zeros(0)

    def make_model(self, question: MakeModel) -> ModelLayout:
        self._elements, self._seed = elements_of(question.spec), question.spec.seed
        chunk = max(ALIGN_ELEMENTS, question.chunk_bytes // 8 // ALIGN_ELEMENTS * ALIGN_ELEMENTS)
        tensors = _tensors(self._elements)
        layout = Manifest(dtype="fp64", elements=self._elements, chunk_elements=chunk, tensors=tensors, local=[])
        return ModelLayout(manifest=question.manifest or messages.encode(layout))

    def write_initial(self, question: WriteInitialModel) -> Done:
        self._center()[:] = np.linspace(-1.0, 1.0, self._elements) * (1 + self._seed % 97)
        return Done()

    def copy_center(self, question: CopyCenter) -> Done:
        self._copy = self._center().copy()
        return Done()

    def evaluate(self, question: EvaluateCenter) -> EvaluationReport:
        return EvaluationReport(metrics={"mean": float(self._copy.mean())})

    def questions(self) -> Handlers:
        return {
            MakeModel: self.make_model,
            WriteInitialModel: self.write_initial,
            CopyCenter: self.copy_center,
            EvaluateCenter: self.evaluate,
        }

    def _center(self) -> Vector:
        return np.frombuffer(self._memory.view(), DTYPES["fp64"].little_endian, self._elements)


@dataclass(frozen=True, slots=True)
class StubState:
    """The state that a stub trainer keeps on disk."""

    submission: str
    clock: int
    own: bytes  # W_i
    pending: dict[int, bytes]  # clock → elastic difference without a known verdict
    trained: bytes  # the first W_i plus all training steps, without elastic differences


Disk = dict[str, StubState]  # path → state


class StubTrainer:
    """A trainer whose model moves towards a value that depends on its number and clock, so that no two updates are equal."""

    def __init__(self, memory: SharedMemory, disk: Disk) -> None:
        self._memory, self._disk = memory, disk
        self._steps_ever = 0
        self._own = torch.zeros(0, dtype=torch.float64)

    def describe(self, question: DescribeDevice) -> DeviceDescription:
        return DeviceDescription(name="stub", shared=False)

    def prepare(self, question: PrepareRun) -> RunPrepared:
        settings, state_path, submission = question.spec, question.state_path, question.submission
        self._elements = elements_of(settings)
        self._updates = local_update_of(settings, messages.decode(Manifest, question.manifest).buffers)
        self._steps = 20 if settings.local.steps is None else settings.local.steps
        self._memory.grow(PROGRESS_BYTES + 8 * (1 + outboxes(settings)) * self._elements)
        self._view, self._path = self._memory.view(), state_path
        self._diverges = bool(settings.task_options.get("diverges"))  # every seventh update holds a NaN
        kept, self._submission = self._disk.get(state_path), submission
        self._first = kept is None or kept.submission != submission
        if kept is None or self._first:
            zeros = bytes(8 * self._elements)
            kept = StubState(submission, 0, zeros, {}, zeros)
        self._own, self._trained = _vector(bytearray(kept.own)), _vector(bytearray(kept.trained))
        self._from = torch.zeros_like(self._own)
        self._updates.pending = {c: _vector(bytearray(difference)) for c, difference in kept.pending.items()}
        return RunPrepared(clock=kept.clock)

    def period(self, period: TrainPeriod) -> PeriodReport:
        number, own = period.part, self._own
        self._updates.resolve(period.verdicts, own)
        center = self._box(0).clone() if period.fresh_center else None
        self._updates.begin(own, self._from, center, first=self._first)
        if self._first:
            self._first = False
            self._trained.copy_(own)
        drift = (number * 7919 + period.clock * 104729) % 1009 / 1009
        target = number + number**2 / 7  # all distances between agents differ, so that no rule has to break a tie
        step = 0.25 * (torch.arange(self._elements, dtype=torch.float64) * 0.01 + target - own) + drift
        own += step
        self._trained += step
        update = None if self._updates.needs_center else self._leave(period)
        self._steps_ever += max(SLICES, self._steps)
        struct.pack_into("<QQ", self._view, 0, self._steps_ever, self._steps)
        return PeriodReport(steps=self._steps, rows=64 // period.parts, loss=0.0, update=update)

    def make_elastic_update(self, question: MakeElasticUpdate) -> UpdateReport:
        if question.fresh_center:
            self._from.copy_(self._box(0))
        return self._leave(question.period)

    def questions(self) -> Handlers:
        return {
            DescribeDevice: self.describe,
            PrepareRun: self.prepare,
            TrainPeriod: self.period,
            MakeElasticUpdate: self.make_elastic_update,
        }

    def _leave(self, period: TrainPeriod) -> UpdateReport:
        box = self._box(1 + period.outbox)
        box[:] = self._updates.take(self._own, self._from, period.clock)
        if self._diverges and (5 * period.part + 3 * period.clock) % 7 == 0:
            box[-1] = torch.nan
        pending = {c: _bytes(difference) for c, difference in self._updates.pending.items()}
        own, trained = _bytes(self._own), _bytes(self._trained)
        self._disk[self._path] = StubState(self._submission, period.clock, own, pending, trained)
        return UpdateReport()

    def _box(self, which: int) -> torch.Tensor:
        begin = PROGRESS_BYTES + 8 * which * self._elements
        return _vector(self._view[begin : begin + 8 * self._elements])


def _tensors(elements: int) -> list[Entry]:
    """Return the model's tensors: a parameter, then a buffer of one element."""
    split = max(1, elements - 1)
    whole = [
        Entry(name="w", shape=[split], offset=0, elements=split),
        Entry(name="statistic", shape=[1], offset=split, elements=1, buffer=True),
    ]
    return whole[:elements]


def _vector(data: bytearray | memoryview) -> torch.Tensor:
    return torch.frombuffer(data, dtype=torch.float64)


def _bytes(x: torch.Tensor) -> bytes:
    return bytes(x.numpy().tobytes())


def elements_of(spec: RunSpec) -> int:
    return int(spec.task_options.get("elements", 4))
