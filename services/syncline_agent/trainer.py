"""The agent's child process: owns the device, the model and W_i, and trains one local period at a time.

It talks to the service over a socket, and shares memory with it:

    progress   steps since the process began, the step of this period, the service's wish to stop early, the steps that this
               period has, and the rows of this agent's part
    inbox      the center as it came over the bus, coded
    outbox     the update W_i − W_v, coded

W_i is kept on disk, so that an agent that was killed goes on from its own work.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from syncline.child import Handler, serve
from syncline.data.partition import Part
from syncline.engine.mix import mix_
from syncline.shm import SharedMemory
from syncline.spec import RunSpec, parse
from syncline.tasks.base import Task, batches, evaluate, load_task, to_device
from syncline.wire.codecs import CODECS
from syncline.wire.flat import DTYPES, FlatModel
from syncline.wire.manifest import Manifest
from syncline.wire.messages import decode
from syncline_agent.device import Claim, claim_device
from syncline_agent.state import Kept, load_state, save_state
from syncline_agent.training import PROGRESS, PROGRESS_BYTES, STOP_EARLY

EVALUATION_ROWS = 512
SAVE_EVERY_S = 1.0
SAVE_SHARE = 0.05  # of an agent's time that saving may take

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}


class Trainer:
    """The questions of the service, each a method: `describe`, then `prepare` for a run, then `period` after `period`."""

    def __init__(
        self,
        memory: SharedMemory,
        device: str,
        allowed: list[str],
        task_dir: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._memory, self._allowed, self._task_dir = memory, allowed, task_dir
        self._wanted = device
        self._steps_ever = 0

    @cached_property
    def _claim(self) -> Claim:
        """The device, claimed with the first question: what is wrong with it is an answer then."""
        return claim_device(self._wanted)

    def describe(self) -> dict[str, Any]:
        return {"device": self._claim.describe(), "shared": self._claim.shared}

    def prepare(self, spec: dict[str, Any], manifest: bytes, state_path: str) -> dict[str, Any]:
        """Loads the task, makes the model, and finds what this agent kept of the run. Answers with its clock."""
        settings = self._settings = parse(RunSpec, spec)
        self._task = self.load_task(settings)
        self._layout = decode(Manifest, manifest)
        torch.manual_seed(settings.seed)
        model = self._task.model().to(self._claim.device)
        self._flat = FlatModel(model, self._layout, self._task.local)
        self._center_P = torch.empty_like(self._flat.flat_P)
        self._optimizer = self._make_optimizer()
        self._memory.grow(PROGRESS_BYTES + 2 * self._layout.nbytes)
        self._view = self._memory.view()
        self._codec = CODECS[self._layout.dtype]
        self._place: tuple[int, int] | None = None
        self._state_path, self._save_after_s = Path(state_path), 0.0
        kept = load_state(self._state_path, self._layout)
        self._has_own = kept is not None
        if kept is not None:
            self._flat.flat_P.copy_(kept.own_P)
            self._flat.load()
            kept.restore(self._optimizer)
        return {"clock": kept.clock if kept is not None else 0}

    def period(self, version: int, clock: int, number: int, parts: int) -> dict[str, Any]:
        """Mixes in the center that lies in the inbox, trains one local period, and leaves the update in the outbox."""
        self._take_part(number, parts)
        self._mix()
        settings, rows = self._settings, len(self._dataset)
        torch.manual_seed(_seed(settings.seed, number, clock))
        began = self._clock()
        loss, steps, seen = self._train(settings.local.steps_for(rows), clock, number)
        seconds = self._clock() - began
        answer: dict[str, Any] = {
            "steps": steps,
            "rows": rows,
            "loss": loss,
            "samples_per_s": seen / seconds if seconds > 0 else 0.0,
        }
        if self._stopped():
            return {**answer, "stopped": True}
        self._flat.store()
        update_P = (self._flat.flat_P - self._center_P).cpu()
        self._codec.encode(update_P, self._box(1))
        if settings.evaluate.agents:
            answer["metrics"] = self._evaluate()
        self._save(clock)
        return {**answer, "stopped": False}

    def questions(self) -> dict[str, Handler]:
        return {"describe": self.describe, "prepare": self.prepare, "period": self.period}

    def load_task(self, settings: RunSpec) -> Task:
        return load_task(settings.task, settings.task_options, self._allowed, self._task_dir)

    # -- the steps of a period -----------------------------------------------------------------------------------------
    def _take_part(self, number: int, parts: int) -> None:
        """This agent's D_i: part `number` of `parts`; made anew only where that changed."""
        if self._place != (number, parts):
            part = Part(index=number, parts=parts, how=self._settings.partition, seed=self._settings.seed)
            self._dataset: Any = self._task.dataset(part)
            self._place = (number, parts)

    def _mix(self) -> None:
        """W_i ← W_i + α (W − W_i); an agent without a W_i of its own begins with W."""
        center_P = torch.empty(self._layout.elements, dtype=DTYPES[self._layout.dtype])
        self._codec.decode(self._box(0), center_P)
        self._center_P.copy_(center_P)
        self._flat.store()
        mix_(self._flat.flat_P, self._center_P, self._settings.mix.alpha if self._has_own else 1.0)
        self._flat.load()
        self._has_own = True

    def _train(self, steps: int, clock: int, number: int) -> tuple[float | None, int, int]:
        """Up to `steps` steps. Returns the mean loss, the steps made and the rows seen."""
        PROGRESS.pack_into(self._view, 0, self._steps_ever, 0, 0, steps, len(self._dataset))
        seen = done = 0

        def on_step(rows: int) -> bool:
            nonlocal seen, done
            seen, done, self._steps_ever = seen + rows, done + 1, self._steps_ever + 1
            struct.pack_into("<QQ", self._view, 0, self._steps_ever, done)
            return not self._stopped()

        if steps == 0:
            return None, 0, 0
        local, seed = self._settings.local, self._settings.seed
        stream = batches(self._dataset, local.batch_size, seed, number, (clock - 1) * steps)
        placed = (to_device(batch, self._claim.device) for batch in itertools.islice(stream, steps))
        loss = self._task.train(self._flat.model, self._optimizer, placed, on_step)
        return loss, done, seen

    def _stopped(self) -> bool:
        return bool(self._view[STOP_EARLY])

    def _save(self, clock: int) -> None:
        """Keeps W_i and the optimiser, at most every second and for a small share of the time."""
        now_s = self._clock()
        if now_s < self._save_after_s:
            return
        save_state(self._state_path, Kept.of(clock, self._flat.flat_P, self._optimizer), self._layout)
        took_s = self._clock() - now_s
        self._save_after_s = now_s + max(SAVE_EVERY_S, took_s / SAVE_SHARE)

    def _evaluate(self) -> dict[str, float]:
        """W_i on the held-out data; every batch counts as a sign of progress."""

        def on_batch() -> None:
            self._steps_ever += 1
            struct.pack_into("<Q", self._view, 0, self._steps_ever)

        device = self._claim.device
        return evaluate(self._task, self._flat.model, self._held_out(), EVALUATION_ROWS, device, on_batch)

    def _held_out(self) -> Any:
        if not hasattr(self, "_test_set"):
            self._test_set = self._task.dataset(Part.test())
        return self._test_set

    def _make_optimizer(self) -> torch.optim.Optimizer:
        params = [p for p in self._flat.model.parameters() if p.requires_grad]
        setting = self._settings.local.optimizer
        return self._task.optimizer(params) or OPTIMIZERS[setting.kind](params, **setting.arguments)

    def _box(self, which: int) -> memoryview:
        begin = PROGRESS_BYTES + which * self._layout.nbytes
        return self._view[begin : begin + self._layout.nbytes]


def _seed(*parts: int) -> int:
    """One seed out of several numbers, for dropout and the like: the same period draws the same numbers."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")


def main(device: str, threads: int, allowed: list[str], task_dir: str, end_fd: int, memory_fd: int) -> int:
    if threads:
        torch.set_num_threads(threads)
    trainer = Trainer(SharedMemory(memory_fd), device, allowed, Path(task_dir))
    return serve(end_fd, trainer.questions())
