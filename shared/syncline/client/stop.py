"""Stopping a run: the coordinator finishes the merge under way, then ends the run."""

from __future__ import annotations

import asyncio
import getpass
import socket
from dataclasses import dataclass

from syncline.bus.base import Bus
from syncline.client.follow import HeadFollower
from syncline.client.runs import head_of
from syncline.errors import BusError, Denied, NoResponders, RunFailed
from syncline.wire import subjects
from syncline.wire.messages import Head, Stop, Stopped, decode, encode

END_S = 120.0  # for the merge under way and the evaluation of the last version
ANSWER_S = 10.0
ASK_AGAIN_S = 5.0  # a coordinator that was restarted meanwhile does not remember the request
MAX_REQUESTER_CHARS = 200


@dataclass(frozen=True, slots=True)
class StopResult:
    """The end of a run that was asked to stop."""

    outcome: str  # the coordinator's first answer: `ended` for a run that had ended before
    head: Head  # the last one


def requester() -> str:
    """Return `user@host` of this process, as far as the system knows them."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):
        user = "somebody"
    return f"{user}@{socket.gethostname()}"[:MAX_REQUESTER_CHARS]


async def stop(bus: Bus, run: str, by: str = "") -> StopResult:
    """Stop a run and wait for its end. The request is repeated until the run has ended.

    Args:
        bus: a connection with a coordinator's key.
        by: the name in the run's reason, `stopped by <name>`; default: `requester()`.

    Raises:
        ConfigError: no such run; the error names similar ones.
        NoResponders: no coordinator is up.
        Denied: the key may not stop runs.
        RunFailed: the run has not ended after END_S.
    """
    await head_of(bus, run)
    loop = asyncio.get_running_loop()
    outcome = ""
    deadline_s = loop.time() + END_S
    ended = asyncio.create_task(HeadFollower(bus, run).until_ended())  # first: a local fleet may be gone a moment later
    try:
        while loop.time() < deadline_s:
            outcome = await _request(bus, run, by or requester(), outcome)
            done, _ = await asyncio.wait({ended}, timeout=ASK_AGAIN_S)
            if done:
                return StopResult(outcome, ended.result())
    finally:
        ended.cancel()
        await asyncio.gather(ended, return_exceptions=True)
    raise RunFailed(f"run {run} was asked to stop and has not ended after {END_S:g} s: see `syncline watch {run}`")


async def _request(bus: Bus, run: str, by: str, before: str) -> str:
    """Ask once; return the coordinator's first answer, `before` if there was one already."""
    try:
        answer = decode(Stopped, await bus.request(subjects.stop(), encode(Stop(run=run, by=by)), ANSWER_S))
    except Denied:
        raise
    except NoResponders:
        if before:
            return before
        raise
    except BusError:  # asked again soon
        return before
    return before or answer.outcome
