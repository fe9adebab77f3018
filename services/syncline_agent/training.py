"""The service's side of the training child: starts it, asks it, and starts it again when it died. Knows no bus."""

from __future__ import annotations

from typing import Any, Protocol

from syncline.child import Asked, ChildDied, ChildFailed, Start
from syncline.shm import SharedMemory

PROGRESS_BYTES = 64  # the head of the shared memory: steps ever, steps of this period, stop early


class Training(Protocol):
    """What a session needs of a trainer."""

    async def describe(self) -> dict[str, Any]: ...
    async def prepare(self, spec: dict[str, Any], manifest: bytes, state_path: str) -> dict[str, Any]: ...
    async def period(self, version: int, clock: int, number: int, parts: int) -> dict[str, Any]: ...
    def inbox(self, nbytes: int) -> memoryview: ...
    def outbox(self, nbytes: int) -> memoryview: ...
    def steps(self) -> tuple[int, int]: ...
    def stop_early(self) -> None: ...
    async def close(self) -> None: ...


class ChildTraining:
    """A child with the tensors in shared memory. Raises ConfigError, ChildFailed or ChildDied."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._memory = SharedMemory()
        self._memory.grow(PROGRESS_BYTES)
        self._child: Asked | None = None

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
            self._child = await self._start(self._memory)
        try:
            return await self._child.ask(question, **fields)
        except ChildFailed as error:
            if error.config is not None:
                raise error.config from None
            raise
        except ChildDied:
            await self.close()
            raise
