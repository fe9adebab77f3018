"""A rolling upgrade: two installations on one broker, the newer from a wheel with one more setting, in both directions."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

import syncline
from syncline.bus.nats.bus import NatsBus
from syncline.bus.nats.lane import Connection
from syncline.errors import BusError
from syncline.wire import subjects
from syncline.wire.messages import Head, Stop, Stopped, decode, encode
from system.command import SYNCLINE, Command
from system.server import Server, free_port

ROOT = Path(__file__).parents[2]
NEWER = "9.0.0"
OLD, NEW = "old", "new"  # the versions, and the agents' names
pytestmark = pytest.mark.timeout(180)


def replaced(tree: Path, pattern: str, before: str, after: str) -> None:
    """Replace a text that stands in exactly one of the files that match."""
    (file,) = [path for path in tree.rglob(pattern) if before in path.read_text()]
    file.write_text(file.read_text().replace(before, after, 1))


def pip(*args: object) -> None:
    words = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, args)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{args}: {done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Build a wheel of the next version, whose section `local` has one more setting, and install it.

    Its virtual environment takes everything but Syncline from the environment of the tests. Returns its command `syncline`.
    """
    place = tmp_path_factory.mktemp("newer")
    tree, dist, home = place / "tree", place / "dist", place / "venv"
    for folder in ("services", "shared"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    own = f'__version__ = "{syncline.__version__}"'
    replaced(tree, "__init__.py", f"\n{own}\n", f'\n__version__ = "{NEWER}"\n')
    setting = 'prox_mu: float = Field(0.0, ge=0, description="'
    replaced(tree, "*.py", setting, f"warmth: float = 0.5\n    {setting}")
    pip("wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", dist, tree)

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    own_packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    theirs = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (own_packages / "environment.pth").write_text("".join(f"{path}\n" for path in theirs))
    (wheel,) = dist.iterdir()
    pip("--python", home / "bin" / "python", "install", "--no-index", "--no-deps", "--force-reinstall", wheel)
    return str(home / "bin" / "syncline")


class Stage:
    """A broker, services of both versions, and commands of both versions."""

    def __init__(self, place: Path, newer: str, url: str, started: ExitStack) -> None:
        self._place, self._url, self._started = place, url, started
        self._programs = {OLD: SYNCLINE, NEW: (newer,)}
        self._services: dict[tuple[str, str], Command] = {}

    def start(self, version: str, *args: str) -> Command:
        command = Command(self._place, (*args, "--connect", self._url), self._programs[version])
        self._started.callback(command.stop)
        return command

    def fleet(self, coordinator: str, *agents: str) -> None:
        """Have a coordinator of this version and an agent of each of these versions, and no others."""
        wanted = {("coordinator", coordinator), *(("agent", version) for version in agents)}
        for gone in set(self._services) - wanted:
            service = self._services.pop(gone)
            service.process.send_signal(signal.SIGTERM)
            assert service.ended(20.0) == 0, service.err
        for kind, version in sorted(wanted - set(self._services)):
            own = ("--name", version, "--state-dir", version, "--device", "cpu") if kind == "agent" else ()
            self._services[kind, version] = self.start(version, kind, *own)
        self._services["coordinator", coordinator].says("the coordinator is up")

    def run(self, version: str, name: str, local: str = "", *, agents: int = 1, versions: int = 2) -> Command:
        """Submit a run, and follow it. `local`: more settings of that section."""
        spec = f"task: syncline.tasks.noop:Noop\nagents: {{min: {agents}}}\nstop: {{versions: {versions}}}\n"
        (self._place / f"{name}.yaml").write_text(f"{spec}local: {{seconds: 0.1{local}}}\n")
        return self.start(version, "run", f"{name}.yaml", "--name", name)

    async def connect(self) -> NatsBus:
        return await NatsBus.connect(Connection(self._url, "test"))


@pytest.fixture(scope="module")
def stage(newer: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    place, port = tmp_path_factory.mktemp("stage"), free_port()
    config = place / "broker.conf"
    config.write_text(f'listen: "127.0.0.1:{port}"\njetstream {{ store_dir: "{place}/store" }}\n')
    with Server(config, place / "broker.log"), ExitStack() as started:
        yield Stage(place, newer, f"nats://127.0.0.1:{port}", started)


def test_the_two_commands_are_of_two_versions(newer: str) -> None:
    said = [subprocess.check_output([*program, "--version"], text=True) for program in (SYNCLINE, (newer,))]
    assert said == [f"syncline {syncline.__version__}\n", f"syncline {NEWER}\n"]


def test_a_newer_fleet_trains_what_an_older_command_submits(stage: Stage) -> None:
    stage.fleet(NEW, NEW)
    default = stage.run(OLD, "default-older")
    written = stage.run(OLD, "written-older", ", warmth: 0.9")
    assert written.ended() == 2
    assert written.err.startswith("error: local.warmth: there is no such setting"), written.err
    assert "The coordinator is" not in written.err, "the command refuses it by itself"
    assert default.ended() == 0, default.err


async def test_an_older_agent_names_the_setting_that_keeps_it_out_and_the_newer_one_trains(stage: Stage) -> None:
    stage.fleet(NEW, NEW)
    written = stage.run(NEW, "written", ", warmth: 0.9", versions=10_000)
    bus = await stage.connect()
    try:
        await _version(bus, written, "written", 1)
        stage.fleet(NEW, NEW, OLD)
        written.says("old cannot train: local.warmth: there is no such setting")
        assert "upgrade Syncline on this agent" in written.out
        reached = await _version(bus, written, "written", 1)
        await _version(bus, written, "written", reached + 2)
        decode(Stopped, await bus.request(subjects.stop(), encode(Stop(run="written")), 20.0))
        assert written.ended() == 0, written.err
    finally:
        await bus.close()


async def test_services_of_two_versions_work_on_one_run(stage: Stage) -> None:
    """The newer coordinator begins a run with an agent of each version, and the older one ends it."""
    stage.fleet(NEW, NEW, OLD)
    both = stage.run(NEW, "both", agents=2, versions=12)
    bus = await stage.connect()
    try:
        await _version(bus, both, "both", 3)
        stage.fleet(OLD, NEW, OLD)
        assert both.ended() == 0, both.err + both.out
        ended = await _head(bus, "both")
    finally:
        await bus.close()
    assert ended is not None and ended.phase == "done" and ended.version == 12, ended
    assert "no such setting" not in both.out and "cannot train" not in both.out, both.out


def test_an_older_fleet_trains_what_a_newer_command_submits_and_refuses_by_name_what_it_does_not_know(
    stage: Stage,
) -> None:
    stage.fleet(OLD, OLD)
    default = stage.run(NEW, "default-newer")
    written = stage.run(NEW, "written-newer", ", warmth: 0.5")
    assert written.ended() == 2
    assert written.err.startswith("error: local.warmth: there is no such setting"), written.err
    assert f"The coordinator is Syncline {syncline.__version__}: upgrade it" in written.err
    assert default.ended() == 0, default.err


async def _version(bus: NatsBus, run: Command, name: str, least: int) -> int:
    """Wait for a version of a run, and return the newest."""
    while (head := await _head(bus, name)) is None or head.version < least:
        assert run.process.poll() is None, run.err + run.out
        await asyncio.sleep(0.05)
    return head.version


async def _head(bus: NatsBus, run: str) -> Head | None:
    with suppress(BusError):
        entry = await bus.kv_get(subjects.RUNS_BUCKET, subjects.head_key(run))
        return None if entry is None else decode(Head, entry.value)
    return None
