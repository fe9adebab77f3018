"""`syncline demo` and `syncline run` as a user runs them: what they say, and that they leave nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import nats
import pytest
import pytest_asyncio

from syncline.bus.server.embedded import EmbeddedBroker
from syncline.wire import subjects
from system.command import LONG_S, Command, until
from system.harness import Fleet, eventually

pytestmark = pytest.mark.timeout(180)
in_module_loop = pytest.mark.asyncio(loop_scope="module")

KEYS = {
    *("run", "versions", "seconds", "first_commit_s", "accuracy", "metrics", "alone"),
    *("bytes_up", "bytes_down", "digest", "reason"),
}
Start = Callable[..., Command]


def all_ended(service: Command) -> bool:
    return not service.processes()


def alive(service: Command) -> str:
    return f"still alive: {service.processes()}"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts commands, and ends those that still run."""
    started: list[Command] = []

    def begin(*args: str) -> Command:
        started.append(Command(tmp_path, args))
        return started[-1]

    yield begin
    for command in started:
        command.stop()


# -- the demo -----------------------------------------------------------------------------------------------------------


class Demo:
    """One whole `syncline demo --json`, and what a bare client heard meanwhile."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.heard: list[tuple[str, dict[str, Any]]] = []
        self.events: list[dict[str, Any]] = []
        self.command = Command(place, ("demo", "--json", "--directory", "kept"))

    async def watch(self) -> None:
        """With nothing but a NATS client, the address and the watcher's key."""
        where = self.place / "kept" / "broker.url"

        async def there() -> bool:
            return where.exists() and where.read_text().endswith("\n")

        await eventually(there, "the broker's address", 60.0)
        client = await nats.connect(where.read_text().strip(), nkeys_seed=str(self.place / "kept/keys/watch.nk"))

        async def hear(message: Any) -> None:
            self.heard.append((message.subject, json.loads(message.data)))

        async def hear_event(message: Any) -> None:
            self.events.append(json.loads(message.data))

        await client.subscribe("syncline.v1.*.metrics.>", cb=hear)
        await client.subscribe("syncline.v1.*.events.*", cb=hear_event)
        await asyncio.to_thread(self.command.ended)
        await client.close()

    @property
    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.command.out)
        return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    whole = Demo(tmp_path_factory.mktemp("demo"))
    try:
        await whole.watch()
    finally:
        whole.command.stop()
    return whole


@in_module_loop
async def test_the_demo_is_done_and_says_all_it_promises_in_one_line(demo: Demo) -> None:
    assert demo.command.process.returncode == 0, demo.command.err
    assert demo.command.out.count("\n") == 1
    result = demo.result
    assert set(result) == KEYS
    assert result["versions"] == 40
    assert result["reason"] == "40 versions"
    assert len(result["digest"]) == 32
    assert 0 < result["first_commit_s"] < 60
    assert result["bytes_up"] > result["bytes_down"] > 0
    assert result["metrics"]["accuracy"] == result["accuracy"]


@in_module_loop
async def test_the_shared_model_beats_every_agent_alone(demo: Demo) -> None:
    result = demo.result
    assert result["accuracy"] >= 0.96
    assert set(result["alone"]) == {"a1", "a2", "a3", "a4"}
    assert all(accuracy < result["accuracy"] for accuracy in result["alone"].values())


@in_module_loop
async def test_any_nats_client_can_watch_every_agent(demo: Demo) -> None:
    who = {subject.split(".")[4] for subject, _ in demo.heard}
    assert who == {"a1", "a2", "a3", "a4", subjects.COORDINATOR}
    losses = [m["loss"] for subject, m in demo.heard if subject.endswith(".a1.train") and m["loss"] is not None]
    assert len(losses) > 3
    assert losses[-1] < losses[0]


@in_module_loop
async def test_the_first_thing_a_newcomer_sees_is_without_a_warning(demo: Demo) -> None:
    assert {e["event"] for e in demo.events} >= {"agent-joined", "run-done"}
    assert [e["text"] for e in demo.events if e["level"] != "info"] == []


@in_module_loop
async def test_a_demo_that_keeps_its_directory_leaves_nothing_else(demo: Demo) -> None:
    demo.command.leaves_nothing(5.0)
    assert {"coordinator.log", "a1.log"} <= {p.name for p in (demo.place / "kept" / "logs").iterdir()}


# -- interrupted --------------------------------------------------------------------------------------------------------


IMPORTING = "has begun to import"
MOMENTS = [IMPORTING, "starting a broker", "round ", "each agent alone"]


def wait_for(demo: Command, moment: str) -> None:
    """Until it says so; `IMPORTING` as soon as the process is there that imports torch for all others."""
    if moment == IMPORTING:
        until(lambda: len(demo.processes()) > 1, LONG_S, lambda: demo.err)
    else:
        demo.says(moment)


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_stops_everything_within_seconds(start: Start, moment: str) -> None:
    demo = start("demo", "--rounds", "8")
    wait_for(demo, moment)
    began = time.monotonic()
    demo.process.send_signal(signal.SIGINT)
    assert demo.ended(5.0) == 130
    demo.leaves_nothing(max(0.0, began + 5.0 - time.monotonic()))
    assert "interrupted" in demo.err
    assert "Traceback" not in demo.err


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_demo_that_is_killed_takes_everything_with_it(start: Start, moment: str) -> None:
    demo = start("demo", "--rounds", "8")
    wait_for(demo, moment)
    assert moment != "round " or len(demo.processes()) > 10, (
        "a broker, a coordinator and four agents, each with a child"
    )
    demo.process.kill()
    demo.ended(5.0)
    demo.leaves_nothing(10.0)


def test_an_agent_that_is_killed_is_named_and_the_demo_goes_on(start: Start) -> None:
    demo = start("demo", "--rounds", "30", "--directory", "kept")
    demo.says("round ")
    os.kill(_service(demo, "a2"), signal.SIGKILL)
    assert demo.ended() == 0, demo.err
    assert "a2: its process was killed by SIGKILL" in demo.out
    assert "a2 alone" not in demo.out
    assert "a1 alone" in demo.out


def test_a_coordinator_that_is_killed_ends_the_demo_with_its_log(start: Start) -> None:
    demo = start("demo", "--json")
    demo.says("round ")
    os.kill(_service(demo, subjects.COORDINATOR), signal.SIGKILL)
    assert demo.ended(15.0) == 1
    assert "error: the coordinator's process was killed by SIGKILL" in demo.err
    assert "coordinator.log: " in demo.err
    assert "Traceback" not in demo.err
    demo.leaves_nothing(5.0)


def test_a_broker_that_is_killed_is_started_again_with_all_that_it_held(start: Start, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("task: syncline.tasks.digits:Digits\nname: long\nstop: {versions: 100}\n")
    run = start("run", "s.yaml", "--local", "2")
    run.says("round ")
    (pid_file,) = run.temporary.glob("syncline-broker-*/broker.pid")
    os.kill(int(pid_file.read_text()), signal.SIGKILL)
    assert run.ended() == 0, run.err
    assert "the broker's process was killed by SIGKILL; restarting it" in run.out
    assert "run long: 100 versions" in run.out
    run.leaves_nothing(5.0)


def test_a_coordinator_that_is_killed_is_started_again_and_the_run_goes_on(start: Start, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("task: syncline.tasks.digits:Digits\nname: long\nstop: {versions: 100}\n")
    run = start("run", "s.yaml", "--local", "2", "--stay")
    run.says("round ")
    os.kill(_service(run, subjects.COORDINATOR), signal.SIGKILL)
    run.says("the fleet stays up")
    assert "the coordinator's process was killed by SIGKILL; restarting it" in run.out
    last, summary = run.out.index("round 100/100"), run.out.index("run long: 100 versions")
    assert last < summary
    os.kill(_service(run, subjects.COORDINATOR), signal.SIGKILL)
    until(lambda: run.out.count("restarting it") == 2, 10, lambda: run.out + run.err)
    run.process.send_signal(signal.SIGINT)
    assert run.ended(10.0) == 0
    run.leaves_nothing(5.0)


def _service(command: Command, name: str) -> int:
    """The process of a service: the one that holds its log open and is nobody's child there."""
    holders = []
    for entry in (line.split()[0] for line in command.processes()):
        try:
            files = [str(fd.readlink()) for fd in Path("/proc", entry, "fd").iterdir()]
        except OSError:
            continue
        if any(file.endswith(f"logs/{name}.log") for file in files):
            holders.append(int(entry))
    parents = {pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in holders}
    (service,) = [pid for pid, parent in parents.items() if parent not in holders]
    return service


# -- run ----------------------------------------------------------------------------------------------------------------

SPEC = """
task: syncline.tasks.digits:Digits
local: {steps: 5}
stop: {versions: 3}
"""


def test_run_local_needs_one_line_of_settings_beside_the_task(start: Start, tmp_path: Path) -> None:
    (tmp_path / "My first.yaml").write_text(SPEC)
    run = start("run", "My first.yaml", "--local", "2", "--json")
    assert run.ended() == 0, run.err
    result = json.loads(run.out)
    assert set(result) == KEYS - {"first_commit_s", "alone"}
    assert result["run"].startswith("my-first-")
    assert result["versions"] == 3
    assert result["accuracy"] > 0.3
    run.leaves_nothing(5.0)


def test_what_a_task_prints_is_not_on_standard_output(start: Start, tmp_path: Path) -> None:
    code = "from syncline.tasks.digits import Digits\nprint('I am here')\nclass Mine(Digits):\n    pass\n"
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "mine.yaml").write_text(SPEC.replace("syncline.tasks.digits:Digits", "mine.py:Mine"))
    run = start("run", "mine.yaml", "--local", "1", "--json")
    assert run.ended() == 0, run.err
    assert json.loads(run.out)["versions"] == 3


def test_a_task_that_breaks_on_the_agents_fails_the_run_and_shows_why(start: Start, tmp_path: Path) -> None:
    code = """
        from syncline.tasks.digits import Digits

        class Broken(Digits):
            def loss(self, model, batch):
                raise RuntimeError("a bug of mine")
    """
    (tmp_path / "broken.py").write_text("\n".join(line[8:] for line in code.splitlines()))
    (tmp_path / "broken.yaml").write_text(SPEC.replace("syncline.tasks.digits:Digits", "broken.py:Broken"))
    run = start("run", "broken.yaml", "--local", "2", "--json")
    assert run.ended() == 1, run.out + run.err
    last = run.err[run.err.index("error: ") :]
    assert "a bug of mine (broken.py:6)" in last
    assert "a1.log: " in last
    assert "no agent can train" in json.loads(run.out)["reason"]
    run.leaves_nothing(5.0)


@in_module_loop
async def test_run_follows_on_a_broker_that_is_there_and_ctrl_c_leaves_the_run(
    fleet: Fleet, start: Start, tmp_path: Path
) -> None:
    broker = fleet.local.broker
    where = ("--connect", broker.url, "--key", str(broker.keyring.path(subjects.COORDINATOR)))
    (tmp_path / "there.yaml").write_text(SPEC + "agents: {min: 4}\n")
    run = start("run", "there.yaml", *where, "--json")
    assert await asyncio.to_thread(run.ended) == 0, run.err
    result = json.loads(run.out)
    head = await fleet.head(result["run"])
    assert head is not None
    assert (head.digest, head.version) == (result["digest"], result["versions"])

    (tmp_path / "long.yaml").write_text(SPEC.replace("versions: 3", "versions: 400") + "agents: {min: 4}\n")
    long = start("run", "long.yaml", *where, "--name", "long")
    await asyncio.to_thread(long.says, "round ")
    long.process.send_signal(signal.SIGINT)
    assert await asyncio.to_thread(long.ended, 5.0) == 130
    key = broker.keyring.path("watch")
    assert "run long continues" in long.err
    assert f"syncline watch long --connect {broker.url} --key {key}" in long.err
    before = await fleet.head("long")
    assert before is not None
    await fleet.version("long", before.version + 5)


@in_module_loop
async def test_the_services_started_by_hand_make_a_run_together(start: Start, tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(SPEC + "agents: {min: 2}\n")
    async with EmbeddedBroker(agents=["left", "right"]) as broker:

        def key(name: str) -> tuple[str, ...]:
            return ("--connect", broker.url, "--key", str(broker.keyring.path(name)))

        services = [start("coordinator", *key(subjects.COORDINATOR), "--threads", "1")]
        for name in ("left", "right"):
            options = ("--name", name, "--state-dir", str(tmp_path / name), "--device", "cpu", "--threads", "1")
            services.append(start("agent", *key(name), *options))
        await asyncio.to_thread(services[0].says, "coordinator-started")
        run = start("run", "two.yaml", *key(subjects.COORDINATOR))
        assert await asyncio.to_thread(run.ended) == 0, run.err
        assert "3 versions" in run.out
        for service in services:
            service.process.send_signal(signal.SIGTERM)
        for service in services:
            assert await asyncio.to_thread(service.ended, 10.0) == 0, service.err
            await asyncio.to_thread(until, partial(all_ended, service), 5.0, partial(alive, service))
