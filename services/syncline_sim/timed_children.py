"""Real training at simulated speeds: the tensors are real, and a step takes the virtual time that the settings give.

One process holds the whole fleet: a task, a model and an optimiser for each agent; equal data sets share their memory. Only
training costs real time, waiting costs almost none.
"""

from __future__ import annotations

import asyncio
import math
import os
import struct
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch.utils.data import TensorDataset

from syncline.runtime.child_messages import PeriodReport, Question, TrainPeriod
from syncline.shm import SharedMemory
from syncline.spec.run_spec import RunSpec
from syncline.tasks.base import Task, load_task
from syncline.tasks.seeding import seed_all
from syncline_agent.trainer import Trainer
from syncline_agent.training_child import PROGRESS_BYTES
from syncline_coordinator.evaluator import Evaluator
from syncline_sim.child_factories import QUICK_S, TaskChildFactory
from syncline_sim.inline_children import InlineChild
from syncline_sim.rng import Rng
from syncline_sim.scenario import Scenario
from syncline_sim.settings import SimSettings

Clock = Callable[[], float]


@dataclass(slots=True)
class AgentSpeed:
    """The speed of an agent, and counters of its work."""

    step_s: float
    jitter: float  # σ of the factor drawn for each period
    rng: Rng
    periods: int = 0
    steps: int = 0
    busy_s: float = 0.0

    @classmethod
    def of(cls, number: int, settings: SimSettings, seed: int) -> AgentSpeed:
        """Return the speed of agent `number`, counted from 0."""
        rng = Rng(f"{seed} speed {number}")
        own = math.exp(settings.spread * rng.normal()) if settings.spread else 1.0
        return cls(settings.step_s[number % len(settings.step_s)] * own, settings.jitter, rng)

    def next_step_s(self) -> float:
        """Return the duration of a step in the next period."""
        return self.step_s * (math.exp(self.jitter * self.rng.normal()) if self.jitter else 1.0)

    def count_period(self, steps: int, seconds: float) -> None:
        """Add a finished period to the counters."""
        self.periods += 1
        self.steps += steps
        self.busy_s += seconds


class Tasks:
    """The tasks of a fleet. The class is loaded once; each child gets an instance of its own, as in separate processes.

    Equal data sets share their memory.
    """

    def __init__(self, allowed: list[str], task_dir: Path) -> None:
        self._allowed, self._task_dir = allowed, task_dir
        self._class: type[Task] | None = None
        self._vector: torch.Tensor | None = None
        self._tensors: weakref.WeakValueDictionary[tuple[object, ...], torch.Tensor] = weakref.WeakValueDictionary()

    def load(self, settings: RunSpec) -> Task:
        """Return a new task.

        Raises:
            ConfigError: the task cannot be loaded or made.
        """
        if self._class is not None:
            seed_all(settings.seed)
            return self._class(**settings.task_options)
        task = load_task(
            settings.task, settings.task_options, self._allowed, self._task_dir, seed=settings.seed, enter=os.chdir
        )
        self._class = type(task)
        return task

    def shared(self, make: Callable[..., Any], *args: Any) -> Any:
        """Return the data set that `make` returns, with shared memory for equal tensors of a TensorDataset.

        Tensors that the task keeps a reference to are not shared, because the task may write to them.
        """
        dataset = make(*args)
        if type(dataset) is not TensorDataset or not all(map(_owns_memory, dataset.tensors)):
            return dataset
        shared = [self._shared(tensor) for tensor in dataset.tensors]
        whole, *parts = [weakref.ref(dataset), *map(weakref.ref, dataset.tensors)]
        del dataset
        if (kept := whole()) is not None:
            return kept
        own = [ref() for ref in parts]
        return TensorDataset(*[ours if theirs is None else theirs for ours, theirs in zip(shared, own, strict=True)])

    def _shared(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the one copy of all equal tensors; no task has a reference to it."""
        content = xxhash.xxh3_128_digest(tensor.reshape(-1).view(torch.uint8).numpy().data)
        key = (tensor.dtype, tensor.shape, content)
        found = self._tensors.get(key)
        if found is None:
            found = self._tensors[key] = tensor.clone()
        return found

    def vector(self, like_P: torch.Tensor) -> torch.Tensor:
        """Return the one scratch vector of all trainers. Children compute one after another, so they never use it at once."""
        if self._vector is None:
            self._vector = torch.empty_like(like_P)
        return self._vector


def _owns_memory(tensor: torch.Tensor) -> bool:
    """Return whether no other object can write to the tensor: it is no view and shares no memory with an array."""
    storage = tensor.untyped_storage()
    whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and storage.resizable()
    return whole and not tensor.requires_grad and not tensor.is_complex()


class TimedTrainer(Trainer):
    """A trainer whose steps take `step_s` virtual seconds.

    `TimedChild` sets `began_s`, the start of the current period, and `limit`, its largest number of steps.
    """

    def __init__(self, memory: SharedMemory, tasks: Tasks, clock: Clock, *, keeps: bool) -> None:
        super().__init__(memory, "cpu", [], Path(), self._now_s, lambda seconds: int(seconds / self.step_s))
        self._shared_memory = memory
        self._tasks, self._loop_time, self._keeps = tasks, clock, keeps
        self.began_s: float | None = None
        self.step_s = 0.0
        self.limit: int | None = None

    def load_task(self, settings: RunSpec) -> Task:
        return self._tasks.load(settings)

    def made(self, make: Callable[..., Any], *args: Any) -> Any:
        return self._tasks.shared(make, *args)

    def planned_steps(self, number: int, parts: int, step_s: float) -> int:
        """Return the number of steps of the next period; 0 if the task raises, because the period will fail as well."""
        self.step_s = step_s
        try:
            self._take_part(number, parts)
            return self._duration(len(self._dataset)).most
        except Exception:
            return 0

    def period(self, period: TrainPeriod) -> PeriodReport:
        try:
            return super().period(period)
        finally:
            # frees the gradients: a fleet holds many models, and few train at a time
            self._local.flat.model.zero_grad(set_to_none=True)
            self.began_s = None
            if hasattr(self, "_layout"):
                self._shared_memory.discard(
                    PROGRESS_BYTES, PROGRESS_BYTES + self._layout.blob_bytes
                )  # the center, which was read

    def vector(self, like_P: torch.Tensor) -> torch.Tensor:
        """Return a vector of the model's size; shared by all trainers, unless its content must last between periods."""
        lasting = self._settings.mix.kind == "elastic"
        return super().vector(like_P) if lasting else self._tasks.vector(like_P)

    def show(self, steps: int) -> None:
        """Write the progress of the period to the shared memory; the steps themselves are computed at its end."""
        struct.pack_into("<QQ", self._shared_memory.view(), 0, self._memory.steps_ever + steps, steps)

    def _now_s(self) -> float:
        return self._loop_time() if self.began_s is None else self.began_s + self.step_s * self._memory.steps_made

    def _stopped(self) -> bool:
        return self.limit is not None and self._memory.steps_made >= self.limit

    def _save(self, clock: int, *, at_once: bool = False) -> str:
        return super()._save(clock, at_once=at_once) if self._keeps else ""


class TimedChild(InlineChild):
    """A child whose period first passes in virtual time and is then computed, with the steps for which the time sufficed."""

    def __init__(self, trainer: TimedTrainer, memory: SharedMemory, speed: AgentSpeed, clock: Clock) -> None:
        super().__init__(trainer.questions(), memory, lambda _: QUICK_S, trainer.chore())
        self._trainer, self._speed, self._clock = trainer, speed, clock
        self._woken = asyncio.Event()
        self._begun: tuple[float, float] | None = None  # (start of the current period, duration of its steps)
        self._holds: list[tuple[float, float]] = []  # interruptions of the current period: (start, duration)
        self._stopping = False

    async def _pass_time(self, question: Question[Any]) -> bool:
        if not isinstance(question, TrainPeriod):
            return await super()._pass_time(question)
        trainer = self._trainer
        began_s, step_s = self._clock(), self._speed.next_step_s()
        self._begun = (began_s, step_s)
        steps = trainer.planned_steps(question.part, question.parts, step_s)
        self._stopping = False
        self._woken.clear()
        self.update_progress()
        made = steps
        try:
            await self._until_made(steps)
            if self._stopping:  # the current step is finished first
                made = min(steps, int(self._worked_s() / step_s) + 1)
                await self._pause(max(0.0, self._end_s(made) - self._clock()))
        finally:
            self._begun = None
            self._holds.clear()
            self._speed.count_period(made, made * step_s)
        trainer.began_s, trainer.step_s, trainer.limit = began_s, step_s, made if made < steps else None
        return True

    def update_progress(self) -> None:
        if self._begun is not None:
            self._trainer.show(int(self._worked_s() / self._begun[1]))

    def hold(self, seconds: float) -> None:
        self._holds.append((self._clock(), seconds))
        self._woken.set()

    def stop(self) -> None:
        if self._begun is not None:
            self._stopping = True
            self._woken.set()

    def die(self) -> None:
        super().die()
        self._woken.set()

    async def close(self) -> None:
        await super().close()
        self._woken.set()

    def _worked_s(self) -> float:
        """Return the time since the start of the period, without interruptions."""
        assert self._begun is not None
        now_s = self._clock()
        return now_s - self._begun[0] - sum(min(now_s - since_s, held_s) for since_s, held_s in self._holds)

    def _end_s(self, steps: int) -> float:
        """Return the time at which so many steps of the period are made, without interruptions that come later."""
        assert self._begun is not None
        began_s, step_s = self._begun
        return began_s + steps * step_s + sum(held_s for _, held_s in self._holds)

    async def _until_made(self, steps: int) -> None:
        """Wait until the steps are made or the service ends the period."""
        while not self._stopping and (left_s := self._end_s(steps) - self._clock()) > 0:
            await self._wait(left_s)
            self._woken.clear()
            self._check_alive()

    async def _wait(self, seconds: float) -> None:
        """Wait for so long, or until `hold`, `stop`, `die` or `close` is called."""
        try:
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        except TimeoutError:
            return
        self._check_alive()


class TimedChildFactory(TaskChildFactory):
    """Makes the children of a fleet at their own speeds.

    Trainers save their state only if the settings hold faults: without faults no agent ever reads its disk.
    """

    def __init__(self, scenario: Scenario, disk: Path, clock: Clock, settings: SimSettings) -> None:
        super().__init__(scenario, disk, clock)
        seed = scenario.spec.seed if settings.seed is None else settings.seed
        self.speeds = {agent: AgentSpeed.of(i, settings, seed) for i, agent in enumerate(scenario.agents)}
        self._keeps = bool(settings.faults)
        self._tasks = Tasks(["*"], scenario.task_dir)

    def evaluator(self, memory: SharedMemory) -> InlineChild:
        evaluator = Evaluator(memory, [], Path(), self.clock)
        setattr(evaluator, "load_task", self._tasks.load)  # noqa: B010 (in the place of a method)
        return InlineChild(evaluator.questions(), memory, lambda _: QUICK_S)

    def trainer(self, agent: str, memory: SharedMemory) -> InlineChild:
        trainer = TimedTrainer(memory, self._tasks, self.clock, keeps=self._keeps)
        return TimedChild(trainer, memory, self.speeds[agent], self.clock)
