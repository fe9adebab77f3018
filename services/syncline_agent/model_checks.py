"""Checks of a task and its model, so that no tensor is left out of the averaging silently."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from syncline.errors import ConfigError
from syncline.model.flat import FlatModel
from syncline.model.frozen import digest_of, frozen_of, insist_on_frozen
from syncline.model.manifest import Manifest
from syncline.model.tensors import matches, saved_buffers, slots_of, tensors_of
from syncline.tasks.base import Task
from syncline.tasks.sources import differing, digests_of_code


class ModelChecks:
    """Checks a model when it is made and after the 1st, 2nd, 4th, 8th … period of training: digests cost time.

    Attributes:
        advice: sentences for the owner that were not taken yet.
    """

    def __init__(self, task: Task, model: nn.Module, layout: Manifest) -> None:
        """Check a new model.

        Raises:
            ConfigError: a frozen tensor of the model differs from the coordinator's.
        """
        insist_on_frozen(model, layout, task.local, task.shared)
        self.advice: list[str] = []
        self._local = task.local
        self._layout = layout
        self._digests = {entry.name: entry.digest for entry in layout.frozen}
        self._frozen = {
            name: (tensor.dtype, tensor.shape)
            for name, tensor in frozen_of(model, task.local, task.shared)
            if isinstance(tensor, nn.Parameter) and name in self._digests
        }
        self._periods = 0
        self._next_look = 1
        self._moved = False
        names = [name for name, _ in tensors_of(model)]
        for pattern in task.local:
            if not any(matches(name, [pattern]) for name in names):
                self.advice.append(
                    f"task: `local` names {pattern!r}, which no tensor of the model matches, so nothing stays with the agent "
                    "by it. Write the names as `model().named_parameters()` gives them"
                )
        for name in differing(digests_of_code(task), {entry.name: entry.digest for entry in layout.code}):
            self.advice.append(
                f"task: {name} on this machine differs from the coordinator's. Use the same code on every machine"
            )

    def take_advice(self) -> list[str]:
        """Return the advice and forget it."""
        taken, self.advice = self.advice, []
        return taken

    def trained(self, flat: FlatModel, center_P: Tensor, steps: int) -> None:
        """Check the model after a period that began with this center.

        Raises:
            ConfigError: training has changed a frozen tensor that does not travel. Names it.
        """
        if not steps:
            return
        self._look_for_movement(flat, center_P, steps)
        self._periods += 1
        if self._periods == self._next_look:
            self._next_look *= 2
            tensors = {name: slot.tensor for name, slot in slots_of(flat.model)}
            self._look_at_frozen(tensors)
            self._look_at_buffers(tensors, saved_buffers(flat.model))

    def _look_for_movement(self, flat: FlatModel, center_P: Tensor, steps: int) -> None:
        if self._moved or any(not torch.equal(s.of(flat.flat_P), s.of(center_P)) for s in flat.sites):
            self._moved = True
            return
        self.advice.append(
            f"task: {steps} steps have changed no parameter that is averaged. Look whether the optimiser holds the model's "
            "parameters, and whether its learning rate is above 0"
        )
        self._moved = True  # said once

    def _look_at_frozen(self, tensors: dict[str, Tensor]) -> None:
        for name, kind in self._frozen.items():
            tensor = tensors.get(name)
            if (
                tensor is None or (tensor.dtype, tensor.shape) != kind
            ):  # some kinds change when they come to their device
                continue
            if digest_of(tensor) != self._digests[name]:
                raise ConfigError(
                    "task",
                    f"the model's {name} is frozen, and the task has changed it: it is neither averaged, kept nor exported",
                    "Name it in the task's `shared` to have it averaged, or in `local` to keep it with each agent",
                )

    def _look_at_buffers(self, tensors: dict[str, Tensor], saved: set[str]) -> None:
        """Advise on buffers that had no finite value when the manifest was made, and so are not averaged."""
        averaged = {entry.name for entry in self._layout.tensors}
        late = [
            name
            for name, tensor in tensors.items()
            if name in saved - averaged
            and tensor.is_floating_point()
            and tensor.numel()
            and not matches(name, self._local)
            and bool(torch.isfinite(tensor).all())
        ]
        if late:
            self._local = (*self._local, *late)  # it is said once
            more = f" and {len(late) - 1} more" if len(late) > 1 else ""
            self.advice.append(
                f"task: the buffer {late[0]}{more} had no finite value in model() and stays with each agent. Send one batch "
                "through the model in model() to have it averaged, or name it in the task's `local`"
            )
