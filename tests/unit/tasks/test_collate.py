"""How rows become a batch: the task's `collate`, a data set's `__getitems__`, and data sets that cannot be batched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from syncline.data.partition import Part
from syncline.errors import ConfigError
from syncline.tasks.base import Task, batches, evaluate, rows_of_part, to_device, whole_gradient
from unit.trainers import Child

LENGTHS = [3, 1, 4, 1, 5, 2, 6]

OWN_TASKS = """
import torch
from torch import nn
from syncline.tasks.base import Task

class Padded(Task):
    def model(self):
        return nn.Linear(1, 1)

    def dataset(self, part):
        return [(torch.ones(1 + k % 4), torch.tensor(float(1 + k % 4))) for k in range(12)]

    def collate(self, rows):
        return nn.utils.rnn.pad_sequence([ones for ones, _ in rows], batch_first=True), torch.stack([y for _, y in rows])

    def loss(self, model, batch):
        ones, length = batch
        return nn.functional.mse_loss(model(ones.sum(1, keepdim=True))[:, 0], length)

    def metrics(self, model, batch):
        return {"length": batch[1].mean()}

class Unpadded(Padded):
    collate = Task.collate
"""


class Sequences(Dataset[tuple[Tensor, int]]):
    """Rows of different lengths."""

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return torch.full((LENGTHS[row],), float(row)), row


class Graph:
    """A row that is an object with tensors."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: torch.device | str) -> Graph:
        return Graph(self.x.to(device))


class Averages(Task):
    """Without a `collate` of its own; its metric is the mean of the rows' numbers."""

    def model(self) -> nn.Module:
        return nn.Linear(1, 1)

    def dataset(self, part: Part) -> Dataset[Any]:
        return Sequences()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = model(batch[1].float()[:, None]).mean()
        return loss

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, float]:
        return {"row": batch[1].double().mean().item()}


class Padding(Averages):
    def collate(self, rows: list[Any]) -> Any:
        assert isinstance(rows, list)
        padded = nn.utils.rnn.pad_sequence([values for values, _ in rows], batch_first=True, padding_value=-1.0)
        return padded, torch.tensor([row for _, row in rows])


def first_batch(dataset: Any, task: Task | None = None, size: int = 3) -> Any:
    return next(batches(dataset, size, 0, 0, 0, task))


@pytest.fixture(autouse=True)
def own_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


# -- a collate of the task's own -------------------------------------------------------------------------------------------
def test_rows_of_several_lengths_train_and_are_evaluated_with_a_collate_of_the_tasks_own() -> None:
    task = Padding()
    model = task.model()
    padded, rows = first_batch(Sequences(), task)
    assert padded.shape == (len(rows), max(LENGTHS[row] for row in rows.tolist()))
    assert evaluate(task, model, Sequences(), 3, "cpu") == {"row": pytest.approx(3.0)}
    whole_gradient(task, model, Sequences(), 3, "cpu")
    assert model.weight.grad.item() == pytest.approx(3.0)  # type: ignore[union-attr, operator]


def test_a_collate_of_the_tasks_own_gets_the_rows_of_every_kind_of_data_set() -> None:
    class Doubled(Averages):
        def collate(self, rows: list[Any]) -> Any:
            return [2 * values[0] for values in rows]

    numbers = TensorDataset(torch.arange(4.0))
    for data in (numbers, Subset(numbers, [0, 1, 2, 3]), [(0.0,), (1.0,), (2.0,), (3.0,)]):
        assert sorted(map(float, next(batches(data, "all", 0, 0, 0, Doubled())))) == [0, 2, 4, 6]  # type: ignore[arg-type]


def test_a_collate_may_be_an_object_that_the_task_made_in_its_constructor() -> None:
    task = Averages()
    task.collate = lambda rows: len(rows)  # type: ignore[method-assign]
    assert first_batch(Sequences(), task) == 3


def test_a_graph_goes_to_the_device_as_it_says_itself() -> None:
    assert to_device([Graph(torch.ones(2))], "meta")[0].x.is_meta
    packed = nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    moved = to_device(packed, "cpu")
    assert type(moved) is type(packed) and torch.equal(moved.data, packed.data)


def test_the_training_child_collates_as_the_task_says(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_TASKS)
    spec = {"task": f"{tmp_path / 'own.py'}:Padded", "local": {"steps": 3}, "evaluate": {"agents": True}}
    child = Child(tmp_path / "a1.safetensors", spec)
    answer = child.period(child.initial_P)
    assert answer.report.steps == 3 and answer.evaluation.metrics == {"length": pytest.approx(2.5)}
    spec["task"] = f"{tmp_path / 'own.py'}:Unpadded"
    child = Child(tmp_path / "a2.safetensors", spec)
    with pytest.raises(ConfigError, match=r"rows of dataset\(\) \(list\) do not collate"):
        child.period(child.initial_P)


# -- rows that do not collate ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("dataset", "kind", "why"),
    [
        (Sequences(), "Sequences", "equal size"),
        (Subset(Sequences(), [0, 1, 2]), "Subset", "equal size"),
        ([Graph(torch.ones(1)), Graph(torch.ones(1)), Graph(torch.ones(1))], "list", "Graph"),
        ([{"a": 1}, {"b": 1}, {"a": 1}], "list", "'a'"),
    ],
)
def test_rows_that_do_not_collate_are_refused_with_the_data_set_and_the_hook(dataset: Any, kind: str, why: str) -> None:
    for task in (None, Averages()):
        with pytest.raises(
            ConfigError, match=rf"^task: the rows of dataset\(\) \({kind}\) do not collate .*{why}"
        ) as error:
            next(batches(dataset, "all", 0, 0, 0, task))
        assert "`collate(rows)`" in error.value.hint and "pads" in error.value.hint


def test_an_error_of_the_data_set_or_of_the_tasks_collate_stays_what_it_is() -> None:
    class Broken(Sequences):
        def __getitem__(self, row: int) -> tuple[Tensor, int]:
            raise OSError("no such file")

    class Wrong(Averages):
        def collate(self, rows: list[Any]) -> Any:
            raise RuntimeError("cannot pad")

    with pytest.raises(OSError, match="no such file"):
        first_batch(Broken(), Averages())
    with pytest.raises(RuntimeError, match="cannot pad"):
        first_batch(Sequences(), Wrong())


# -- several rows at once --------------------------------------------------------------------------------------------------
class AtOnce(Sequences):
    """Returns several rows at once; `given` records their numbers."""

    def __init__(self, given: Any) -> None:
        self.given = given

    def __getitems__(self, rows: list[int]) -> Any:
        return self.given(rows)


def test_rows_given_at_once_as_a_list_are_collated_and_anything_else_is_a_batch() -> None:
    rows_of_text = AtOnce(lambda rows: [{"ids": torch.tensor([row]), "text": str(row)} for row in rows])
    batch = first_batch(rows_of_text)
    assert batch["ids"].shape == (3, 1) and batch["text"] == [str(row) for row in batch["ids"][:, 0].tolist()]
    assert torch.equal(first_batch(AtOnce(torch.tensor)), batch["ids"][:, 0])
    assert first_batch(AtOnce(lambda rows: {"ids": rows})) == {"ids": batch["ids"][:, 0].tolist()}


def test_rows_given_at_once_go_through_the_tasks_collate() -> None:
    data = AtOnce(lambda rows: [(torch.ones(LENGTHS[row]), row) for row in rows])
    padded, rows = first_batch(Subset(data, [6, 4, 2]), Padding())
    assert padded.shape == (3, 6) and sorted(rows.tolist()) == [2, 4, 6]


# -- kinds of data sets that are refused -----------------------------------------------------------------------------------
class Stream(IterableDataset[Any]):
    """An iterable data set with a length, which resembles a map-style one."""

    def __iter__(self) -> Iterator[Any]:
        return iter(range(7))

    def __len__(self) -> int:
        return 7


class NoRows(Dataset[Any]):
    """Has a length, and inherits a `[row]` that raises NotImplementedError."""

    def __len__(self) -> int:
        return 7


@pytest.mark.parametrize(
    ("dataset", "problem", "hint"),
    [
        (Stream(), "Stream, an IterableDataset, which gives no row by its number", "list(stream)"),
        (DataLoader(Sequences(), 2), "DataLoader, a data loader, which makes batches of its own", "`local.batch_size`"),
        (NoRows(), "NoRows, which has no len() and [row]", "map-style"),
        (iter([1, 2]), "list_iterator, which has no len() and [row]", "map-style"),
        ({1, 2}, "set, which has no len() and [row]", "map-style"),
        (None, "NoneType, which has no len() and [row]", "map-style"),
    ],
)
def test_what_gives_no_rows_by_number_is_refused_by_its_kind(dataset: Any, problem: str, hint: str) -> None:
    for refused in (lambda: rows_of_part(dataset, 0), lambda: first_batch(dataset)):
        with pytest.raises(ConfigError) as error:
            refused()
        assert str(error.value).startswith(f"task: dataset() returned {problem}") and hint in error.value.hint
