"""Every training structure learns what a plain PyTorch loop learns, or is refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from trainers import Child

from structures.registry import SEED, STRUCTURES, Structure, plain_loop
from syncline.data.partition import Part
from syncline.errors import ConfigError
from syncline.tasks.base import evaluate, make_model

PERIODS = 3
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def own_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


def train(structure: Structure, path: Path, *, killed_after: int = 0) -> dict[str, Tensor]:
    """Return the center after some periods of one agent, by name."""
    child = Child(path, structure.spec)
    center_P = child.initial_P
    for period in range(PERIODS):
        if killed_after and period == killed_after:
            clock, child = child.clock, Child(path, structure.spec)
            assert child.clock == clock, "it found what it kept"
            child.version = period
        update_P = child.period(center_P)["update"]
        center_P = center_P + update_P
        for buffer in child.layout.buffers:  # an update holds their values
            center_P[buffer] = update_P[buffer]
    return {e.name: center_P[e.offset : e.offset + e.elements].view(e.shape) for e in child.layout.tensors}


def compare(structure: Structure, center: dict[str, Tensor]) -> None:
    """The center's tensors are those of the plain loop, and a new model that loads them is as good."""
    task, model = plain_loop(structure, PERIODS)
    expected = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    expected = {name.replace("_orig_mod.", ""): tensor.detach() for name, tensor in expected.items()}
    initial = dict(make_model(structure.load(), SEED).named_parameters())
    assert any(not torch.equal(p, expected[n]) for n, p in initial.items() if n in expected), "it learned something"
    for name, tensor in center.items():
        torch.testing.assert_close(
            tensor.to(expected[name].dtype), expected[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}"
        )
    exported = make_model(structure.load(), SEED)
    exported.load_state_dict(center, strict=False)
    held_out = task.dataset(Part.test(SEED))
    found, wanted = (evaluate(structure.load(), m, held_out, 64, "cpu")["loss"] for m in (exported, model))
    assert found == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("name", [n for n, s in STRUCTURES.items() if not s.refused])
def test_it_learns_what_a_plain_loop_learns(name: str, tmp_path: Path) -> None:
    structure = STRUCTURES[name]
    compare(structure, train(structure, tmp_path / "a1.safetensors"))


@pytest.mark.parametrize("name", [n for n, s in STRUCTURES.items() if not s.refused])
def test_killed_once_it_learns_the_same(name: str, tmp_path: Path) -> None:
    structure = STRUCTURES[name]
    compare(structure, train(structure, tmp_path / "a1.safetensors", killed_after=1))


@pytest.mark.parametrize("name", [n for n, s in STRUCTURES.items() if s.refused])
def test_it_is_refused_by_name(name: str, tmp_path: Path) -> None:
    structure = STRUCTURES[name]
    with pytest.raises(ConfigError, match=re.escape(structure.refused)):
        train(structure, tmp_path / "a1.safetensors")
