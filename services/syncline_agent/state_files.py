"""Where an agent keeps what it has of each run, and when that goes. Imports no torch: what is in a file, `state` knows.

A file goes when its run has ended: at once where the agent is there to see it, else when it begins with another run. Of a run
that the bus does not know, nobody can say whether it is over; perhaps it is another broker's. The newest few of those stay.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from syncline.bus.base import Bus
from syncline.errors import BusError, PeerError
from syncline.wire import subjects
from syncline.wire.messages import ENDED, Head, decode

log = logging.getLogger(__name__)

UNKNOWN_KEPT = 4  # runs that the bus does not know
LOOKED_AT = 16  # runs, each time


class StateFiles:
    """`<state directory>/<run>/<agent>.safetensors`; agents may share the directory. Nothing here fails: what does not go now
    goes another time."""

    def __init__(self, bus: Bus, state_dir: Path, agent: str) -> None:
        self._bus, self._state_dir, self._agent = bus, state_dir, agent

    def path(self, run: str) -> Path:
        return self._state_dir / run / f"{self._agent}.safetensors"

    async def remove(self, run: str) -> None:
        """What this agent has of the run, and the run's directory with the last of it."""
        await asyncio.get_running_loop().run_in_executor(None, self._remove, run)

    async def tidy(self, run: str) -> None:
        """This agent begins with the run: what it has of others goes, where these are over."""
        unknown = 0
        for other in await asyncio.get_running_loop().run_in_executor(None, self._others, run):
            try:
                entry = await self._bus.kv_get(subjects.RUNS_BUCKET, subjects.head_key(other))
                over = entry is not None and decode(Head, entry.value).phase in ENDED
            except (BusError, PeerError) as error:
                log.debug("is run %s over? %s", other, error)
                return
            unknown += entry is None
            if over or (entry is None and unknown > UNKNOWN_KEPT):
                await self.remove(other)

    def _others(self, run: str) -> list[str]:
        """The runs that this agent has something of, but for that one; the newest first."""
        try:
            found = [
                (path.stat().st_mtime, path.parent.name)
                for path in self._state_dir.glob(f"*/{self._agent}.safetensors")
                if path.parent.name != run and subjects.NAME.fullmatch(path.parent.name)
            ]
        except OSError as error:
            log.warning("the state directory: %s", error)
            return []
        return [name for _, name in sorted(found, reverse=True)[:LOOKED_AT]]

    def _remove(self, run: str) -> None:
        path = self.path(run)
        try:
            path.unlink(missing_ok=True)
            path.with_suffix(".new").unlink(missing_ok=True)  # of a child that was killed while it wrote
            if path.parent.is_dir() and not any(path.parent.iterdir()):
                path.parent.rmdir()
        except OSError as error:  # another agent has begun with it just now, or it is not ours
            log.warning("what was kept of run %s stays: %s", run, error)
