"""Where a run stands, for whoever begins to listen late. Reads the run, and changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from syncline.observe.telemetry import LOST_NAMED, REASON_CHARS, RunStatus

if TYPE_CHECKING:
    from syncline_coordinator.run import Run


def status_of(run: Run) -> RunStatus:
    head, spec = run.keeper.head, run.parts.spec
    return RunStatus(
        task=spec.task,
        phase=head.phase,
        version=head.version,
        versions=spec.stop.versions,
        agents=len(run.present),
        needed=spec.agents.min,
        lost=[agent for agent in run.ledger.numbering.names if agent not in run.present][:LOST_NAMED],
        slow=sorted(run.slow)[:LOST_NAMED],
        reason=head.reason[:REASON_CHARS],
    )
