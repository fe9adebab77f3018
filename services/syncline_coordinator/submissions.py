"""Submitted runs, from the request to the verdict: accepted or refused.

A check loads the task and makes its model and its held-out data, which may take minutes the first time. The submitter repeats
its request with the same record, and each request is answered within `ANSWER_S`: with the coordinator's present activity, or
with the verdict. A check without requests for `ABANDONED_S` is cancelled.
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

ANSWER_S = 5.0  # the longest time from a request to its answer
ABANDONED_S = 60.0  # without a request; then a check is cancelled, and a verdict discarded
MAX_CHECKS = 16
MAX_WAITING_REQUESTS = 4  # for one check; the newest ones are kept

Accept = Callable[
    [RunSpec, Submit], Awaitable[list[str]]
]  # returns warnings; raises ConfigError and others for a refusal


@dataclass(slots=True)
class _Check:
    """One submitted run and the requests for it that have no answer yet."""

    run: str
    requests: deque[Delivery] = field(default_factory=lambda: deque(maxlen=MAX_WAITING_REQUESTS))
    requested: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def add(self, request: Delivery) -> None:
        """Queue a request for an answer."""
        self.requests.append(request)
        self.requested.set()


class Submissions:
    """Checks submitted runs, one at a time.

    Args:
        accept: checks a run and queues it.
        doing: returns the activity of the check of a run, as a phrase with a verb: «makes the model». '' if not known.
        answer: sends the answer to a request.
    """

    def __init__(
        self, accept: Accept, doing: Callable[[str], str], answer: Callable[[Delivery, Submitted], Awaitable[None]]
    ) -> None:
        self._accept = accept
        self._doing = doing
        self._answer = answer
        self._checks: dict[bytes, _Check] = {}  # by the record as it was submitted
        self._one_at_a_time = asyncio.Lock()
        self._checked_run = ""  # the run that holds the lock, or held it last

    async def on_submit(self, request: Delivery) -> None:
        """Begin a check, or add the request to the check of the same record. Return at once."""
        check = self._checks.get(request.data)
        if check is None:
            try:
                record = decode(Submit, request.data)
                spec = _spec_in(record)
                if len(self._checks) >= MAX_CHECKS:
                    raise ConfigError("spec", f"{MAX_CHECKS} submitted runs are being checked", "Try again later")
            except (ConfigError, PeerError) as error:
                await self._answer(request, refusal(error))
                return
            check = self._checks[request.data] = _Check(spec.name)
            check.task = asyncio.create_task(self._run_check(request.data, check, spec, record))
        check.add(request)

    async def close(self) -> None:
        """Cancel all checks."""
        tasks = [check.task for check in self._checks.values() if check.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run_check(self, key: bytes, check: _Check, spec: RunSpec, record: Submit) -> None:
        """Check a run and answer the requests for it, until the verdict is sent or the submitter has gone."""
        verdict = asyncio.create_task(self._verdict(spec, record))
        silent_s = 0.0
        try:
            while not verdict.done() and silent_s < ABANDONED_S:
                await asyncio.wait({verdict}, timeout=ANSWER_S)
                if not verdict.done():
                    silent_s = 0.0 if check.requests else silent_s + ANSWER_S
                    await self._answer_all(check, Submitted(doing=self._activity(check.run)))
            if verdict.done():
                async with asyncio.timeout(ABANDONED_S):
                    while not check.requests:
                        # An answered request has left the event set, and `wait` on a set event does not yield.
                        check.requested.clear()
                        await check.requested.wait()
                await self._answer_all(check, verdict.result())
        except TimeoutError:
            log.warning("run %s: no request for the verdict of its check within %g s", check.run, ABANDONED_S)
        finally:
            del self._checks[key]
            verdict.cancel()
            await asyncio.gather(verdict, return_exceptions=True)

    async def _answer_all(self, check: _Check, answer: Submitted) -> None:
        check.requested.clear()
        while check.requests:
            await self._answer(check.requests.popleft(), answer)

    def _activity(self, run: str) -> str:
        """Return the coordinator's present activity, for the submitter of a run."""
        if self._checked_run != run:
            return f"checks run {self._checked_run} first"
        return self._doing(run) or "checks the run"

    async def _verdict(self, spec: RunSpec, record: Submit) -> Submitted:
        """Check a run after those that came earlier. Return the acceptance with its warnings, or the refusal."""
        async with self._one_at_a_time:
            self._checked_run = spec.name
            try:
                return Submitted(run=spec.name, warnings=await self._accept(spec, submission(spec, record)))
            except (ConfigError, PeerError, BusError, ChildDied) as error:
                return refusal(error)
            except Exception as error:  # a bug in Syncline: without an answer the submitter would wait for ever
                log.exception("run %s: the check failed", spec.name)
                return refusal(PeerError(f"the coordinator failed to check the run: {type(error).__name__}: {error}"))


def _spec_in(record: Submit) -> RunSpec:
    """Return the settings in a record. Raises ConfigError for settings that are wrong, or that this version does not know."""
    try:
        return submitted_spec(record)
    except ConfigError as error:
        upgrade = f"The coordinator is Syncline {__version__}: upgrade it if a newer version accepts this setting"
        hint = f"{error.hint}. {upgrade}" if error.hint else upgrade
        raise ConfigError(error.setting, error.problem, hint) from None


def refusal(error: Exception) -> Submitted:
    """Return the answer that refuses a run because of an error."""
    if isinstance(error, ConfigError):
        return Submitted(setting=error.setting[:2000], problem=error.problem[:2000], hint=error.hint[:2000])
    return Submitted(setting="spec", problem=str(error)[:2000])
