"""Ledgers for tests of policies."""

from __future__ import annotations

from collections.abc import Mapping

from syncline.policy.ledger import Ledger
from syncline.wire.messages import Verdict


def ledger_at(clocks: Mapping[str, int]) -> Ledger:
    """Return a ledger in which these are the agents' last judged clocks."""
    ledger = Ledger()
    for agent, clock in clocks.items():
        ledger.judge(agent, clock, Verdict.MERGED)
    return ledger
