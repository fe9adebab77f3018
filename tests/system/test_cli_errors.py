"""Wrong input ends with code 2 and one line that names the setting and the hint; nothing has been started for it."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from syncline.errors import Unavailable
from syncline.wire import subjects
from system.command import Command
from system.harness import Fleet

pytestmark = pytest.mark.timeout(180)
in_module_loop = pytest.mark.asyncio(loop_scope="module")

DIGITS = "task: syncline.tasks.digits:Digits\n"
NOWHERE = "nats://127.0.0.1:1"


def refused(place: Path, *args: str, within_s: float = 100.0) -> str:
    """What the command says, once it is checked how it says it."""
    command = Command(place, args)
    try:
        assert command.ended(within_s) == 2, command.out + command.err
        assert "Traceback" not in command.err
        assert "error" not in command.out
        command.leaves_nothing(5.0)
        return command.err
    finally:
        command.stop()


def spec_file(place: Path, text: str) -> str:
    (place / "spec.yaml").write_text(text)
    return "spec.yaml"


# -- before anything is asked of a broker -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "setting", "hint"),
    [
        (DIGITS + "lokal: {steps: 3}\n", "lokal", "Did you mean `local`?"),
        (DIGITS + "local: {stepps: 3}\n", "local.stepps", "Did you mean `steps`?"),
        (DIGITS + "mix: {alpha: 2.5}\n", "mix.alpha", "less than 2"),
        (DIGITS + "agents: {min: 2}\nsync: {quorum: 3}\n", "sync.quorum", "Use at most 2"),
        (DIGITS + "v: 2\n", "v", "Upgrade Syncline"),
        ("name: no-task\n", "task", "Add it"),
        ("task: [unclosed\n", "spec", "Correct the line"),
        ("just words\n", "spec", "Start with a line like `task:"),
        (DIGITS + "name: Not A Name\n", "name", "Use 1 to 63"),
    ],
)
def test_a_wrong_spec(tmp_path: Path, text: str, setting: str, hint: str) -> None:
    said = refused(tmp_path, "run", spec_file(tmp_path, text), "--local", "2")
    assert said.startswith(f"error: {setting}: ")
    assert hint in said


def test_a_spec_file_that_is_not_there(tmp_path: Path) -> None:
    said = refused(tmp_path, "run", "missing.yaml")
    assert said.startswith("error: spec: missing.yaml: ")
    assert "Name a YAML file" in said


def test_a_spec_that_needs_more_agents_than_local(tmp_path: Path) -> None:
    said = refused(tmp_path, "run", spec_file(tmp_path, DIGITS + "agents: {min: 4}\n"), "--local", "2")
    assert said.startswith("error: agents.min: ")
    assert "--local 4" in said


@pytest.mark.parametrize(
    ("flag", "value"), [("--agents", "0"), ("--rounds", "0"), ("--alpha", "3"), ("--alpha", "nan"), ("--port", "70000")]
)
def test_a_flag_of_the_demo_out_of_range(tmp_path: Path, flag: str, value: str) -> None:
    said = refused(tmp_path, "demo", flag, value)
    assert said.startswith(f"error: {flag}: {value} ")
    assert "Use " in said
    assert said.count("\n") == 1


def test_an_option_or_a_command_that_does_not_exist(tmp_path: Path) -> None:
    assert "--agents" in refused(tmp_path, "demo", "--agnets", "3")
    assert "demo" in refused(tmp_path, "dmeo")


def test_a_directory_of_an_older_demo(tmp_path: Path) -> None:
    (tmp_path / "older" / "jetstream").mkdir(parents=True)
    assert refused(tmp_path, "demo", "--directory", "older").startswith("error: --directory: older is not empty. ")


# -- brokers ------------------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = refused(tmp_path, "demo", "--port", str(port))
    assert said.startswith(f"error: --port: {port}: ")
    assert "use 0" in said


@pytest.mark.parametrize("command", ["run", "coordinator", "agent"])
def test_a_broker_that_nobody_reaches(tmp_path: Path, command: str) -> None:
    args = [spec_file(tmp_path, DIGITS)] if command == "run" else ["--patience", "1"]
    said = refused(tmp_path, command, *args, "--connect", NOWHERE.replace("//", "//alice:s3cr3t@"))
    hidden = NOWHERE.replace("//", "//***@")
    assert said.splitlines()[-1].startswith(f"error: --connect: no broker answers at {hidden}")
    assert "SYNCLINE_NATS_URL" in said and "s3cr3t" not in said and "alice" not in said


@pytest.mark.parametrize("command", ["coordinator", "agent"])
def test_a_log_that_cannot_be_written(tmp_path: Path, command: str) -> None:
    said = refused(tmp_path, command, "--log-file", "missing/a.log", "--connect", NOWHERE, "--patience", "1")
    assert said == "error: --log-file: missing/a.log: No such file or directory. Name a file that you may write\n"


@pytest.mark.parametrize("command", ["run", "coordinator"])
def test_a_broker_without_jetstream(tmp_path: Path, bare_broker: str, command: str) -> None:
    args = [spec_file(tmp_path, DIGITS)] if command == "run" else []
    said = refused(tmp_path, command, *args, "--connect", bare_broker)
    assert said.splitlines()[-1].startswith(f"error: --connect: {bare_broker}: the broker has no JetStream")
    assert "-js" in said


# -- what only the coordinator can tell ---------------------------------------------------------------------------------


async def refused_by_coordinator(fleet: Fleet, place: Path, text: str) -> str:
    """What `syncline run` says on a running fleet, once it is checked that nothing of the run is on the bus."""
    broker = fleet.local.broker
    key = str(broker.keyring.path(subjects.COORDINATOR))
    args = ("run", spec_file(place, text), "--name", "refused-run", "--connect", broker.url, "--key", key)
    said = await asyncio.to_thread(refused, place, *args)
    assert not [k for k in await fleet.bus.kv_keys(subjects.RUNS_BUCKET) if k.startswith("refused-run.")]
    for stream in (subjects.updates_stream, subjects.offers_stream, subjects.model_stream, subjects.log_stream):
        with pytest.raises(Unavailable):
            await fleet.bus.state(stream("refused-run"))
    return said


@in_module_loop
async def test_a_task_that_does_not_exist(fleet: Fleet, tmp_path: Path) -> None:
    said = await refused_by_coordinator(fleet, tmp_path, "task: syncline.tasks.digit:Digits\n")
    assert said.startswith("error: task: ")
    assert "Did you mean `syncline.tasks.digits`?" in said


@in_module_loop
async def test_a_task_that_is_not_allowed(fleet: Fleet, tmp_path: Path) -> None:
    said = await refused_by_coordinator(fleet, tmp_path, "task: os.path:Evil\n")
    assert said.startswith("error: task: 'os.path:Evil' is not on this coordinator's allow-list (")
    assert "start the coordinator with `--allow-task 'os.path:Evil'`" in said


@in_module_loop
async def test_the_key_of_an_agent_or_a_watcher_submits_nothing(fleet: Fleet, tmp_path: Path) -> None:
    broker = fleet.local.broker
    spec = spec_file(tmp_path, DIGITS)
    for name in ("a1", "watch"):
        key = str(broker.keyring.path(name))
        said = await asyncio.to_thread(refused, tmp_path, "run", spec, "--connect", broker.url, "--key", key)
        assert said.startswith("error: --key: ")
        assert "coordinator's key" in said


@in_module_loop
async def test_a_broker_that_asks_for_a_key_and_gets_none(fleet: Fleet, tmp_path: Path) -> None:
    said = await asyncio.to_thread(refused, tmp_path, "ls", "--connect", fleet.local.broker.url)
    assert "asks for a key, and none was given. Name the key file" in said


@in_module_loop
async def test_a_key_that_is_not_the_agents_own(fleet: Fleet, tmp_path: Path) -> None:
    broker = fleet.local.broker
    key = str(broker.keyring.path("a1"))
    args = ("agent", "--name", "a2", "--key", key, "--connect", broker.url, "--state-dir", "state")
    agent = Command(tmp_path, args)
    try:
        assert await asyncio.to_thread(agent.ended, 60.0) == 2
        assert f"error: --key: {key} is not the key of 'a2'" in agent.err
        assert "answers to 'a2': the key belongs to another name" in agent.err and "--name" in agent.err
    finally:
        agent.stop()


def test_a_model_without_float_parameters(tmp_path: Path) -> None:
    code = """
        import torch
        from torch import nn
        from torch.utils.data import TensorDataset
        from syncline.tasks.base import Task

        class Counting(Task):
            def model(self):
                return nn.Identity()
            def dataset(self, part):
                return TensorDataset(torch.zeros(4, 1))
            def loss(self, model, batch):
                return batch[0].sum()
    """
    (tmp_path / "counting.py").write_text("\n".join(line[8:] for line in code.splitlines()))
    said = refused(tmp_path, "run", spec_file(tmp_path, "task: counting.py:Counting\n"), "--local", "1")
    assert said.splitlines()[-1].startswith("error: task: ")
    assert "float" in said
