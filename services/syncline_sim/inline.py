"""Children without processes: the real trainer and evaluator, or stubs of a few numbers, answering inline in virtual time."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Mapping
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from syncline.child import ChildDied, ChildFailed, Handler, Start, answer
from syncline.shm import SharedMemory
from syncline.wire.manifest import ALIGN_ELEMENTS, Entry, Manifest
from syncline.wire.messages import encode
from syncline_agent.training import PROGRESS_BYTES, ChildTraining, Progress

TASK = "syncline_sim.inline:Stub"  # the name stubs go by; nothing is loaded
SLICES = 4  # signs of progress in a period
Seconds = Callable[[dict[str, Any]], float]  # how long a question takes
Vector = NDArray[np.float64]


class InlineChild:
    """Asked like a process. What it says travels as msgpack, and takes the virtual time that `seconds` says."""

    def __init__(self, handlers: Mapping[str, Handler], memory: SharedMemory, seconds: Seconds) -> None:
        self._handlers, self._memory, self._seconds = handlers, memory, seconds
        self._lock = asyncio.Lock()
        self._died = asyncio.Event()

    async def ask(self, question: str, **fields: Any) -> dict[str, Any]:
        asked: dict[str, Any] = msgpack.unpackb(msgpack.packb({"ask": question, **fields}), strict_map_key=False)
        async with self._lock:
            if not await self._spend(asked):
                return {"stopped": True}
            said: dict[str, Any] = msgpack.unpackb(msgpack.packb(answer(self._handlers, asked)), strict_map_key=False)
        if "error" in said:
            raise ChildFailed(said["error"], setting=said.get("setting", ""), mend=said.get("mend", ""))
        return said

    async def close(self) -> None:
        self._died.set()

    def die(self) -> None:
        """As if the kernel had killed it."""
        self._died.set()

    def show(self) -> None:
        """Progress is asked for: it lies in the shared memory."""

    def stop(self) -> None:
        """The wish to end the period lies in the shared memory."""

    async def _spend(self, asked: dict[str, Any]) -> bool:
        """Lets the time pass; a period shows progress, and ends early (False) where the service asks for it."""
        seconds = self._seconds(asked)
        if asked["ask"] != "period":
            await self._pause(seconds)
            return True
        view = self._memory.view()
        view[8:17] = bytes(9)
        for _ in range(SLICES):
            await self._pause(seconds / SLICES)
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
        self._insist_on_life()

    def _insist_on_life(self) -> None:
        if self._died.is_set():
            raise ChildDied("process was killed by SIGKILL")


class InlineTraining(ChildTraining):
    """A ChildTraining whose memory goes with it, because no process ends here."""

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        self._discarded = False

    def die(self) -> None:
        if isinstance(self._child, InlineChild):
            self._child.die()

    def progress(self) -> Progress:
        if isinstance(self._child, InlineChild):
            self._child.show()
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
    """Makes a vector for a center; its one metric is the center's mean."""

    def __init__(self, memory: SharedMemory) -> None:
        self._memory, self._elements = memory, 0
        self._copy: Vector = np.zeros(0)

    def describe(self, spec: dict[str, Any], chunk_bytes: int, manifest: bytes = b"") -> dict[str, Any]:
        self._elements, self._seed = elements_of(spec), int(spec["seed"])
        chunk = max(ALIGN_ELEMENTS, chunk_bytes // 8 // ALIGN_ELEMENTS * ALIGN_ELEMENTS)
        tensors = [Entry(name="w", shape=[self._elements], offset=0, elements=self._elements)]
        layout = Manifest(dtype="fp64", elements=self._elements, chunk_elements=chunk, tensors=tensors, at_home=[])
        return {"manifest": manifest or encode(layout)}

    def initial(self) -> dict[str, Any]:
        self._buffer(0)[:] = np.linspace(-1.0, 1.0, self._elements) * (1 + self._seed % 97)
        return {}

    def copy(self, buffer: int) -> dict[str, Any]:
        self._copy = self._buffer(buffer).copy()
        return {}

    def evaluate(self) -> dict[str, Any]:
        return {"metrics": {"mean": float(self._copy.mean())}, "seconds": 0.0}

    def questions(self) -> dict[str, Handler]:
        return {"describe": self.describe, "initial": self.initial, "copy": self.copy, "evaluate": self.evaluate}

    def _buffer(self, which: int) -> Vector:
        return np.frombuffer(self._memory.view(), "<f8", self._elements, which * self._elements * 8)


Disk = dict[str, tuple[int, bytes]]  # what stub trainers keep: path → clock and W_i


class StubTrainer:
    """Drifts towards a place of its own, by its number and its clock: an update tells whose and which one it is."""

    def __init__(self, memory: SharedMemory, disk: Disk) -> None:
        self._memory, self._disk = memory, disk
        self._steps_ever = 0
        self._own: Vector | None = None

    def describe(self) -> dict[str, Any]:
        return {"device": "stub", "shared": False}

    def prepare(self, spec: dict[str, Any], manifest: bytes, state_path: str) -> dict[str, Any]:
        self._elements, self._alpha = elements_of(spec), float(spec["mix"]["alpha"])
        self._steps = 20 if spec["local"]["steps"] is None else int(spec["local"]["steps"])
        self._memory.grow(PROGRESS_BYTES + 16 * self._elements)
        self._view, self._path = self._memory.view(), state_path
        clock, own = self._disk.get(state_path, (0, b""))
        self._own = np.frombuffer(own, "<f8").copy() if own else None
        return {"clock": clock}

    def period(self, version: int, clock: int, number: int, parts: int) -> dict[str, Any]:
        center = np.frombuffer(self._view, "<f8", self._elements, PROGRESS_BYTES)
        own = center.copy() if self._own is None else self._own + self._alpha * (center - self._own)
        drift = (number * 7919 + clock * 104729) % 1009 / 1009
        self._own = own + 0.25 * (np.arange(self._elements) * 0.01 + number - own) + drift
        np.frombuffer(self._view, "<f8", self._elements, PROGRESS_BYTES + 8 * self._elements)[:] = self._own - center
        self._steps_ever += max(SLICES, self._steps)
        struct.pack_into("<QQ", self._view, 0, self._steps_ever, self._steps)
        self._disk[self._path] = clock, self._own.tobytes()
        rows = 64 // parts
        return {"steps": self._steps, "rows": rows, "loss": 0.0, "samples_per_s": 0.0, "stopped": False}

    def questions(self) -> dict[str, Handler]:
        return {"describe": self.describe, "prepare": self.prepare, "period": self.period}


def elements_of(spec: dict[str, Any]) -> int:
    return int(spec["task_options"].get("elements", 4))
