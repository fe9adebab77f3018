"""A fleet of our own around a piece of work: started, watched while it runs, and gone afterwards whatever happens."""

from __future__ import annotations

import asyncio
import math
import os
import re
import shutil
import signal
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, NoReturn, TypeVar

from syncline.bus.server.violations import LogTail
from syncline.client.follow import RunFollower, first_of, report_standstill
from syncline.client.submit import Say
from syncline.errors import RunFailed, SynclineError
from syncline.observe.run_state import RunState
from syncline.runtime.nursery import Nursery
from syncline.runtime.service import WRONG_INPUT
from syncline.wire.messages import Head
from syncline.wire.subjects import COORDINATOR
from syncline_cli.local_fleet.fleet import FleetSettings, LocalFleet
from syncline_cli.process import Interrupted, run_interruptible

LOOK_S = 0.2
LOG_LINES = 12
NO_SPACE = re.compile(r"\[\d+\] \S+ \S+ \[ERR\] JetStream .*: no space left on device")  # a line of nats-server's log
ENOUGH_BYTES = 64 << 20  # to go on with
BROKER_STARTS = COORDINATOR_STARTS = 3  # again, after which it will not stay up

T = TypeVar("T")


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


class Services:
    """The processes of a fleet, watched: nobody else will bring back one that is gone."""

    def __init__(self, fleet: LocalFleet, say: Say, *, coordinator_starts: int = COORDINATOR_STARTS) -> None:
        self.fleet, self._say = fleet, say
        self._gone: set[str] = set()
        self._coordinator_starts = coordinator_starts  # that are left
        self._broker_starts, self._full = 0, False
        self._broker_log = LogTail(fleet.broker.log_path, from_end=True)

    def able(self, state: RunState) -> list[str]:
        """The agents that are alive and have not said that they cannot train."""
        self._look()
        return [name for name in self.fleet.settings.agents if name not in self._gone and name not in state.failed]

    async def until_ended(self, follower: RunFollower, needed: int, *, stalled_s: float = math.inf) -> Head:
        """The last head of a run that did what it should. Raises RunFailed, with the end of a log, for any other end, and
        when nothing has moved for `stalled_s`. `needed`: the agents that the run starts with."""
        watching = (
            self._until_broken(follower, needed),
            self._until_stalled(follower, stalled_s),
            report_standstill(follower, self._say),
        )
        head = await first_of(follower.until_ended(), *watching)
        if head.phase != "done":
            culprits = sorted(follower.state.failed) or [COORDINATOR]
            raise RunFailed(f"run {head.run}: {head.reason}{ends_of_logs(self.fleet, culprits[:2])}")
        return head

    async def while_up(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which asks the coordinator. Raises RunFailed where that one has gone: it has no answer."""
        return await first_of(work, self._until_no_coordinator())

    async def keep_up(self) -> NoReturn:
        """Broker and coordinator, until cancelled. Raises RunFailed where one does not stay up."""
        while True:
            await self._keep_broker()
            await self._keep_coordinator()
            self._look()
            await asyncio.sleep(LOOK_S)

    def _look(self) -> None:
        """Names the agents that have gone. None is started again: the run goes on without it, as in a fleet of machines."""
        for name in self.fleet.settings.agents:
            worker = self.fleet.workers[name]
            if name not in self._gone and worker.exited.done():
                self._gone.add(name)
                self._say("warning", f"{name}: its process {how_it_ended(worker.exited.result())}")

    def _coordinator_end(self) -> int | None:
        """The exit code of a coordinator that has gone."""
        exited = self.fleet.workers[COORDINATOR].exited
        return exited.result() if exited.done() else None

    async def _keep_coordinator(self) -> None:
        """Starts it again where it has gone: it goes on where head stands. Raises RunFailed where that is no help."""
        if (code := self._coordinator_end()) is None:
            return
        if code == WRONG_INPUT or not self._coordinator_starts:
            raise self._no_coordinator(code)
        self._coordinator_starts -= 1
        self._say("warning", f"the coordinator's process {how_it_ended(code)}; it is started again")
        try:
            await self.fleet.start_coordinator()
        except SynclineError as error:
            why = f"the coordinator's process {how_it_ended(code)}, and does not start again: {error}"
            raise RunFailed(why) from None

    async def _until_no_coordinator(self) -> NoReturn:
        raise self._no_coordinator(await asyncio.shield(self.fleet.workers[COORDINATOR].exited))

    def _no_coordinator(self, code: int) -> RunFailed:
        return RunFailed(f"the coordinator's process {how_it_ended(code)}{ends_of_logs(self.fleet, [COORDINATOR])}")

    async def _keep_broker(self) -> None:
        """Starts it again where it has gone, or stores nothing any more: its disk has all that was acknowledged. Raises
        RunFailed where that is no help."""
        code = self.fleet.broker.exit_code
        why = "ran out of disk space" if code is None else how_it_ended(code)
        if code is None and not self._has_space_again():
            return
        if self._broker_starts == BROKER_STARTS:
            raise RunFailed(f"the broker's process {why}, after {BROKER_STARTS} new starts")
        self._broker_starts += 1
        self._say("warning", f"the broker's process {why}; it is started again")
        try:
            await self.fleet.broker.restart()
        except SynclineError as error:
            raise RunFailed(f"the broker's process {why}, and does not start again: {error}") from None

    def _has_space_again(self) -> bool:
        """After its disk was full: until it is started anew, nats-server stores nothing, however much is freed."""
        place = self.fleet.broker.directory
        if any(NO_SPACE.match(line) for line in self._broker_log.read()) and not self._full:
            self._full = True
            self._say("error", f"the disk is full and the run stands still: free {ENOUGH_BYTES >> 20} MiB for {place}")
        if not self._full or shutil.disk_usage(place).free < ENOUGH_BYTES:
            return False
        self._broker_log.read()
        self._full = False
        return True

    async def _until_broken(self, follower: RunFollower, needed: int) -> NoReturn:
        """Raises RunFailed when too few agents are left, or broker or coordinator do not stay up."""
        state = follower.state
        while True:
            await self._keep_broker()
            await self._keep_coordinator()
            able, least = self.able(state), needed
            if follower.opened:  # what is said from now on, the coordinator judges; processes are for us to see
                able, least = [name for name in self.fleet.settings.agents if name not in self._gone], 1
            if len(able) < least:
                unable = sorted({*self.fleet.settings.agents} - {*able})
                why = "; ".join(state.failed.values()) or f"{', '.join(unable)} gone"
                text = f"run {state.run} needs {least} of its agents and has {len(able)}: {why}"
                raise RunFailed(text + ends_of_logs(self.fleet, unable[:2]))
            await asyncio.sleep(LOOK_S)

    async def _until_stalled(self, follower: RunFollower, stalled_s: float) -> NoReturn:
        """Raises RunFailed when nobody has made a step, and no round has closed, for so long."""
        state, loop = follower.state, asyncio.get_running_loop()
        moved_at_s, seen = loop.time(), ""
        while True:
            trains = [
                (a.train.state, a.train.clock, a.train.step) for a in state.agents.values() if a.train is not None
            ]
            now = repr((follower.head, trains))
            if now != seen:
                moved_at_s, seen = loop.time(), now
            if loop.time() - moved_at_s > stalled_s:
                text = f"run {state.run}: nothing has moved for {stalled_s:g} s; it stands at version {state.version}"
                raise RunFailed(text + ends_of_logs(self.fleet, [COORDINATOR, *self.fleet.settings.agents[:1]]))
            await asyncio.sleep(LOOK_S)


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
