"""From a run's settings to its policy and its adviser, and from a head to the point where the policy resumes."""

from __future__ import annotations

from syncline.policy.advice import Adviser
from syncline.policy.asynchronous import Asynchronous
from syncline.policy.base import Policy, ResumePoint
from syncline.policy.ledger import Ledger
from syncline.policy.membership import Numbering
from syncline.policy.rounds import Rounds
from syncline.spec.run_spec import RunSpec
from syncline.spec.sections import Async
from syncline.wire.messages import Head, Presence, Roster


def policy_of(spec: RunSpec, max_agents: int) -> Policy:
    """Make the policy that the section `sync` of a spec chooses.

    Args:
        max_agents: the most agents that the run's ledger admits.
    """
    ledger = Ledger(Numbering(fixed_parts=spec.partition.parts, max_agents=max_agents))
    sync = spec.sync
    merge = spec.merge
    elastic = spec.mix.kind == "elastic"
    if not isinstance(sync, Async):
        return Rounds(
            ledger=ledger,
            min_agents=spec.agents.min,
            versions=spec.stop.versions,
            quorum=None if sync.quorum == "all" else sync.quorum,
            grace_s=sync.grace_s,
            min_updates=merge.min_updates(),
            rule=merge.rule,
            sample=sync.sample,
            weights=merge.weights,
            normalize=merge.normalize,
            elastic=elastic,
            seed=spec.seed,
        )
    return Asynchronous(
        ledger=ledger,
        min_agents=spec.agents.min,
        versions=spec.stop.versions,
        buffer=sync.buffer_size(spec.agents.min),
        max_lag=sync.lag_bound(spec.agents.min),
        max_ahead=sync.max_ahead,
        overlap=sync.overlap,
        quorum=sync.quorum,
        grace_s=sync.grace_s,
        min_updates=merge.min_updates(),
        rule=merge.rule,
        staleness=sync.staleness_or_default,
        weights=merge.weights,
        normalize=merge.normalize,
        elastic=elastic,
        one_each=merge.rule != "mean",
    )


def adviser_of(spec: RunSpec) -> Adviser:
    """Make the adviser of a run. The adviser looks at lags, rows and norms for settings that do not fit the fleet."""
    sync = spec.sync
    bounded = isinstance(sync, Async) and sync.max_ahead is not None
    return Adviser(
        waits=bounded or (not isinstance(sync, Async) and sync.quorum == "all"),
        max_lag=sync.lag_bound(spec.agents.min) if isinstance(sync, Async) else None,
        max_ahead=sync.max_ahead if isinstance(sync, Async) else None,
        by_rows=spec.merge.weights == "samples",
        alpha=1.0 if spec.mix.kind == "elastic" else spec.mix.alpha,
    )


def resume_point_of(head: Head, roster: Roster) -> ResumePoint:
    """Return the point of a run at which a restarted coordinator's policy resumes.

    Args:
        roster: the roster that `head` names.
    """
    agents = list(enumerate(roster.agents))
    return ResumePoint(
        version=head.version,
        participants=tuple(a for i, a in agents if roster.participant(i)),
        live=frozenset(a for i, a in agents if roster.state(i) == Presence.PRESENT),
        slow=frozenset(a for i, a in agents if roster.state(i) == Presence.SLOW),
        offsets={a: roster.offset(i) for i, a in agents if roster.offset(i)},
        gate=head.gate,
    )
