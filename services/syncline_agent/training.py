"""The service's side of the training child: starts it, asks it, and starts it again when it died. Knows no bus."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from syncline.child import Child, ChildDied, ChildFailed
from syncline.errors import ConfigError
from syncline.nursery import Nursery
from syncline.shm import SharedMemory

TRAINER = "syncline_agent.trainer:main"
PROGRESS_BYTES = 64  # the head of the shared memory: steps ever, steps of this period, stop early


@dataclass(frozen=True, slots=True)
class TrainerSettings:
    device: str = "auto"
    threads: int = 0  # 0: torch decides
    allowed_tasks: tuple[str, ...] = ()
    task_dir: Path = Path()


class Training(Protocol):
    """What a session needs of a trainer; a simulation runs one inline."""

    async def describe(self) -> dict[str, Any]: ...
    async def prepare(self, spec: dict[str, Any], manifest: bytes, state_path: str) -> dict[str, Any]: ...
    async def period(self, version: int, clock: int, number: int, parts: int) -> dict[str, Any]: ...
    def inbox(self, nbytes: int) -> memoryview: ...
    def outbox(self, nbytes: int) -> memoryview: ...
    def steps(self) -> tuple[int, int]: ...
    def stop_early(self) -> None: ...
    async def close(self) -> None: ...


class ChildTraining:
    """A child process with the tensors in shared memory. Raises ConfigError, ChildFailed or ChildDied."""

    def __init__(self, nursery: Nursery, settings: TrainerSettings) -> None:
        self._nursery, self._settings = nursery, settings
        self._memory = SharedMemory()
        self._memory.grow(PROGRESS_BYTES)
        self._child: Child | None = None

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.worker.pid

    async def describe(self) -> dict[str, Any]:
        return await self._ask("describe")

    async def prepare(self, spec: dict[str, Any], manifest: bytes, state_path: str) -> dict[str, Any]:
        return await self._ask("prepare", spec=spec, manifest=manifest, state_path=state_path)

    async def period(self, version: int, clock: int, number: int, parts: int) -> dict[str, Any]:
        return await self._ask("period", version=version, clock=clock, number=number, parts=parts)

    def inbox(self, nbytes: int) -> memoryview:
        return self._memory.view()[PROGRESS_BYTES : PROGRESS_BYTES + nbytes]

    def outbox(self, nbytes: int) -> memoryview:
        return self._memory.view()[PROGRESS_BYTES + nbytes : PROGRESS_BYTES + 2 * nbytes]

    def steps(self) -> tuple[int, int]:
        """Steps since the child began, and of this period."""
        view = self._memory.view()
        return int.from_bytes(view[0:8], "little"), int.from_bytes(view[8:16], "little")

    def stop_early(self) -> None:
        """Asks the child to end the period after the step it is in."""
        self._memory.view()[16] = 1

    async def close(self) -> None:
        if self._child is not None:
            child, self._child = self._child, None
            await child.close()

    async def _ask(self, question: str, **fields: Any) -> dict[str, Any]:
        if self._child is None:
            s = self._settings
            arguments = (s.device, s.threads, list(s.allowed_tasks), str(s.task_dir))
            self._child = await Child.start(self._nursery, TRAINER, self._memory, *arguments)
        try:
            return await self._child.ask(question, **fields)
        except ChildFailed as error:
            if error.config is not None:
                raise error.config from None
            raise
        except ChildDied:
            await self.close()
            raise


__all__ = ["ChildTraining", "ConfigError", "TrainerSettings", "Training"]
