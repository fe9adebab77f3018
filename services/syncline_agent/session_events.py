"""Events of an agent's session, in words for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from syncline.observe.telemetry import Telemetry
from syncline.runtime.child_messages import SaveReport

MOST_ADVICE = 16  # texts of one run
MOST_TEXT_CHARS = 2000


class SessionEvents:
    """Publishes the events of one session; advice, and a full disk, once."""

    def __init__(self, telemetry: Telemetry, agent: str) -> None:
        self._telemetry = telemetry
        self._agent = agent
        self._advised: set[str] = set()
        self._save_problem_told = False

    async def advise(self, advice: Sequence[str]) -> None:
        """Publish each text once in this run, also if the child was started again meanwhile."""
        for text in advice:
            if text not in self._advised and len(self._advised) < MOST_ADVICE:
                self._advised.add(text)
                await self._publish("advice", f"{self._agent}: {text}")

    async def not_saved(self, save: SaveReport) -> None:
        """Report, once, that the disk is full or cannot be written."""
        if not save.problem or self._save_problem_told:
            return
        self._save_problem_told = True
        consequence = (
            "takes no part until it is, for what it gives up must be there first"
            if save.blocks_offer
            else "goes on without"
        )
        text = f"{self._agent}: what it trains is not kept on its disk, and {consequence}: {save.problem}"
        await self._publish("not-kept", text)

    def saved_again(self) -> None:
        """Report the next problem of the disk again."""
        self._save_problem_told = False

    async def rolled_back(self, version: int, before: int) -> None:
        """Report a head that is older than the version before. A restarted coordinator may not know of the loss."""
        text = f"the run goes on from version {version}, and was at {before} already: the broker lost what came between"
        await self._publish("run-set-back", f"{self._agent}: {text}")

    async def bad_message(self, text: str) -> None:
        await self._publish("bad-message", f"{self._agent}: {text}")

    async def child_died(self, error: Exception, pause_s: float) -> None:
        later = f" in {pause_s:.0f} s" if pause_s else ""
        await self._publish(
            "trainer-died", f"{self._agent}: the training process died: {error}; starting another{later}"
        )

    async def failed(self, reason: str) -> None:
        await self._publish("agent-failed", f"{self._agent} cannot train: {reason}", level="error")

    async def _publish(self, kind: str, text: str, level: Literal["warning", "error"] = "warning") -> None:
        await self._telemetry.event(kind, text[:MOST_TEXT_CHARS], level=level, agent=self._agent)
