"""Facts and commands of a policy in words, for people. The one place that turns a story into text."""

from __future__ import annotations

from collections.abc import Sequence

from syncline.policy.events import (
    AgentJoined,
    AgentLost,
    AgentSlow,
    Command,
    Committed,
    Drop,
    Fact,
    Finish,
    LetRun,
    Merge,
    OfferReady,
    StartRound,
    TargetReached,
    Tell,
    Tick,
    UpdateBroken,
    WakeAt,
)
from syncline.policy.story import Step

NAMED = 8  # agents, of a list of many


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
        case Committed(version):
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
            return f"merge {named}: {reason}" + (f"; late: {_names(late)}" if late else "")
        case Drop(agent, clock, reason):
            return f"drop clock {clock} of {agent}: {reason}"
        case WakeAt():
            return "wait for the end of the grace period"
        case Tell(event):
            return f"publish the event {event}"
        case Finish(reason, failed):
            return f"{'fail' if failed else 'end'} the run: {reason}"


def _names(names: Sequence[str]) -> str:
    more = [f"and {len(names) - NAMED} more"] if len(names) > NAMED else []
    return ", ".join([*names[:NAMED], *more]) or "no agent"
