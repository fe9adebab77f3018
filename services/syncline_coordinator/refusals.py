"""What the broker refused is said in the events, with the agent's name: its log alone knows."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from syncline.bus.server.violations import ViolationLog
from syncline.observe.telemetry import Telemetry

LOOK_S = 0.25


async def tell_refusals(log: Path | None, names: Mapping[str, str], events: Telemetry) -> None:
    """`names`: by public key. Without a log there is nothing to tell."""
    violations = ViolationLog(log, dict(names)) if log is not None else None
    while violations is not None:
        for violation in violations.read():
            text = f"{violation.who}: {violation.what} on {violation.subject} was refused by the broker"
            await events.event("refused", text, level="warning", agent=violation.who)
        await asyncio.sleep(LOOK_S)
