"""A training child without a process, for unit tests: asked as the service asks it, through shared memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncline.model.flat import FlatModel, manifest_of
from syncline.runtime.child_messages import (
    EvaluationReport,
    MakeElasticUpdate,
    PeriodReport,
    PrepareRun,
    TrainPeriod,
    UpdateReport,
)
from syncline.shm import SharedMemory
from syncline.spec.run_spec import RunSpec, parse
from syncline.tasks.base import Task, load_task
from syncline.tasks.sources import digests_of_code
from syncline.transform.torch_dtypes import TORCH_DTYPES
from syncline.wire.messages import encode
from syncline_agent.trainer import Trainer
from syncline_agent.training_child import PROGRESS, PROGRESS_BYTES, ChildProgress

REGRESSION = "syncline.tasks.quadratic:LinearRegression"


class Ticking:
    """A clock that goes on by so much with every look at it, and by a while between periods."""

    def __init__(self, tick_s: float = 0.0) -> None:
        self.tick_s, self.now_s = tick_s, 0.0

    def __call__(self) -> float:
        self.now_s += self.tick_s
        return self.now_s


class Trained(NamedTuple):
    """Result of a period: the report, and the sections of the outbox."""

    report: PeriodReport
    update_P: Tensor
    control: Tensor | None  # Δc_i, if control variates are used

    @property
    def update(self) -> UpdateReport:
        assert self.report.update is not None
        return self.report.update

    @property
    def evaluation(self) -> EvaluationReport:
        assert self.report.evaluation is not None
        return self.report.evaluation

    @property
    def control_P(self) -> Tensor:
        assert self.control is not None
        return self.control


class Child:
    """`period` after `period`; what a session keeps is kept here: the clock."""

    def __init__(
        self,
        path: Path,
        spec: dict[str, Any],
        *,
        clock: Ticking | None = None,
        fitting: Callable[[float], int] | None = None,
        number: int = 0,
        parts: int = 1,
        submission: str = "first",
    ) -> None:
        settings = parse(RunSpec, {"task": REGRESSION, "seed": 3, **spec})
        self.number, self.parts, self.version = number, parts, 0
        self.task: Task = load_task(settings.task, settings.task_options, ["*"], Path("/"))
        torch.manual_seed(settings.seed)
        model = self.task.model()
        code = digests_of_code(self.task)
        self.layout = manifest_of(model, 4096, self.task.local, settings.local.sections, self.task.shared, code)
        self.initial_P = FlatModel(model, self.layout, self.task.local, self.task.shared).flat_P.clone()
        self.memory = SharedMemory()
        self.memory.grow(PROGRESS_BYTES)
        self._clock = clock or Ticking()
        self.trainer = Trainer(self.memory, "cpu", ["*"], Path("/"), self._clock, fitting)
        question = PrepareRun(spec=settings, manifest=encode(self.layout), state_path=str(path), submission=submission)
        self.clock = self.trainer.prepare(question).clock

    def period(
        self,
        center_P: Tensor,
        sum_P: Tensor | None = None,
        verdicts: dict[int, bool] | None = None,
        *,
        fresh: bool = True,
        pause_s: float = 60.0,
    ) -> Trained:
        """Train one local period from this center.

        `fresh`: the center is newer than that of the period before. `pause_s`: since that period; by default it is time to
        save again.
        """
        self._box(0).copy_(center_P)
        if sum_P is not None:
            self._box(0, 1).copy_(sum_P)
        self.clock += 1
        self._clock.now_s += pause_s
        report = self.trainer.period(self._question(fresh, verdicts or {}))
        self.version += 1
        return Trained(report, self._box(1).clone(), self._box(1, 1).clone() if sum_P is not None else None)

    def make_elastic_update(self) -> UpdateReport:
        """After a period of elastic averaging, with the same center."""
        question = MakeElasticUpdate(period=self._question(True, {}), fresh_center=True)
        return self.trainer.make_elastic_update(question)

    def _question(self, fresh: bool, verdicts: dict[int, bool]) -> TrainPeriod:
        return TrainPeriod(
            version=self.version,
            clock=self.clock,
            part=self.number,
            parts=self.parts,
            fresh_center=fresh,
            verdicts=verdicts,
        )

    @property
    def progress(self) -> ChildProgress:
        ever, step, _, steps, rows = PROGRESS.unpack_from(self.memory.view())
        return ChildProgress(ever, step, steps, rows)

    def _box(self, which: int, section: int = 0) -> Tensor:
        layout = self.layout
        offset = PROGRESS_BYTES + which * layout.blob_bytes + section * layout.nbytes
        return torch.frombuffer(
            self.memory.view(), dtype=TORCH_DTYPES[layout.dtype], count=layout.elements, offset=offset
        )
