"""Loading and refusing tasks, the order of batches, evaluation. test_ready_made.py tests the ready-made tasks."""

from __future__ import annotations

import itertools
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from syncline.data.partition import Part
from syncline.errors import ConfigError
from syncline.spec.sections import Iid, Local
from syncline.tasks import DEFAULT_ALLOWED
from syncline.tasks.base import Task, batch_rows, batches, evaluate, load_task, to_device
from syncline.tasks.quadratic import LinearRegression
from syncline.wire.allow_list import check_patterns

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def own_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def load(path: str, allowed: tuple[str, ...] = DEFAULT_ALLOWED, base_dir: Path = HERE, **options: Any) -> Task:
    return load_task(path, options, allowed, base_dir)


def refused(path: str, allowed: tuple[str, ...] = DEFAULT_ALLOWED, base_dir: Path = HERE, **options: Any) -> str:
    with pytest.raises(ConfigError) as error:
        load_task(path, options, allowed, base_dir)
    return str(error.value)


# -- finding tasks ----------------------------------------------------------------------------------------------------

TASK = """
from dataclasses import dataclass
import torch
from syncline.tasks.base import Task

@dataclass
class Mine(Task):
    width: int = 2
    def model(self): return torch.nn.Linear(self.width, 1)
    def dataset(self, part): return torch.utils.data.TensorDataset(torch.ones(6, self.width)[part.rows(6)])
    def loss(self, model, batch): return model(batch[0]).square().mean()

class Duck:
    def model(self): return torch.nn.Linear(1, 1)
    def dataset(self, part): return torch.utils.data.TensorDataset(torch.ones(2, 1))
    def loss(self, model, batch): return model(batch[0]).mean()

class NoLoss(Task):
    def model(self): ...
    def dataset(self, part): ...

class Stranger: ...

class Picky(Mine):
    def __init__(self, **anything):
        if anything.get("depth", 1) < 1: raise ValueError("depth must be positive")

helper = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.py").write_text(TASK)
    return tmp_path


def test_a_task_that_is_not_allowed_is_refused_before_its_code_runs(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("open('/'.join(__file__.split('/')[:-1]) + '/ran', 'w').close()\nclass Evil: ...")
    assert refused("evil.py:Evil", base_dir=tmp_path) == (
        "task: 'evil.py:Evil' is not on this agent's allow-list (syncline.tasks.*). "
        "If you trust it, start the agent with `--allow-task 'evil.py:Evil'`"
    )
    assert not (tmp_path / "ran").exists()
    refused("evil.py:Evil", ("evil.py",), base_dir=tmp_path)  # allowed now, and no task
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        ("this:Zen", "syncline.tasks.*"),
        ("syncline.tasksy:Zen", "syncline.tasks.*"),
        ("syncline.tasks./../evil.py:Evil", "syncline.tasks.*"),  # a file dressed up as a module
        ("syncline.tasks.evil.py:Evil", "syncline.tasks.*"),
        ("tasks/../../evil.py:Evil", "tasks/*"),  # out of the folder
        ("tasks\\..\\..\\evil.py:Evil", "tasks\\*"),
        ("tasks/mine.py:Evil", "tasks/mine.py:Mine"),
        ("Tasks/mine.py:Mine", "tasks/*"),
        ("/elsewhere/mine.py:Mine", "*.py:*"),  # a relative pattern, and a file elsewhere
        ("/elsewhere/mine.py:Mine", "tasks/*.py"),
    ],
)
def test_the_allow_list_lets_through_only_what_it_means(path: str, pattern: str, folder: Path) -> None:
    assert "is not on this agent's allow-list" in refused(path, (pattern,), base_dir=folder)
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    ("patterns", "problem"),
    [
        (["x.py:*"] * 101, "101 patterns are more than 100"),
        (["/" + "d" * 220 + "/t.py:T"], "has 228 characters, at most 200"),
    ],
    ids=["many", "long"],
)
def test_an_allow_list_that_cannot_be_told_is_refused(patterns: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_patterns(patterns)


def test_an_empty_allow_list_refuses_everything() -> None:
    assert "allow-list (which is empty)" in refused("syncline.tasks.digits:Digits", ())


@pytest.mark.parametrize("pattern", ["tasks/mine.py:Mine", "tasks/mine.py", "tasks/*", "*.py", "tasks/*:M*", "*"])
def test_a_file_task_is_loaded_relative_to_the_folder_of_the_agent(pattern: str, folder: Path) -> None:
    task = load("tasks/mine.py:Mine", (pattern,), folder, width=3)
    assert next(task.model().parameters()).shape == (1, 3)
    assert len(task.dataset(Part(0, 2, Iid(), 0))) == 3  # type: ignore[arg-type]
    assert "mine" not in sys.modules


def test_a_class_that_is_not_derived_from_task_gets_its_defaults(folder: Path) -> None:
    task = load("tasks/mine.py:Duck", ("*",), folder)
    model = task.model()
    assert isinstance(task, Task) and task.local == () and task.optimizer(model.parameters()) is None
    assert list(evaluate(task, model, task.dataset(Part.test()), 2, "cpu")) == ["loss"]


@pytest.mark.parametrize("path", ["digits", ":Digits", "digits:", "digits:Digits()"])
def test_a_path_without_a_class_is_refused(path: str) -> None:
    assert refused(path, ("*",)) == f"task: {path!r} names no class. Write `package.module:Class` or `file.py:Class`"


def test_an_unknown_ready_made_task_is_refused_with_the_near_one() -> None:
    assert refused("syncline.tasks.digit:Digits") == (
        "task: 'syncline.tasks.digit:Digits': there is no module 'syncline.tasks.digit' on this machine. "
        "Did you mean `syncline.tasks.digits`?"
    )
    assert "Ready-made ones: syncline.tasks.digits, syncline.tasks.fashion_mnist, " in refused(
        "syncline.tasks.xyz:Digits"
    )
    assert "there is no module 'no_such_package.tasks'" in refused("no_such_package.tasks:T", ("*",))


def test_an_unknown_class_is_refused_with_the_near_one() -> None:
    assert refused("syncline.tasks.digits:Digit") == (
        "task: 'syncline.tasks.digits:Digit': there is no such class. Did you mean `Digits`?"
    )
    assert "Classes there: Noop, Vector" in refused("syncline.tasks.noop:Zzz").replace("Vector, Noop", "Noop, Vector")


def test_an_unknown_file_is_refused_with_the_place_where_it_was_looked_for(folder: Path) -> None:
    text = refused("tasks/other.py:Mine", ("tasks/*",), folder)
    assert f"there is no file {folder / 'tasks' / 'other.py'}" in text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("NoLoss", "is no task: it lacks loss(). Derive it from syncline.tasks.base.Task"),
        ("Stranger", "is no task: it lacks dataset(), loss(), model()"),
        ("helper", "helper is a int, not a class"),
        ("Task", "is no task: it lacks dataset(), loss(), model()"),
    ],
)
def test_what_is_no_task_is_refused_with_what_it_lacks(name: str, text: str, folder: Path) -> None:
    assert text in refused(f"tasks/mine.py:{name}", ("*",), folder)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (
            "import no_such_module_at_all",
            "needs the module 'no_such_module_at_all', which is neither installed here nor in /",
        ),
        ("1 / 0", "cannot be loaded: ZeroDivisionError: division by zero"),
        ("class :", "cannot be loaded: SyntaxError: invalid syntax"),
    ],
)
def test_a_task_whose_code_fails_is_refused_with_the_reason(code: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(code)
    before = set(sys.modules)
    assert text in refused("broken.py:T", ("*",), tmp_path)
    assert not [name for name in set(sys.modules) - before if name.startswith("_syncline_task")]


def test_an_unknown_option_is_refused_with_the_known_ones(folder: Path) -> None:
    assert refused("syncline.tasks.digits:Digits", hiden=3) == (
        "task_options.hiden: 'syncline.tasks.digits:Digits' has no such option. Did you mean `hidden`?"
    )
    assert "Known here: hidden" in refused("syncline.tasks.digits:Digits", zzz=3)
    assert "It takes none" in refused("tasks/mine.py:Duck", ("*",), folder, x=1)


def test_a_value_that_the_task_refuses_is_refused_with_its_words(folder: Path) -> None:
    text = refused("tasks/mine.py:Picky", ("*",), folder, depth=0)
    assert "task_options: " in text and "does not accept {'depth': 0}: depth must be positive" in text
    for path, options in (
        ("digits:Digits", {"hidden": 1}),
        ("noop:Noop", {"params": 0}),
        ("quadratic:LinearRegression", {"dtype": "int8"}),
    ):
        assert refused(f"syncline.tasks.{path}", **options).startswith("task_options: ")


# -- batches ----------------------------------------------------------------------------------------------------------


class Items(Dataset[dict[str, Any]]):
    """Rows made one by one."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"x": torch.tensor([row, row]), "row": row}


class Doubled(Subset[Any]):
    """A derived Subset that changes rows, so each row must be read through the class."""

    def __getitem__(self, row: Any) -> Any:
        return tuple(2 * value for value in self.dataset[self.indices[row]])

    def __getitems__(self, rows: list[int]) -> list[Any]:
        return [self[row] for row in rows]


def numbered(rows: int) -> TensorDataset:
    return TensorDataset(torch.arange(rows))


def take(dataset: Dataset[Any], size: Any, count: int, seed: int = 0, part: int = 0, start: int = 0) -> list[list[int]]:
    found = itertools.islice(batches(dataset, size, seed, part, start), count)
    return [batch[0].tolist() for batch in found]


@given(rows=st.integers(1, 40), size=st.integers(1, 50), start=st.integers(0, 30), seed=st.integers(0, 2**63))
def test_a_batch_depends_on_its_step_only(rows: int, size: int, start: int, seed: int) -> None:
    data = numbered(rows)
    assert take(data, size, start + 5, seed)[start:] == take(data, size, 5, seed, start=start)


@given(rows=st.integers(1, 40), size=st.integers(1, 50), epoch=st.integers(0, 3))
def test_an_epoch_has_every_row_once_and_its_last_batch_may_be_short(rows: int, size: int, epoch: int) -> None:
    steps = Local(epochs=1, batch_size=size).steps_for(rows)
    found = take(numbered(rows), size, steps, start=epoch * steps)
    assert sorted(itertools.chain(*found)) == list(range(rows))
    assert [len(batch) for batch in found[:-1]] == [size] * (steps - 1)
    assert min(rows, size, 2) <= len(found[-1]) <= size + 1, "a single row is left over only where there is no other"


def test_a_row_that_is_left_over_belongs_to_the_batch_before_it() -> None:
    assert [len(batch) for batch in take(numbered(10), 3, 6)] == [3, 3, 4] * 2
    assert [len(batch) for batch in take(numbered(4), 3, 2)] == [4, 4]


def test_epochs_parts_and_seeds_have_orders_of_their_own() -> None:
    data = numbered(50)
    orders = [*take(data, 50, 2), *take(data, 50, 1, seed=1), *take(data, 50, 1, part=1)]
    assert len(set(map(tuple, orders))) == 4


def test_all_is_the_whole_part_in_its_own_order_at_each_step() -> None:
    assert take(numbered(5), "all", 3, start=7) == [[0, 1, 2, 3, 4]] * 3


def test_every_kind_of_data_set_gives_the_same_rows() -> None:
    quick = take(numbered(10), 4, 6)
    assert take(Subset(numbered(20), range(10)), 4, 6) == quick
    assert take(Subset(Subset(numbered(20), np.arange(1, 20)), np.arange(10)), 4, 6) == [  # type: ignore[arg-type]
        [row + 1 for row in batch] for batch in quick
    ]
    assert take(Doubled(numbered(20), range(10)), 4, 6) == [[2 * row for row in batch] for batch in quick]
    slow = list(itertools.islice(batches(Items(10), 4, 0, 0, 0), 6))
    assert [batch["row"].tolist() for batch in slow] == quick
    assert slow[0]["x"].shape == (4, 2)


def test_batches_and_evaluation_leave_the_random_numbers_of_torch_alone() -> None:
    before = torch.random.get_rng_state()
    take(numbered(10), 4, 6)
    list(itertools.islice(batches(Items(10), 4, 0, 0, 0), 6))
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_empty_data_set_and_one_without_length_are_refused() -> None:
    with pytest.raises(ConfigError, match="dataset\\(\\) returned no rows for part 3"):
        next(batches(numbered(0), 4, seed=0, part_index=3, first_step=0))

    class Endless(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return itertools.count()

    with pytest.raises(ConfigError, match=r"dataset\(\) returned Endless, an IterableDataset"):
        next(batches(Endless(), 4, seed=0, part_index=0, first_step=0))


def test_a_nested_batch_goes_to_the_device_and_keeps_its_form() -> None:
    pair = namedtuple("pair", "a b")
    batch = {"x": torch.ones(2), "more": [torch.ones(1), "text"], "pair": pair(torch.ones(1), 3), "t": (torch.ones(1),)}
    moved = to_device(batch, "meta")
    assert moved["x"].is_meta and moved["more"][0].is_meta and moved["more"][1] == "text"
    assert type(moved["pair"]) is pair and moved["pair"].a.is_meta and moved["pair"].b == 3
    assert type(moved["t"]) is tuple and moved["t"][0].is_meta


# -- one local period -------------------------------------------------------------------------------------------------


def test_a_local_period_stops_when_told_to_and_returns_the_mean_loss() -> None:
    task, seen = LinearRegression(rows=10), list[int]()
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    data = task.dataset(Part(0, 1, Iid(), 0))

    def on_step(rows: int) -> bool:
        seen.append(rows)
        return len(seen) < 5

    mean = task.train(model, optimizer, batches(data, 4, 0, 0, 0), on_step)
    losses = [task.loss(model, batch).item() for batch in itertools.islice(batches(data, 4, 0, 0, 0), 5)]
    assert seen == [4, 4, 2, 4, 4] and mean == pytest.approx(sum(losses) / 5, rel=1e-6)
    assert task.train(model, optimizer, iter(()), on_step) is None


def test_the_rows_of_a_batch_are_those_of_its_first_tensor() -> None:
    assert batch_rows({"name": "x", "pair": [torch.ones(3, 2), torch.ones(4)]}) == 3
    assert batch_rows("nothing") == 0


# -- evaluation -------------------------------------------------------------------------------------------------------


class Averages(Task):
    """Its metric is the mean of the rows."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1), nn.Dropout())

    def dataset(self, part: Part) -> Dataset[Any]:
        return TensorDataset(torch.arange(10, dtype=torch.float64) ** 2)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        raise RuntimeError("no loss here")

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        return {"mean": batch[0].mean().item()}


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 100])
def test_evaluation_weights_batches_by_their_rows(batch_size: int) -> None:
    task = Averages()
    found = evaluate(task, task.model(), task.dataset(Part.test()), batch_size, "cpu")
    assert found == {"mean": pytest.approx(28.5, rel=1e-14)}


def test_evaluation_leaves_the_model_as_it_was_also_when_it_fails() -> None:
    task = Averages()
    model = task.model().train()
    frozen = model.get_submodule("1").eval()  # as somebody does who fine-tunes with fixed statistics
    evaluate(task, model, task.dataset(Part.test()), 4, "cpu")
    assert model.training and not frozen.training and torch.is_grad_enabled()

    class Failing(Averages):
        def metrics(self, model: nn.Module, batch: Any) -> dict[str, float]:
            raise RuntimeError("broken metric")

    with pytest.raises(RuntimeError, match="broken metric"):
        evaluate(Failing(), model, task.dataset(Part.test()), 4, "cpu")
    assert model.training and not frozen.training and torch.is_grad_enabled()


def test_evaluation_without_rows_is_refused() -> None:
    task = Averages()
    with pytest.raises(ConfigError, match="no held-out row"):
        evaluate(task, task.model(), numbered(0), 4, "cpu")
