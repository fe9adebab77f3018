"""The duration of a local period: a number of steps or passes, or as many steps as fit into a number of seconds.

Pure: time is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass


def steps_in_pass(rows: int, batch_size: int) -> int:
    """Return the batches of one pass over the data.

    The last batch may be short. A single row that would be left over belongs to the batch before it, because a network with
    batch norm cannot be trained on one row.
    """
    full, left = divmod(rows, batch_size)
    return full + (left > 1 or (left == 1 and full == 0))


@dataclass(slots=True)
class Duration:
    """Counts the steps of one local period. A period that is given in seconds has at least one step."""

    most: int  # steps
    seconds: float | None = None  # None: the period is given in steps
    done: int = 0  # steps
    elapsed_s: float = 0.0  # from the period's begin to the end of the last step
    step_s: float = 0.0  # estimate for the next step: the last step or the mean of all, whichever is shorter

    def stepped(self, elapsed_s: float) -> bool:
        """Count a step. Return whether another step fits.

        Args:
            elapsed_s: from the period's begin to the end of this step.
        """
        last_s = elapsed_s - self.elapsed_s
        self.elapsed_s = elapsed_s
        self.done += 1
        self.step_s = min(last_s, elapsed_s / self.done)
        return self.is_open

    @property
    def is_open(self) -> bool:
        """Return whether another step fits."""
        if self.done >= self.most:
            return False
        return self.seconds is None or self.done == 0 or self.elapsed_s + self.step_s <= self.seconds

    @property
    def expected(self) -> int:
        """Return an estimate of the period's steps; 0 before the first step of a period that is given in seconds."""
        if self.seconds is None:
            return self.most
        if self.done == 0:
            return 0
        left_s = max(0.0, self.seconds - self.elapsed_s)
        more = int(left_s / self.step_s) if self.step_s > 0 else self.most
        return min(self.most, self.done + more)
