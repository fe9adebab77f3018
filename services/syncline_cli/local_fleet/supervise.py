"""Supervision of a local fleet: start it for some work, restart its broker and coordinator, and end it afterwards."""

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
ENOUGH_BYTES = 64 << 20  # free space at which a broker with a full disk is restarted
BROKER_STARTS = COORDINATOR_STARTS = 3  # restarts, after which the run fails

T = TypeVar("T")


def run_with_fleet(
    settings: FleetSettings,
    nursery: Nursery,
    work: Callable[[LocalFleet], Awaitable[int]],
    around: AbstractAsyncContextManager[Any] | None = None,
) -> int:
    """Run `work` with the fleet up.

    Args:
        work: returns the exit code.
        around: a context that is entered before the fleet starts and left after its end, such as the screen.

    Raises:
        Interrupted: a signal came; the fleet has been stopped.
    """
    starting = True

    def stop_imports() -> None:
        if starting:
            os.kill(nursery.pid, signal.SIGKILL)  # while it imports torch it does not see the end of this process

    async def start_and_work() -> int:
        nonlocal starting
        async with around or nullcontext(), LocalFleet(settings, nursery) as fleet:
            starting = False
            return await work(fleet)

    try:
        return run_interruptible(start_and_work, on_signal=stop_imports)
    except KeyboardInterrupt:  # a signal before the event loop ran
        stop_imports()
        raise Interrupted from None


class FleetSupervisor:
    """Watches the processes of a local fleet, and restarts the broker and the coordinator. Agents are not restarted."""

    def __init__(self, fleet: LocalFleet, say: Say, *, coordinator_starts: int = COORDINATOR_STARTS) -> None:
        self.fleet, self._say = fleet, say
        self._gone: set[str] = set()
        self._coordinator_starts = coordinator_starts  # restarts that are left
        self._broker_starts = 0  # restarts so far
        self._disk_full = False
        self._broker_log = LogTail(fleet.broker.log_path, from_end=True)

    def able_agents(self, state: RunState) -> list[str]:
        """Return the agents that are alive and have not reported that they cannot train."""
        self._look()
        return [name for name in self.fleet.settings.agents if name not in self._gone and name not in state.failed]

    async def until_ended(self, follower: RunFollower, needed: int, *, stalled_s: float = math.inf) -> Head:
        """Return the last head of a run that is done.

        Args:
            needed: agents that the run starts with.
            stalled_s: longest time without progress.

        Raises:
            RunFailed: the run failed or stalled, or the fleet cannot continue it; the error has the last lines of logs.
        """
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
        """Return the result of `work`, which asks the coordinator. Raises RunFailed if the coordinator ends before."""
        return await first_of(work, self._until_no_coordinator())

    async def keep_up(self) -> NoReturn:
        """Restart broker and coordinator as needed, until cancelled. Raises RunFailed after too many restarts."""
        while True:
            await self._keep_broker()
            await self._keep_coordinator()
            self._look()
            await asyncio.sleep(LOOK_S)

    def _look(self) -> None:
        """Report agents whose processes have ended. The run continues without them, as in a fleet of machines."""
        for name in self.fleet.settings.agents:
            worker = self.fleet.workers[name]
            if name not in self._gone and worker.exited.done():
                self._gone.add(name)
                self._say("warning", f"{name}: its process {how_it_ended(worker.exited.result())}")

    def _coordinator_end(self) -> int | None:
        """Return the exit code of an ended coordinator."""
        exited = self.fleet.workers[COORDINATOR].exited
        return exited.result() if exited.done() else None

    async def _keep_coordinator(self) -> None:
        """Restart a coordinator that has ended; it continues at head. Raises RunFailed if another restart cannot help."""
        if (code := self._coordinator_end()) is None:
            return
        if code == WRONG_INPUT or not self._coordinator_starts:
            raise self._no_coordinator(code)
        self._coordinator_starts -= 1
        self._say("warning", f"the coordinator's process {how_it_ended(code)}; restarting it")
        try:
            await self.fleet.start_coordinator()
        except SynclineError as error:
            why = f"the coordinator's process {how_it_ended(code)}, and cannot be restarted: {error}"
            raise RunFailed(why) from None

    async def _until_no_coordinator(self) -> NoReturn:
        raise self._no_coordinator(await asyncio.shield(self.fleet.workers[COORDINATOR].exited))

    def _no_coordinator(self, code: int) -> RunFailed:
        return RunFailed(f"the coordinator's process {how_it_ended(code)}{ends_of_logs(self.fleet, [COORDINATOR])}")

    async def _keep_broker(self) -> None:
        """Restart a broker that has ended, or that stopped storing on a full disk; its disk has every acknowledged write.

        Raises:
            RunFailed: the broker cannot be restarted, or was restarted too often.
        """
        code = self.fleet.broker.exit_code
        why = "ran out of disk space" if code is None else how_it_ended(code)
        if code is None and not self._has_space_again():
            return
        if self._broker_starts == BROKER_STARTS:
            raise RunFailed(f"the broker's process {why}, after {BROKER_STARTS} restarts")
        self._broker_starts += 1
        self._say("warning", f"the broker's process {why}; restarting it")
        try:
            await self.fleet.broker.restart()
        except SynclineError as error:
            raise RunFailed(f"the broker's process {why}, and cannot be restarted: {error}") from None

    def _has_space_again(self) -> bool:
        """Tell whether a broker with a full disk has space again; nats-server stores nothing until its restart."""
        place = self.fleet.broker.directory
        if any(NO_SPACE.match(line) for line in self._broker_log.read()) and not self._disk_full:
            self._disk_full = True
            self._say("error", f"the disk is full and the run has stopped: free {ENOUGH_BYTES >> 20} MiB for {place}")
        if not self._disk_full or shutil.disk_usage(place).free < ENOUGH_BYTES:
            return False
        self._broker_log.read()
        self._disk_full = False
        return True

    async def _until_broken(self, follower: RunFollower, needed: int) -> NoReturn:
        """Raise RunFailed when too few agents are left, or when broker or coordinator cannot be kept up."""
        state = follower.state
        while True:
            await self._keep_broker()
            await self._keep_coordinator()
            able, least = self.able_agents(state), needed
            if follower.opened:  # the coordinator handles failures from now on; only ended processes count here
                able, least = [name for name in self.fleet.settings.agents if name not in self._gone], 1
            if len(able) < least:
                unable = sorted({*self.fleet.settings.agents} - {*able})
                why = "; ".join(state.failed.values()) or f"{', '.join(unable)} ended"
                text = f"run {state.run} needs {least} of its agents and has {len(able)}: {why}"
                raise RunFailed(text + ends_of_logs(self.fleet, unable[:2]))
            await asyncio.sleep(LOOK_S)

    async def _until_stalled(self, follower: RunFollower, stalled_s: float) -> NoReturn:
        """Raise RunFailed when no agent has made a step and no round has closed for `stalled_s`."""
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
                text = f"run {state.run}: no progress for {stalled_s:g} s, at version {state.version}"
                raise RunFailed(text + ends_of_logs(self.fleet, [COORDINATOR, *self.fleet.settings.agents[:1]]))
            await asyncio.sleep(LOOK_S)


def how_it_ended(code: int) -> str:
    """Describe an exit code; negative for a signal, as in `subprocess`."""
    if code >= 0:
        return f"ended with code {code}"
    known = {int(s): s.name for s in signal.Signals}
    return f"was killed by {known.get(-code, f'signal {-code}')}"


def ends_of_logs(fleet: LocalFleet, names: list[str]) -> str:
    """Return the last lines of the logs of services, indented to stand below an error."""
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
