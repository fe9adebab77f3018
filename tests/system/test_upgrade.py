"""A rolling upgrade: two trees on one broker, the newer with one more setting, in both directions."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from command import Command
from server import Server, free_port

from syncline.bus.nats.bus import Connection, NatsBus
from syncline.errors import BusError
from syncline.wire import subjects
from syncline.wire.messages import Head, decode

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def newer_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages whose section `local` has one more setting."""
    tree = tmp_path_factory.mktemp("newer")
    for package in (*(ROOT / "services").iterdir(), ROOT / "shared" / "syncline"):
        if package.is_dir():
            shutil.copytree(package, tree / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    spec = tree / "syncline" / "spec.py"
    before = 'prox_mu: float = Field(0.0, ge=0, description="'
    assert before in spec.read_text()
    spec.write_text(spec.read_text().replace(before, f"warmth: float = 0.5\n    {before}", 1))
    return tree


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    port = free_port()
    config = tmp_path / "broker.conf"
    config.write_text(f'listen: "127.0.0.1:{port}"\njetstream {{ store_dir: "{tmp_path}/store" }}\n')
    with Server(config, tmp_path / "broker.log"):
        yield f"nats://127.0.0.1:{port}"


async def test_services_of_two_versions_work_on_one_run(
    newer_tree: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newer coordinator begins a run with an agent of each version, and the older one ends it."""
    (tmp_path / "spec.yaml").write_text(
        "name: both\ntask: syncline.tasks.noop:Noop\nagents: {min: 2}\nlocal: {seconds: 0.1}\nstop: {versions: 12}\n"
    )
    with ExitStack() as started:

        def start(*args: str, newer: bool = False) -> Command:
            with monkeypatch.context() as environment:
                if newer:
                    environment.setenv("PYTHONPATH", str(newer_tree))
                command = Command(tmp_path, (*args, "--connect", url))
            started.callback(command.stop)
            return command

        coordinator = start("coordinator", newer=True)
        agents = [start("agent", "--name", "old", "--state-dir", "old", "--device", "cpu")]
        agents.append(start("agent", "--name", "new", "--state-dir", "new", "--device", "cpu", newer=True))
        run = start("run", "spec.yaml", newer=True)
        bus = await NatsBus.connect(Connection(url, "test"))
        try:
            while (head := await _head(bus)) is None or head.version < 3:
                assert run.process.poll() is None, run.err + run.out
                await asyncio.sleep(0.05)
            coordinator.process.send_signal(signal.SIGTERM)
            assert coordinator.ended(20.0) == 0, coordinator.err
            start("coordinator")
            assert run.ended() == 0, run.err + run.out
            ended = await _head(bus)
        finally:
            await bus.close()
        assert ended is not None and ended.phase == "done" and ended.version == 12, ended
        story = "".join(agent.err for agent in agents)
        assert "no such setting" not in story and "cannot train" not in story, story


async def _head(bus: NatsBus) -> Head | None:
    try:
        entry = await bus.kv_get(subjects.RUNS_BUCKET, subjects.head_key("both"))
    except BusError:
        return None
    return None if entry is None else decode(Head, entry.value)
