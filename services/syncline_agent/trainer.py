"""The agent's child process: owns the device, the model and W_i, and trains one local period at a time.

It answers questions of the service over a socket. Tensors are in shared memory: the inbox takes the center as it came over the
bus, coded, and the outboxes take updates, coded; two of them if one update is sent while the next one is made. The shared
memory also shows the progress, and takes the service's request to stop early.

W_i is kept on disk, so that an agent that was killed continues its own work.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from syncline.averaging.kernels import finite
from syncline.data.partition import Part
from syncline.errors import ConfigError
from syncline.local.duration import Duration
from syncline.model.manifest import Manifest
from syncline.runtime.child import Chore, Handlers, described, serve
from syncline.runtime.child_messages import (
    DescribeDevice,
    DeviceDescription,
    EvaluationReport,
    MakeElasticUpdate,
    PeriodReport,
    PrepareRun,
    RetrySave,
    RunPrepared,
    SaveReport,
    TrainPeriod,
    UpdateReport,
)
from syncline.shm import SharedMemory
from syncline.spec.run_spec import RunSpec
from syncline.tasks.base import (
    Task,
    as_number,
    batches,
    evaluate,
    load_task,
    make_dataset,
    make_held_out,
    rows_of_part,
    to_device,
    whole_gradient,
)
from syncline.tasks.seeding import seed_all, seed_of
from syncline.wire.messages import decode
from syncline_agent.background_progress import BackgroundProgress, background_progress
from syncline_agent.child_memory import CONTROL, ChildMemory
from syncline_agent.device import DeviceClaim, claim_device
from syncline_agent.local_model import LocalModel
from syncline_agent.state_saver import StateSaver
from syncline_agent.training_child import outboxes

log = logging.getLogger(__name__)

EVALUATION_ROWS = 512
SAVED_VECTORS = 4  # as large as the model: W_i, two of the optimiser's, and one that is pending


class Trainer:
    """Answers the questions of the service: `describe`, then `prepare` for a run, then `period` after `period`.

    A simulation overrides `load_task`, `made`, `vector`, and the private methods that it documents.
    """

    def __init__(
        self,
        memory: SharedMemory,
        device: str,
        allowed: list[str],
        task_dir: Path,
        clock: Callable[[], float] = time.monotonic,
        fitting: Callable[[float], int] | None = None,
        enter: Callable[[Path], object] = lambda directory: None,
        background_progress: BackgroundProgress = lambda tick, nbytes: nullcontext(),
    ) -> None:
        """Keep the arguments; the first question claims the device.

        Args:
            device: as `--device` names it.
            allowed: patterns of tasks that this agent runs.
            clock: returns the time, in seconds.
            fitting: returns how many steps fit into so many seconds, in a simulation; None: measure the steps.
            enter: changes the working directory, as `load_task` has it.
            background_progress: reports progress during long work; a simulation passes time itself.
        """
        self._device_name = device
        self._allowed = allowed
        self._task_dir = task_dir
        self._clock = clock
        self._fitting = fitting
        self._enter = enter
        self._background_progress = background_progress
        self._memory = ChildMemory(memory)
        self._saver: StateSaver | None = None  # until a run is prepared

    @cached_property
    def _claim(self) -> DeviceClaim:
        """Return the device, claimed with the first question: a problem of the device is that question's answer."""
        return claim_device(self._device_name)

    # -- questions -----------------------------------------------------------------------------------------------------
    def questions(self) -> Handlers:
        return {
            DescribeDevice: self.describe,
            PrepareRun: self.prepare,
            TrainPeriod: self.period,
            MakeElasticUpdate: self.make_elastic_update,
            RetrySave: self.retry_save,
        }

    def describe(self, question: DescribeDevice) -> DeviceDescription:
        return DeviceDescription(name=self._claim.describe(), shared=self._claim.shared)

    def prepare(self, question: PrepareRun) -> RunPrepared:
        """Load the task, make the model, and restore the state that this agent has of the run on its disk."""
        self._saver = None
        self._settings = question.spec
        self._layout = decode(Manifest, question.manifest)
        self._memory.lay_out(self._layout, outboxes(question.spec), question.spec.wire.codec)
        saver = StateSaver(Path(question.state_path), self._layout, question.submission, self._clock)
        self._begin_run()
        clock = self._restore(saver)
        self._saver = saver
        return RunPrepared(clock=clock, advice=self._local.checks.take_advice())

    def period(self, period: TrainPeriod) -> PeriodReport:
        """Take over the center in the inbox if it is fresh, train one local period, and leave the update in an outbox."""
        assert self._saver is not None
        self._saver.unsaved_clock = None  # from here on the state in memory belongs to no clock
        self._take_part(period.part, period.parts)
        with self._reporting():
            self._begin_period(period)
        rows = len(self._dataset)
        seed_all(seed_of(self._settings.seed, period.part, period.clock), self._claim.device)
        self._memory.period_begins()  # a simulation's clock counts the steps from there
        began_s = self._clock()
        loss, steps, seen = self._train(self._duration(rows), period.clock, period.part)
        seconds = self._clock() - began_s
        advice = [*self._local.checks.take_advice(), *self._advice_on_first_period(period.parts)]
        stopped = self._stopped()
        evaluation, evaluation_problem = None, ""
        if self._settings.evaluate.agents and not stopped:
            evaluation, evaluation_problem = self._evaluated(period.version)
        update = None
        if not self._local.local_update.needs_center and not stopped:
            with self._reporting():
                update = self._leave_update(period, at_once=self._local.variates is not None)
        return PeriodReport(
            stopped=stopped,
            steps=steps,
            rows=rows,
            loss=loss,
            seconds=max(0.0, seconds),
            samples_per_s=seen / seconds if seconds > 0 else 0.0,
            advice=advice,
            evaluation=evaluation,
            evaluation_problem=evaluation_problem,
            update=update,
        )

    def make_elastic_update(self, question: MakeElasticUpdate) -> UpdateReport:
        """Make the update of a period from the newest center, which is in the inbox if it is fresh.

        The part of W_i that the update gives up is on the disk before the update can be merged.
        """
        with self._reporting():
            if question.fresh_center:
                self._local.center_P.copy_(self._center())
            return self._leave_update(question.period, at_once=True)

    def retry_save(self, question: RetrySave) -> SaveReport:
        """Write the state to the disk that the disk did not take before."""
        return self._saved(question.clock, at_once=True)

    # -- while no question waits ---------------------------------------------------------------------------------------
    def chore(self) -> Chore:
        return Chore(self.save_due_in_s, self.save_held_back)

    def save_due_in_s(self) -> float | None:
        """Return the seconds until the unsaved state may be saved; None: every state is saved."""
        return None if self._saver is None else self._saver.due_in_s()

    def save_held_back(self) -> None:
        """Save the unsaved state between two questions, before the next period changes it."""
        if self._saver is None or self._saver.unsaved_clock is None:
            return
        clock = self._saver.unsaved_clock
        self._saver.unsaved_clock = None
        try:
            with self._reporting():
                self._save(clock)
        except Exception:  # of the task's own state: the save after the next period raises it to the service
            log.warning("the state of clock %d is not saved", clock, exc_info=True)

    # -- hooks of a simulation -----------------------------------------------------------------------------------------
    def load_task(self, settings: RunSpec) -> Task:
        return load_task(
            settings.task,
            settings.task_options,
            self._allowed,
            self._task_dir,
            seed=settings.seed,
            enter=self._enter,
        )

    def made(self, make: Callable[..., Any], *args: Any) -> Any:
        """Return the data set that `make` returns. A fleet in one process holds equal data sets once."""
        return make(*args)

    def vector(self, like_P: Tensor) -> Tensor:
        """Return room for a center, on the device. Trainers of one process may share that room."""
        return torch.empty_like(like_P)

    def _stopped(self) -> bool:
        return self._memory.stop_requested

    def _save(self, clock: int, *, at_once: bool = False) -> str:
        """Save the state if it is time to; returns the problem, as StateSaver.save does."""
        assert self._saver is not None
        return self._saver.save(clock, self._local.state, at_once=at_once)

    # -- a run ---------------------------------------------------------------------------------------------------------
    def _begin_run(self) -> None:
        """Make the task, the model and all else that a period changes, as they are before the first period."""
        task = self.load_task(self._settings)
        self._part: tuple[int, int] | None = None  # that `_dataset` is, and of how many
        self._dataset: Any = None
        self._test_set: Any = None
        self._local = LocalModel(task, self._settings, self._layout, self._claim.device, self.vector)
        self._is_first_period = True  # of this process
        self._miscounted = ""  # batches that the last period drew, if they are many more than the steps it told of

    def _restore(self, saver: StateSaver) -> int:
        """Take over the saved state and return its clock. 0: none fits, and the agent begins with the center."""
        state = saver.load()
        if state is None:
            return 0
        try:
            self._local.restore(state)
        except Exception as error:
            log.warning("%s does not fit (%s); beginning with the center", saver.path, error)
            self._begin_run()  # drop a model that is half restored
            return 0
        return state.clock

    def _take_part(self, number: int, parts: int) -> None:
        """Make the data set of this agent's part, unless it is the one of the period before."""
        if self._part != (number, parts):
            settings = self._settings
            part = Part(number, parts, settings.partition, settings.seed, needed=settings.agents.min)
            dataset = self.made(make_dataset, self._local.task, part)
            rows_of_part(dataset, number)
            self._dataset = dataset
            self._part = (number, parts)

    # -- a period ------------------------------------------------------------------------------------------------------
    def _begin_period(self, period: TrainPeriod) -> None:
        center_P = self._center() if period.fresh_center else None
        needs_sum = period.fresh_center and self._local.variates is not None
        self._local.begin_period(period, center_P, self._center(CONTROL) if needs_sum else None)

    def _center(self, *section: int) -> Tensor:
        return self._memory.center(*section).to(self._local.device)

    def _duration(self, rows: int) -> Duration:
        """Return how long the next period lasts."""
        local = self._settings.local
        most = local.steps_for(rows)
        if local.seconds is not None and self._fitting is not None:
            return Duration(min(most, max(1, self._fitting(local.seconds))))
        return Duration(most, local.seconds)

    def _train(self, duration: Duration, clock: int, part: int) -> tuple[float | None, int, int]:
        """Make the steps of a period, fewer if it is stopped. Returns the mean loss, the steps made and the rows seen."""
        local, memory, task = self._local, self._memory, self._local.task
        memory.period_begins()
        memory.expect(duration.expected, len(self._dataset))
        if duration.most == 0 or self._stopped():
            return None, 0, 0
        settings = self._settings.local
        first = local.drawn if settings.seconds is not None else (clock - 1) * duration.most
        stream = batches(self._dataset, settings.batch_size, self._settings.seed, part, first, task)
        began_s = self._clock()
        seen = 0
        drawn = 0

        def on_step(rows: int) -> bool:
            nonlocal seen
            seen += _rows_told(rows)
            if duration.seconds is not None:
                self._claim.synchronize()
            more = duration.stepped(self._clock() - began_s)
            memory.step_made(duration.done, duration.expected)
            return more and not self._stopped()

        def draw() -> Iterator[Any]:
            """Yield batches up to the period's last, also for a task that ignores the answer of `on_step`."""
            nonlocal drawn
            while drawn < duration.most and duration.is_open and not self._stopped():
                drawn += 1
                yield to_device(next(stream), self._claim.device)

        if local.variates is not None and local.variates.at_center:
            self._write_gradient_at_center(local.variates.gradients_P)
        local.flat.model.zero_grad(set_to_none=True)  # gradients are not saved, so no period begins with any
        with local.inner.watching():
            loss = task.train(local.flat.model, local.inner.given, draw(), on_step)
        local.flat.store()
        if not duration.done and not self._stopped():
            hint = "Call `on_step(rows)` after every batch, and stop when it returns False"
            raise ConfigError("task", f"`train` drew {drawn} batches and never called `on_step`", hint)
        local.inner.period_ends(duration.done)
        local.checks.trained(local.flat, local.center_P, duration.done)
        local.drawn += drawn
        miscounts = drawn >= 2 * duration.done
        self._miscounted = f"{drawn} batches and called `on_step` {duration.done} times" if miscounts else ""
        if loss is not None:
            loss = as_number(loss, "`train` returned", "Return the mean loss as a number, or None")
        return loss, duration.done, seen

    def _write_gradient_at_center(self, out_P: Tensor) -> None:
        """Write the gradient of the loss over this agent's whole part, where the model stands."""
        local = self._local
        whole_gradient(
            local.task,
            local.flat.model,
            self._dataset,
            EVALUATION_ROWS,
            self._claim.device,
            self._memory.show_progress,
        )
        for site in local.flat.sites:
            if site.parameter.grad is not None:
                site.of(out_P).copy_(site.parameter.grad)
        local.flat.model.zero_grad(set_to_none=True)

    def _advice_on_first_period(self, parts: int) -> list[str]:
        """Return advice on settings that are rarely meant, once. Raises ConfigError for a state that cannot be saved."""
        if not self._is_first_period:
            return []
        self._is_first_period = False
        self._local.check_state()
        advice = list(self._local.inner.advice) if parts > 1 else []
        if self._miscounted:
            advice.append(
                f"task: `train` drew {self._miscounted}: `local.steps`, progress and `merge.weights: steps` count these "
                "calls. Call `on_step(rows)` after every batch, also where several batches make one step"
            )
        return advice

    def _evaluated(self, version: int) -> tuple[EvaluationReport | None, str]:
        """Return the metrics of W_i on the held-out data, or None and the problem, which costs no update.

        Draws the random numbers that the evaluation of this version's center draws.
        """
        device = self._claim.device
        skipped = Counter[str]()
        try:
            test_set = self._held_out()
            seed_all(seed_of(self._settings.seed, version), device)
            metrics = evaluate(
                self._local.task,
                self._local.flat.model,
                test_set,
                EVALUATION_ROWS,
                device,
                self._memory.show_progress,
                skipped,
            )
            return EvaluationReport(metrics=metrics, skipped=dict(skipped)), ""
        except Exception as error:  # of any class: the task's code raises it
            return None, described(error)

    def _held_out(self) -> Any:
        """Return the held-out data, loaded when they are first needed."""
        if self._test_set is None:
            self._test_set = self.made(make_held_out, self._local.task, self._settings.seed)
        return self._test_set

    # -- the update ----------------------------------------------------------------------------------------------------
    def _leave_update(self, period: TrainPeriod, *, at_once: bool) -> UpdateReport:
        """Put the update into its outbox and save the state that belongs to it.

        Args:
            at_once: save now, and block the offer until the disk has taken the state.
        """
        update_P, change_P = self._local.take_update(period.clock)
        sections_P = [update_P] if change_P is None else [update_P, change_P]
        self._memory.put_update(period.outbox, *sections_P)
        if all(map(finite, sections_P)):
            return UpdateReport(save=self._saved(period.clock, at_once=at_once))
        self._local.forget_period(period.clock)
        return UpdateReport(broken=True)  # offered all the same: the coordinator judges it, and drops it

    def _saved(self, clock: int, *, at_once: bool) -> SaveReport:
        problem = self._save(clock, at_once=at_once)
        return SaveReport(problem=problem, blocks_offer=at_once and bool(problem))

    def _reporting(self) -> AbstractContextManager[None]:
        """Report progress while vectors and the optimiser's state are mixed, encoded, checked or saved."""
        return self._background_progress(self._memory.show_progress, SAVED_VECTORS * self._layout.nbytes)


def _rows_told(rows: Any) -> int:
    """Return the rows that a task has told `on_step`. Raises ConfigError for anything but a whole number."""
    hint = "Call `on_step(rows)` with the number of rows of the step"
    told = as_number(rows, "`train` called `on_step` with", hint)
    if not (told >= 0 and told.is_integer()):
        raise ConfigError("task", f"`train` called `on_step` with {told:g}", hint)
    return int(told)


def main(device: str, threads: int, allowed: list[str], task_dir: str, end_fd: int, memory_fd: int) -> int:
    """Serve as a child process until the service hangs up. Returns the exit code."""
    if threads:
        torch.set_num_threads(threads)
    memory = SharedMemory(memory_fd)
    trainer = Trainer(memory, device, allowed, Path(task_dir), enter=os.chdir, background_progress=background_progress)
    return serve(end_fd, trainer.questions(), trainer.chore())
