"""The base class of tasks: a user's model, data and loss; `syncline.tasks.digits` is an example.

The module also loads the class that a run names (`load_task`, from the local disk only), makes batches of an agent's rows
(`batches`), and computes held-out metrics (`evaluate`) and the gradient over all rows (`whole_gradient`). It imports no bus.
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
_NOT_TASKS = ("base", "classification", "optimizers", "seeding", "sources")  # modules of the package without a task


class Task(abc.ABC):
    """A model, its data and its loss. A subclass defines `model`, `dataset` and `loss`; all other methods have defaults.

    A batch is the result of `collate` for some rows of the data set, moved to the agent's device.
    """

    # Name patterns of tensors that stay with the agent and are not averaged, as "*.running_mean".
    local: Sequence[str] = ()
    # Name patterns of frozen tensors that the task itself updates and that are averaged, as "teacher.*".
    shared: Sequence[str] = ()

    @abc.abstractmethod
    def model(self) -> nn.Module:
        """Return a new model.

        Torch, `random` and `numpy.random` are seeded before the call, so every machine makes the same initial model.
        """

    @abc.abstractmethod
    def dataset(self, part: Part) -> Dataset[Any]:
        """Return the common test set if `part.held_out`, else the agent's own rows.

        Use `part.rows(len(labels), label=labels)` to get the indices of the agent's rows. The method is called again with
        another part when the roster grows, so read files once, in a `functools.cached_property`. Torch, `random` and
        `numpy.random` are seeded with the run's seed before each call, so a random split is the same in all calls.
        """

    @abc.abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the scalar to minimise, a mean over the rows of the batch."""

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, float]:
        """Return metrics by name, each a mean over the rows of the batch.

        The method is called without gradients and with the model in evaluation mode.
        """
        return {"loss": float(self.loss(model, batch))}

    def evaluate(self, model: nn.Module, dataset: Any) -> dict[str, float] | None:
        """Return metrics over the whole held-out set, for metrics that are no means over batches, such as AUC.

        The method is called as `metrics` is.

        Args:
            model: the model.
            dataset: the data set that `dataset` returned for the held-out part.

        Returns:
            Metrics by name; None: use the means of `metrics` over the batches.
        """
        return None

    def collate(self, rows: list[Any]) -> Any:
        """Return a batch of the rows. Override it for rows that torch's `default_collate` cannot stack, such as sequences.

        Args:
            rows: `dataset[i]` for each row, or the result of the data set's `__getitems__` for all of them.
        """
        return default_collate(rows)

    def optimizer(self, params: Any) -> torch.optim.Optimizer | None:
        """Return the agent's optimiser, or None to use the one of the run's settings.

        Args:
            params: a list of the trainable parameters; `params.named()` returns them with their names.
        """
        return None

    def optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        """Return several optimisers by name, if the task needs more than one; `train` then receives this dict."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the task's own state, beside the model and the optimisers. The agent saves it to disk.

        Allowed are numbers, strings, tensors and arrays, in lists, tuples and dicts.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict` after a restart. `optimizer` or `optimizers` was called before."""
        raise NotImplementedError

    def train(
        self, model: nn.Module, optimizer: Any, batches: Iterator[Any], on_step: Callable[[int], bool]
    ) -> float | None:
        """Train for one local period, with one step for each batch. Override it for full control.

        Args:
            model: the agent's model.
            optimizer: the optimiser, or the dict that `optimizers` returned.
            batches: batches on the agent's device, without end.
            on_step: to be called with the rows of the batch after every step; stop when it returns False.

        Returns:
            The mean loss, or None.
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


# -- loading -----------------------------------------------------------------------------------------------------------


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
    """Load a class and make a task of it.

    No code is imported before the allow-list accepts the path. The task's directory becomes the last entry of `sys.path`: the
    directory of a task file, or `base_dir` for a module that is not installed.

    Args:
        path: `package.module:Class`, or `file.py:Class` relative to `base_dir`.
        options: keyword arguments of the class.
        allowed: patterns of whole paths, or of their modules or files.
        base_dir: the directory of task files.
        asker: the service that owns the allow-list, for the hint of an error.
        seed: the run's seed; random generators are seeded with it before the code is loaded and before `__init__`.
        enter: called with the task's directory (`base_dir` for a module) before any of the task's code runs. A process
            that runs only this task makes it the working directory, so that relative paths mean the same everywhere.

    Raises:
        ConfigError: the task is not allowed, does not exist, is no task, or its own code fails.
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
    seed_all(seed)  # again, because loading draws random numbers only at the first import
    return _make(path, task_class, options)


def _load_module(path: str, module_path: str, directory: Path) -> ModuleType:
    root = module_path.partition(".")[0]
    try:
        if importlib.util.find_spec(root) is None:
            _make_importable(directory)
        return importlib.import_module(module_path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_path}.".startswith(f"{error.name}."):
            raise _broken(path, error, directory) from error  # the module exists, but a module that it imports does not
    except Exception as error:  # whatever the user's code raises
        raise _broken(path, error, directory) from error
    ready_made = {name: f"{_READY_MADE}.{name}" for name in _ready_made()}
    near = difflib.get_close_matches(module_path.rpartition(".")[2], ready_made, n=1)
    hint = f"Did you mean `{ready_made[near[0]]}`?" if near else f"Ready-made ones: {', '.join(ready_made.values())}"
    raise ConfigError("task", f"{path!r}: there is no module {module_path!r} on this machine", hint)


def _checked_file(path: str, file: Path) -> Path:
    """Return the file with symbolic links resolved. Raises ConfigError if it does not exist or is no Python file."""
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
    importlib.invalidate_caches()  # files may have been added since the directory was read


def _broken(path: str, error: Exception, directory: Path) -> ConfigError:
    """Return the error for a task whose code raised `error` while it was loaded."""
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == _syncline_task.__name__:
        hint = "Write `import helper` for the file helper.py beside it"
        return ConfigError("task", f"{path!r} has a relative import, and a task file belongs to no package", hint)
    if isinstance(error, ModuleNotFoundError):
        problem = f"{path!r} needs the module {error.name!r}, which is neither installed here nor in {directory}"
        return ConfigError("task", problem, "Install it, or put it there, for the coordinator and every agent")
    problem = f"{path!r} cannot be loaded: {type(error).__name__}: {error}"
    return ConfigError("task", problem, "Correct the task's code")


def _find_class(path: str, module: ModuleType, name: str) -> type[Task]:
    """Return the class, checked to be a task. A class that is not derived from Task gets the defaults of Task."""
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
    """Derive a class from the user's class and from Task. Pickles refer to the user's class, which a module contains."""

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
        raise ConfigError(
            "task_options", f"{path!r} does not accept {dict(options)}: {error}", "Correct them"
        ) from error


def _ready_made() -> list[str]:
    package = importlib.import_module(_READY_MADE)
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in _NOT_TASKS)


def _suggestion(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean `{near[0]}`?" if near else ""


# -- model and data ---------------------------------------------------------------------------------------------------


def make_model(task: Task, seed: int) -> nn.Module:
    """Return a new model whose random values depend on the seed alone."""
    seed_all(seed)
    return task.model()


def make_dataset(task: Task, part: Part) -> Dataset[Any]:
    """Return the data of a part.

    The generators are seeded in the same way for every part, so a random split in `dataset` is the same for all agents and for
    the held-out set.
    """
    seed_all(part.seed)
    try:
        return task.dataset(part)
    except Exception as error:  # whatever the user's code raises
        if part.held_out:
            error.add_note(f"It was asked for the held-out set. {_NO_HELD_OUT}")
        raise


def make_held_out(task: Task, seed: int) -> Dataset[Any]:
    """Return the common held-out set. Raises ConfigError if the task has none or it is empty."""
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
    """Yield the batches of the global steps `first_step`, `first_step` + 1, … without end.

    Each batch is a pure function of (seed, part, step), so an agent that restarts or joins late sees the same batches as it
    would have seen otherwise. Every epoch is a new permutation of the rows; its last batch may be short, or have one row more
    (`steps_in_pass`).

    Args:
        dataset: the rows of the part.
        batch_size: rows of a batch; `all`: the whole data set in its own order, in each step.
        seed: the run's seed.
        part_index: the number of the part.
        first_step: the step of the first batch, counted from the start of the run.
        task: its `collate` makes the batches; None: torch's `default_collate` does.

    Raises:
        ConfigError: the data set is empty, or gives no rows by number.
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
    """Return the positions of batch k of a pass."""
    return slice(k * size, rows if k + 1 == steps_in_pass(rows, size) else (k + 1) * size)


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Return the batch with its tensors on the device.

    Tuples, lists and mappings are searched for tensors. An object with a method `to(device)`, as graph and text libraries have,
    is moved by it; any other object is returned unchanged.
    """
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
    """Return the rows of a batch: the length of its first tensor with a dimension; 0 without such a tensor."""
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
    """Return the task's metrics over all rows, from its own `evaluate` if it has one.

    Args:
        task: the task.
        model: its modules' training modes are restored afterwards.
        dataset: the held-out rows.
        batch_size: rows of a batch.
        device: the model's device.
        on_batch: called after each batch, or after each call of the model by the task's own `evaluate`, to show progress.
        skipped: counts by name the batches that were left out of a metric's mean because it was NaN.

    Raises:
        ConfigError: the task returned no numbers, or the data set has no rows.
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
    """Return the means of the batches' metrics, weighted by rows, without the batches in which a metric is NaN.

    A metric that is NaN in all batches is NaN; a metric that is infinite in one batch is infinite.
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
    """Put the model into evaluation mode without gradients; restore every module's own mode afterwards."""
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
    """Turn torch's error about a missing gradient into a ConfigError that names the cause."""
    try:
        yield
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        problem = f"`{hook}` needs gradients, and is called without them: {error}"
        hint = f"Put `with torch.enable_grad():` around the lines that need them, in `{hook}` or in `loss`"
        raise ConfigError("task", problem, hint) from error


def as_number(value: Any, what: str, hint: str) -> float:
    """Return a number, also from a tensor of one element.

    Args:
        value: a value that the task returned.
        what: beginning of the error's text, as "`loss` returned".
        hint: of the error.

    Raises:
        ConfigError: the value is no number.
    """
    try:
        if not isinstance(value, str | bytes):
            return float(value.detach() if isinstance(value, Tensor) else value)
    except Exception:  # whatever its class raises
        pass
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    raise ConfigError("task", f"{what} a {type(value).__name__}{shape}", hint)


def checked_loss(loss: Any) -> Tensor:
    """Return the result of `loss`. Raises ConfigError unless it is a tensor of one element."""
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss
    what = f"tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise ConfigError(
        "task", f"`loss` returned a {what}", "Return a tensor of one element: a mean over the rows of the batch"
    )


def _checked(metrics: Any, hook: str) -> dict[str, float]:
    """Return the result of `metrics` or `evaluate` as numbers by name. Raises ConfigError for anything else."""
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
    """Write the gradient of the mean loss over all rows to `.grad` of the parameters.

    The model's buffers are restored; its modules are left in training mode.

    Args:
        task: the task.
        model: receives the gradient.
        dataset: the rows.
        batch_size: rows of a batch, of which gradients are accumulated.
        device: the model's device.
        on_batch: called after each batch, to show progress.
    """
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
    """Return the number of rows of a part. Raises ConfigError if the data set is empty, or gives no rows by number."""
    rows = _rows(dataset)
    if rows == 0:
        raise ConfigError("task", f"dataset() returned no rows for part {number}", "Give every part a row at least")
    return rows


def _rows(dataset: Dataset[Any]) -> int:
    """Return the number of rows. Raises ConfigError for an object that does not give rows by number."""
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
    """Return whether the task overrides the default of a method."""
    return getattr(getattr(task, hook), "__func__", None) is not getattr(Task, hook)


def _collate(dataset: Dataset[Any], numbers: NDArray[np.int64], task: Task | None) -> Any:
    """Return the rows of these numbers as one batch. Raises ConfigError for rows that need the task's own `collate`.

    A TensorDataset, or a Subset of one, is indexed with all numbers at once, which is far faster than row by row.
    """
    own = task is not None and _is_own(task, "collate")
    source = dataset
    while type(source) is Subset:  # a derived class may do more than select rows
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
        return rows  # the data set's `__getitems__` returned a batch
    try:
        return default_collate(rows)
    except Exception as error:  # whatever torch raises for rows that it cannot stack
        problem = f"the rows of dataset() ({type(dataset).__name__}) do not collate to a batch: {error}"
        hint = "Write `collate(rows)` in the task: it pads rows of several lengths, or returns any object that `loss` takes"
        raise ConfigError("task", problem, hint) from error
