"""Every training structure learns what a plain PyTorch loop learns, or is refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structures.registry import SEED, STRUCTURES, Structure, plain_loop
from syncline.data.partition import Part
from syncline.errors import ConfigError
from syncline.model.flat import FlatModel, manifest_of, to_unit_
from syncline.model.tensors import tensors_of
from syncline.tasks.base import evaluate, make_model
from unit.trainers import Child

PERIODS = 3
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def own_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


def train(structure: Structure, path: Path, *, killed_after: int = 0) -> tuple[dict[str, Tensor], list[str]]:
    """Return the center after some periods of one agent, by name, and the advice that was given."""
    child = Child(path, structure.spec)
    center_P, advice = child.initial_P, []
    for period in range(PERIODS):
        if killed_after and period == killed_after:
            clock, child = child.clock, Child(path, structure.spec)
            assert child.clock == clock, "it found what it kept"
            child.version = period
        answer = child.period(center_P)
        advice += answer.report.advice
        center_P = center_P + answer.update_P
        for buffer in child.layout.buffers:  # an update holds their values
            center_P[buffer] = answer.update_P[buffer]
    center = {e.name: center_P[e.offset : e.offset + e.elements].view(e.shape) for e in child.layout.tensors}
    return center, advice


def compare(structure: Structure, center: dict[str, Tensor], advice: list[str]) -> None:
    """The center equals the tensors of the plain loop, and a new model with them has the same loss."""
    task, model = plain_loop(structure, PERIODS)
    expected = {name: tensor.detach() for name, tensor in tensors_of(model)}
    exported = make_model(structure.load(), SEED)
    own = {name: tensor for name, tensor in tensors_of(exported) if name in center}
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in own.items()), "it has learned something"
    for name, tensor in own.items():
        found = center[name].to(tensor.dtype)
        torch.testing.assert_close({name: found}, {name: expected[name]}, **CLOSE)
        tensor.data.copy_(found)
    if structure.advised:
        assert any(structure.advised in text for text in advice)
    else:
        held_out = task.dataset(Part.test(SEED))
        losses = [evaluate(structure.load(), m, held_out, 64, "cpu")["loss"] for m in (exported, model)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("name", [n for n, s in STRUCTURES.items() if not s.refused])
def test_it_learns_what_a_plain_loop_learns(name: str, tmp_path: Path) -> None:
    structure = STRUCTURES[name]
    compare(structure, *train(structure, tmp_path / "a1.safetensors"))


@pytest.mark.parametrize("name", [n for n, s in STRUCTURES.items() if not s.refused])
def test_killed_once_it_learns_the_same(name: str, tmp_path: Path) -> None:
    structure = STRUCTURES[name]
    compare(structure, *train(structure, tmp_path / "a1.safetensors", killed_after=1))


@pytest.mark.parametrize("name", [n for n, s in STRUCTURES.items() if s.refused])
def test_it_is_refused_by_name(name: str, tmp_path: Path) -> None:
    structure = STRUCTURES[name]
    with pytest.raises(ConfigError, match=re.escape(structure.refused)):
        train(structure, tmp_path / "a1.safetensors")


# -- several agents ------------------------------------------------------------------------------------------------------
def averaged(name: str, agents: int = 2) -> FlatModel:
    """Return a model with the mean parameters of agents that trained on other data."""
    structure = STRUCTURES[name]
    task = structure.load()
    model = make_model(task, SEED)
    flat = FlatModel(model, manifest_of(model, 4096), task.local)
    mean_P = torch.zeros_like(flat.flat_P)
    for seed in range(agents):
        torch.manual_seed(seed)
        with torch.no_grad():
            for place in flat.sites:
                place.parameter.copy_(torch.randn_like(place.parameter))
        for _ in range(20):  # the power iteration follows the weights
            model(torch.zeros(2, 6))
        flat.store()
        mean_P += flat.flat_P / agents
    flat.flat_P.copy_(mean_P)
    flat.load()
    return flat


@pytest.mark.parametrize("name", ["spectral norm", "spectral norm, by its older hook"])
def test_averaged_vectors_of_spectral_norm_have_length_1(name: str) -> None:
    flat = averaged(name)
    units = [(n, t) for n, t in tensors_of(flat.model) if n.endswith(("_u", "_v"))]
    assert {n for n, _ in units} == {e.name for e in manifest_of(flat.model, 4096).tensors if e.unit} != set()
    assert all(float(t.norm()) == pytest.approx(1, abs=1e-5) for _, t in units)


def test_a_vector_of_length_1_keeps_its_bits() -> None:
    vector = nn.functional.normalize(torch.randn(64), dim=0)
    before = vector.clone()
    to_unit_(vector)
    assert torch.equal(vector, before)
    assert torch.equal(to_unit_(torch.zeros(3)), torch.zeros(3)), "what has no direction stays as it is"


def test_a_plain_model_loads_what_a_compiled_one_has_learned() -> None:
    task = STRUCTURES["torch.compile"].load()
    compiled, plain = make_model(task, SEED), STRUCTURES["plain"].load().model()
    layout = manifest_of(compiled, 4096)
    flat = FlatModel(compiled, layout)
    plain.load_state_dict({e.name: flat.flat_P[e.offset : e.offset + e.elements].view(e.shape) for e in layout.tensors})
    x = torch.randn(4, 6)
    assert torch.equal(plain(x), compiled(x))
    assert layout.layout_digest() == manifest_of(plain, 4096).layout_digest(), "agents may compile, or not"
