"""The model of an agent in a run, with all else that its periods change: W_i, optimisers, control variates, the task's state.

P: elements of the flat vector.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from syncline.averaging.kernels import finite
from syncline.errors import ConfigError
from syncline.model.flat import FlatModel
from syncline.model.manifest import Manifest
from syncline.model.tensors import slots_of
from syncline.runtime.child_messages import TrainPeriod
from syncline.spec.run_spec import RunSpec
from syncline.tasks.base import Task, make_model
from syncline_agent.control_variates import ControlVariates
from syncline_agent.inner_optimizers import InnerOptimizers
from syncline_agent.local_state import LocalState
from syncline_agent.local_update import ProgressUpdate, local_update_of
from syncline_agent.model_checks import ModelChecks
from syncline_agent.nested_values import is_finite, pack, unpack
from syncline_agent.training_child import outboxes


class LocalModel:
    """Begins as every agent of the run does, before its first period.

    Attributes:
        has_own: W_i exists; False: the next period begins with the center, as that of a new agent.
        drawn: batches in all periods, where these are given in seconds.
        center_P: the vector that a period is measured from.
    """

    def __init__(
        self,
        task: Task,
        settings: RunSpec,
        layout: Manifest,
        device: torch.device,
        vector: Callable[[Tensor], Tensor],
    ) -> None:
        """Make the model and its optimisers.

        Args:
            vector: returns room for a center, like the flat vector that it is given.

        Raises:
            ConfigError: the task cannot be used with these settings.
        """
        self.task = task
        self.has_own = False
        self.drawn = 0
        self._settings = settings
        model = make_model(task, settings.seed)
        self.checks = ModelChecks(task, model, layout)
        self.flat = FlatModel(model.to(device), layout, task.local, task.shared)
        self.center_P = vector(self.flat.flat_P)
        self.local_update = local_update_of(settings, layout.buffers)
        self._anchor_P = self.center_P  # the center received last, to which FedProx pulls
        if settings.local.prox_mu and isinstance(self.local_update, ProgressUpdate):
            self._anchor_P = self.flat.flat_P.clone()  # a period without a newer center is measured from W_i
        self.inner = InnerOptimizers(task, self.flat, self._anchor_P, settings.local)
        self._fresh_task_state = self._task_state()
        self.variates: ControlVariates | None = None
        if (scaffold := settings.local.control_variates) is not None:
            overlap = outboxes(settings) > 1
            self.variates = ControlVariates(self.flat.flat_P, along=scaffold.option == 2, overlap=overlap)

    @property
    def device(self) -> torch.device:
        return self.flat.flat_P.device

    def begin_period(self, period: TrainPeriod, center_P: Tensor | None, sum_P: Tensor | None) -> None:
        """Apply the verdicts and take over the center. An agent without a W_i begins with W.

        Args:
            center_P: a newer center, on the device; None: no newer center.
            sum_P: the sum of all control variates that belongs to that center, if the run has them.
        """
        self.flat.store()
        self.local_update.resolve(period.verdicts, self.flat.flat_P)
        if center_P is not None and self._anchor_P is not self.center_P:
            self._anchor_P.copy_(center_P)
        self.local_update.begin(self.flat.flat_P, self.center_P, center_P, first=not self.has_own)
        self.flat.load()
        self.has_own = True
        control = None
        if self.variates is not None:
            self.variates.resolve(period.verdicts)
            control = self.variates.begin(sum_P, period.parts)
        self.inner.period_begins(control)

    def take_update(self, clock: int) -> tuple[Tensor, Tensor | None]:
        """Return the update of the period that is over, and Δc_i if the run has control variates."""
        self.flat.store()
        update_P = self.local_update.take(self.flat.flat_P, self.center_P, clock)
        self.flat.load()
        if self.variates is None:
            return update_P, None
        return update_P, self.variates.take(clock, self.inner.gradients.steps)

    @torch.no_grad()
    def forget_period(self, clock: int) -> None:
        """Drop the results of a period that diverged: NaN would stay in W_i and in the optimiser for ever.

        The next period begins with the center, as that of a new agent. Local tensors that hold NaN become those of a new
        model, and a task's own state that holds NaN becomes that of a new task.
        """
        self.has_own = False
        self.local_update.pending.clear()  # they belong to the lost W_i
        if self.variates is not None:
            self.variates.pending.pop(clock, None)
        self.inner.forget()
        if not is_finite(self.task.state_dict()):
            packed, tensors = self._fresh_task_state
            self.task.load_state_dict(unpack(packed, {name: t.clone() for name, t in tensors.items()}))
        self._renew_local_tensors()

    def _renew_local_tensors(self) -> None:
        fresh = dict(slots_of(make_model(copy.copy(self.task), self._settings.seed)))
        for name, (owner, attribute, tensor) in list(slots_of(self.flat.model)):
            if not tensor.is_floating_point() or finite(tensor):
                continue
            new = fresh[name].tensor if name in fresh else None
            if new is not None and new.shape == tensor.shape:
                tensor.copy_(new)
            elif new is not None:  # training has made it grow, and will again
                owner._buffers[attribute] = new.to(tensor.device)
            else:  # training has made it, and will again
                owner._buffers.pop(attribute, None)

    def state(self, clock: int) -> LocalState:
        """Return the state after the period of this clock. Its tensors share memory with this object."""
        variates = {} if self.variates is None else self.variates.kept()
        own_P = self.flat.flat_P.detach()
        return LocalState(
            clock, own_P, self._inner_state(), dict(self.local_update.pending), variates, self.flat.local()
        )

    def restore(self, state: LocalState) -> None:
        """Take over a saved state. Raises whatever does not fit raises; then this object must not be used any more."""
        self.flat.flat_P.copy_(state.own_P)
        self.flat.load()
        self.flat.restore_at_home(state.local)
        self.inner.restore(state.inner)
        self.drawn = int(state.inner["drawn"])
        if state.inner["task"]:
            self.task.load_state_dict(state.inner["task"])
        if self.variates is not None:
            self.variates.restore(state.variates)
        self.local_update.pending = {clock: pending_P.to(self.device) for clock, pending_P in state.pending.items()}
        self.has_own = True

    def check_state(self) -> None:
        """Raise ConfigError if the state cannot be saved."""
        pack(self._inner_state(), "the state")

    def _inner_state(self) -> dict[str, Any]:
        """Return optimisers, schedules and the task's own state, as nested plain values."""
        return {**self.inner.kept(), "task": self.task.state_dict(), "drawn": self.drawn}

    def _task_state(self) -> tuple[Any, dict[str, Tensor]]:
        """Return a copy of the task's own state, as JSON and tensors. Raises ConfigError for a state that cannot be kept."""
        state: Any = self.task.state_dict()
        if not isinstance(state, dict):
            hint = "Return a dict of numbers, strings and tensors"
            raise ConfigError("task", f"`state_dict` returned a {type(state).__name__}", hint)
        if state and type(self.task).load_state_dict is Task.load_state_dict:
            raise ConfigError(
                "task", "has `state_dict` and no `load_state_dict`", "Add it: it is called after a restart"
            )
        packed, tensors = pack(state, "state_dict()")
        return packed, {name: tensor.clone() for name, tensor in tensors.items()}
