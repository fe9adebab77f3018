"""A training child without a process, for unit tests: asked as the service asks it, through shared memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from syncline.model.flat import FlatModel, manifest_of
from syncline.shm import SharedMemory
from syncline.spec.run_spec import RunSpec, parse
from syncline.tasks.base import Task, load_task
from syncline.tasks.sources import digests_of_code
from syncline.transform.torch_dtypes import TORCH_DTYPES
from syncline.wire.messages import encode
from syncline_agent.trainer import Trainer
from syncline_agent.training_child import PROGRESS, PROGRESS_BYTES, Period, Progress

REGRESSION = "syncline.tasks.quadratic:LinearRegression"


class Ticking:
    """A clock that goes on by so much with every look at it, and by a while between periods."""

    def __init__(self, tick_s: float = 0.0) -> None:
        self.tick_s, self.now_s = tick_s, 0.0

    def __call__(self) -> float:
        self.now_s += self.tick_s
        return self.now_s


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
        self.clock = self.trainer.prepare(settings.model_dump(mode="json"), encode(self.layout), str(path), submission)[
            "clock"
        ]

    def period(
        self,
        center_P: Tensor,
        sum_P: Tensor | None = None,
        verdicts: dict[int, bool] | None = None,
        *,
        fresh: bool = True,
        pause_s: float = 60.0,
    ) -> dict[str, Any]:
        """One local period from this center; the answer, with the update as `update`, and `control` beside `sum_P`.

        `fresh`: the center is newer than that of the period before. `pause_s`: since that period; by default it is time to
        save again.
        """
        self._box(0).copy_(center_P)
        if sum_P is not None:
            self._box(0, 1).copy_(sum_P)
        self.clock += 1
        self._clock.now_s += pause_s
        judged = [*(verdicts or {}).items()]
        asked = Period(self.version, self.clock, self.number, self.parts, fresh, verdicts=judged)
        answer = self.trainer.period(**asked._asdict())
        self.version += 1
        answer["update"] = self._box(1).clone()
        if sum_P is not None:
            answer["control"] = self._box(1, 1).clone()
        return answer

    def meet(self) -> dict[str, Any]:
        """After a period of elastic averaging, with the same center."""
        return self.trainer.meet(**Period(self.version, self.clock, self.number, self.parts)._asdict())

    @property
    def progress(self) -> Progress:
        ever, step, _, steps, rows = PROGRESS.unpack_from(self.memory.view())
        return Progress(ever, step, steps, rows)

    def _box(self, which: int, section: int = 0) -> Tensor:
        layout = self.layout
        offset = PROGRESS_BYTES + which * layout.blob_bytes + section * layout.nbytes
        return torch.frombuffer(
            self.memory.view(), dtype=TORCH_DTYPES[layout.dtype], count=layout.elements, offset=offset
        )
