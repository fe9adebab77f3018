"""How long a local period lasts: so many steps or passes, or as many steps as fit into so many seconds.

Pure: time is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass


def steps_in_pass(rows: int, batch_size: int) -> int:
    """Batches of one pass over so many rows. The last may be short, but one row that would be left over belongs to the batch
    before it: a network with batch norm cannot be trained on a single row."""
    full, left = divmod(rows, batch_size)
    return full + (left > 1 or (left == 1 and full == 0))


@dataclass(slots=True)
class Duration:
    """Of one local period, from its first step to its last; with `seconds` at least one step is made."""

    most: int  # steps
    seconds: float | None = None
    done: int = 0  # steps
    elapsed_s: float = 0.0
    step_s: float = 0.0  # how long the next step may take: the last one or the mean of all, whichever is shorter

    def stepped(self, elapsed_s: float) -> bool:
        """A step was finished so many seconds after the period's begin. Whether there is room for another."""
        last_s, self.elapsed_s, self.done = elapsed_s - self.elapsed_s, elapsed_s, self.done + 1
        self.step_s = min(last_s, elapsed_s / self.done)
        return self.is_open

    @property
    def is_open(self) -> bool:
        if self.done >= self.most:
            return False
        return self.seconds is None or self.done == 0 or self.elapsed_s + self.step_s <= self.seconds

    @property
    def expected(self) -> int:
        """How many steps this period will have, as far as can be told by now; 0 where nothing can be."""
        if self.seconds is None:
            return self.most
        if self.done == 0:
            return 0
        left_s = max(0.0, self.seconds - self.elapsed_s)
        more = int(left_s / self.step_s) if self.step_s > 0 else self.most
        return min(self.most, self.done + more)
