"""Reasons, facts and commands of a policy in words, for the log, the events, commit records and `syncline why`."""

from __future__ import annotations

from collections.abc import Sequence

from syncline.policy.events import (
    AgentJoined,
    AgentLost,
    AgentSlow,
    Command,
    Drop,
    Fact,
    Finish,
    LetRun,
    Merge,
    OfferReady,
    StartRound,
    TargetReached,
    Tick,
    UpdateBroken,
    VersionCommitted,
    WakeAt,
    Warn,
)
from syncline.policy.reasons import (
    Closed,
    DropReason,
    FinishReason,
    NoAgentCanTrain,
    NothingUsable,
    NotParticipant,
    NotStarted,
    Replaced,
    RoundClosed,
    StopRequested,
    TooFewUpdates,
    TooStale,
    Unusable,
    VersionsReached,
)
from syncline.policy.story import Step

NAMED = 8  # agents, of a list of many
REASON_CHARS = 1000  # reasons travel in records with limits, and the agents' own words in them may be long
ABSENT_NAMED = 5
ABSENT_CHARS = 100


def story_lines(steps: Sequence[Step], limit: int = 200) -> list[str]:
    """Return one line for each of the last `limit` steps.

    A line has the step's number, the time since the first step, the fact, its cause, and the commands that followed.
    """
    start_s = steps[0].at_s if steps else 0.0
    return [_line(step, start_s) for step in steps[-limit:]]


def _line(step: Step, start_s: float) -> str:
    cause = f" (from {step.cause})" if step.cause else ""
    commands = "; ".join(map(command_words, step.commands)) or "nothing to do"
    return f"{step.number} +{step.at_s - start_s:.2f} s: {fact_words(step.fact)}{cause} → {commands}"


def fact_words(fact: Fact) -> str:
    """Return a fact as a clause."""
    match fact:
        case AgentJoined(agent):
            return f"{agent} joined"
        case AgentLost(agent, reason, failed):
            return f"{agent} {'failed' if failed else 'lost'}: {reason}"
        case AgentSlow(agent, reason):
            return f"{agent} slow: {reason}"
        case OfferReady(agent, clock, base):
            return f"{agent} offered clock {clock}, trained from version {base}"
        case UpdateBroken(agent, clock, why):
            return f"the update of {agent}, clock {clock}, is unusable: {why}"
        case VersionCommitted(version):
            return f"version {version} committed"
        case TargetReached(why):
            return f"the run is to end: {why}"
        case Tick():
            return "time passed"


def command_words(command: Command) -> str:
    """Return a command as a clause."""
    match command:
        case StartRound(version, participants):
            return f"start the round of version {version} with {_names(participants)}"
        case LetRun(version, participants, gate):
            bound = f" up to clock {gate}" if gate is not None else ""
            return f"let {_names(participants)} train from version {version}{bound}"
        case Merge(updates, reason, late):
            named = _names([f"{u.agent} clock {u.clock} weight {u.weight:.4g}" for u in updates])
            return f"merge {named}: {closed_words(reason)}" + (f"; late: {_names(late)}" if late else "")
        case Drop(agent, clock, reason):
            return f"drop clock {clock} of {agent}: {drop_words(reason)}"
        case WakeAt():
            return "wait for the end of the grace period"
        case Warn(reason):
            return f"warn: {warning_words(reason)}"
        case Finish(reason, failed):
            return f"{'fail' if failed else 'end'} the run: {finish_words(reason)}"


# -- reasons -------------------------------------------------------------------------------------------------------------
def drop_words(reason: DropReason) -> str:
    """Return why an update was dropped."""
    match reason:
        case RoundClosed(base):
            return f"late: the round of version {base} is closed"
        case NotParticipant(version):
            return f"not a participant of the round of version {version}"
        case Replaced(by_clock):
            return f"replaced by clock {by_clock} of the same agent"
        case TooStale(lag, max_lag):
            return f"lag {lag} > max_lag {max_lag}"
        case NotStarted():
            return "the run has not started"
        case Unusable(problem):
            return problem


def closed_words(closed: Closed) -> str:
    """Return why a round or a buffer was closed, in at most `REASON_CHARS` characters."""
    text = f"{closed.updates} of {closed.expected}"
    if closed.by == "quorum":
        text = f"quorum {text} + {closed.grace_s or 0.0:.1f} s"
    elif closed.by == "nobody may run":
        text += ", nobody may run before they are judged"
    if closed.absent:
        named = [f"{agent} {brief(why)}" for agent, why in closed.absent[:ABSENT_NAMED]]
        more = [f"and {len(closed.absent) - ABSENT_NAMED} more"] if len(closed.absent) > ABSENT_NAMED else []
        text += f" ({'; '.join([*named, *more])})"
    text += "".join(f"; without {agent}: {brief(why)}" for agent, why in closed.without)
    return brief(text, REASON_CHARS)


def warning_words(reason: TooFewUpdates) -> str:
    """Return what the owner of a run is warned of."""
    text = (
        f"version {reason.version} waits: merge.rule = {reason.rule} needs {reason.needed} updates, {reason.received} are in, "
        f"and no update of the {reason.present} present agents is awaited. It goes on when another agent joins"
    )
    return text + (f", or one of {reason.slow} slow agents makes progress" if reason.slow else "")


def finish_words(reason: FinishReason) -> str:
    """Return why a run ends."""
    match reason:
        case VersionsReached(versions):
            return f"{versions} versions"
        case StopRequested(why):
            return why
        case NoAgentCanTrain(failed):
            return "no agent can train: " + "; ".join(f"{agent}: {why}" for agent, why in failed)
        case NothingUsable(version, agent, problem):
            return f"every update of version {version} was dropped; the last: {agent}: {problem}"


def brief(text: str, chars: int = ABSENT_CHARS) -> str:
    """Return the text, cut to so many characters."""
    return text if len(text) <= chars else text[: chars - 1] + "…"


def _names(names: Sequence[str]) -> str:
    more = [f"and {len(names) - NAMED} more"] if len(names) > NAMED else []
    return ", ".join([*names[:NAMED], *more]) or "no agent"
