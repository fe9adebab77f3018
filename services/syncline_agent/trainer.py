"""The agent's child process: owns the device, the model and W_i, and trains one local period at a time.

It talks to the service over a socket, and shares memory with it:

    progress   steps since the process began, the step of this period, the service's wish to stop early, the steps that this
               period has, and the rows of this agent's part
    inbox      the center as it came over the bus, coded
    outboxes   updates, coded; two of them where one is sent while the next one is made

W_i is kept on disk, so that an agent that was killed goes on from its own work. Saving is limited, so that a large model with
short periods still trains most of the time; what the limit holds back is saved while the child waits for its next question.
"""

from __future__ import annotations

import copy
import logging
import os
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from syncline.averaging.kernels import finite
from syncline.data.partition import Part
from syncline.errors import ConfigError
from syncline.local.duration import Duration
from syncline.model.flat import FlatModel
from syncline.model.manifest import Manifest
from syncline.model.tensors import slots_of
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
    make_model,
    rows_of_part,
    to_device,
    whole_gradient,
)
from syncline.tasks.seeding import seed_all, seed_of
from syncline.transform.codecs import RAW
from syncline.transform.payloads import write_payloads
from syncline.transform.torch_dtypes import TORCH_DTYPES
from syncline.wire.messages import decode
from syncline_agent.control_variates import Variates
from syncline_agent.device import Claim, claim_device
from syncline_agent.inner_optimizers import Inner
from syncline_agent.local_state import Kept, load_state, save_state
from syncline_agent.local_update import Progress, updates_of
from syncline_agent.task_checks import Checks
from syncline_agent.ticking import Ticking, ticking
from syncline_agent.training_child import PROGRESS_BYTES, SAVE_AGAIN_S, STEPS_EXPECTED, STOP_EARLY, outboxes
from syncline_agent.values import is_finite, pack, unpack

log = logging.getLogger(__name__)

EVALUATION_ROWS = 512
CONTROL = 1  # the section of a blob that holds control variates
SAVE_EVERY_S = 1.0
SAVED_VECTORS = 4  # as large as the model: W_i, two of the optimiser's, and one that is pending
SAVE_SHARE = 0.05  # of an agent's time that saving may take


class Trainer:
    """The questions of the service, each a method: `describe`, then `prepare` for a run, then `period` after `period`."""

    def __init__(
        self,
        memory: SharedMemory,
        device: str,
        allowed: list[str],
        task_dir: Path,
        clock: Callable[[], float] = time.monotonic,
        fitting: Callable[[float], int] | None = None,
        enter: Callable[[Path], object] = lambda directory: None,
        ticking: Ticking = lambda tick, nbytes: nullcontext(),
    ) -> None:
        """`fitting`: how many steps fit into so many seconds, where a simulation says so; else that is measured. `enter`: as
        `load_task` has it. `ticking`: lets long work report progress; nothing does in a simulation."""
        self._enter, self._ticking = enter, ticking
        self._clock, self._fitting = clock, fitting
        self._memory, self._allowed, self._task_dir = memory, allowed, task_dir
        self._wanted = device
        self._steps_ever = 0
        self._unsaved_clock: int | None = None  # of the state in memory, where it is not on the disk yet
        self._not_kept = ""  # why the disk took nothing the last time

    @cached_property
    def _claim(self) -> Claim:
        """The device, claimed with the first question: what is wrong with it is an answer then."""
        return claim_device(self._wanted)

    def describe(self, question: DescribeDevice) -> DeviceDescription:
        return DeviceDescription(name=self._claim.describe(), shared=self._claim.shared)

    def prepare(self, question: PrepareRun) -> RunPrepared:
        """Load the task, make the model, and restore the state that this agent has of the run on its disk."""
        self._unsaved_clock, self._not_kept = None, ""
        settings = self._settings = question.spec
        self._layout = decode(Manifest, question.manifest)
        self._memory.grow(PROGRESS_BYTES + (1 + outboxes(settings)) * self._layout.blob_bytes)
        self._view = self._memory.view()
        layout, codec = self._layout, settings.wire.codec
        self._chunks = [layout.chunk(k) for k in range(layout.chunks)]
        zeros_P = torch.zeros(layout.elements if codec.vectors else 0, dtype=TORCH_DTYPES[layout.dtype])
        self._codec_states = [[zeros_P.clone() for _ in range(codec.vectors)] for _ in range(layout.sections)]
        self._state_path, self._submission, self._save_after_s = Path(question.state_path), question.submission, 0.0
        self._make()
        kept = load_state(self._state_path, self._layout, self._submission)
        self._has_own = kept is not None and self._restored(kept)
        clock = kept.clock if kept is not None and self._has_own else 0
        return RunPrepared(clock=clock, advice=self._checks.take_advice())

    def _make(self) -> None:
        """The task, the model, the optimisers, and all else that a period changes, as they are before the first one."""
        settings = self._settings
        self._task = self.load_task(settings)
        self._place: tuple[int, int] | None = None
        self._test_set: Any = None
        model = make_model(self._task, settings.seed)
        self._checks = Checks(self._task, model, self._layout)
        self._flat = FlatModel(model.to(self._claim.device), self._layout, self._task.local, self._task.shared)
        self._center_P = self.vector()  # what a period is measured from
        self._updates = updates_of(settings, self._layout.buffers)
        self._anchor_P = self._center_P  # the center received last, to which FedProx pulls
        if settings.local.prox_mu and isinstance(self._updates, Progress):
            self._anchor_P = self._flat.flat_P.clone()  # a period without a newer center is measured from W_i
        self._inner = Inner(self._task, self._flat, self._anchor_P, settings.local)
        self._fresh_state = self._task_state()
        self._is_first = True  # no period has ended in this process
        self._drawn = 0  # batches, in all periods; where these are given in seconds
        self._told_fewer = ""  # that the last period drew many more batches than the task has told
        scaffold = settings.local.control_variates
        self._variates: Variates | None = None
        if scaffold is not None:
            overlap = outboxes(settings) > 1
            self._variates = Variates(self._flat.flat_P, along=scaffold.option == 2, overlap=overlap)

    def _restored(self, kept: Kept) -> bool:
        """Whether all of it fits; where something does not, everything is as `_make` makes it."""
        try:
            self._flat.flat_P.copy_(kept.own_P)
            self._flat.load()
            self._flat.restore_at_home(kept.local)
            self._inner.restore(kept.inner)
            self._drawn = int(kept.inner["drawn"])
            if kept.inner["task"]:
                self._task.load_state_dict(kept.inner["task"])
            if self._variates is not None:
                self._variates.restore(kept.variates)
            self._updates.pending = {c: d.to(self._flat.flat_P.device) for c, d in kept.pending.items()}
        except Exception as error:
            log.warning("%s does not fit (%s); beginning with the center", self._state_path, error)
            self._make()
            return False
        return True

    def period(self, period: TrainPeriod) -> PeriodReport:
        """Take over the center in the inbox if it is fresh, train one local period, and leave the update in an outbox."""
        self._unsaved_clock = None  # from here on the state is of no clock
        self._take_part(period.part, period.parts)
        with self._reporting():
            self._begin(period)
        settings, rows = self._settings, len(self._dataset)
        seed_all(seed_of(settings.seed, period.part, period.clock), self._claim.device)
        struct.pack_into("<QQ", self._view, 0, self._steps_ever, 0)  # a simulation's clock counts the steps from there
        began = self._clock()
        loss, steps, seen = self._train(self._allotted(rows), period.clock, period.part)
        seconds = self._clock() - began
        advice = [*self._checks.take_advice(), *self._advice(period.parts)]
        stopped = self._stopped()
        evaluation, evaluation_problem = None, ""
        if settings.evaluate.agents and not stopped:
            evaluation, evaluation_problem = self._evaluated(period.version)
        update = None
        if not self._updates.needs_center and not stopped:
            with self._reporting():
                update = self._leave_update(period, at_once=self._variates is not None)
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
                self._center_P.copy_(self._inbox())
            return self._leave_update(question.period, at_once=True)

    def retry_save(self, question: RetrySave) -> SaveReport:
        """Write the state to the disk that the disk did not take before."""
        return self._saved(question.clock, at_once=True)

    def questions(self) -> Handlers:
        return {
            DescribeDevice: self.describe,
            PrepareRun: self.prepare,
            TrainPeriod: self.period,
            MakeElasticUpdate: self.make_elastic_update,
            RetrySave: self.retry_save,
        }

    def chore(self) -> Chore:
        return Chore(self.save_due_in_s, self.save_held_back)

    def save_due_in_s(self) -> float | None:
        """Return the seconds until a state that is not on the disk may be saved, or None where there is none."""
        return None if self._unsaved_clock is None else self._save_after_s - self._clock()

    def save_held_back(self) -> None:
        """Save the state that is not on the disk, between two questions: the next period would change it."""
        clock, self._unsaved_clock = self._unsaved_clock, None
        if clock is None:
            return
        try:
            with self._reporting():
                self._save(clock)
        except Exception:  # of the task's own state: the save after the next period raises it to the service
            log.warning("the state of clock %d is not saved", clock, exc_info=True)

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
        """Return a data set that this makes. A fleet in one process holds equal ones once."""
        return make(*args)

    def vector(self) -> torch.Tensor:
        """Room for a center, on the device."""
        return torch.empty_like(self._flat.flat_P)

    # -- the steps of a period -----------------------------------------------------------------------------------------
    def _take_part(self, number: int, parts: int) -> None:
        """This agent's D_i: part `number` of `parts`; made anew only where that changed."""
        if self._place != (number, parts):
            settings = self._settings
            part = Part(number, parts, settings.partition, settings.seed, needed=settings.agents.min)
            dataset = self.made(make_dataset, self._task, part)
            rows_of_part(dataset, number)
            self._dataset: Any = dataset
            self._place = (number, parts)

    def _begin(self, period: TrainPeriod) -> None:
        """W_i as the period begins; an agent without one begins with W."""
        self._flat.store()
        self._updates.resolve(period.verdicts, self._flat.flat_P)
        center_P = self._inbox() if period.fresh_center else None
        if center_P is not None and self._anchor_P is not self._center_P:
            self._anchor_P.copy_(center_P)
        self._updates.begin(self._flat.flat_P, self._center_P, center_P, first=not self._has_own)
        self._flat.load()
        self._has_own, control = True, None
        if self._variates is not None:
            self._variates.resolve(period.verdicts)
            control = self._variates.begin(self._inbox(CONTROL) if period.fresh_center else None, period.parts)
        self._inner.period_begins(control)

    def _leave_update(self, period: TrainPeriod, *, at_once: bool) -> UpdateReport:
        """Put the update into its outbox and save the state that belongs to it.

        Args:
            at_once: save now, and block the offer until the disk has taken the state.
        """
        self._flat.store()
        update_P = self._updates.take(self._flat.flat_P, self._center_P, period.clock)
        self._flat.load()
        outbox = self._box(1 + period.outbox, sections=self._layout.sections)
        written = self._encode(update_P, 0, outbox)
        sound = finite(update_P)
        if self._variates is not None:
            change_P = self._variates.take(period.clock, self._inner.gradients.steps)
            self._encode(change_P, CONTROL, outbox[written:])
            sound = sound and finite(change_P)
        if sound:
            return UpdateReport(save=self._saved(period.clock, at_once=at_once))
        self._forget(period.clock)
        return UpdateReport(broken=True)  # offered all the same: the coordinator judges it, and drops it

    def _encode(self, update_P: torch.Tensor, section: int, out: memoryview) -> int:
        """Code one section of an update into an outbox. Returns the bytes of its payloads."""
        state = self._codec_states[section]
        payloads, kept = self._settings.wire.codec.encode(update_P.cpu(), self._chunks, state)
        self._codec_states[section] = list(kept)
        return write_payloads(payloads, out)

    def _saved(self, clock: int, *, at_once: bool) -> SaveReport:
        problem = self._save(clock, at_once=at_once)
        return SaveReport(problem=problem, blocks_offer=at_once and bool(problem))

    @torch.no_grad()
    def _forget(self, clock: int) -> None:
        """NaN would stay in W_i and in the optimiser for ever: the next period begins with the center, as that of a new agent,
        and nothing of this one gets to the disk. Tensors that stay at home and hold NaN become those of a new model, and a
        task's own state that holds NaN becomes that of a new task."""
        self._has_own = False
        self._updates.pending.clear()  # of a W_i that is gone
        if self._variates is not None:
            self._variates.pending.pop(clock, None)
        self._inner.forget()
        if not is_finite(self._task.state_dict()):
            packed, tensors = self._fresh_state
            self._task.load_state_dict(unpack(packed, {name: t.clone() for name, t in tensors.items()}))
        first, own = make_model(copy.copy(self._task), self._settings.seed), self._flat.model
        fresh = dict(slots_of(first))
        for name, (owner, attribute, tensor) in list(slots_of(own)):
            if not tensor.is_floating_point() or finite(tensor):
                continue
            there = fresh[name].tensor if name in fresh else None
            if there is not None and there.shape == tensor.shape:
                tensor.copy_(there)
            elif there is not None:  # it has grown as the model trained, and does so again
                owner._buffers[attribute] = there.to(tensor.device)
            else:  # the model has made it as it trained, and does so again
                owner._buffers.pop(attribute, None)

    def _inbox(self, section: int = 0) -> torch.Tensor:
        """The center in the inbox, on the device."""
        center_P = torch.empty(self._layout.elements, dtype=TORCH_DTYPES[self._layout.dtype])
        RAW.decode(self._box(0, section), center_P)
        return center_P.to(self._flat.flat_P.device)

    def _allotted(self, rows: int) -> Duration:
        """How long this period lasts."""
        local = self._settings.local
        most, seconds = local.steps_for(rows), local.seconds
        if seconds is not None and self._fitting is not None:
            most, seconds = min(most, max(1, self._fitting(seconds))), None
        return Duration(most, seconds)

    def _train(self, lasts: Duration, clock: int, number: int) -> tuple[float | None, int, int]:
        """The steps of a period, or fewer where it is stopped. Returns the mean loss, the steps made and the rows seen."""
        struct.pack_into("<QQ", self._view, 0, self._steps_ever, 0)
        struct.pack_into("<QQ", self._view, STEPS_EXPECTED, lasts.expected, len(self._dataset))
        if lasts.most == 0 or self._stopped():
            return None, 0, 0
        local, seed = self._settings.local, self._settings.seed
        first = self._drawn if local.seconds is not None else (clock - 1) * lasts.most
        stream = batches(self._dataset, local.batch_size, seed, number, first, self._task)
        seen, began_s = 0, self._clock()

        def on_step(rows: int) -> bool:
            nonlocal seen
            seen, self._steps_ever = seen + _rows_told(rows), self._steps_ever + 1
            if lasts.seconds is not None:
                self._claim.synchronize()
            more = lasts.stepped(self._clock() - began_s)
            struct.pack_into("<QQ", self._view, 0, self._steps_ever, lasts.done)
            struct.pack_into("<Q", self._view, STEPS_EXPECTED, lasts.expected)
            return more and not self._stopped()

        if self._variates is not None and self._variates.at_center:
            self._gradient_at_center(self._variates.gradients_P)
        self._flat.model.zero_grad(set_to_none=True)  # gradients are kept on no disk, so no period begins with any
        drawn = 0

        def draw() -> Iterator[Any]:
            """Batches, none after the period's last: also for a task that does not listen to `on_step`."""
            nonlocal drawn
            while drawn < lasts.most and lasts.is_open and not self._stopped():
                drawn += 1
                yield to_device(next(stream), self._claim.device)

        with self._inner.watching():
            loss = self._task.train(self._flat.model, self._inner.given, draw(), on_step)
        self._flat.store()
        if not lasts.done and not self._stopped():
            hint = "Call `on_step(rows)` after every batch, and stop when it returns False"
            raise ConfigError("task", f"`train` drew {drawn} batches and never called `on_step`", hint)
        self._inner.period_ends(lasts.done)
        self._checks.trained(self._flat, self._center_P, lasts.done)
        self._drawn += drawn
        self._told_fewer = f"{drawn} batches and called `on_step` {lasts.done} times" if drawn >= 2 * lasts.done else ""
        if loss is not None:
            loss = as_number(loss, "`train` returned", "Return the mean loss as a number, or None")
        return loss, lasts.done, seen

    def _task_state(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """A copy of the task's own state, as JSON and tensors. Raises ConfigError for a state that cannot be kept."""
        state: Any = self._task.state_dict()
        if not isinstance(state, dict):
            hint = "Return a dict of numbers, strings and tensors"
            raise ConfigError("task", f"`state_dict` returned a {type(state).__name__}", hint)
        if state and type(self._task).load_state_dict is Task.load_state_dict:
            raise ConfigError(
                "task", "has `state_dict` and no `load_state_dict`", "Add it: it is called after a restart"
            )
        packed, tensors = pack(state, "state_dict()")
        return packed, {name: tensor.clone() for name, tensor in tensors.items()}

    def _inner_state(self) -> dict[str, Any]:
        return {**self._inner.kept(), "task": self._task.state_dict(), "drawn": self._drawn}

    def _advice(self, parts: int) -> list[str]:
        """After the first period: what the task or its settings rarely mean. Raises ConfigError for what cannot be kept."""
        if not self._is_first:
            return []
        self._is_first = False
        pack(self._inner_state(), "the state")
        advice = self._inner.advice if parts > 1 else []
        if self._told_fewer:
            advice = [
                *advice,
                f"task: `train` drew {self._told_fewer}: `local.steps`, progress and `merge.weights: steps` count these "
                "calls. Call `on_step(rows)` after every batch, also where several batches make one step",
            ]
        return advice

    def _stopped(self) -> bool:
        return bool(self._view[STOP_EARLY])

    def _save(self, clock: int, *, at_once: bool = False) -> str:
        """Keeps W_i and all that goes with it, at most every second and for a small share of the time.

        What is held back is saved as soon as the limit allows while no question comes, see `save_held_back`. Returns why the
        disk took nothing the last time: then the file from before is still there, and it is tried again. `at_once`: in any
        case, for what is given up to the center must be on the disk before it is offered.
        """
        now_s, problem = self._clock(), ""
        if now_s < self._save_after_s and not at_once:
            self._unsaved_clock = clock
            return self._not_kept
        variates = {} if self._variates is None else self._variates.kept()
        own_P, pending = self._flat.flat_P.detach(), self._updates.pending
        kept = Kept(clock, own_P, self._inner_state(), dict(pending), variates, self._flat.local())
        try:
            save_state(self._state_path, kept, self._layout, self._submission)
        except (OSError, SafetensorError) as error:
            problem = f"{self._state_path.parent}: {getattr(error, 'strerror', None) or error}"
            log.warning("not kept: %s", problem)
        took_s = self._clock() - now_s
        self._save_after_s = now_s + max(SAVE_EVERY_S if not problem else SAVE_AGAIN_S, took_s / SAVE_SHARE)
        self._unsaved_clock, self._not_kept = (clock if problem else None), problem
        return problem

    def _evaluated(self, version: int) -> tuple[EvaluationReport | None, str]:
        """Return the metrics of W_i on the held-out data, or None and the problem, which costs no update.

        Draws the random numbers that the evaluation of this version's center draws.
        """
        device, skipped = self._claim.device, Counter[str]()
        try:
            test_set = self._held_out()
            seed_all(seed_of(self._settings.seed, version), device)
            metrics = evaluate(self._task, self._flat.model, test_set, EVALUATION_ROWS, device, self._on_batch, skipped)
            return EvaluationReport(metrics=metrics, skipped=dict(skipped)), ""
        except Exception as error:  # of any class: the task's code raises it
            return None, described(error)

    def _gradient_at_center(self, out_P: torch.Tensor) -> None:
        """Of the loss over this agent's whole part, where the model stands."""
        device = self._claim.device
        whole_gradient(self._task, self._flat.model, self._dataset, EVALUATION_ROWS, device, self._on_batch)
        for site in self._flat.sites:
            if site.parameter.grad is not None:
                site.of(out_P).copy_(site.parameter.grad)
        self._flat.model.zero_grad(set_to_none=True)

    def _reporting(self) -> AbstractContextManager[None]:
        """Report progress while the vectors and the optimiser's state are mixed, encoded, checked or saved."""
        return self._ticking(self._on_batch, SAVED_VECTORS * self._layout.nbytes)

    def _on_batch(self) -> None:
        """A sign of progress beside the steps."""
        self._steps_ever += 1
        struct.pack_into("<Q", self._view, 0, self._steps_ever)

    def _held_out(self) -> Any:
        if self._test_set is None:
            self._test_set = self.made(make_held_out, self._task, self._settings.seed)
        return self._test_set

    def _box(self, which: int, section: int = 0, *, sections: int = 1) -> memoryview:
        """The inbox (0) or an outbox: so many sections of it, from `section` on."""
        begin = PROGRESS_BYTES + which * self._layout.blob_bytes + section * self._layout.nbytes
        return self._view[begin : begin + sections * self._layout.nbytes]


def _rows_told(rows: Any) -> int:
    """What a task has told `on_step`. Raises ConfigError."""
    hint = "Call `on_step(rows)` with the number of rows of the step"
    told = as_number(rows, "`train` called `on_step` with", hint)
    if not (told >= 0 and told.is_integer()):
        raise ConfigError("task", f"`train` called `on_step` with {told:g}", hint)
    return int(told)


def main(device: str, threads: int, allowed: list[str], task_dir: str, end_fd: int, memory_fd: int) -> int:
    if threads:
        torch.set_num_threads(threads)
    trainer = Trainer(SharedMemory(memory_fd), device, allowed, Path(task_dir), enter=os.chdir, ticking=ticking)
    return serve(end_fd, trainer.questions(), trainer.chore())
