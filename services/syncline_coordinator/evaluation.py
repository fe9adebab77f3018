"""Held-out evaluation of the center beside the merging. A version that arrives during an evaluation is skipped."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from syncline.errors import SynclineError
from syncline.observe.telemetry import CenterEval, Once, Telemetry, numbers
from syncline.policy.advice import MetricsAdviser
from syncline.runtime.child import Asked, ChildDied
from syncline.runtime.child_messages import CopyCenter, EvaluateCenter

Restart = Callable[[], Awaitable[Asked]]
Report = Callable[[int, dict[str, float]], None]


class Evaluation:
    """Asks the evaluating child, and starts another one after its death.

    Attributes:
        evaluated: the version that was evaluated last; −1: none.
    """

    def __init__(
        self, child: Asked, start: Restart, telemetry: Telemetry, report: Report, longest_s: float | None = None
    ) -> None:
        """Take over a child that has loaded the task.

        Args:
            start: starts another child with the task.
            report: receives the version and the metrics of each evaluation.
            longest_s: limit of an evaluation; after one that takes longer, the center is not evaluated any more.
        """
        self.evaluated = -1
        self._child = child
        self._start = start
        self._telemetry = telemetry
        self._report = report
        self._longest_s = longest_s
        self._too_slow = False
        self._copied = asyncio.Event()
        self._copied.set()
        self._running: asyncio.Task[None] | None = None
        self._adviser = MetricsAdviser()
        self._failures = Once()

    def offer(self, version: int) -> None:
        """Evaluate the center, which is now that of `version`, unless an evaluation is under way."""
        if not self._too_slow and (self._running is None or self._running.done()):
            self._copied.clear()
            self._running = asyncio.create_task(self._evaluate(version))

    async def copied(self) -> None:
        """Wait until the child has copied the center, so that the center may be overwritten."""
        await self._copied.wait()

    async def last(self, version: int) -> None:
        """Evaluate the run's last version, after an evaluation that is under way, unless an earlier one was too slow."""
        if self._running is not None:
            await self._running
        if self.evaluated != version:
            self.offer(version)
            if self._running is not None:
                await self._running
        await self._advise(self._adviser.ended())

    async def close(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        await self._child.close()

    async def _evaluate(self, version: int) -> None:
        """Evaluate the center. A failure is an event and does not end the run; each failure of the task's code is told once."""
        try:
            async with asyncio.timeout(self._longest_s):
                await self._child.ask(CopyCenter())
                self._copied.set()
                result = await self._child.ask(EvaluateCenter(version=version))
            metric = CenterEval(version=version, metrics=numbers(result.metrics), seconds=result.seconds)
        except Exception as error:
            self._copied.set()
            self._too_slow = isinstance(error, TimeoutError)
            child_is_gone = isinstance(error, ChildDied | TimeoutError)
            await self._failed(version, error, once=not child_is_gone)
            if child_is_gone:
                await self._start_again(version)
            return
        finally:
            self._copied.set()
        self.evaluated = version
        await self._telemetry.metric(metric)
        self._report(version, result.metrics)
        await self._advise(self._adviser.evaluated(result.metrics, result.skipped))

    async def _advise(self, advice: list[str]) -> None:
        for text in advice:
            await self._telemetry.event("advice", text, level="warning")

    async def _start_again(self, version: int) -> None:
        """Start another child. If that fails, the next evaluation finds the dead child and tries again."""
        await self._child.close()
        try:
            self._child = await self._start()
        except Exception as error:
            await self._failed(version, error)

    async def _failed(self, version: int, error: Exception, *, once: bool = False) -> None:
        why = str(error) if isinstance(error, SynclineError) else f"{type(error).__name__}: {error}"
        if isinstance(error, TimeoutError):
            why = (
                f"no result within {self._longest_s or 0:g} s, and this run's center is evaluated no more. "
                "Correct the task's metrics(), or hold out fewer rows"
            )
        if once and not self._failures.is_new(why):
            return
        text = f"version {version}: {why}{' (told once)' if once else ''}"
        await self._telemetry.event("evaluation-failed", text, level="warning")
