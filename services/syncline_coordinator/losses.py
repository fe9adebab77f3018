"""What the broker has lost of each run, as this coordinator has noticed it, and on whose word.

Agents tell of losses that nobody else can see, and may lie: each is believed a few times, until the connection was gone again.
"""

from __future__ import annotations

from collections import Counter

from syncline_coordinator.head import RolledBack

WORDS = 3  # of one agent: an honest one may be the only one to notice two losses in a row


class Losses:
    def __init__(self) -> None:
        self._terms: dict[str, int] = {}  # run → the highest term that anybody has seen
        self._words: Counter[tuple[str, str]] = Counter()  # (run, agent) → roll-backs on its word alone

    def noticed(self, run: str, error: RolledBack) -> str:
        """Notes it. Returns the agent who is not believed any more from now on, or ''."""
        self._terms[run] = max(error.term, self._terms.get(run, 0))
        if not error.agent:
            return ""
        self._words[run, error.agent] += 1
        return "" if self.believes(run, error.agent) else error.agent

    def believes(self, run: str, agent: str) -> bool:
        return self._words[run, agent] < WORDS

    def connection_was_gone(self) -> None:
        self._words.clear()

    def term(self, run: str) -> int | None:
        """The highest term seen of a run that has lost something and was not opened since, or None."""
        return self._terms.get(run)

    def mended(self, run: str) -> None:
        """It goes on under a higher term."""
        self._terms.pop(run, None)
