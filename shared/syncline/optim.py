"""The optimisers and schedules of torch, by name. Whatever torch would refuse is refused with the setting and the mend."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from syncline.errors import ConfigError
from syncline.spec import Local
from syncline.tasks.base import Task

T = TypeVar("T")

OPTIMIZERS: dict[str, type[Optimizer]] = {
    name.lower(): found
    for name, found in vars(torch.optim).items()
    if isinstance(found, type) and issubclass(found, Optimizer) and found is not Optimizer
}
OPTIMIZERS_OF_A_TASK = {
    "lbfgs": "computes its gradients anew in each step",
    "sparseadam": "takes sparse gradients alone",
}

SCHEDULES: dict[str, type[LRScheduler]] = {
    name.lower().removesuffix("lr"): found
    for name, found in vars(lr_scheduler).items()
    if isinstance(found, type) and issubclass(found, LRScheduler) and not name.startswith("_")
}
for _needs_code in ("lrscheduler", "lambda", "multiplicative", "chainedscheduler", "sequential", "reducelronplateau"):
    SCHEDULES.pop(_needs_code, None)  # functions, other schedules or a metric: nothing that settings can hold
SCHEDULES["cosine"] = SCHEDULES["cosineannealing"]


def inner_of(task: Task, model: nn.Module, local: Local) -> tuple[Optimizer, LRScheduler | None]:
    """The inner optimiser of an agent, its task's own or the one of the settings, and its schedule. Raises ConfigError."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = task.optimizer(parameters) or _optimizer(local, parameters)
    return optimizer, _schedule(local, optimizer)


def check_inner(task: Task, model: nn.Module, local: Local) -> None:
    """Raise ConfigError for settings that torch refuses, at once or in the first steps.

    The steps are made with stand-ins of one element for each parameter, so that no optimiser's state is allocated.
    A task's own optimiser is looked at where it trains.
    """
    if type(task).optimizer is Task.optimizer:
        parameters = [p for p in model.parameters() if p.requires_grad]
        _optimizer(local, parameters)
        stand_ins = [nn.Parameter(p.new_zeros([min(1, size) for size in p.shape])) for p in parameters]
        _schedule(local, _optimizer(local, stand_ins, _stepped), _advanced)


def _stepped(optimizer: Optimizer) -> Optimizer:
    """Make two steps with gradients of zero: the second one uses the state that the first one made."""
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        p.grad = torch.zeros_like(p)
    with suppress(AssertionError):  # about the device, as `capturable` asks: an agent may have another one
        for _ in range(2):
            optimizer.step()
    return optimizer


def _advanced(schedule: LRScheduler) -> LRScheduler:
    """Make one step of the schedule, and of its optimiser as torch wants it."""
    schedule.optimizer.step()
    schedule.step()
    return schedule


def _as_made(made: T) -> T:
    return made


def advance(schedule: LRScheduler) -> None:
    """One step or period of the schedule is over. One that has come to its end (OneCycleLR) stays there."""
    if schedule.last_epoch < getattr(schedule, "total_steps", schedule.last_epoch + 1):
        schedule.step()


def _optimizer(
    local: Local, parameters: Iterable[nn.Parameter], tried: Callable[[Optimizer], Optimizer] = _as_made
) -> Optimizer:
    setting = local.optimizer
    kind = setting.kind.lower()
    if kind in OPTIMIZERS_OF_A_TASK:
        raise ConfigError(
            "local.optimizer.kind",
            f"{setting.kind!r} {OPTIMIZERS_OF_A_TASK[kind]}",
            "Return it from the task's `optimizer`, with a `train` that suits it, or use another",
        )
    made = _known(OPTIMIZERS, "local.optimizer.kind", kind, setting.kind)
    parameters = list(parameters)
    return _made("local.optimizer", made, lambda **kwargs: tried(made(parameters, **kwargs)), setting.arguments)


def _schedule(
    local: Local, optimizer: Optimizer, tried: Callable[[LRScheduler], LRScheduler] = _as_made
) -> LRScheduler | None:
    setting = local.schedule
    if setting is None:
        return None
    kind = setting.kind.lower().replace("_", "").replace("-", "").removesuffix("lr")
    made = _known(SCHEDULES, "local.schedule.kind", kind, setting.kind)
    return _made("local.schedule", made, lambda **kwargs: tried(made(optimizer, **kwargs)), setting.arguments)


def _known(registry: Mapping[str, type[T]], setting: str, kind: str, written: str) -> type[T]:
    if kind in registry:
        return registry[kind]
    near = difflib.get_close_matches(kind, registry, n=1)
    mend = f"Did you mean `{near[0]}`?" if near else f"Use one of {', '.join(sorted(registry))}"
    raise ConfigError(setting, f"{written!r} is not known", mend)


def _made(section: str, kind: type[T], make: Callable[..., T], arguments: Mapping[str, Any]) -> T:
    """`make(**arguments)`, with what is wrong about the arguments told by the name of the setting."""
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(kind).parameters.items()
        if name not in ("params", "optimizer", "last_epoch")
    }
    for name, value in arguments.items():
        if name in parameters and (number := _number_as_text(value)):
            raise ConfigError(
                f"{section}.{name}", f"{number!r} is a text, not a number", f"Write {number} without quotes"
            )
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, n=1)
            mend = f"Did you mean `{near[0]}`?" if near else f"Known here: {', '.join(parameters)}"
            raise ConfigError(f"{section}.{name}", f"torch's {kind.__name__} has no such argument", mend)
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in arguments:
            raise ConfigError(f"{section}.{name}", f"is missing: torch's {kind.__name__} needs it", "Add it")
    try:
        return make(**arguments)
    except Exception as error:  # whatever torch raises for a value
        culprit = next((n for n in arguments if _accepts(make, {k: v for k, v in arguments.items() if k != n})), "")
        setting, value = (f"{section}.{culprit}", arguments[culprit]) if culprit else (section, dict(arguments))
        problem = f"{value!r} is not accepted by torch's {kind.__name__}: {error}"
        raise ConfigError(setting, problem, "Mend it, or leave it out") from error


def _number_as_text(value: Any) -> str:
    """Return the first text that reads as a number, or "". Torch refuses one at once, in a later period, or never."""
    for part in value if isinstance(value, tuple) else (value,):
        try:
            if isinstance(part, str) and float(part) is not None:
                return part
        except ValueError:
            pass
    return ""


def _accepts(make: Callable[..., T], arguments: Mapping[str, Any]) -> bool:
    try:
        make(**arguments)
    except Exception:
        return False
    return True
