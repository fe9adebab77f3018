"""Factories of the services' child processes: stubs that compute a few numbers, or the real trainer and evaluator.

A simulated child computes inside the simulation's process. The computation takes no virtual time by itself; each factory
decides how many virtual seconds a question takes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from syncline.runtime.child_messages import Question, TrainPeriod
from syncline.shm import SharedMemory
from syncline_sim.inline_children import Disk, InlineChild, Seconds, StubEvaluator, StubState, StubTrainer
from syncline_sim.scenario import Scenario

QUICK_S = 0.002  # virtual seconds of every question that is no period


class ChildFactory(Protocol):
    """Makes the children of a cluster's services and holds the agents' disks."""

    def evaluator(self, memory: SharedMemory) -> InlineChild:
        """Return a new evaluator for the coordinator."""
        ...

    def trainer(self, agent: str, memory: SharedMemory) -> InlineChild:
        """Return a new trainer for an agent."""
        ...

    def state_dir(self, agent: str) -> Path:
        """Return the state directory of an agent."""
        ...

    def erase_disk(self, agent: str) -> None:
        """Delete everything in the state directory of an agent."""
        ...


class StubChildFactory:
    """Makes stubs, whose disks are in memory. A period takes the time that the scenario gives."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._disk: Disk = {}

    def evaluator(self, memory: SharedMemory) -> InlineChild:
        return InlineChild(StubEvaluator(memory).questions(), memory, lambda _: QUICK_S)

    def trainer(self, agent: str, memory: SharedMemory) -> InlineChild:
        return InlineChild(StubTrainer(memory, self._disk).questions(), memory, period_of(self._scenario, agent))

    def state_dir(self, agent: str) -> Path:
        return Path(agent)

    def kept(self, run: str, agent: str) -> StubState | None:
        """Return the agent's state of a run on its disk, or None."""
        return self._disk.get(str(self.state_dir(agent) / run / f"{agent}.safetensors"))

    def erase_disk(self, agent: str) -> None:
        for path in [p for p in self._disk if p.startswith(f"{agent}/")]:
            del self._disk[path]


class TaskChildFactory:
    """Makes the real trainer and evaluator.

    Args:
        scenario: gives the duration of periods and the directory of the task.
        disk: a directory for this cluster alone.
        clock: the virtual time.
    """

    def __init__(self, scenario: Scenario, disk: Path, clock: Callable[[], float]) -> None:
        self.scenario, self.disk, self.clock = scenario, disk, clock

    def evaluator(self, memory: SharedMemory) -> InlineChild:
        from syncline_coordinator.evaluator import Evaluator

        evaluator = Evaluator(memory, ["*"], self.scenario.task_dir, self.clock)
        return InlineChild(evaluator.questions(), memory, lambda _: QUICK_S)

    def trainer(self, agent: str, memory: SharedMemory) -> InlineChild:
        from syncline_agent.trainer import Trainer

        trainer = Trainer(memory, "cpu", ["*"], self.scenario.task_dir, self.clock)
        return InlineChild(trainer.questions(), memory, period_of(self.scenario, agent), trainer.chore())

    def state_dir(self, agent: str) -> Path:
        return self.disk / agent

    def erase_disk(self, agent: str) -> None:
        for file in self.state_dir(agent).rglob("*.safetensors"):
            file.unlink()


def period_of(scenario: Scenario, agent: str) -> Seconds:
    """Return the function that gives the virtual seconds of each question to an agent's trainer."""
    period_s = scenario.period_s[scenario.agents.index(agent) % len(scenario.period_s)]

    def seconds(question: Question[Any]) -> float:
        return period_s if isinstance(question, TrainPeriod) else QUICK_S

    return seconds
