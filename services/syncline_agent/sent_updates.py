"""Clocks of the updates that an agent has sent in a run, and the rule for beginning another period. Pure."""

from __future__ import annotations

from syncline.spec.run_spec import RunSpec
from syncline.spec.sections import Async
from syncline.wire.messages import BlobRef, Head
from syncline_agent.run_view import RosterLine
from syncline_agent.training_child import outboxes

GIVEN_UP_CLOCKS = 8  # the newest ones: no more of them can wait for their verdicts


class SentUpdates:
    """Clocks of the updates that this agent has sent in the present epoch.

    Attributes:
        newest: clock of the newest update that is sent or on its way.
    """

    def __init__(self) -> None:
        self.newest = 0
        self._offered_for = ""  # rounds: id of the model that the last offer deviates from
        self._lost_verdicts = range(0)  # clocks of the epoch before
        self._made = 0  # updates of this process

    def may_begin(self, spec: RunSpec, head: Head, line: RosterLine) -> bool:
        """Return whether a period may begin: head asks for one, and the updates under way leave room for it."""
        if isinstance(spec.sync, Async):
            position = max(self.newest, line.judged)
            full = position - line.judged >= outboxes(spec)
            gated = head.gate is not None and position + line.offset > head.gate
            return not full and not gated and head.phase in ("training", "merging")
        # An offer for this model waits on the bus, whatever its term, if it was not judged and this agent is asked again.
        assert head.model is not None
        offered = self._offered_for == head.model.id and line.judged < self.newest
        return head.phase == "training" and not offered

    def next_outbox(self, spec: RunSpec) -> int:
        """Return the outbox of the next update: its last update but one is judged. Clocks cannot tell: some are left out."""
        return self._made % outboxes(spec)

    def verdicts(self, line: RosterLine) -> dict[int, bool]:
        """Return by clock whether updates were merged. Verdicts that the broker has lost count as drops."""
        lost = {clock: False for clock in self._lost_verdicts if clock > line.judged}
        return {**lost, **line.verdicts}

    def verdicts_applied(self) -> None:
        self._lost_verdicts = range(0)

    def update_made(self) -> None:
        self._made += 1

    def offered(self, clock: int) -> None:
        self.newest = max(self.newest, clock)

    def round_offered(self, model: BlobRef | None) -> None:
        """Remember that the round of this model has this agent's offer."""
        self._offered_for = model.id if model is not None else ""

    def restart(self, clock: int) -> None:
        """Begin a new epoch: the broker has lost acknowledged writes, and updates up to `clock` may be among them."""
        self._lost_verdicts = range(max(1, clock - GIVEN_UP_CLOCKS + 1), clock + 1)
        self.newest = 0
        self._offered_for = ""
