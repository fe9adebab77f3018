"""The inner optimiser of an agent: with its schedule, and with what is done to the gradients."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from syncline.engine.gradients import Control, Gradients
from syncline.errors import ConfigError
from syncline.optim import advance, inner_of
from syncline.spec import Local
from syncline.tasks.base import Task
from syncline.wire.flat import FlatModel
from syncline_agent.state import Kept

NEED_STEPS = (
    "clip_norm",
    "clip_value",
    "prox_mu",
    "control_variates",
    "schedule",
)  # settings that work through the optimiser's steps


class Inner:
    """`optimizer` is what the task trains with. `center_P`: the center that the period began from, kept up to date outside."""

    def __init__(self, task: Task, flat: FlatModel, center_P: Tensor, local: Local) -> None:
        self._made_anew = partial(inner_of, task, flat.model, local)
        self.optimizer, self._schedule = self._made_anew()
        self._replaced = flat.replaced
        self._per_step = self._schedule is not None and local.schedule is not None and local.schedule.per == "step"
        self._needs_steps = [name for name in NEED_STEPS if getattr(local, name)]
        self.gradients = Gradients(
            flat.sites, center_P, prox_mu=local.prox_mu, clip_norm=local.clip_norm, clip_value=local.clip_value
        )
        if self._needs_steps:
            self.gradients.attach(self.optimizer)
        if self._schedule is not None and self._per_step:
            schedule = self._schedule
            self.optimizer.register_step_post_hook(lambda *_: advance(schedule))

    def period_begins(self, control: Control | None = None) -> None:
        self.gradients.steps, self.gradients.control = 0, control

    def period_ends(self, steps: int) -> None:
        """`steps`: as the task has counted them. Raises ConfigError where settings could have no effect."""
        if steps and self._needs_steps and not self.gradients.steps:
            raise ConfigError(
                f"local.{self._needs_steps[0]}",
                "has no effect: the task's `train` makes no step with the optimiser that it is given",
                "Have it call `optimizer.step()`, or leave the setting out",
            )
        if self._schedule is not None and not self._per_step and steps:
            advance(self._schedule)
        self._insist_on_replaced()

    def _insist_on_replaced(self) -> None:
        """Raises ConfigError where the loss reaches a parameter that training has put in the place of another one, and the
        optimiser still steps that other one."""
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for name, (before, now) in self._replaced.items():
            if now.grad is not None and id(before) in held and id(now) not in held:
                raise ConfigError(
                    "task",
                    f"training has put another parameter in the place of the model's {name}, which gets gradients, and the "
                    "optimiser steps the one before: it is not trained",
                    f"Write into it: `with torch.no_grad(): {name}.copy_(…)`",
                )

    def forget(self) -> None:
        """The optimiser has what a new one has; its schedule goes on."""
        fresh, _ = self._made_anew()
        self.optimizer.state.clear()
        self.optimizer.state.update(fresh.state)

    def kept(self, clock: int, own_P: Tensor, pending: Mapping[int, Tensor], drawn: int) -> Kept:
        return Kept.of(clock, own_P, self.optimizer, pending, self._schedule, drawn)

    def restore(self, kept: Kept) -> None:
        kept.restore(self.optimizer, self._schedule)
