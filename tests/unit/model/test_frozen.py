"""Frozen tensors and code that differ on one machine, and statistics that are not averaged, are named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from syncline.errors import ConfigError
from syncline.model.flat import FlatModel, manifest_of
from syncline.model.frozen import digest_of, insist_on_frozen
from syncline.model.manifest import Manifest
from syncline.runtime.child_messages import PrepareRun, RunPrepared
from syncline.spec.run_spec import RunSpec, parse
from syncline.wire.messages import encode
from unit.trainers import Child

TASK = '''
import torch
from pathlib import Path
from syncline.tasks.quadratic import LinearRegression

BASE = Path(__file__).with_name("base.txt")

class Based(LinearRegression):
    """A trained head on a base that a file holds."""
    def model(self):
        head = super().model()
        head.register_parameter("base", torch.nn.Parameter(torch.full((5,), float(BASE.read_text())).double()))
        head.base.requires_grad_(False)
        head.register_buffer("vocabulary", torch.arange(3))
        return head

class MayDiffer(Based):
    local = ("base",)

class Travels(Based):
    shared = ("base",)

class NoStep(Based):
    def train(self, model, optimizer, batches, on_step):
        for batch in batches:
            on_step(len(batch[0]))

class Typing(Based):
    local = ("haed.*", "base")

class Late(Based):
    """A statistic that has no value before the first batch."""
    def model(self):
        head = super().model()
        head.register_buffer("largest", torch.tensor(-torch.inf))
        head.register_buffer("seen", torch.zeros(0))
        head.register_buffer("mask", torch.full((2,), -torch.inf))
        return head

    def loss(self, model, batch):
        model.largest = torch.maximum(model.largest, batch[0].max().float())
        model.seen.resize_(2).fill_(1.0)
        return super().loss(model, batch)

class Observed(LinearRegression):
    """Two observers side by side, both empty before the first batch, of the type that the vector has."""
    def model(self):
        head = super().model()
        for name in ("low", "high"):
            head.register_buffer(name, torch.zeros(0, dtype=torch.float64))
        return head

    def loss(self, model, batch):
        model.low.resize_(2).fill_(1.0)
        model.high.resize_(2).fill_(2.0)
        return super().loss(model, batch)
'''


@pytest.fixture(autouse=True)
def own_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(TASK)
    (tmp_path / "base.txt").write_text("1.5")
    return tmp_path


def child_of(own: Path, task: str, **local: Any) -> Child:
    return Child(own / "kept" / "a1.safetensors", {"task": f"{own}/own.py:{task}", "local": {"steps": 3, **local}})


def tensor_of(child: Child, name: str) -> Tensor:
    tensor = getattr(child.trainer._local.flat.model, name)
    assert isinstance(tensor, Tensor)
    return tensor


def prepare_again(own: Path, child: Child, task: str) -> RunPrepared:
    """As another agent whose files are what they are now."""
    spec = parse(RunSpec, {"task": f"{own}/own.py:{task}", "seed": 3, "local": {"steps": 3}})
    path = str(own / "kept" / "a2.safetensors")
    return child.trainer.prepare(
        PrepareRun(spec=spec, manifest=encode(child.layout), state_path=path, submission="first")
    )


# -- on another machine --------------------------------------------------------------------------------------------------
def test_a_frozen_base_that_differs_is_refused_by_name(own: Path) -> None:
    child = child_of(own, "Based")
    assert [entry.name for entry in child.layout.frozen] == ["base", "vocabulary"]
    (own / "base.txt").write_text("1.25")
    with pytest.raises(
        ConfigError, match=r"^task: the model's base does not travel and differs from the coordinator's"
    ):
        prepare_again(own, child, "Based")


@pytest.mark.parametrize("task", ["MayDiffer", "Travels"])
def test_a_frozen_base_that_is_local_or_shared_may_differ(own: Path, task: str) -> None:
    child = child_of(own, task)
    (own / "base.txt").write_text("1.25")
    prepare_again(own, child, task)


def test_a_shared_base_comes_from_the_center(own: Path) -> None:
    child = child_of(own, "Travels")
    (own / "base.txt").write_text("1.25")
    prepare_again(own, child, "Travels")
    child.period(child.initial_P)
    assert tensor_of(child, "base").tolist() == [1.5] * 5


def test_code_that_differs_is_advice(own: Path) -> None:
    child = child_of(own, "Based")
    assert prepare_again(own, child, "Based").advice == []
    (own / "own.py").write_text(TASK.replace("\n", "\r\n"))
    assert prepare_again(own, child, "Based").advice == [], "line endings are no difference"
    (own / "own.py").write_text(TASK + "\n# another version\n")
    assert prepare_again(own, child, "Based").advice == [
        "task: own.py on this machine differs from the coordinator's. Use the same code on every machine"
    ]


# -- digests -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.0),
        torch.arange(6.0).reshape(2, 3).t(),
        torch.ones(3, dtype=torch.bfloat16),
        torch.ones(2, dtype=torch.complex64).conj(),
        torch.tensor([True, False]),
        torch.zeros(0),
    ],
    ids=["scalar", "transposed", "bfloat16", "complex", "bool", "empty"],
)
def test_a_digest_is_of_dtype_shape_and_values(tensor: Tensor) -> None:
    assert digest_of(tensor) == digest_of(tensor.clone().contiguous()) != ""
    assert digest_of(tensor) != digest_of(tensor[None])
    if tensor.numel():
        assert digest_of(tensor) != digest_of(torch.zeros_like(tensor))


def test_a_digest_does_not_depend_on_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.arange(1000.0)
    whole = digest_of(tensor)
    monkeypatch.setattr("syncline.model.frozen.PIECE_ELEMENTS", 7)
    assert digest_of(tensor) == whole


class Packed(Tensor):
    """As the packed weights of a quantisation library."""

    def reshape(self, *shape: Any) -> Tensor:
        raise NotImplementedError


def test_a_tensor_that_shows_no_bytes_is_not_compared() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("packed", torch.ones(3, dtype=torch.int8).as_subclass(Packed))
    layout = manifest_of(model, 4096)
    assert layout.frozen == []
    insist_on_frozen(model, layout, (), ())


# -- in a period ---------------------------------------------------------------------------------------------------------
def test_steps_that_change_nothing_are_advised_once(own: Path) -> None:
    child = child_of(own, "NoStep")
    (text,) = child.period(child.initial_P).report.advice
    assert text.startswith("task: 3 steps have changed no parameter that is averaged.")
    assert child.period(child.initial_P).report.advice == []


def test_a_period_without_steps_is_not_advised(own: Path) -> None:
    child = child_of(own, "NoStep", steps=0)
    assert child.period(child.initial_P).report.advice == []


def test_a_statistic_without_a_value_at_first_is_advised_once(own: Path) -> None:
    child = child_of(own, "Late")
    (text,) = child.period(child.initial_P).report.advice
    assert text.startswith(
        "task: the buffer largest and 1 more had no finite value in model() and stays with each agent"
    )
    assert child.period(child.initial_P).report.advice == []


def test_a_local_pattern_without_a_tensor_is_advised(own: Path) -> None:
    (advice,) = prepare_again(own, child_of(own, "Typing"), "Typing").advice
    assert "`local` names 'haed.*', which no tensor of the model matches" in advice


def test_empty_buffers_that_grow_have_memory_of_their_own(own: Path) -> None:
    """In one vector they would begin at the same place, and each would overwrite the other and the weights behind it."""
    child = child_of(own, "Observed")
    child.period(child.initial_P)
    model = child.trainer._local.flat.model
    assert (model.get_buffer("low").tolist(), model.get_buffer("high").tolist()) == ([1.0, 1.0], [2.0, 2.0])


def test_a_buffer_may_grow_after_it_was_kept(own: Path) -> None:
    """Observers do so where they see a larger batch; what was written to the disk must not pin them."""
    child = child_of(own, "Late")
    child.period(child.initial_P)
    tensor_of(child, "seen").resize_(4).fill_(2.0)
    child.period(child.initial_P)
    assert tensor_of(child, "seen").tolist() == [1.0, 1.0]


def test_an_empty_buffer_that_has_grown_is_kept(own: Path) -> None:
    child = child_of(own, "Late")
    update_P = child.period(child.initial_P).update_P
    again = child_of(own, "Late")
    assert again.clock == 1 and tensor_of(again, "seen").tolist() == [1.0, 1.0]
    assert torch.equal(update_P, again.trainer._local.flat.flat_P - child.initial_P)


# -- the flat vector -----------------------------------------------------------------------------------------------------
def flat_of(model: nn.Module, shared: tuple[str, ...] = ()) -> tuple[FlatModel, Manifest]:
    layout = manifest_of(model, 4096, shared=shared)
    return FlatModel(model, layout, (), shared), layout


def test_tensors_that_swap_their_memory_swap_their_values() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    flat, _ = flat_of(model)
    first, second = (parameter.detach().clone() for parameter in model.parameters())
    model[0].weight.data, model[1].weight.data = model[1].weight.data, model[0].weight.data
    flat.store()
    assert torch.equal(flat.flat_P, torch.cat([second.flatten(), first.flatten()]))
    flat.flat_P.fill_(4.0)
    assert [parameter.tolist() for parameter in model.parameters()] == [[[4.0, 4.0], [4.0, 4.0]]] * 2


def test_a_view_of_the_same_memory_in_another_order_is_taken_in() -> None:
    model = nn.Linear(2, 2, bias=False)
    flat, _ = flat_of(model)
    turned = model.weight.detach().t().clone()
    model.weight.data = model.weight.data.t()
    flat.store()
    assert torch.equal(flat.flat_P, turned.flatten())


def test_half_precision_weights_that_are_replaced_are_taken_in() -> None:
    model = nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
    flat, _ = flat_of(model)
    model.weight = nn.Parameter(model.weight.detach() + 1)
    flat.store()
    assert torch.equal(flat.flat_P.view(2, 2), model.weight.detach().float())
    flat.flat_P.fill_(2.0)
    flat.load()
    assert model.weight.tolist() == [[2.0, 2.0], [2.0, 2.0]]


def test_the_sites_are_those_of_the_parameter_that_took_the_place() -> None:
    model = nn.Linear(2, 2)
    flat, _ = flat_of(model)
    sites = flat.sites
    model.weight = nn.Parameter(torch.ones(2, 2))
    flat.store()
    assert [site.parameter for site in sites] == [model.weight, model.bias]


def _removed(model: nn.Module) -> None:
    model.register_buffer("mean", None)


def _grown(model: Any) -> None:
    model.mean.resize_(5)


def _halved(model: nn.Module) -> None:
    model.weight.data = model.weight.data.half()


def _another_kind(model: nn.Module) -> None:
    del model.weight
    model.register_buffer("weight", torch.zeros(2, 2))


def _same_memory(model: Any) -> None:
    model.bias.data = model.weight.data[0]


def _trainable(model: nn.Module) -> None:
    model.base.requires_grad_(True)


def _another(model: nn.Module) -> None:
    model.extra = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_removed, r"mean is averaged, and training has removed it"),
        (_grown, r"mean was a buffer of torch.float32 \[2\], and training has made it a buffer of torch.float32 \[5\]"),
        (
            _halved,
            r"weight was a parameter of torch.float32 \[2, 2\], and training has made it a parameter of torch.float16",
        ),
        (_another_kind, r"weight was a parameter of .*, and training has made it a buffer of torch.float32 \[2, 2\]"),
        (_same_memory, r"(weight and bias|bias and weight) lie in the same memory since training"),
        (_trainable, r"base became trainable during training"),
        (_another, r"extra.weight became trainable during training"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_taken_in_is_refused_by_name(change: Any, problem: str) -> None:
    model = nn.Linear(2, 2)
    model.base = nn.Parameter(torch.zeros(2), requires_grad=False)
    model.register_buffer("mean", torch.zeros(2))
    flat, _ = flat_of(model)
    change(model)
    with pytest.raises(ConfigError, match=f"^task: the model's {problem}"):
        flat.store()


def test_layers_may_be_frozen_and_trained_again() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    flat, _ = flat_of(model)
    for frozen in (True, False):
        model[0].requires_grad_(not frozen)
        flat.store()


# -- `shared` ------------------------------------------------------------------------------------------------------------
def test_shared_tensors_travel_and_are_statistics() -> None:
    model = nn.ModuleDict({"student": nn.Linear(2, 2), "teacher": nn.BatchNorm1d(2).requires_grad_(False)})
    _, layout = flat_of(model, ("teacher.*",))
    kinds = {entry.name: entry.buffer for entry in layout.tensors}
    statistics = ["teacher.weight", "teacher.bias", "teacher.running_mean", "teacher.running_var"]
    assert kinds == {"student.weight": False, "student.bias": False} | dict.fromkeys(statistics, True)
    assert [entry.name for entry in layout.frozen] == ["teacher.num_batches_tracked"]


@pytest.mark.parametrize(
    ("local", "shared", "problem"),
    [
        ((), ("techer.*",), "`shared` names 'techer.*', which no floating-point tensor of the model matches"),
        (("0.*",), ("0.weight",), "`local` and `shared` both name 0.weight"),
        ((), "0.*", "`shared` is the text '0.*'. Write a tuple"),
        ("0.*", (), "`local` is the text '0.*'. Write a tuple"),
    ],
)
def test_patterns_without_meaning_are_refused(local: Any, shared: Any, problem: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    with pytest.raises(ConfigError) as error:
        manifest_of(model, 4096, local, shared=shared)
    assert str(error.value).startswith(f"task: {problem}")
