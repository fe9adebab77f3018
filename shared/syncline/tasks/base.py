"""What a task is: the user's model, data and loss. Knows no bus, no run and no agent; loads code from this disk only.

A task is one small class, `syncline.tasks.digits` is one. Beside it: finding the class that a run names (`load_task`), the
order in which an agent sees its rows (`batches`), held-out metrics (`evaluate`), and the gradient over all rows.
"""

from __future__ import annotations

import abc
import difflib
import functools
import importlib
import importlib.util
import inspect
import math
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

import _syncline_task
from syncline.data.partition import Part
from syncline.errors import ConfigError
from syncline.local.duration import steps_in_pass
from syncline.tasks.seeding import seed_all
from syncline.wire.allow_list import is_allowed, is_file

_READY_MADE = "syncline.tasks"
_NO_HELD_OUT = "Return rows where `part.held_out`, or evaluate nothing: `evaluate: {center: false, agents: false}`"
_NOT_TASKS = ("base", "classification", "optimizers", "seeding", "sources")  # modules there that hold none


class Task(abc.ABC):
    """Subclass it and write `model`, `dataset` and `loss`; the rest has defaults.

    A batch is what `collate` makes of rows of the data set, on the agent's device.
    """

    local: Sequence[str] = ()  # name patterns of tensors that stay with the agent, as "*.running_mean"
    shared: Sequence[str] = ()  # of frozen tensors that the task updates itself and that are averaged, as "teacher.*"

    @abc.abstractmethod
    def model(self) -> nn.Module:
        """A new model. The caller has seeded torch, `random` and `numpy.random`, so that every machine makes the same one."""

    @abc.abstractmethod
    def dataset(self, part: Part) -> Dataset[Any]:
        """The common test set if `part.held_out`, else this agent's rows: `part.rows(len(labels), label=labels)` of all.

        Asked again with another part when the roster grows: read files once, in a `functools.cached_property`. Torch, `random`
        and `numpy.random` are seeded with the run's seed alone before each call, so a random split is the same in all of them.
        """

    @abc.abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The scalar to minimise, a mean over the rows of the batch."""

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, float]:
        """Means over the rows of the batch. Called without gradients, the model in evaluation mode."""
        return {"loss": float(self.loss(model, batch))}

    def evaluate(self, model: nn.Module, dataset: Any) -> dict[str, float] | None:
        """Metrics over the whole held-out set, in the place of `metrics`: those that are no means over batches, as AUC.

        `dataset`: what `dataset` returned for the held-out part. Called as `metrics` is. None: the means of `metrics`.
        """
        return None

    def collate(self, rows: list[Any]) -> Any:
        """Make one batch of rows. Override it for rows that torch's `default_collate` cannot stack: sequences, graphs, objects.

        `rows`: what the data set gives for the rows, `dataset[i]` each, or what its `__getitems__` returns for all of them.
        """
        return default_collate(rows)

    def optimizer(self, params: Any) -> torch.optim.Optimizer | None:
        """The agent's optimiser. None: the one of the run's settings.

        `params`: a list of the trainable parameters; `params.named()` are the same with their names.
        """
        return None

    def optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        """Several optimisers by name, where one is not enough. `train` is given this dict then."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What the task changes as it trains, beside the model and its optimisers: kept on the agent's disk.

        Numbers, strings, tensors and arrays, in lists, tuples and dicts.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave, after a restart; `optimizer` or `optimizers` was called before."""
        raise NotImplementedError

    def train(
        self, model: nn.Module, optimizer: Any, batches: Iterator[Any], on_step: Callable[[int], bool]
    ) -> float | None:
        """One local period: a step for each batch. Override it for full control.

        `optimizer` is the optimiser, or the dict of them where `optimizers` made it. Call `on_step(rows)` after every batch,
        and stop when it returns False. Returns the mean loss, or None.
        """
        model.train()
        total, steps = torch.zeros(()), 0
        optimizers = list(optimizer.values()) if isinstance(optimizer, dict) else [optimizer]
        for batch in batches:
            for each in optimizers:
                each.zero_grad(set_to_none=True)
            loss = checked_loss(self.loss(model, batch))
            loss.backward()
            for each in optimizers:
                each.step()
            total, steps = total.to(loss.device) + loss.detach(), steps + 1
            if not on_step(batch_rows(batch)):
                break
        return float(total) / steps if steps else None


# -- finding the class ------------------------------------------------------------------------------------------------


def load_task(
    path: str,
    options: Mapping[str, Any],
    allowed: Sequence[str],
    base_dir: Path,
    *,
    asker: str = "agent",
    seed: int = 0,
    enter: Callable[[Path], object] = lambda directory: None,
) -> Task:
    """Load the task at `package.module:Class`, or at `file.py:Class` relative to `base_dir`, and make it with `options`.

    Nothing is imported before the allow-list (patterns of the whole path or of its module or file) has let it pass. The
    task's directory becomes the last entry of `sys.path`: that of its file; for a module that is not installed, `base_dir`.

    Args:
        asker: the service that has the allow-list.
        seed: the run's; for what the code draws while it is loaded, and in `__init__`.
        enter: called with the task's directory (`base_dir` for every module) before any of the task's code runs. A process
            of the task's own makes it the working directory, so that relative paths mean the same on every machine.

    Raises:
        ConfigError: the task is not allowed, not there, no task, or its own code fails.
    """
    module_path, _, name = path.rpartition(":")
    if not module_path or not name.isidentifier():
        raise ConfigError("task", f"{path!r} names no class", "Write `package.module:Class` or `file.py:Class`")
    if not is_allowed(path, allowed):
        raise ConfigError(
            "task",
            f"{path!r} is not on this {asker}'s allow-list ({', '.join(allowed) or 'which is empty'})",
            f"If you trust it, start the {asker} with `--allow-task '{path}'`",
        )
    seed_all(seed)
    if is_file(module_path):
        file = _checked_file(path, base_dir / module_path)
        enter(file.parent)
        module = _load_file(path, file)
    else:
        directory = base_dir.resolve()
        enter(directory)
        module = _load_module(path, module_path, directory)
    task_class = _find_class(path, module, name)
    seed_all(seed)  # again: a module that is imported already has drawn nothing now
    return _make(path, task_class, options)


def _load_module(path: str, module_path: str, directory: Path) -> ModuleType:
    root = module_path.partition(".")[0]
    try:
        if importlib.util.find_spec(root) is None:
            _make_importable(directory)
        return importlib.import_module(module_path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_path}.".startswith(f"{error.name}."):
            raise _broken(path, error, directory) from error  # the module is there; one that it imports is not
    except Exception as error:  # whatever the user's code raises
        raise _broken(path, error, directory) from error
    ready_made = {name: f"{_READY_MADE}.{name}" for name in _ready_made()}
    near = difflib.get_close_matches(module_path.rpartition(".")[2], ready_made, n=1)
    hint = f"Did you mean `{ready_made[near[0]]}`?" if near else f"Ready-made ones: {', '.join(ready_made.values())}"
    raise ConfigError("task", f"{path!r}: there is no module {module_path!r} on this machine", hint)


def _checked_file(path: str, file: Path) -> Path:
    """Return the file without symbolic links. Raises ConfigError where there is none."""
    file = file.resolve()
    if not file.is_file():
        raise ConfigError("task", f"{path!r}: there is no file {file}", "Put it there, or correct the path")
    if file.suffix != ".py":
        raise ConfigError("task", f"{path!r}: {file} is no Python file", "Name a file that ends in .py")
    return file


def _load_file(path: str, file: Path) -> ModuleType:
    _make_importable(file.parent)
    name = _syncline_task.module_name(file)
    sys.modules.pop(name, None)  # the file may have changed since
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever the user's code raises
        raise _broken(path, error, file.parent) from error


def _make_importable(directory: Path) -> None:
    """Put the directory last on `sys.path`: a file there shadows neither the standard library nor an installed package."""
    if str(directory) not in sys.path:
        sys.path.append(str(directory))
    importlib.invalidate_caches()  # its files may be new


def _broken(path: str, error: Exception, directory: Path) -> ConfigError:
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == _syncline_task.__name__:
        hint = "Write `import helper` for the file helper.py beside it"
        return ConfigError("task", f"{path!r} has a relative import, and a task file belongs to no package", hint)
    if isinstance(error, ModuleNotFoundError):
        problem = f"{path!r} needs the module {error.name!r}, which is neither installed here nor in {directory}"
        return ConfigError("task", problem, "Install it, or put it there, for the coordinator and every agent")
    problem = f"{path!r} cannot be loaded: {type(error).__name__}: {error}"
    return ConfigError("task", problem, "Correct the task's code")


def _find_class(path: str, module: ModuleType, name: str) -> type[Task]:
    """The class, checked to be a task. One that is not derived from Task gets its defaults."""
    classes = [n for n, c in vars(module).items() if isinstance(c, type) and c.__module__ == module.__name__]
    found = getattr(module, name, None)
    if not isinstance(found, type):
        problem = "there is no such class" if found is None else f"{name} is a {type(found).__name__}, not a class"
        hint = _suggestion(name, classes) or f"Classes there: {', '.join(classes) or 'none'}"
        raise ConfigError("task", f"{path!r}: {problem}", hint)
    required = sorted(Task.__abstractmethods__)
    missing = [n for n in required if n in getattr(found, "__abstractmethods__", ()) or not hasattr(found, n)]
    if missing:
        missing_text = ", ".join(f"{n}()" for n in missing)
        raise ConfigError(
            "task", f"{path!r} is no task: it lacks {missing_text}", "Derive it from syncline.tasks.base.Task"
        )
    if issubclass(found, Task):
        return found
    return _with_defaults(cast(Any, found))


@functools.cache
def _with_defaults(plain: Any) -> type[Task]:
    """Derive a class from the user's and from Task. Pickles name the user's class, the only one that a module has."""

    def reduce(task: Any) -> tuple[Any, ...]:
        return _new_with_defaults, (plain,), task.__getstate__()

    return cast(type[Task], type(plain.__name__, (plain, Task), {"__module__": plain.__module__, "__reduce__": reduce}))


def _new_with_defaults(plain: type) -> Task:
    return object.__new__(_with_defaults(plain))


def _make(path: str, task_class: type[Task], options: Mapping[str, Any]) -> Task:
    parameters = inspect.signature(task_class).parameters
    known = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    has_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in options:
        if name not in known and not has_any:
            hint = _suggestion(name, known) or (f"Known here: {', '.join(known)}" if known else "It takes none")
            raise ConfigError(f"task_options.{name}", f"{path!r} has no such option", hint)
    try:
        return task_class(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError("task_options", f"{path!r} does not accept {dict(options)}: {error}", "Mend them") from error


def _ready_made() -> list[str]:
    package = importlib.import_module(_READY_MADE)
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in _NOT_TASKS)


def _suggestion(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean `{near[0]}`?" if near else ""


# -- a model, and data, by the run's seed -----------------------------------------------------------------------------


def make_model(task: Task, seed: int) -> nn.Module:
    """Return a new model, with random values of this seed alone."""
    seed_all(seed)
    return task.model()


def make_dataset(task: Task, part: Part) -> Dataset[Any]:
    """Return the data of a part. What `dataset` draws is the same in every call of a run, whatever the part.

    So a split that a task makes at random is the same one for its agents and for the held-out set.
    """
    seed_all(part.seed)
    try:
        return task.dataset(part)
    except Exception as error:  # whatever the user's code raises
        if part.held_out:
            error.add_note(f"It was asked for the held-out set. {_NO_HELD_OUT}")
        raise


def make_held_out(task: Task, seed: int) -> Dataset[Any]:
    """Return the common held-out set. Raises ConfigError where there is none, or no row in it."""
    dataset = make_dataset(task, Part.test(seed))
    if dataset is None or _rows(dataset) == 0:
        what = "None" if dataset is None else f"{type(dataset).__name__} without a row"
        raise ConfigError("task", f"dataset() returned {what} for the held-out set", _NO_HELD_OUT)
    return dataset


# -- batches ----------------------------------------------------------------------------------------------------------


def batches(
    dataset: Dataset[Any],
    batch_size: int | Literal["all"],
    seed: int,
    part_index: int,
    first_step: int,
    task: Task | None = None,
) -> Iterator[Any]:
    """Batches of global steps `first_step`, `first_step` + 1, … without end; each a pure function of (seed, part, step).

    `task`: the one that collates them; None: torch's `default_collate` does.

    So an agent that starts again, or joins late, sees what it would have seen. Every epoch is a new permutation of the rows;
    its last batch may be short, or have one row more (`steps_in_pass`). `all`: the whole data set in its own order, each step.
    """
    rows = rows_of_part(dataset, part_index)
    size = rows if batch_size == "all" else batch_size
    steps_per_epoch = steps_in_pass(rows, size)
    order, ordered_epoch = np.arange(rows), -1
    step = first_step
    while True:
        epoch, k = divmod(step, steps_per_epoch)
        if batch_size != "all" and epoch != ordered_epoch:
            words = np.random.SeedSequence((seed, part_index, epoch))
            order, ordered_epoch = np.random.default_rng(words).permutation(rows), epoch
        yield _collate(dataset, order[_batch(k, rows, size)], task)
        step += 1


def _batch(k: int, rows: int, size: int) -> slice:
    """Where batch k of a pass lies."""
    return slice(k * size, rows if k + 1 == steps_in_pass(rows, size) else (k + 1) * size)


def to_device(batch: Any, device: torch.device | str) -> Any:
    """The batch with its tensors on the device: tuples, lists and dicts are followed, an object that has `to(device)` is
    asked, as those of graph and text libraries have, and anything else stays as it is."""
    if callable(move := getattr(batch, "to", None)):
        return move(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def batch_rows(batch: Any) -> int:
    """Rows of a batch: the length of its first tensor that has one."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 0
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((rows for value in values if (rows := batch_rows(value))), 0)


def evaluate(
    task: Task,
    model: nn.Module,
    dataset: Dataset[Any],
    batch_size: int,
    device: torch.device | str,
    on_batch: Callable[[], None] = lambda: None,
    skipped: Counter[str] | None = None,
) -> dict[str, float]:
    """Return the task's metrics over all rows, from its `evaluate` if it has one. Leaves the model as it was.

    Args:
        on_batch: called after each batch, or each call of the model by the task's own `evaluate`: a sign of progress.
        skipped: counts the batches that were left out of a metric's mean, by the metric's name.
    """
    with _in_evaluation(model):
        if _is_own(task, "evaluate"):
            progress = model.register_forward_hook(lambda *_: on_batch())
            try:
                with _gradients_explained("evaluate"):
                    metrics = task.evaluate(model, dataset)
            finally:
                progress.remove()
            if metrics is not None:
                return _checked(metrics, "evaluate")
        return _means(task, model, dataset, batch_size, device, on_batch, Counter() if skipped is None else skipped)


def _means(
    task: Task,
    model: nn.Module,
    dataset: Dataset[Any],
    batch_size: int,
    device: torch.device | str,
    on_batch: Callable[[], None],
    skipped: Counter[str],
) -> dict[str, float]:
    """Return the means of the batches' metrics, weighted by their rows, over the batches in which a metric is no NaN.

    A metric that is NaN in all of them, or infinite in one, stays so.
    """
    rows, sums, counted = _rows(dataset), dict[str, float](), Counter[str]()
    if not rows:
        raise ConfigError("task", "there is no held-out row to evaluate", "Return some where `part.held_out`")
    for start in range(0, rows, batch_size):
        chosen = np.arange(start, min(start + batch_size, rows))
        batch = to_device(_collate(dataset, chosen, task), device)
        with _gradients_explained("metrics"):
            metrics = task.metrics(model, batch)
        for name, value in _checked(metrics, "metrics").items():
            before = sums.setdefault(name, 0.0)
            if math.isnan(value):
                skipped[name] += 1
            else:
                sums[name], counted[name] = before + value * len(chosen), counted[name] + len(chosen)
        on_batch()
    return {name: total / counted[name] if counted[name] else math.nan for name, total in sums.items()}


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, without gradients, and every module back into its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _gradients_explained(hook: str) -> Iterator[None]:
    """Turn torch's complaint that there is no gradient into one that says why. Raises ConfigError."""
    try:
        yield
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        problem = f"`{hook}` needs gradients, and is called without them: {error}"
        hint = f"Put `with torch.enable_grad():` around the lines that need them, in `{hook}` or in `loss`"
        raise ConfigError("task", problem, hint) from error


def as_number(value: Any, what: str, hint: str) -> float:
    """One number that the task gave: also a tensor of one element. Raises ConfigError for anything else."""
    try:
        if not isinstance(value, str | bytes):
            return float(value.detach() if isinstance(value, Tensor) else value)
    except Exception:  # whatever its class raises
        pass
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    raise ConfigError("task", f"{what} a {type(value).__name__}{shape}", hint)


def checked_loss(loss: Any) -> Tensor:
    """What `loss` returned. Raises ConfigError."""
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss
    what = f"tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise ConfigError(
        "task", f"`loss` returned a {what}", "Return a tensor of one element: a mean over the rows of the batch"
    )


def _checked(metrics: Any, hook: str) -> dict[str, float]:
    """Return what `metrics` or `evaluate` has returned, as numbers by name. Raises ConfigError."""
    hint = "Return numbers by name, as {'loss': loss.item()}"
    if not isinstance(metrics, Mapping):
        raise ConfigError("task", f"`{hook}` returned a {type(metrics).__name__}", hint)
    for name in metrics:
        if not isinstance(name, str) or not name.isprintable():
            raise ConfigError("task", f"`{hook}` returned a metric by the name of {name!r}", hint)
    return {name: as_number(value, f"`{hook}` returned for {name!r}", hint) for name, value in metrics.items()}


def whole_gradient(
    task: Task,
    model: nn.Module,
    dataset: Dataset[Any],
    batch_size: int,
    device: torch.device | str,
    on_batch: Callable[[], None] = lambda: None,
) -> None:
    """Leaves the gradient of the loss over all rows in `.grad`, the model in training mode, and its tensors as they were."""
    rows = _rows(dataset)
    before = [buffer.clone() for buffer in model.buffers()]
    model.zero_grad(set_to_none=True)
    model.train()
    for k in range(steps_in_pass(rows, batch_size)):
        chosen = np.arange(rows)[_batch(k, rows, batch_size)]
        loss = checked_loss(task.loss(model, to_device(_collate(dataset, chosen, task), device)))
        (loss * (len(chosen) / rows)).backward()
        on_batch()
    with torch.no_grad():
        for buffer, was in zip(model.buffers(), before, strict=True):
            buffer.copy_(was)


def rows_of_part(dataset: Dataset[Any], number: int) -> int:
    """Rows to train on. Raises ConfigError where there is none, or nobody can tell."""
    rows = _rows(dataset)
    if rows == 0:
        raise ConfigError("task", f"dataset() returned no rows for part {number}", "Give every part a row at least")
    return rows


def _rows(dataset: Dataset[Any]) -> int:
    """Return the number of rows. Raises ConfigError for anything that does not give rows by number."""
    kind, hint = type(dataset).__name__, "Return a map-style data set: one with len() and [row], which a list has too"
    if isinstance(dataset, IterableDataset):
        problem = f"dataset() returned {kind}, an IterableDataset, which gives no row by its number"
        raise ConfigError("task", problem, f"{hint}. `list(stream)` makes one of a stream that fits into memory")
    if isinstance(dataset, DataLoader):
        hint = (
            "Return the data set itself. `local.batch_size` says how many rows a batch has, `collate` how one is made"
        )
        raise ConfigError("task", f"dataset() returned {kind}, a data loader, which makes batches of its own", hint)
    abstract = getattr(type(dataset), "__getitem__", None) in (None, Dataset.__getitem__)
    if abstract or not hasattr(dataset, "__len__"):
        raise ConfigError("task", f"dataset() returned {kind}, which has no len() and [row]", hint)
    return len(dataset)


def _is_own(task: Task, hook: str) -> bool:
    """Tell whether the task has this hook, or its default only."""
    return getattr(getattr(task, hook), "__func__", None) is not getattr(Task, hook)


def _collate(dataset: Dataset[Any], numbers: NDArray[np.int64], task: Task | None) -> Any:
    """Return the rows of these numbers as one batch. Raises ConfigError for rows that need the task's own `collate`.

    A TensorDataset, or a Subset of one, is indexed at once: far faster than row by row.
    """
    own = task is not None and _is_own(task, "collate")
    source = dataset
    while type(source) is Subset:  # a class derived from it may do more than choose rows
        chosen = source
        source, numbers = chosen.dataset, np.array([chosen.indices[row] for row in numbers])
    if type(source) is TensorDataset and not own:
        index = torch.from_numpy(numbers)
        return tuple(tensor[index] for tensor in source.tensors)
    if hasattr(source, "__getitems__"):
        rows = source.__getitems__(numbers.tolist())
    else:
        rows = [source[number] for number in numbers.tolist()]
    if task is not None and own:
        return task.collate(rows)
    if not isinstance(rows, list):
        return rows  # of a data set whose `__getitems__` makes the batch
    try:
        return default_collate(rows)
    except Exception as error:  # whatever torch raises for rows that it cannot stack
        problem = f"the rows of dataset() ({type(dataset).__name__}) do not collate to a batch: {error}"
        hint = "Write `collate(rows)` in the task: it pads rows of several lengths, or returns any object that `loss` takes"
        raise ConfigError("task", problem, hint) from error
