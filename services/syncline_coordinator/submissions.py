"""Runs that were submitted, until they are accepted or refused.

A check loads the task, makes its model and its held-out data, which may take minutes the first time. So it goes on beside
everything else, and its submitter has an answer every few seconds: what the coordinator is doing, and at last the verdict.
The submitter asks again with the same record; a check that is asked for no more is given up.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from syncline import __version__
from syncline.bus.base import Delivery
from syncline.errors import BusError, ConfigError, PeerError
from syncline.runtime.child import ChildDied
from syncline.spec.run_spec import RunSpec
from syncline.spec.submission import submission, submitted_spec
from syncline.wire.messages import Submit, Submitted, decode

log = logging.getLogger(__name__)

ANSWER_S = 5.0  # between a question and its answer, at most
FORGOTTEN_S = 60.0  # without a question, after which a check is given up, and a verdict forgotten
MOST_CHECKS = 16
MOST_QUESTIONS = 4  # of one check that wait for an answer; of more, the newest

Accept = Callable[[RunSpec, Submit], Awaitable[list[str]]]  # returns warnings; raises what is wrong


@dataclass(slots=True)
class Check:
    """One submitted run, and the questions about it that have no answer yet."""

    run: str
    questions: deque[Delivery] = field(default_factory=lambda: deque(maxlen=MOST_QUESTIONS))
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def ask(self, question: Delivery) -> None:
        self.questions.append(question)
        self.asked.set()


class Submissions:
    """Checks submitted runs, one at a time.

    Args:
        accept: checks a run, and queues it.
        doing: what the check of the named run is at, as the object of «the coordinator …».
        answer: sends the answer to a question.
    """

    def __init__(
        self, accept: Accept, doing: Callable[[str], str], answer: Callable[[Delivery, Submitted], Awaitable[None]]
    ) -> None:
        self._accept, self._doing, self._answer = accept, doing, answer
        self._checks: dict[bytes, Check] = {}  # by the record as it was submitted
        self._turn = asyncio.Lock()
        self._first = ""  # the run whose turn it is

    async def on_submit(self, question: Delivery) -> None:
        """Begin a check, or take up the question about one that goes on. Returns at once."""
        check = self._checks.get(question.data)
        if check is None:
            try:
                record = decode(Submit, question.data)
                spec = _spec_in(record)
                if len(self._checks) >= MOST_CHECKS:
                    raise ConfigError("spec", f"{MOST_CHECKS} submitted runs are being checked", "Try again later")
            except (ConfigError, PeerError) as error:
                await self._answer(question, refusal(error))
                return
            check = self._checks[question.data] = Check(spec.name)
            check.task = asyncio.create_task(self._see_through(question.data, check, spec, record))
        check.ask(question)

    async def close(self) -> None:
        """Give up all checks."""
        tasks = [check.task for check in self._checks.values() if check.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _see_through(self, key: bytes, check: Check, spec: RunSpec, record: Submit) -> None:
        """Answer all questions about a check, until the verdict is told or the submitter asks no more."""
        verdict = asyncio.create_task(self._verdict(spec, record))
        silent_s = 0.0
        try:
            while not verdict.done() and silent_s < FORGOTTEN_S:
                await asyncio.wait({verdict}, timeout=ANSWER_S)
                if not verdict.done():
                    silent_s = 0.0 if check.questions else silent_s + ANSWER_S
                    await self._tell(check, Submitted(doing=self._what(check.run)))
            if verdict.done():
                async with asyncio.timeout(FORGOTTEN_S):
                    while not check.questions:
                        check.asked.clear()  # by a question that has its answer: `wait` would never give way
                        await check.asked.wait()
                await self._tell(check, verdict.result())
        except TimeoutError:
            log.warning("the submitter of run %s has not asked for the verdict within %g s", check.run, FORGOTTEN_S)
        finally:
            del self._checks[key]
            verdict.cancel()
            await asyncio.gather(verdict, return_exceptions=True)

    async def _tell(self, check: Check, said: Submitted) -> None:
        check.asked.clear()
        while check.questions:
            await self._answer(check.questions.popleft(), said)

    def _what(self, run: str) -> str:
        return (self._doing(run) or "checks the run") if self._first == run else f"checks run {self._first} first"

    async def _verdict(self, spec: RunSpec, record: Submit) -> Submitted:
        async with self._turn:
            self._first = spec.name
            try:
                return Submitted(run=spec.name, warnings=await self._accept(spec, submission(spec, record)))
            except (ConfigError, PeerError, BusError, ChildDied) as error:
                return refusal(error)
            except Exception as error:  # a bug of ours: the submitter must not wait for ever
                log.exception("checking run %s failed", spec.name)
                return refusal(PeerError(f"the coordinator failed to check it: {type(error).__name__}: {error}"))


def _spec_in(record: Submit) -> RunSpec:
    """Return the settings of a submitted run. Raises ConfigError, as for settings that only a newer Syncline knows."""
    try:
        return submitted_spec(record)
    except ConfigError as error:
        ours = f"The coordinator is Syncline {__version__}: upgrade it, where a newer Syncline accepts this"
        raise ConfigError(error.setting, error.problem, f"{error.hint}. {ours}" if error.hint else ours) from None


def refusal(error: Exception) -> Submitted:
    """Return the answer that says what is wrong with a submitted run."""
    if isinstance(error, ConfigError):
        return Submitted(setting=error.setting[:2000], problem=error.problem[:2000], hint=error.hint[:2000])
    return Submitted(setting="spec", problem=str(error)[:2000])
