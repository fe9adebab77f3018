"""The layout: what is averaged and what stays at home; and a model that lives in one flat vector."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from syncline.errors import ConfigError, PeerError
from syncline.model.flat import FlatModel, manifest_of
from syncline.model.manifest import ALIGN_ELEMENTS, Entry, Manifest
from syncline.wire.messages import decode, encode

CHUNK_BYTES = 64 * 1024


@pytest.fixture(autouse=True)
def own_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Everything(nn.Module):
    """Parameters: trainable, frozen, tied, scalar. Buffers: floating, integer, not saved. And batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("drift", torch.arange(3.0))
        self.register_buffer("cache", torch.zeros(4), persistent=False)
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))


def names(layout: Manifest) -> list[str]:
    return [t.name for t in layout.tensors]


def layout_of(model: nn.Module, local: tuple[str, ...] = ()) -> Manifest:
    return manifest_of(model, CHUNK_BYTES, local)


# -- what travels ------------------------------------------------------------------------------------------------------
def test_trainable_parameters_and_saved_floating_buffers_travel_and_nothing_else() -> None:
    layout = layout_of(Everything())
    assert names(layout) == [
        "scale", "embed.weight", "norm.weight", "norm.bias", "drift", "norm.running_mean", "norm.running_var",
    ]  # fmt: skip
    assert layout.local == ["frozen.weight", "frozen.bias", "cache", "steps", "norm.num_batches_tracked"]


def test_tied_weights_travel_once() -> None:
    assert names(layout_of(Everything())).count("embed.weight") == 1
    assert "head.weight" not in names(layout_of(Everything()))


def test_a_run_of_adapters_sends_only_the_adapters() -> None:
    model = nn.ModuleDict({"base": nn.Linear(100, 100), "adapter": nn.Linear(100, 2, bias=False)})
    model["base"].requires_grad_(False)
    layout = layout_of(model)
    assert names(layout) == ["adapter.weight"] and layout.nbytes == 800


def test_what_the_task_calls_local_stays_with_the_agent() -> None:
    layout = layout_of(Everything(), local=("norm.running_*", "drift"))
    assert names(layout) == ["scale", "embed.weight", "norm.weight", "norm.bias"]
    assert {"norm.running_mean", "norm.running_var", "drift"} <= set(layout.local)


def test_a_mask_of_infinities_stays_where_it_is() -> None:
    model = nn.Linear(4, 4)
    model.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
    assert names(layout_of(model)) == ["weight", "bias"] and layout_of(model).local == ["mask"]


def _tied_by_data() -> nn.Module:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight.data = first.weight.data
    return nn.Sequential(first, second)


def _buffer_within_a_parameter() -> nn.Module:
    model = nn.Linear(4, 4)
    model.register_buffer("row", model.weight.detach()[1])
    return model


def _complex_parameter() -> nn.Module:
    model = nn.Linear(4, 4)
    model.phase = nn.Parameter(torch.zeros(4, dtype=torch.complex64))
    return model


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (_tied_by_data, "0.weight and 1.weight lie in the same memory"),
        (_buffer_within_a_parameter, "weight and row lie in the same memory"),
        (_complex_parameter, "phase is torch.complex64, and cannot be averaged"),
        (lambda: nn.LazyLinear(3), "weight has no shape before the first batch"),
    ],
    ids=["tied by .data", "a buffer within a parameter", "complex", "lazy"],
)
def test_a_model_that_a_flat_vector_would_change_is_refused(make: Callable[[], nn.Module], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        layout_of(make())


@pytest.mark.parametrize(
    ("model", "local"),
    [
        (nn.Identity(), ()),
        (nn.Linear(2, 2).requires_grad_(False), ()),
        (nn.BatchNorm1d(3, affine=False), ()),  # floating buffers alone are nothing to train
        (nn.Linear(2, 2), ("*",)),
    ],
)
def test_a_model_with_nothing_to_average_is_refused(model: nn.Module, local: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        layout_of(model, local)
    assert str(error.value) == (
        "task: the model has no trainable floating-point parameter to average. Return a model with parameters"
    )


# -- dtypes ------------------------------------------------------------------------------------------------------------
def mixed(*dtypes: torch.dtype) -> nn.Module:
    return nn.ParameterList([nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in dtypes])


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float32,), "fp32"),
        ((torch.float64,), "fp64"),
        ((torch.bfloat16, torch.float16), "fp32"),
        ((torch.float32, torch.float64), "fp64"),
    ],
)
def test_the_center_is_as_precise_as_the_most_precise_tensor_and_fp32_at_least(
    dtypes: tuple[torch.dtype, ...], expected: str
) -> None:
    layout = layout_of(mixed(*dtypes))
    assert layout.dtype == expected and layout.nbytes == 3 * len(dtypes) * layout.itemsize


def test_half_precision_weights_are_copied_to_and_from_an_exact_center() -> None:
    model = mixed(torch.bfloat16, torch.float32)
    flat = FlatModel(model, layout_of(model))
    assert flat.flat_P.dtype == torch.float32 and flat.flat_P.tolist() == [1.0] * 6
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    assert flat.flat_P.tolist() == [1.0] * 3 + [3.0] * 3, "only the second lives in the vector"
    flat.store()
    assert flat.flat_P.tolist() == [3.0] * 6
    flat.flat_P.fill_(1.00390625)  # between two numbers of bfloat16
    flat.load()
    first, second = model.parameters()
    assert first.dtype == torch.bfloat16 and first.tolist() == [1.0] * 3 and second.tolist() == [1.00390625] * 3


def test_the_vector_keeps_the_digits_that_half_precision_cannot_hold() -> None:
    model = mixed(torch.bfloat16, torch.float16)
    flat = FlatModel(model, layout_of(model))
    center = 1 + 2.0**-20
    flat.flat_P.fill_(center)
    flat.load()
    flat.store()
    assert flat.flat_P.tolist() == [center] * 6, "nothing was trained, and nothing changes"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    flat.store()
    flat.store()
    assert flat.flat_P.tolist() == [center + 0.5] * 6 and flat.flat_P.dtype == torch.float32


def test_merged_steps_that_half_precision_cannot_hold_add_up() -> None:
    """One agent in 64 steps by 2⁻⁷ in each of 64 rounds: their mean moves by 2⁻¹³, and in the end by what all have stepped."""
    model = mixed(torch.bfloat16)
    flat = FlatModel(model, layout_of(model))
    center_P = flat.flat_P.clone()
    for _ in range(64):
        flat.flat_P.copy_(center_P)
        flat.load()
        with torch.no_grad():
            next(model.parameters()).add_(2.0**-7)
        flat.store()
        center_P += (flat.flat_P - center_P) / 64
    assert center_P.tolist() == [1 + 2.0**-7] * 3


# -- the layout --------------------------------------------------------------------------------------------------------
@given(st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=8), st.integers(4096, 1 << 20))
def test_tensors_lie_one_after_the_other_and_chunks_cover_them_exactly(
    shapes: list[list[int]], chunk_bytes: int
) -> None:
    model = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in (*shapes, [1])])
    layout = manifest_of(model, chunk_bytes)
    ends = [t.offset + t.elements for t in layout.tensors]
    assert [t.offset for t in layout.tensors] == [0, *ends[:-1]] and ends[-1] == layout.elements
    assert [t.shape for t in layout.tensors] == [*shapes, [1]]
    covered = [i for k in range(layout.chunks) for i in range(layout.elements)[layout.chunk(k)]]
    assert covered == list(range(layout.elements))
    assert all(layout.chunk(k).stop > layout.chunk(k).start for k in range(layout.chunks))
    assert layout.chunk_elements % ALIGN_ELEMENTS == 0 and layout.chunk_bytes <= max(chunk_bytes, 4096)


def test_the_layout_travels_as_a_record() -> None:
    layout = layout_of(Everything())
    assert decode(Manifest, encode(layout)) == layout


def test_the_layout_of_a_very_large_model_travels_too() -> None:
    one = layout_of(nn.Linear(1, 1)).tensors[0]
    tensors = [one.model_copy(update={"name": f"blocks.{i}.attention.projection.weight"}) for i in range(20_000)]
    layout = layout_of(nn.Linear(1, 1)).model_copy(update={"tensors": tensors})
    assert len(encode(layout)) > 1 << 20 and decode(Manifest, encode(layout)) == layout


def test_the_digest_tells_layouts_apart_and_not_their_chunks() -> None:
    plain, wider = nn.Linear(4, 4), nn.Linear(4, 5)
    assert layout_of(plain).layout_digest() == manifest_of(nn.Linear(4, 4), 1 << 20).layout_digest()
    others = [wider, nn.Linear(4, 4, bias=False), nn.Linear(4, 4).double(), nn.Sequential(nn.Linear(4, 4))]
    assert len({layout_of(m).layout_digest() for m in (plain, *others)}) == 5


# -- a model in a flat vector ------------------------------------------------------------------------------------------
def test_the_vector_holds_the_models_values_in_the_order_of_the_layout() -> None:
    model = Everything()
    layout = layout_of(model)
    expected = torch.cat([model.get_parameter(n).flatten() if n in dict(model.named_parameters()) else
                          model.get_buffer(n).flatten() for n in names(layout)]).detach().clone()  # fmt: skip
    assert torch.equal(FlatModel(model, layout).flat_P, expected)


def test_tensors_are_views_of_the_vector() -> None:
    model: Any = Everything()
    flat = FlatModel(model, layout_of(model))
    flat.flat_P.fill_(7.0)
    assert all(bool((p == 7).all()) for p in model.parameters() if p.requires_grad)
    assert model.drift.tolist() == [7.0] * 3 and model.scale.item() == 7.0
    assert model.head.weight is model.embed.weight, "what was tied stays tied"
    assert model.steps.tolist() == [0, 0] and not bool((model.frozen.weight == 7).any())


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam], ids=lambda make: make.__name__)
def test_a_step_of_an_optimizer_moves_the_vector(make: type[torch.optim.Optimizer]) -> None:
    model, twin = nn.Linear(5, 3), nn.Linear(5, 3)
    twin.load_state_dict(model.state_dict())
    flat = FlatModel(model, layout_of(model))
    before = flat.flat_P.clone()
    for m in (model, twin):
        optimizer = make(m.parameters(), lr=0.1)  # type: ignore[call-arg]
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            m(torch.ones(4, 5)).square().sum().backward()
            optimizer.step()
    assert not torch.equal(flat.flat_P, before)
    assert torch.equal(flat.flat_P, nn.utils.parameters_to_vector(twin.parameters())), "as if it lived alone"


def test_running_statistics_move_the_vector() -> None:
    model = nn.BatchNorm1d(2)
    flat = FlatModel(model, layout_of(model))
    model(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
    assert torch.allclose(flat.flat_P[4:6], torch.tensor([0.2, 2.0]))


def test_an_agent_keeps_what_is_local() -> None:
    model = nn.BatchNorm1d(2)
    local = ("running_*",)
    flat = FlatModel(model, layout_of(model, local), local)
    flat.flat_P.fill_(5.0)
    assert model.running_mean is not None and model.running_mean.tolist() == [0.0, 0.0]
    assert model.weight.tolist() == [5.0, 5.0]


def mismatch(model: nn.Module, layout: Manifest) -> str:
    with pytest.raises(PeerError) as error:
        FlatModel(model, layout)
    return str(error.value)


def test_a_model_that_differs_names_the_tensor() -> None:
    assert mismatch(nn.Linear(4, 3), layout_of(nn.Linear(4, 2))) == (
        "the task's model differs from the run's: ('weight', [3, 4], 'parameter') here, ('weight', [2, 4], 'parameter') in "
        "the run. Is the task's code the same everywhere?"
    )
    assert "('0.weight', [2, 4], 'parameter') here, ('weight', [2, 4], 'parameter')" in mismatch(
        nn.Sequential(nn.Linear(4, 2)), layout_of(nn.Linear(4, 2))
    )


def test_a_model_with_more_or_fewer_tensors_differs() -> None:
    assert "another count" in mismatch(nn.Linear(4, 2, bias=False), layout_of(nn.Linear(4, 2)))
    assert "another count" in mismatch(nn.Linear(4, 2), layout_of(nn.Linear(4, 2, bias=False)))


def test_a_model_that_differs_is_left_as_it_was() -> None:
    model = nn.Linear(4, 3)
    before: list[Tensor] = [p.data for p in model.parameters()]
    mismatch(model, layout_of(nn.Linear(4, 2)))
    assert [p.data.data_ptr() for p in model.parameters()] == [t.data_ptr() for t in before]


def test_the_manifest_says_where_buffers_lie() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    layout = layout_of(model)
    assert [t.name for t in layout.tensors if t.buffer] == ["1.running_mean", "1.running_var"]
    (where,) = layout.buffers
    flat = FlatModel(model, layout)
    flat.flat_P[where] = 7.0
    assert model.state_dict()["1.running_var"].tolist() == [7.0, 7.0] and where.stop == layout.elements
    assert layout_of(nn.Linear(4, 2)).buffers == []


def test_buffers_are_found_in_every_chunk_that_they_reach_into() -> None:
    layout = Manifest(
        dtype="fp32",
        elements=3000,
        chunk_elements=1024,
        tensors=[
            Entry(name="a", shape=[10], offset=0, elements=10, buffer=True),
            Entry(name="b", shape=[10], offset=10, elements=10, buffer=True),
            Entry(name="w", shape=[980], offset=20, elements=980),
            Entry(name="c", shape=[1500], offset=1000, elements=1500, buffer=True),
            Entry(name="v", shape=[500], offset=2500, elements=500),
        ],
    )
    assert layout.buffers == [slice(0, 20), slice(1000, 2500)]
    expected = {0: [slice(0, 20), slice(1000, 1024)], 1: [slice(0, 1024)], 2: [slice(0, 452)]}
    assert layout.buffers_of_chunks() == expected


def test_a_buffer_in_the_place_of_a_parameter_is_another_model() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1, affine=False))
    other = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1, affine=False))
    norm: Any = other[1]
    variance = norm.running_var
    del norm.running_var
    norm.running_var = nn.Parameter(variance)
    assert "'buffer') in the run" in mismatch(other, layout_of(model))
