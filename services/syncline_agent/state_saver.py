"""Decides when the state of an agent goes to its disk, and reports a disk that does not take it.

Saving is limited, so that a large model with short periods still trains most of the time. A state that the limit holds back is
saved later, while the child waits for a question.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from syncline.model.manifest import Manifest
from syncline_agent.local_state import LocalState, load_state, save_state
from syncline_agent.training_child import SAVE_AGAIN_S

log = logging.getLogger(__name__)

SAVE_EVERY_S = 1.0  # at most
SAVE_SHARE = 0.05  # of an agent's time that saving may take


class StateSaver:
    """Saves the states of one run.

    Attributes:
        unsaved_clock: clock of the state in memory if that is not on the disk yet, else None.
    """

    def __init__(self, path: Path, layout: Manifest, submission: str, now_s: Callable[[], float]) -> None:
        """`submission`: tells apart the runs that have had this name. `now_s`: returns the time, in seconds."""
        self.path = path
        self.unsaved_clock: int | None = None
        self._layout = layout
        self._submission = submission
        self._now_s = now_s
        self._not_before_s = 0.0
        self._problem = ""  # of the last save

    def load(self) -> LocalState | None:
        """Return the state on the disk; None: no file of this run and this model can be used."""
        return load_state(self.path, self._layout, self._submission)

    def due_in_s(self) -> float | None:
        """Return the seconds until the unsaved state may be saved, or None if every state is saved."""
        return None if self.unsaved_clock is None else self._not_before_s - self._now_s()

    def save(self, clock: int, state: Callable[[int], LocalState], *, at_once: bool = False) -> str:
        """Save the state of a clock, unless the limit holds the save back.

        Args:
            state: returns the state of the clock; called only for a save now.
            at_once: ignore the limit: the state must be on the disk before the update is offered.

        Returns:
            The problem of this save or of the last one; empty: the disk took the state. The old file stays after a problem.
        """
        begin_s = self._now_s()
        if begin_s < self._not_before_s and not at_once:
            self.unsaved_clock = clock
            return self._problem
        taken = state(clock)
        problem = ""
        try:
            save_state(self.path, taken, self._layout, self._submission)
        except (OSError, SafetensorError) as error:
            problem = f"{self.path.parent}: {getattr(error, 'strerror', None) or error}"
            log.warning("not kept: %s", problem)
        took_s = self._now_s() - begin_s
        least_s = SAVE_AGAIN_S if problem else SAVE_EVERY_S
        self._not_before_s = begin_s + max(least_s, took_s / SAVE_SHARE)
        self.unsaved_clock = clock if problem else None
        self._problem = problem
        return problem
