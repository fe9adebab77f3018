"""A fleet of our own around a piece of work: started, watched while it runs, and gone afterwards whatever happens."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from syncline.errors import RunFailed
from syncline.nursery import Nursery
from syncline.wire.messages import Head
from syncline.wire.subjects import COORDINATOR
from syncline_cli.follow import Follower
from syncline_cli.local import FleetSettings, LocalFleet
from syncline_cli.process import Interrupted, run_interruptible
from syncline_cli.state import RunState

LOOK_S = 0.2
JOIN_S = 10.0  # after which we say for whom the run waits
LOG_LINES = 12

Say = Callable[[str, str], None]  # level, text
T = TypeVar("T")


def start_nursery(*modules: str) -> Nursery:
    """Begins to import torch and all services in the background. What they print is not on *our* standard output."""
    logging.getLogger().addHandler(logging.NullHandler())  # what matters is shown as events
    _keep_torch_out_of_the_temporary_directory()
    sys.stdout.flush()
    ours = os.dup(1)
    try:
        os.dup2(2, 1)
        return LocalFleet.preload(*modules)
    finally:
        os.dup2(ours, 1)
        os.close(ours)


def _keep_torch_out_of_the_temporary_directory() -> None:
    """Its compiler makes a cache directory as soon as it is imported, used or not: where caches belong, please."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "torch", "inductor")
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a home that nobody may write to
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))


def with_fleet(
    settings: FleetSettings,
    nursery: Nursery,
    work: Callable[[LocalFleet], Awaitable[int]],
    around: AbstractAsyncContextManager[Any] | None = None,
) -> int:
    """Runs `work` with the fleet up, inside `around`. Raises Interrupted on a signal; everything is stopped then."""
    starting = True

    def no_more_imports() -> None:
        if starting:
            os.kill(nursery.pid, signal.SIGKILL)  # it would see our end only after it has imported everything

    async def all_of_it() -> int:
        nonlocal starting
        async with around or nullcontext(), LocalFleet(settings, nursery) as fleet:
            starting = False
            return await work(fleet)

    try:
        return run_interruptible(all_of_it, on_signal=no_more_imports)
    except KeyboardInterrupt:  # it came before the event loop ran
        no_more_imports()
        raise Interrupted from None


async def until_ended(
    fleet: LocalFleet, follower: Follower, state: RunState, needed: int, say: Say, *, stalled_s: float = math.inf
) -> Head:
    """The last head of a run that did what it should. Raises RunFailed, with the end of a log, for any other end, and
    when nothing has moved for `stalled_s`."""
    broken = _until_broken(fleet, follower, state, needed, say)
    head = await _first(follower.until_ended(), broken, _until_stalled(fleet, follower, state, stalled_s))
    if head.phase != "done":
        culprits = sorted(state.failed) or [COORDINATOR]
        raise RunFailed(f"run {head.run}: {head.reason}{ends_of_logs(fleet, culprits[:2])}")
    return head


async def _until_broken(fleet: LocalFleet, follower: Follower, state: RunState, needed: int, say: Say) -> NoReturn:
    """Raises RunFailed when the coordinator is gone, or too few agents are left: nobody else will come to help."""
    gone: set[str] = set()
    loop = asyncio.get_running_loop()
    say_at_s: float | None = loop.time() + JOIN_S
    while True:
        for name, worker in fleet.workers.items():
            if name in gone or not worker.exited.done():
                continue
            gone.add(name)
            how = how_it_ended(worker.exited.result())
            if name == COORDINATOR:
                raise RunFailed(f"the coordinator's process {how}{ends_of_logs(fleet, [name])}")
            say("warning", f"{name}: its process {how}")
        unable = gone | set(state.failed)
        able = [name for name in fleet.settings.agents if name not in unable]
        least = 1 if follower.opened else needed
        if len(able) < least:
            why = "; ".join(state.failed.values()) or f"{', '.join(sorted(unable))}: gone"
            text = f"run {state.run} needs {least} agents and has {len(able)}: {why}"
            raise RunFailed(text + ends_of_logs(fleet, sorted(unable)[:2]))
        if say_at_s is not None and loop.time() > say_at_s:
            say_at_s = None
            joined = [a for a in state.agents.values() if a.train is not None and a.train.state != "starting"]
            if not follower.opened:
                say("warning", f"still waiting for agents: {len(joined)} of {needed} are ready")
        await asyncio.sleep(LOOK_S)


async def _until_stalled(fleet: LocalFleet, follower: Follower, state: RunState, stalled_s: float) -> NoReturn:
    """Raises RunFailed when nobody has made a step, and no round has closed, for so long."""
    loop = asyncio.get_running_loop()
    moved_at_s, seen = loop.time(), ""
    while True:
        trains = [(name, a.train and (a.train.state, a.train.clock, a.train.step)) for name, a in state.agents.items()]
        now = repr((follower.head, trains))
        if now != seen:
            moved_at_s, seen = loop.time(), now
        if loop.time() - moved_at_s > stalled_s:
            text = f"run {state.run}: nothing has moved for {stalled_s:g} s; it stands at version {state.version}"
            raise RunFailed(text + ends_of_logs(fleet, [COORDINATOR, *fleet.settings.agents[:1]]))
        await asyncio.sleep(LOOK_S)


async def _first(*works: Coroutine[Any, Any, T]) -> T:
    """The result of whichever ends first; the others are cancelled."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(iter(done)).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def how_it_ended(code: int) -> str:
    """An exit code in words; negative for a signal, as in `subprocess`."""
    if code >= 0:
        return f"ended with code {code}"
    known = {int(s): s.name for s in signal.Signals}
    return f"was killed by {known.get(-code, f'signal {-code}')}"


def ends_of_logs(fleet: LocalFleet, names: list[str]) -> str:
    """The last lines of these services' logs, to be put below an error."""
    text = ""
    for name in names:
        path = fleet.broker.directory / "logs" / f"{name}.log"
        try:
            lines = path.read_text(errors="replace").splitlines()[-LOG_LINES:]
        except OSError:
            lines = []
        text += "".join(f"\n  {name}.log: {line}" for line in lines)
    if fleet.settings.directory is not None:
        return f"{text}\n  all logs: {fleet.broker.directory / 'logs'}"
    return text
