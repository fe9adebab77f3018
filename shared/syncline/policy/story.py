"""The recent history of a policy: facts, the commands that followed, and the cause of each fact. Pure.

A *step* is one fact that a policy handled, with its commands. `story` lists the steps that concern one agent, and the steps
that caused them: which round named it, which update was merged or dropped, and why.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from syncline.policy.events import (
    Command,
    Drop,
    Fact,
    LetRun,
    Merge,
    StartRound,
    Tick,
    UpdateBroken,
    VersionCommitted,
    WakeAt,
)

MAX_STEPS = 1000
MAX_MENTIONS = 20_000  # of agents in the kept steps: with 1,000 agents about twenty commands that name all of them


@dataclass(frozen=True, slots=True)
class Step:
    """A fact that a policy handled."""

    number: int  # from 1 on
    at_s: float
    fact: Fact
    commands: tuple[Command, ...]
    cause: int = 0  # number of the step whose command led to this fact; 0: it came from outside

    def agents(self) -> Iterator[str]:
        """Yield the agents that the fact or a command names, some of them twice."""
        if (agent := getattr(self.fact, "agent", None)) is not None:
            yield agent
        for command in self.commands:
            match command:
                case StartRound() | LetRun():
                    yield from command.participants
                case Merge():
                    yield from (chosen.agent for chosen in command.updates)
                    yield from command.late
                case Drop():
                    yield command.agent


@dataclass(slots=True)
class History:
    """The last steps of a policy: at most `MAX_STEPS`, and fewer where each names many agents."""

    steps: deque[Step] = field(default_factory=deque)
    _mentions: deque[int] = field(default_factory=deque)  # agents named by each step
    _mentioned: int = 0  # their sum
    _last: int = 0  # number of the newest step
    _plan: int = 0  # number of the step that decided the plan under way
    _alarm: int = 0  # number of the step that asked for the next Tick

    def add(self, fact: Fact, commands: list[Command], now_s: float) -> None:
        """Note a fact and the commands that followed. A Tick without commands is not kept."""
        if isinstance(fact, Tick) and not commands:
            return
        self._last += 1
        step = Step(self._last, now_s, fact, tuple(commands), self._cause(fact))
        if any(isinstance(command, Merge) for command in commands):
            self._plan = step.number
        if any(isinstance(command, WakeAt) for command in commands):
            self._alarm = step.number
        mentions = sum(1 for _ in step.agents())
        self.steps.append(step)
        self._mentions.append(mentions)
        self._mentioned += mentions
        while len(self.steps) > 1 and (len(self.steps) > MAX_STEPS or self._mentioned > MAX_MENTIONS):
            self.steps.popleft()
            self._mentioned -= self._mentions.popleft()

    def story(self, agent: str) -> list[Step]:
        """Return the kept steps that concern the agent and the steps that caused them, the oldest first."""
        kept = {step.number: step for step in self.steps}
        told: dict[int, Step] = {}
        for step in self.steps:
            if agent not in step.agents():
                continue
            cause: Step | None = step
            while cause is not None and cause.number not in told:
                told[cause.number] = cause
                cause = kept.get(cause.cause)
        return [told[number] for number in sorted(told)]

    def _cause(self, fact: Fact) -> int:
        match fact:
            case VersionCommitted() | UpdateBroken():
                return self._plan
            case Tick():
                return self._alarm
            case _:
                return 0
