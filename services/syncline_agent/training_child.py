"""The service's side of the training child: starts it, asks it, and starts it again when it died. Knows no bus."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from syncline.policy.asynchronous import OVERLAPPING
from syncline.runtime.child import Asked, ChildDied, ChildFailed, Start
from syncline.shm import SharedMemory
from syncline.spec.run_spec import RunSpec
from syncline.spec.sections import Async

PROGRESS = struct.Struct("<QQB7xQQ")  # the head of the shared memory: Progress, and the wish to stop early
PROGRESS_BYTES = 64
STOP_EARLY = 16  # where that wish stands
STEPS_EXPECTED = 24  # where Progress.steps stands
SAVE_AGAIN_S = 30.0  # after the disk took nothing


class Progress(NamedTuple):
    """How far the child is."""

    steps_ever: int  # since its process began; batches of an evaluation count too
    step: int  # made in this period
    steps: int  # that this period has; as far as one can tell, where it is given in seconds; 0: nobody can tell yet
    rows: int  # of this agent's part


class Period(NamedTuple):
    """One local period, as it is asked for."""

    version: int  # of the center in the inbox
    clock: int  # periods finished with this one
    number: int  # of the agent's part
    parts: int
    fresh: bool = True  # the center in the inbox is newer than the one the child saw last
    box: int = 0  # the outbox that takes the update
    verdicts: Sequence[tuple[int, bool]] = ()  # of the last judged clocks: merged or not


def outboxes(spec: RunSpec) -> int:
    """Updates of an agent that may be on their way at once: one is sent while the next one is made."""
    return OVERLAPPING if isinstance(spec.sync, Async) and spec.sync.overlap else 1


class Training(Protocol):
    """What a session needs of a trainer."""

    async def describe(self) -> dict[str, Any]: ...
    async def prepare(
        self, spec: dict[str, Any], manifest: bytes, state_path: str, submission: str
    ) -> dict[str, Any]: ...
    async def period(self, period: Period) -> dict[str, Any]:
        """A wish to stop early that comes from here on, however early, is about this period."""
        ...

    async def meet(self, period: Period) -> dict[str, Any]: ...
    async def keep(self, clock: int) -> dict[str, Any]: ...
    def inbox(self, nbytes: int) -> memoryview: ...
    def outbox(self, nbytes: int, box: int) -> memoryview: ...
    def progress(self) -> Progress: ...
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

    async def prepare(self, spec: dict[str, Any], manifest: bytes, state_path: str, submission: str) -> dict[str, Any]:
        """`submission`: which of the runs that ever had this name, by the id of head's manifest."""
        return await self._ask("prepare", spec=spec, manifest=manifest, state_path=state_path, submission=submission)

    async def period(self, period: Period) -> dict[str, Any]:
        self._memory.view()[STOP_EARLY] = 0  # here and not there: from now on the wish is about this period
        return await self._ask("period", **period._asdict())

    async def meet(self, period: Period) -> dict[str, Any]:
        """Elastic averaging: makes the update from the center in the inbox, after the period."""
        return await self._ask("meet", **period._asdict())

    async def keep(self, clock: int) -> dict[str, Any]:
        """Tries again what the disk did not take; answers with `held_back`, and why it did not, in `not_kept`."""
        return await self._ask("keep", clock=clock)

    def inbox(self, nbytes: int) -> memoryview:
        return self._memory.view()[PROGRESS_BYTES : PROGRESS_BYTES + nbytes]

    def outbox(self, nbytes: int, box: int) -> memoryview:
        begin = PROGRESS_BYTES + (1 + box) * nbytes
        return self._memory.view()[begin : begin + nbytes]

    def progress(self) -> Progress:
        steps_ever, step, _, steps, rows = PROGRESS.unpack_from(self._memory.view(), 0)
        return Progress(steps_ever, step, steps, rows)

    def stop_early(self) -> None:
        """Asks the child to end the period after the step it is in."""
        self._memory.view()[STOP_EARLY] = 1

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
