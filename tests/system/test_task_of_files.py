"""A task of several files, with data beside it and loaders that spawn processes: three ways to run it, and one result.

Its directory also holds a `queue.py`, which would break torch if it were found before Python's own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from syncline.bus.server.embedded import EmbeddedBroker
from system.command import SYNCLINE, Command, until

pytestmark = pytest.mark.timeout(240)

TASK = """
import torch
from helper_beside_it import Rows, read_rows
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset


class Doubled(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows.x)

    def __getitem__(self, row):
        return 2 * self.rows.x[row], self.rows.y[row]


class Mine:
    def __init__(self, data):
        self.data = data

    def model(self):
        return nn.Linear(3, 2)

    def dataset(self, part):
        rows = read_rows(self.data)
        chosen = Doubled(rows if part.held_out else rows.only(part.rows(len(rows.x))))
        loader = DataLoader(chosen, batch_size=8, num_workers=1, multiprocessing_context="spawn")
        xs, ys = zip(*loader)
        return TensorDataset(torch.cat(xs), torch.cat(ys))

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])
"""

HELPER = """
from dataclasses import dataclass

import torch


@dataclass
class Rows:
    x: torch.Tensor
    y: torch.Tensor

    def only(self, rows):
        return Rows(self.x[rows], self.y[rows])


def read_rows(file):
    numbers = torch.tensor([[float(n) for n in line.split(",")] for line in open(file)])
    return Rows(numbers[:, :3], (numbers.sum(1) > 0).long())
"""

SPEC: dict[str, Any] = {
    "task": "task.py:Mine",
    "task_options": {"data": "data/rows.csv"},
    "agents": {"min": 1},
    "local": {"steps": 3, "batch_size": 8},
    "stop": {"versions": 3},
}


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory with a short name: sockets of multiprocessing lie in the temporary directories that are made in it."""
    with tempfile.TemporaryDirectory(prefix="s-") as directory:
        yield Path(directory)


@pytest.fixture
def folder(short: Path) -> Path:
    place = short / "tasks"
    (place / "data").mkdir(parents=True)
    (place / "task.py").write_text(TASK)
    (place / "helper_beside_it.py").write_text(HELPER)
    (place / "queue.py").write_text("raise RuntimeError('it shadows the standard library')\n")
    (place / "data" / "rows.csv").write_text("".join(f"{i % 7 - 3},{i % 5 - 2},{i % 3 - 1}\n" for i in range(48)))
    (place / "spec.json").write_text(json.dumps(SPEC))
    return place


def digest_of(place: Path, *args: str) -> str:
    """What a command that runs the task to its end says."""
    command = Command(place, (*args, "--json"))
    try:
        assert command.ended() == 0, command.out + command.err
    finally:
        command.stop()
    return str(json.loads(command.out.splitlines()[-1])["digest"])


@contextmanager
def services(broker: EmbeddedBroker, folder: Path, place: Path) -> Iterator[None]:
    """A coordinator and an agent as processes of their own, started in `/`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SYNCLINE_")}
    environment |= {"SYNCLINE_NATS_URL": broker.url, "SYNCLINE_TASK_DIR": str(folder)}
    environment |= {"SYNCLINE_ALLOW_TASK": "task.py:*", "SYNCLINE_STATE_DIR": str(place / "state")}
    started: list[subprocess.Popen[bytes]] = []
    try:
        for name in ("coordinator", "a1"):
            words = ["coordinator"] if name == "coordinator" else ["agent", "--name", name, "--device", "cpu"]
            key, log = str(broker.keyring.path(name)), str(place / f"{name}.log")
            command = [*SYNCLINE, *words, "--key", key, "--threads", "1", "--log-file", log]
            started.append(subprocess.Popen(command, cwd="/", env=environment, stdin=subprocess.DEVNULL))
        yield
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(30)


async def test_a_task_of_several_files_gives_one_result_in_all_three_ways(folder: Path, short: Path) -> None:
    elsewhere = short / "elsewhere"
    elsewhere.mkdir()
    simulated = digest_of(elsewhere, "sim", "../tasks/spec.json")
    local = digest_of(folder, "run", "spec.json", "--local", "1")
    async with EmbeddedBroker(agents=("a1",)) as broker:
        with services(broker, folder, short):
            key = str(broker.keyring.path("coordinator"))
            at = ("--connect", broker.url, "--key", key)
            doctor = [*SYNCLINE, "doctor", *at, "--only", "coordinator"]
            until(lambda: subprocess.run(doctor, capture_output=True, check=False).returncode == 0, 60, lambda: "down")
            apart = digest_of(elsewhere, "run", "../tasks/spec.json", *at)
    assert simulated == local == apart


def test_processes_of_the_simulator_do_not_have_the_working_directory_on_their_path(folder: Path) -> None:
    (folder / "pickle.py").write_text("raise RuntimeError('it shadows the standard library')\n")
    command = [str(Path(sys.executable).with_name("syncline-sim")), "--seeds", "1", "--jobs", "1"]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode == 0 and "0 failed" in ran.stdout, ran.stdout + ran.stderr
