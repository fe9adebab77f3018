"""The inner optimisers of an agent, with their schedules and the changes to gradients.

Everything here uses torch's hooks around `Optimizer.step`, so that a task with a `train` of its own has it too. The hooks see
every optimiser that steps during a period, also one that the task has not returned.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from syncline.errors import ConfigError
from syncline.local.gradients import Control, Gradients
from syncline.model.flat import FlatModel
from syncline.spec.sections import Local
from syncline.tasks.base import Task
from syncline.tasks.optimizers import inner_of, optimizers_of
from syncline_agent.nested_values import can_be_kept

NEED_STEPS = (
    "clip_norm",
    "clip_value",
    "prox_mu",
    "control_variates",
    "schedule",
)  # settings that work through the optimiser's steps


class InnerOptimizers:
    """The optimisers of one run.

    Attributes:
        given: the optimiser, or the optimisers, that the task's `train` receives.
        gradients: changes gradients before each step.
    """

    def __init__(self, task: Task, flat: FlatModel, center_P: Tensor, local: Local) -> None:
        """Make the optimisers of a task.

        Args:
            center_P: the center received last; its owner keeps it up to date.
            local: settings of local training.

        Raises:
            ConfigError: the task returns no usable optimisers, or settings and saved state would miss a parameter.
        """
        self._replaced = flat.replaced
        self._task = task
        self._model = flat.model
        self._local = local
        self.given, self._optimizers, self._schedules = inner_of(task, flat.model, local)
        self._known = {id(optimizer) for optimizer in self._optimizers.values()}
        self._needs_steps = [name for name in NEED_STEPS if getattr(local, name)]
        self.gradients = Gradients(
            flat.sites, center_P, prox_mu=local.prox_mu, clip_norm=local.clip_norm, clip_value=local.clip_value
        )
        self._sites = flat.sites
        self._refuse_unkept_parameters()
        if self._needs_steps:
            self._refuse_what_settings_would_miss(flat)
        self._stepping: list[Optimizer] = []  # optimisers whose steps are under way, each inside the one before
        self._strangers: weakref.WeakSet[Optimizer] = (
            weakref.WeakSet()
        )  # optimisers with a state that the task has not returned
        self._has_stepped = False
        self._skipped = False  # a gradient was not finite: a GradScaler skips that step

    def _refuse_unkept_parameters(self) -> None:
        """Raise ConfigError for a trained parameter outside the model, such as one of a loss that the task holds on `self`."""
        if type(self._task).state_dict is not Task.state_dict:
            return
        of_model = {id(p) for p in self._model.parameters()}
        for optimizer in self._optimizers.values():
            trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
            if any(id(p) not in of_model for p in trained):
                raise ConfigError(
                    "task",
                    f"{type(optimizer).__name__} trains a parameter that is no part of the model: it is not averaged, and a "
                    "restart would lose it",
                    "Return it as a part of model(); or keep it with `state_dict` and `load_state_dict`, and it stays with "
                    "each agent",
                )

    def _refuse_what_settings_would_miss(self, flat: FlatModel) -> None:
        """Raise ConfigError for an averaged parameter that no optimiser has: settings act on the steps of optimisers."""
        optimized = {id(p) for o in self._optimizers.values() for group in o.param_groups for p in group["params"]}
        names = {id(p): name for name, p in flat.model.named_parameters()}
        missed = [names.get(key, "a parameter") for key in self._travelling - optimized]
        if missed:
            raise ConfigError(
                f"local.{self._needs_steps[0]}",
                f"would miss {min(missed)}, which is averaged and which no optimiser of the task has",
                "Return every optimiser from the task's `optimizers`, or freeze the parameter (`requires_grad_(False)`)",
            )
        if self._local.control_variates is not None and len(self._optimizers) > 1:
            raise ConfigError(
                "local.control_variates",
                f"counts the steps of one optimiser, and the task has {len(self._optimizers)}",
                "Leave it out, or train with one optimiser",
            )

    # -- a period --------------------------------------------------------------------------------------------------------
    def period_begins(self, control: Control | None = None) -> None:
        """Count steps anew. `control`: the period's control variates, if the run has them."""
        self.gradients.steps = 0
        self.gradients.control = control
        if self._local.optimizer_state == "reset":
            self.forget()

    def period_ends(self, steps: int) -> None:
        """Check the period and advance schedules that count periods.

        Args:
            steps: of the period, as the task has told them.

        Raises:
            ConfigError: a setting had no effect, an unknown optimiser holds state, or a parameter was replaced.
        """
        if steps and self._needs_steps and not self._has_stepped and not self._skipped:
            raise ConfigError(
                f"local.{self._needs_steps[0]}",
                "has no effect: the task's `train` makes no step with the optimiser that it is given",
                "Have it call `optimizer.step()`, or leave the setting out",
            )
        self._refuse_strangers()
        if steps and self._local.schedule is not None and self._local.schedule.per == "period":
            for schedule in set(self._schedules.values()):  # optimisers with the same groups share one
                schedule.advance()
        self._insist_on_replaced()

    def _insist_on_replaced(self) -> None:
        """Raise ConfigError if training has replaced a parameter that gets gradients, and the optimiser steps the old one."""
        held = set().union(*map(_parameters, self._optimizers.values()))
        for name, (before, now) in self._replaced.items():
            if now.grad is not None and id(before) in held and id(now) not in held:
                raise ConfigError(
                    "task",
                    f"training has put another parameter in the place of the model's {name}, which gets gradients, and the "
                    "optimiser steps the one before: it is not trained",
                    f"Write into it: `with torch.no_grad(): {name}.copy_(…)`",
                )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Apply the settings to every optimiser step inside the `with` block."""
        self._stepping = []
        self._skipped = False
        hooks = [register_optimizer_step_pre_hook(self._before), register_optimizer_step_post_hook(self._after)]
        if self._needs_steps and not self._has_stepped:
            parameters: Any = [p for p in self._model.parameters() if p.requires_grad]
            hooks += [p.register_post_accumulate_grad_hook(self._look) for p in parameters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _look(self, parameter: Tensor) -> None:
        """Note a gradient that is not finite, until the first step."""
        grad = parameter.grad
        if not self._has_stepped and not self._skipped and grad is not None:
            values = grad.coalesce().values() if grad.is_sparse else grad
            self._skipped = not bool(torch.isfinite(values).all())

    @property
    def _travelling(self) -> set[int]:
        """Return the ids of the parameters that are averaged."""
        return {id(site.parameter) for site in self._sites}

    @property
    def _is_inside(self) -> bool:
        """Return whether a returned optimiser is in its step: a wrapper steps others, a subclass steps twice."""
        return any(id(optimizer) in self._known for optimizer in self._stepping)

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        is_known, inside = id(optimizer) in self._known, self._is_inside
        self._stepping.append(optimizer)
        if is_known and not inside:
            self._has_stepped = True
            self.gradients.before_step(optimizer, args, kwargs)
        elif not inside and self._needs_steps and self._travelling & _parameters(optimizer):
            raise ConfigError(
                f"local.{self._needs_steps[0]}",
                f"would miss a step of {type(optimizer).__name__}, an optimiser that the task keeps to itself",
                "Return every optimiser from the task's `optimizers`, or leave the setting out",
            )

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._stepping.pop()
        if id(optimizer) not in self._known:
            is_own = any(optimizer.state is known.state for known in self._optimizers.values())
            if optimizer.state and not is_own:
                self._strangers.add(optimizer)
        elif not self._is_inside and self._local.schedule is not None and self._local.schedule.per == "step":
            next(s for n, s in self._schedules.items() if self._optimizers[n] is optimizer).advance()

    def _refuse_strangers(self) -> None:
        """Raise ConfigError for an optimiser that the task did not return: a restart would lose its state."""
        if not self._strangers or type(self._task).state_dict is not Task.state_dict:
            return
        gc.collect()  # removes optimisers that were made for this period alone
        of_model = {id(p) for p in self._model.parameters()}
        lost = [type(optimizer).__name__ for optimizer in self._strangers if of_model & _parameters(optimizer)]
        if lost:
            raise ConfigError(
                "task",
                f"`train` steps an optimiser that the task keeps to itself ({lost[0]}): a restart would lose its state",
                "Return every optimiser from `optimizers`, or keep what it holds with `state_dict` and `load_state_dict`",
            )

    # -- from one period to the next -------------------------------------------------------------------------------------
    @property
    def advice(self) -> list[str]:
        """Return advice on optimisers that rarely suit runs of several agents."""
        if self._local.optimizer_state == "reset" or not any(isinstance(o, LBFGS) for o in self._optimizers.values()):
            return []
        return [
            "local.optimizer_state: LBFGS keeps the curvature of the agent's own path, and every center moves it off that "
            "path, which diverges. Use `local: {optimizer_state: reset}`"
        ]

    def forget(self) -> None:
        """Give the optimisers the state of new ones. Their schedules go on."""
        task = copy.copy(self._task)  # the task may keep the new optimisers, or a scheduler for them
        _, fresh = optimizers_of(task, self._model, self._local)
        for name, optimizer in self._optimizers.items():
            optimizer.state.clear()
            optimizer.state.update(fresh[name].state)

    def kept(self) -> dict[str, Any]:
        """Return the state of optimisers and schedules, as nested plain values that share memory with them."""
        return {
            "optimizers": {name: state_of(optimizer) for name, optimizer in self._optimizers.items()},
            "schedules": {name: schedule.state_dict() for name, schedule in self._schedules.items()},
        }

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Restore optimisers and schedules to the last bit. Raises ValueError for the state of other optimisers."""
        if (names := sorted(kept["optimizers"])) != sorted(self._optimizers):
            raise ValueError(f"the state belongs to the optimisers {names}")
        for name, optimizer in self._optimizers.items():
            restore_state(optimizer, kept["optimizers"][name])
        for name, schedule in self._schedules.items():
            schedule.load_state_dict(kept["schedules"][name])


def _parameters(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def state_of(optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimiser's state to save, without group settings that cannot be saved, such as functions."""
    whole = optimizer.state_dict()
    if "param_groups" in whole:
        groups = [{k: v for k, v in group.items() if can_be_kept(v)} for group in whole["param_groups"]]
        whole = {**whole, "param_groups": groups}
    return {"kind": type(optimizer).__qualname__, **whole}


def restore_state(optimizer: Optimizer, kept: Mapping[str, Any]) -> None:
    """Restore an optimiser's state to the last bit. Group settings that were not saved stay as the task makes them.

    Raises:
        ValueError: the state belongs to an optimiser of another class, or has other groups.
    """
    whole = dict(kept)
    if (kind := whole.pop("kind", None)) != type(optimizer).__qualname__:
        raise ValueError(f"the state belongs to the optimiser {kind}")
    if "param_groups" in whole:
        groups = zip(optimizer.state_dict()["param_groups"], whole["param_groups"], strict=True)
        whole["param_groups"] = [{**own, **group} for own, group in groups]
    before = optimizer.state, optimizer.param_groups
    optimizer.load_state_dict(whole)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in whole.get("state", {}).items():
        if isinstance(index, int) and isinstance(values, dict):
            own = optimizer.state[parameters[index]]  # torch has cast the tensors to the dtype of the parameter
            optimizer.state[parameters[index]] = {name: _like(own[name], value) for name, value in values.items()}
    if type(optimizer).load_state_dict is Optimizer.load_state_dict:  # a method of its own shares objects as it needs
        _into(optimizer, *before)


def _into(optimizer: Optimizer, state: Any, groups: list[dict[str, Any]]) -> None:
    """Move the loaded state into the objects from before, which an optimiser around or inside this one may hold too."""
    for own, loaded in ((state, optimizer.state), *zip(groups, optimizer.param_groups, strict=True)):
        if own is not loaded:
            own.clear()
            own.update(loaded)
    optimizer.state, optimizer.param_groups = state, groups


def _like(loaded: Any, kept: Any) -> Any:
    """Return the saved value to the last bit, on the device of the loaded one."""
    if isinstance(kept, Tensor):
        return kept.to(loaded.device, copy=True)
    if isinstance(kept, list | tuple):
        return type(kept)(_like(a, b) for a, b in zip(loaded, kept, strict=True))
    if isinstance(kept, dict):
        return {key: _like(loaded[key], value) for key, value in kept.items()}
    return kept
