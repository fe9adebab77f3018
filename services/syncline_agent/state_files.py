"""The files with an agent's states of runs, and their removal. Imports no torch; `local_state` has their content.

A file is removed when its run has ended: at once if the agent takes part until the end, otherwise when the agent begins with
another run. A run that the bus does not know may be over, or may belong to another broker: the newest few such files stay.
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
    """Files `<state directory>/<run>/<agent>.safetensors`; agents may share the directory.

    Errors are logged and not raised: a file that cannot be removed now is removed another time.
    """

    def __init__(self, bus: Bus, state_dir: Path, agent: str) -> None:
        self._bus = bus
        self._state_dir = state_dir
        self._agent = agent

    def path(self, run: str) -> Path:
        return self._state_dir / run / f"{self._agent}.safetensors"

    async def remove(self, run: str) -> None:
        """Remove this agent's file of the run, and the run's directory with its last file."""
        await asyncio.get_running_loop().run_in_executor(None, self._remove, run)

    async def tidy(self, run: str) -> None:
        """Remove this agent's files of runs that are over. `run`: the run that the agent begins with; its file stays."""
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
        """Return the other runs of which this agent has a file; the newest first."""
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
            path.with_suffix(".new").unlink(missing_ok=True)  # left by a child that was killed during a save
            if path.parent.is_dir() and not any(path.parent.iterdir()):
                path.parent.rmdir()
        except OSError as error:  # another agent has begun the run just now, or owns the file
            log.warning("the file of run %s cannot be removed: %s", run, error)
