"""Torch's optimisers and learning-rate schedules by name. Arguments that torch refuses raise an error with the setting."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from syncline.errors import ConfigError
from syncline.spec.sections import Local, Schedule
from syncline.tasks.base import Task

T = TypeVar("T")

COMPILED = "_orig_mod."  # inserted into parameter names by `torch.compile`
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
    SCHEDULES.pop(_needs_code, None)  # their arguments are functions, schedules or metrics, which settings cannot hold
SCHEDULES["cosine"] = SCHEDULES["cosineannealing"]


class Rate:
    """The learning rate of one optimiser: a linear warm-up, then a schedule.

    Value k of the W values of the warm-up is (k + 1) / (W + 1) of the schedule's first rate, for each group, as with torch's
    SequentialLR of LinearLR and the schedule. The schedule begins after these W values.
    """

    def __init__(self, optimizer: Optimizer, schedule: LRScheduler, warmup: int) -> None:
        self._optimizer, self._schedule, self._warmup = optimizer, schedule, warmup
        self._advanced = 0
        self._first = [float(group["lr"]) for group in optimizer.param_groups]  # the schedule's first rates
        if warmup:
            self._warm_up()

    def advance(self) -> None:
        """Go on by one step or period. A schedule with an end (OneCycleLR) stays at its last rate."""
        self._advanced += 1
        if self._advanced <= self._warmup:
            self._warm_up()
            return
        schedule = self._schedule
        if schedule.last_epoch < getattr(schedule, "total_steps", schedule.last_epoch + 1):
            with warnings.catch_warnings():  # torch warns if a schedule steps before its optimiser
                warnings.simplefilter("ignore", UserWarning)
                schedule.step()

    def state_dict(self) -> dict[str, Any]:
        return {"advanced": self._advanced, "first": self._first, "schedule": self._schedule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._advanced, self._first = state["advanced"], state["first"]
        self._schedule.load_state_dict(state["schedule"])

    def _warm_up(self) -> None:
        share = (self._advanced + 1) / (self._warmup + 1)
        for group, first in zip(
            self._optimizer.param_groups, self._first, strict=False
        ):  # groups may have been added later
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(first * share)
            else:
                group["lr"] = first if self._advanced == self._warmup else first * share


class Parameters(list[nn.Parameter]):
    """The trainable parameters of a model, with access to their names."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._named = list(named)
        super().__init__(parameter for _, parameter in self._named)

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """Return names and parameters, as `Module.named_parameters` does."""
        return list(self._named)


Given = Optimizer | dict[str, Optimizer]  # the argument `optimizer` of a task's `train`


def inner_of(task: Task, model: nn.Module, local: Local) -> tuple[Given, dict[str, Optimizer], dict[str, Rate]]:
    """Return the results of `optimizers_of`, and the learning rates by the same names.

    Optimisers that share a parameter group, as a wrapper and its inner one do, share one rate: two schedules would act on
    the same number.

    Raises:
        ConfigError: the task returned no optimiser, or torch refuses a setting.
    """
    given, by_name = optimizers_of(task, model, local)
    rates: dict[str, Rate] = {}
    of_group: dict[int, Rate] = {}
    setting = local.schedule
    if setting is None:
        return given, by_name, rates
    for name, made in by_name.items():
        groups = [id(group) for group in made.param_groups]
        rate = next((of_group[group] for group in groups if group in of_group), None)
        rates[name] = _rate(setting, made) if rate is None else rate
        of_group.update(dict.fromkeys(groups, rates[name]))
    return given, by_name, rates


def optimizers_of(task: Task, model: nn.Module, local: Local) -> tuple[Given, dict[str, Optimizer]]:
    """Return the inner optimisers of an agent: as the task's `train` receives them, and by name.

    They are those of the task's `optimizers`. If it returns none, they are one optimiser with the name "": of the task's
    `optimizer`, or else of the settings.

    Raises:
        ConfigError: the task returned no optimiser, or torch refuses a setting.
    """
    made: Any = task.optimizers(model)
    hint = "Return optimisers by name, as {'generator': …, 'discriminator': …}"
    if not isinstance(made, dict):
        raise ConfigError("task", f"`optimizers` returned a {type(made).__name__}", hint)
    for name, optimizer in made.items():
        if not isinstance(name, str) or not name or not isinstance(optimizer, Optimizer):
            raise ConfigError("task", f"`optimizers` returned a {type(optimizer).__name__} for {name!r}", hint)
    given: Any = made
    if not made:
        named = ((name.replace(COMPILED, ""), p) for name, p in model.named_parameters())
        parameters = Parameters((name, p) for name, p in named if p.requires_grad)
        given = task.optimizer(parameters)
        given = _optimizer(local, parameters) if given is None else given
        if not isinstance(given, Optimizer):
            problem = f"`optimizer` returned a {type(given).__name__}"
            raise ConfigError("task", problem, "Return one optimiser; several are returned by `optimizers`, by name")
    return given, dict(made) if made else {"": given}


def check_inner(task: Task, model: nn.Module, local: Local) -> None:
    """Check the settings of optimiser and schedule before a run is accepted.

    The optimiser makes two steps on parameters of one element each, so that no state of the model's size is allocated. A
    task's own optimiser is checked by the agents.

    Raises:
        ConfigError: torch refuses a setting, at once or in the first steps.
    """
    if type(task).optimizer is Task.optimizer and type(task).optimizers is Task.optimizers:
        parameters = [p for p in model.parameters() if p.requires_grad]
        _optimizer(local, parameters)
        stand_ins = [nn.Parameter(p.new_zeros([min(1, size) for size in p.shape])) for p in parameters]
        optimizer = _optimizer(local, stand_ins, _stepped)
        if local.schedule is not None:
            _rate(local.schedule, optimizer, _advanced)


def _stepped(optimizer: Optimizer) -> Optimizer:
    """Make two steps with zero gradients; the second one uses the state of the first."""
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        p.grad = torch.zeros_like(p)
    with suppress(AssertionError):  # `capturable` asserts the kind of device, and an agent may have another one
        for _ in range(2):
            optimizer.step()
    return optimizer


def _advanced(schedule: LRScheduler) -> LRScheduler:
    """Make one step of the schedule, after one of its optimiser as torch requires."""
    with suppress(AssertionError):  # as in `_stepped`
        schedule.optimizer.step()
    schedule.step()
    return schedule


def _as_made(made: T) -> T:
    return made


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


def _rate(setting: Schedule, optimizer: Optimizer, tried: Callable[[LRScheduler], LRScheduler] = _as_made) -> Rate:
    kind = setting.kind.lower().replace("_", "").replace("-", "").removesuffix("lr")
    made = _known(SCHEDULES, "local.schedule.kind", kind, setting.kind)
    schedule = _made("local.schedule", made, lambda **kwargs: tried(made(optimizer, **kwargs)), setting.arguments)
    return Rate(optimizer, schedule, setting.warmup)


def _known(registry: Mapping[str, type[T]], setting: str, kind: str, written: str) -> type[T]:
    if kind in registry:
        return registry[kind]
    near = difflib.get_close_matches(kind, registry, n=1)
    hint = f"Did you mean `{near[0]}`?" if near else f"Use one of {', '.join(sorted(registry))}"
    raise ConfigError(setting, f"{written!r} is not known", hint)


def _made(section: str, kind: type[T], make: Callable[..., T], arguments: Mapping[str, Any]) -> T:
    """Return `make(**arguments)`.

    Raises:
        ConfigError: an argument is unknown, missing or refused; names its setting.
    """
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
            hint = f"Did you mean `{near[0]}`?" if near else f"Known here: {', '.join(parameters)}"
            raise ConfigError(f"{section}.{name}", f"torch's {kind.__name__} has no such argument", hint)
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in arguments:
            raise ConfigError(f"{section}.{name}", f"is missing: torch's {kind.__name__} needs it", "Add it")
    try:
        return make(**arguments)
    except Exception as error:  # whatever torch raises for a value
        culprit = next((n for n in arguments if _accepts(make, {k: v for k, v in arguments.items() if k != n})), "")
        setting, value = (f"{section}.{culprit}", arguments[culprit]) if culprit else (section, dict(arguments))
        problem = f"{value!r} is not accepted by torch's {kind.__name__}: {error}"
        raise ConfigError(setting, problem, "Correct it, or leave it out") from error


def _number_as_text(value: Any) -> str:
    """Return the first text that reads as a number, or "". Torch may refuse such a text late or never."""
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
