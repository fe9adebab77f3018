"""Who computes in a world: stubs of a few numbers, or the task's own model. Knows no bus.

A child answers inline: what it computes costs real time and no virtual time; how much of that passes is said here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from syncline.shm import SharedMemory
from syncline_sim.inline import Disk, InlineChild, Seconds, StubEvaluator, StubState, StubTrainer
from syncline_sim.scene import Scene

QUICK_S = 0.002  # what a child takes for any other question than a period


class Children(Protocol):
    """Makes the children of a world's services, and keeps what its agents have on disk."""

    def evaluator(self, memory: SharedMemory) -> InlineChild: ...
    def trainer(self, agent: str, memory: SharedMemory) -> InlineChild: ...
    def state_dir(self, agent: str) -> Path: ...
    def forget(self, agent: str) -> None:
        """Its disk is gone."""
        ...


class StubChildren:
    """Periods take what the scene says."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._disk: Disk = {}

    def evaluator(self, memory: SharedMemory) -> InlineChild:
        return InlineChild(StubEvaluator(memory).questions(), memory, lambda _: QUICK_S)

    def trainer(self, agent: str, memory: SharedMemory) -> InlineChild:
        return InlineChild(StubTrainer(memory, self._disk).questions(), memory, period_of(self._scene, agent))

    def state_dir(self, agent: str) -> Path:
        return Path(agent)

    def kept(self, run: str, agent: str) -> StubState | None:
        """What the agent has on its disk of a run."""
        return self._disk.get(str(self.state_dir(agent) / run / f"{agent}.safetensors"))

    def forget(self, agent: str) -> None:
        for path in [p for p in self._disk if p.startswith(f"{agent}/")]:
            del self._disk[path]


class TaskChildren:
    """The real trainer and evaluator. `disk`: a directory of this world alone; `clock`: its time."""

    def __init__(self, scene: Scene, disk: Path, clock: Callable[[], float]) -> None:
        self.scene, self.disk, self.clock = scene, disk, clock

    def evaluator(self, memory: SharedMemory) -> InlineChild:
        from syncline_coordinator.evaluator import Evaluator

        evaluator = Evaluator(memory, ["*"], self.scene.task_dir, self.clock)
        return InlineChild(evaluator.questions(), memory, lambda _: QUICK_S)

    def trainer(self, agent: str, memory: SharedMemory) -> InlineChild:
        from syncline_agent.trainer import Trainer

        trainer = Trainer(memory, "cpu", ["*"], self.scene.task_dir, self.clock)
        return InlineChild(trainer.questions(), memory, period_of(self.scene, agent), trainer.chore())

    def state_dir(self, agent: str) -> Path:
        return self.disk / agent

    def forget(self, agent: str) -> None:
        for file in self.state_dir(agent).rglob("*.safetensors"):
            file.unlink()


def period_of(scene: Scene, agent: str) -> Seconds:
    """How long each question to an agent's child takes."""
    period_s = scene.period_s[scene.agents.index(agent) % len(scene.period_s)]

    def seconds(question: dict[str, Any]) -> float:
        return period_s if question["ask"] == "period" else QUICK_S

    return seconds
