"""The coordinator's child process: makes the initial model, and evaluates the center on the held-out data.

The child shares the center's memory. Evaluation does not delay merging: the child first copies the center, which is quick, and
evaluates the copy while the coordinator merges.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from syncline.averaging.kernels import finite
from syncline.errors import ConfigError
from syncline.model.flat import FlatModel, manifest_of
from syncline.model.frozen import insist_on_frozen
from syncline.model.manifest import Manifest
from syncline.runtime.child import Handlers, serve, tell
from syncline.runtime.child_messages import (
    CopyCenter,
    Done,
    EvaluateCenter,
    EvaluationReport,
    MakeModel,
    ModelLayout,
    WriteInitialModel,
)
from syncline.shm import SharedMemory
from syncline.spec.run_spec import RunSpec
from syncline.tasks.base import Task, evaluate, load_task, make_held_out, make_model
from syncline.tasks.optimizers import check_inner
from syncline.tasks.seeding import seed_all, seed_of
from syncline.tasks.sources import digests_of_code
from syncline.transform.torch_dtypes import TORCH_DTYPES
from syncline.wire import subjects
from syncline.wire.messages import decode, encode

BATCH_ROWS = 512


class Evaluator:
    """Answers the questions of the coordinator, each with a method."""

    def __init__(
        self,
        memory: SharedMemory,
        allowed: list[str],
        task_dir: Path,
        clock: Callable[[], float] = time.monotonic,
        enter: Callable[[Path], object] = lambda directory: None,
        tell: Callable[[str], None] = lambda doing: None,
    ) -> None:
        """Load nothing yet: `make_model` does.

        Args:
            memory: holds the center.
            allowed: patterns of tasks that may be loaded.
            clock: returns the time, in seconds.
            enter: changes the working directory, as `load_task` has it.
            tell: receives a sentence about each call of the task's code, before the call.
        """
        self._memory = memory
        self._allowed = allowed
        self._task_dir = task_dir
        self._clock = clock
        self._enter = enter
        self._tell = tell
        self._task: Task | None = None
        self._flat: FlatModel | None = None

    def make_model(self, question: MakeModel) -> ModelLayout:
        """Load the task and make the model, seeded. Answers with the layout, after checking it against the run's, if given."""
        settings = question.spec
        self._tell(f"loads the task {settings.task}")
        task = self.load_task(settings)
        self._tell(f"makes the model: model() of {settings.task}")
        model = make_model(task, settings.seed)
        if question.manifest:
            layout = decode(Manifest, question.manifest)
            insist_on_frozen(model, layout, task.local, task.shared)
        else:
            sections, code = settings.local.sections, digests_of_code(task)
            layout = manifest_of(model, question.chunk_bytes, task.local, sections, task.shared, code)
            if question.check_optimizer:
                check_inner(task, model, settings.local)
        self._task = task
        self._layout = layout
        self._flat = FlatModel(model, layout, task.local, task.shared)
        if not question.manifest:
            _insist_on_numbers(self._flat, layout)
        self._settings = settings
        if settings.evaluate.center:
            self._tell(f"loads the held-out data: dataset() of {settings.task}")
            self._dataset = make_held_out(task, settings.seed)
        return ModelLayout(manifest=encode(layout))

    def write_initial(self, question: WriteInitialModel) -> Done:
        """Write version 0 into the center's memory."""
        assert self._flat is not None
        self._center().copy_(self._flat.flat_P)
        return Done()

    def copy_center(self, question: CopyCenter) -> Done:
        """Load the center as it is now into this process's model."""
        assert self._flat is not None
        self._flat.flat_P.copy_(self._center())
        self._flat.load()
        return Done()

    def evaluate(self, question: EvaluateCenter) -> EvaluationReport:
        """Return the held-out metrics of the center that was copied last."""
        assert self._flat is not None and self._task is not None
        began, cpu = self._clock(), torch.device("cpu")
        seed_all(seed_of(self._settings.seed, question.version), cpu)
        skipped = Counter[str]()
        metrics = evaluate(self._task, self._flat.model, self._dataset, BATCH_ROWS, cpu, skipped=skipped)
        return EvaluationReport(metrics=metrics, skipped=dict(skipped), seconds=max(0.0, self._clock() - began))

    def questions(self) -> Handlers:
        return {
            MakeModel: self.make_model,
            WriteInitialModel: self.write_initial,
            CopyCenter: self.copy_center,
            EvaluateCenter: self.evaluate,
        }

    def load_task(self, settings: RunSpec) -> Task:
        return load_task(
            settings.task,
            settings.task_options,
            self._allowed,
            self._task_dir,
            asker=subjects.COORDINATOR,
            seed=settings.seed,
            enter=self._enter,
        )

    def _center(self) -> torch.Tensor:
        return torch.frombuffer(
            self._memory.view(), dtype=TORCH_DTYPES[self._layout.dtype], count=self._layout.elements
        )


def _insist_on_numbers(flat: FlatModel, layout: Manifest) -> None:
    """Raise ConfigError for a model that holds NaN before any training: no update can be merged into that."""
    for entry in layout.tensors:
        if not finite(flat.flat_P[entry.offset : entry.offset + entry.elements]):
            problem = f"the model's {entry.name} holds NaN or infinite values before any training"
            raise ConfigError(
                "task", problem, "Give it values in `model()`: `torch.empty` leaves what was in the memory"
            )


def main(threads: int, allowed: list[str], task_dir: str, end_fd: int, memory_fd: int) -> int:
    if threads:
        torch.set_num_threads(threads)
    evaluator = Evaluator(SharedMemory(memory_fd), allowed, Path(task_dir), enter=os.chdir, tell=partial(tell, end_fd))
    return serve(end_fd, evaluator.questions())
