"""The state of an agent on its disk: bit-equal after loading, and an unusable file does not stop training."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from syncline.model.flat import FlatModel, manifest_of
from syncline.model.manifest import Manifest
from syncline_agent.inner_optimizers import restore_state, state_of
from syncline_agent.local_state import LocalState, load_state, save_state
from syncline_agent.nested_values import pack

RUN = "f00d"  # a submission
Make = Callable[[nn.Module], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
    "amsgrad": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, amsgrad=True),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.1),
    "named": lambda m: torch.optim.AdamW(m.named_parameters(), lr=0.01),
}


@pytest.fixture(autouse=True)
def own_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run-1" / "a1.safetensors"


class Agent:
    """A model in a flat vector, with its optimiser, as in the trainer."""

    def __init__(self, make: Make = OPTIMIZERS["momentum"], dtype: torch.dtype = torch.float32) -> None:
        self.model = nn.Linear(4, 3).to(dtype)
        self.layout: Manifest = manifest_of(self.model, 4096)
        self.flat, self.optimizer = FlatModel(self.model, self.layout), make(self.model)

    def train(self, steps: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            x = torch.randn(8, 4, generator=generator).to(self.flat.flat_P.dtype)
            self.optimizer.zero_grad(set_to_none=True)
            self.model(x).square().mean().backward()
            self.optimizer.step()

    def kept(self, clock: int = 3) -> LocalState:
        return LocalState(clock, self.flat.flat_P.detach(), state_of(self.optimizer))

    def take(self, kept: LocalState) -> None:
        self.flat.flat_P.copy_(kept.own_P)
        restore_state(self.optimizer, kept.inner)


def same(a: LocalState, b: LocalState) -> bool:
    (left, ours), (right, theirs) = (pack(dict(kept.inner), "inner") for kept in (a, b))
    return (
        a.clock == b.clock
        and torch.equal(a.own_P, b.own_P)
        and left == right
        and all(torch.equal(t, theirs[k]) and t.dtype == theirs[k].dtype for k, t in ours.items())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_an_agent_goes_on_from_its_file_as_if_nothing_had_happened(path: Path, kind: str, dtype: torch.dtype) -> None:
    undisturbed = Agent(OPTIMIZERS[kind], dtype)
    undisturbed.train(5, seed=1)
    save_state(path, undisturbed.kept(), undisturbed.layout, RUN)
    loaded = load_state(path, undisturbed.layout, RUN)
    assert loaded is not None and same(loaded, undisturbed.kept())
    restarted = Agent(OPTIMIZERS[kind], dtype)
    restarted.take(loaded)
    for agent in (undisturbed, restarted):
        agent.train(5, seed=2)
    assert torch.equal(restarted.flat.flat_P, undisturbed.flat.flat_P)
    assert same(restarted.kept(), undisturbed.kept())


def test_an_optimizer_that_has_made_no_step_has_nothing_to_keep(path: Path) -> None:
    agent = Agent()
    save_state(path, agent.kept(0), agent.layout, RUN)
    loaded = load_state(path, agent.layout, RUN)
    assert loaded is not None and (loaded.clock, loaded.inner["state"]) == (0, {})
    agent.take(loaded)


def test_odd_values_come_back_bit_for_bit(path: Path) -> None:
    agent = Agent()
    odd = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-45] * 3)
    save_state(path, LocalState(1, odd), agent.layout, RUN)
    loaded = load_state(path, agent.layout, RUN)
    assert loaded is not None and loaded.own_P.numpy().tobytes() == odd.numpy().tobytes()


def test_what_is_kept_is_a_copy_by_the_time_it_is_on_disk(path: Path) -> None:
    agent = Agent()
    before = agent.flat.flat_P.clone()
    save_state(path, agent.kept(), agent.layout, RUN)
    agent.flat.flat_P.fill_(9.0)
    loaded = load_state(path, agent.layout, RUN)
    assert loaded is not None and torch.equal(loaded.own_P, before)


def test_saving_again_replaces_the_file_and_leaves_no_other(path: Path) -> None:
    agent = Agent()
    for clock in (1, 2):
        save_state(path, agent.kept(clock), agent.layout, RUN)
    loaded = load_state(path, agent.layout, RUN)
    assert loaded is not None and loaded.clock == 2 and list(path.parent.iterdir()) == [path]


def test_a_crash_while_saving_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = Agent()
    save_state(path, agent.kept(1), agent.layout, RUN)

    def power_cut(fd: int) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "fsync", power_cut)
    with pytest.raises(OSError, match="power cut"):
        save_state(path, agent.kept(2), agent.layout, RUN)
    loaded = load_state(path, agent.layout, RUN)
    assert loaded is not None and loaded.clock == 1


def test_the_file_is_on_disk_before_it_takes_the_place_of_the_old_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = Agent()
    said: list[str] = []
    replace, fsync = Path.replace, os.fsync

    def synced(fd: int) -> None:
        said.append("fsync")
        fsync(fd)

    def replaced(self: Path, target: Path) -> Path:
        said.append("replace")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    save_state(path, agent.kept(), agent.layout, RUN)
    assert said[:2] == ["fsync", "replace"]


def test_without_a_file_there_is_nothing(path: Path) -> None:
    assert load_state(path, Agent().layout, RUN) is None


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100, b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_file_that_is_none_is_told_of_and_passed_over(
    path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    assert load_state(path, Agent().layout, RUN) is None
    assert "beginning with the center" in caplog.text


def test_a_file_cut_off_anywhere_is_passed_over(path: Path) -> None:
    agent = Agent()
    agent.train(1, seed=1)
    save_state(path, agent.kept(), agent.layout, RUN)
    whole = path.read_bytes()
    for size in range(0, len(whole), 17):
        path.write_bytes(whole[:size])
        assert load_state(path, agent.layout, RUN) is None


def test_the_state_of_another_model_is_passed_over(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    agent = Agent()
    save_state(path, agent.kept(), agent.layout, RUN)
    assert load_state(path, manifest_of(nn.Linear(4, 2), 4096), RUN) is None
    assert "is of another model; beginning with the center" in caplog.text


def test_other_chunks_of_the_same_model_are_the_same_model(path: Path) -> None:
    agent = Agent()
    save_state(path, agent.kept(), agent.layout, RUN)
    assert load_state(path, manifest_of(nn.Linear(4, 3), 1 << 20), RUN) is not None
