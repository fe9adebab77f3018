"""Children without processes: an adapter that answers inside the simulation's process, and stubs of trainer and evaluator."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import torch
from numpy.typing import NDArray

from syncline.model.manifest import ALIGN_ELEMENTS, Entry, Manifest
from syncline.runtime.child import ChildDied, ChildFailed, Chore, Handler, Start, packed_answer
from syncline.shm import SharedMemory
from syncline.spec.run_spec import RunSpec, parse
from syncline.wire.dtypes import DTYPES
from syncline.wire.messages import decode, encode
from syncline_agent.local_update import updates_of
from syncline_agent.training_child import PROGRESS_BYTES, ChildTraining, Period, Progress, outboxes

TASK = "syncline_sim.stubs:Stub"  # the task's name in specs of stubs; the stubs load no task
SLICES = 4  # reports of progress in a period
Seconds = Callable[[dict[str, Any]], float]  # question → its virtual duration
Vector = NDArray[np.float64]


class InlineChild:
    """A child with the interface of a process. Questions and answers pass through msgpack, as between processes.

    Args:
        handlers: the functions that answer questions, by name.
        memory: the memory shared with the service.
        seconds: gives the virtual duration of a question.
        chore: work between questions. It is done as soon as it is due and no question waits, and takes no virtual time.
    """

    def __init__(
        self, handlers: Mapping[str, Handler], memory: SharedMemory, seconds: Seconds, chore: Chore | None = None
    ) -> None:
        self._handlers, self._memory, self._seconds, self._chore = handlers, memory, seconds, chore
        self._chore_timer: asyncio.TimerHandle | None = None
        self._lock = asyncio.Lock()
        self._died = asyncio.Event()
        self.doing = ""
        self._held_s = 0.0  # additional duration of the next step

    async def ask(self, question: str, **fields: Any) -> dict[str, Any]:
        asked: dict[str, Any] = msgpack.unpackb(msgpack.packb({"ask": question, **fields}), strict_map_key=False)
        async with self._lock:
            self._cancel_chore()
            if not await self._pass_time(asked):
                return {"stopped": True}
            said: dict[str, Any] = msgpack.unpackb(packed_answer(self._handlers, asked), strict_map_key=False)
            self._schedule_chore()
        if "error" in said:
            raise ChildFailed(said["error"], setting=said.get("setting", ""), hint=said.get("hint", ""))
        return said

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

    async def _pass_time(self, asked: dict[str, Any]) -> bool:
        """Let the duration of a question pass, and report progress during a period.

        Returns:
            False if the service ended the period early.
        """
        seconds = self._seconds(asked)
        if asked["ask"] != "period":
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

    def progress(self) -> Progress:
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

    def describe(
        self, spec: dict[str, Any], chunk_bytes: int, manifest: bytes = b"", check: bool = True
    ) -> dict[str, Any]:
        self._elements, self._seed = elements_of(spec), int(spec["seed"])
        chunk = max(ALIGN_ELEMENTS, chunk_bytes // 8 // ALIGN_ELEMENTS * ALIGN_ELEMENTS)
        tensors = _tensors(self._elements)
        layout = Manifest(dtype="fp64", elements=self._elements, chunk_elements=chunk, tensors=tensors, local=[])
        return {"manifest": manifest or encode(layout)}

    def initial(self) -> dict[str, Any]:
        self._center()[:] = np.linspace(-1.0, 1.0, self._elements) * (1 + self._seed % 97)
        return {}

    def copy(self) -> dict[str, Any]:
        self._copy = self._center().copy()
        return {}

    def evaluate(self, version: int) -> dict[str, Any]:
        return {"metrics": {"mean": float(self._copy.mean())}, "seconds": 0.0}

    def questions(self) -> dict[str, Handler]:
        return {"describe": self.describe, "initial": self.initial, "copy": self.copy, "evaluate": self.evaluate}

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

    def describe(self) -> dict[str, Any]:
        return {"device": "stub", "shared": False}

    def prepare(self, spec: dict[str, Any], manifest: bytes, state_path: str, submission: str) -> dict[str, Any]:
        settings = parse(RunSpec, spec)
        self._elements = elements_of(spec)
        self._updates = updates_of(settings, decode(Manifest, manifest).buffers)
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
        return {"clock": kept.clock}

    def period(self, **asked: Any) -> dict[str, Any]:
        period = Period(**asked)
        number, own = period.number, self._own
        self._updates.resolve(dict(period.verdicts), own)
        center = self._box(0).clone() if period.fresh else None
        self._updates.begin(own, self._from, center, first=self._first)
        if self._first:
            self._first = False
            self._trained.copy_(own)
        drift = (number * 7919 + period.clock * 104729) % 1009 / 1009
        target = number + number**2 / 7  # all distances between agents differ, so that no rule has to break a tie
        step = 0.25 * (torch.arange(self._elements, dtype=torch.float64) * 0.01 + target - own) + drift
        own += step
        self._trained += step
        if not self._updates.needs_center:
            self._leave(period)
        self._steps_ever += max(SLICES, self._steps)
        struct.pack_into("<QQ", self._view, 0, self._steps_ever, self._steps)
        rows = 64 // period.parts
        return {"steps": self._steps, "rows": rows, "loss": 0.0, "seconds": 0.0, "samples_per_s": 0.0, "stopped": False}

    def meet(self, **asked: Any) -> dict[str, Any]:
        period = Period(**asked)
        if period.fresh:
            self._from.copy_(self._box(0))
        self._leave(period)
        return {}

    def questions(self) -> dict[str, Handler]:
        return {"describe": self.describe, "prepare": self.prepare, "period": self.period, "meet": self.meet}

    def _leave(self, period: Period) -> None:
        box = self._box(1 + period.box)
        box[:] = self._updates.take(self._own, self._from, period.clock)
        if self._diverges and (5 * period.number + 3 * period.clock) % 7 == 0:
            box[-1] = torch.nan
        pending = {c: _bytes(difference) for c, difference in self._updates.pending.items()}
        own, trained = _bytes(self._own), _bytes(self._trained)
        self._disk[self._path] = StubState(self._submission, period.clock, own, pending, trained)

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


def elements_of(spec: dict[str, Any]) -> int:
    return int(spec["task_options"].get("elements", 4))
