"""Devices: on a host with several GPUs every agent gets one of its own; the error for a missing device has a hint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from syncline.errors import ConfigError
from syncline_agent import device
from syncline_agent.device import DeviceClaim, claim_device


@pytest.fixture
def claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[DeviceClaim]]:
    """Collect claims and release them at the end; the host has no Apple GPU."""
    monkeypatch.setattr(device, "_has_mps", lambda: False)
    made: list[DeviceClaim] = []
    yield made
    for claim in made:
        give_back(claim)


def give_back(claim: DeviceClaim) -> None:
    """Release the lock, as the kernel does when the process ends."""
    if claim._lock_fd >= 0:
        os.close(claim._lock_fd)
        claim._lock_fd = -1


def auto(claims: list[DeviceClaim], gpus: int, lock_dir: Path) -> DeviceClaim:
    claims.append(claim_device("auto", gpus, lock_dir))
    return claims[-1]


def test_every_agent_of_a_host_gets_a_gpu_of_its_own(claims: list[DeviceClaim], tmp_path: Path) -> None:
    got = [auto(claims, 2, tmp_path) for _ in range(2)]
    assert [(str(c.device), c.shared) for c in got] == [("cuda:0", False), ("cuda:1", False)]


def test_an_agent_too_many_shares_a_gpu_and_says_so(claims: list[DeviceClaim], tmp_path: Path) -> None:
    for _ in range(2):
        auto(claims, 2, tmp_path)
    third = auto(claims, 2, tmp_path)
    assert third.shared and third.device in (torch.device("cuda:0"), torch.device("cuda:1"))


def test_a_gpu_that_is_given_back_is_free_again(claims: list[DeviceClaim], tmp_path: Path) -> None:
    first = auto(claims, 2, tmp_path)
    auto(claims, 2, tmp_path)
    give_back(first)
    again = auto(claims, 2, tmp_path)
    assert (str(again.device), again.shared) == ("cuda:0", False)


def test_a_child_process_does_not_inherit_the_claim(claims: list[DeviceClaim], tmp_path: Path) -> None:
    assert not os.get_inheritable(auto(claims, 1, tmp_path)._lock_fd)


def test_a_lock_file_is_the_users_own_and_no_link_is_followed(claims: list[DeviceClaim], tmp_path: Path) -> None:
    auto(claims, 1, tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.name == f"syncline-{os.getuid()}-gpu-0.lock" and file.stat().st_mode & 0o077 == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / file.name).symlink_to(tmp_path / "target")
    assert claim_device("auto", 1, elsewhere).shared, "no lock of ours: as if another had it"
    assert not (tmp_path / "target").exists()


def test_without_a_gpu_it_is_the_cpu(claims: list[DeviceClaim], tmp_path: Path) -> None:
    claim = auto(claims, 0, tmp_path)
    assert str(claim.device) == "cpu" and not claim.shared and list(tmp_path.iterdir()) == []
    assert claim.describe() == f"cpu ({torch.get_num_threads()} threads)"


def test_a_device_that_is_named_is_taken_without_a_claim(claims: list[DeviceClaim], tmp_path: Path) -> None:
    for wanted in ("cpu", "cuda", "cuda:0", "cuda:1"):
        claim = claim_device(wanted, 2, tmp_path)
        assert str(claim.device) == wanted and not claim.shared
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wanted", "gpus", "problem"),
    [
        ("gpu", 2, "'gpu' is no device"),
        ("", 2, "'' is no device"),
        ("cuda:x", 2, "'cuda:x' is no device"),
        ("cuda:2", 2, "'cuda:2': this host has 2 CUDA devices"),
        ("cuda", 0, "'cuda': this host has 0 CUDA devices"),
        ("mps", 0, "'mps': this host has no Apple GPU that torch can use"),
        ("meta", 0, "'meta' is not supported"),
        ("xpu", 0, "'xpu' is not supported"),
    ],
)
def test_a_device_that_is_not_there_is_refused(claims: list[DeviceClaim], wanted: str, gpus: int, problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        claim_device(wanted, gpus)
    assert str(error.value) == f"--device: {problem}. Use auto, cpu, cuda, cuda:N or mps"


def test_a_shared_gpu_is_described_as_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H200")
    assert DeviceClaim(torch.device("cuda:1")).describe() == "cuda:1 H200"
    assert DeviceClaim(torch.device("cuda:1"), shared=True).describe() == (
        "cuda:1 H200 (shared: more agents than GPUs on this host)"
    )
