"""The Dockerfile without a container engine: what its steps do, done in a clean virtual environment and an empty context.

The steps of the build stage are carried out as they stand, in order, with three translations: `/opt/syncline` and `/src`
are directories of the test, the base image's `pip` and `python` are this interpreter's, and a cache mount is the machine's
own cache. The steps of the last stage that need root (`useradd`, `install`) are read, not run.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from system.dockerfile import ROOT, Step, copied, environment, exec_form, only, steps

pytestmark = pytest.mark.timeout(900)

VENV, SOURCE = "/opt/syncline", "/src"


# -- what stands in it -------------------------------------------------------------------------------------------------
def test_the_process_is_started_without_a_shell_and_not_as_root() -> None:
    assert exec_form(only("ENTRYPOINT")) == ["syncline"]
    assert exec_form(only("CMD")) == ["--help"]
    user, _, group = only("USER").text.partition(":")
    assert int(user) > 0 and int(group) > 0
    assert f"--uid {user}" in only("RUN").text


def test_the_user_is_set_after_everything_that_needs_root() -> None:
    last = [step.instruction for step in steps() if step.stage == ""]
    assert last.index("USER") > max(i for i, name in enumerate(last) if name in ("RUN", "COPY"))


def test_there_is_no_compiler_and_no_package_of_the_system_in_it() -> None:
    assert {step.text.partition(" ")[0] for step in steps() if step.instruction == "FROM"} == {"python:${PYTHON}-slim"}
    assert not re.search(r"\bapt|\bapk\b|gcc|build-essential", (ROOT / "Dockerfile").read_text())


def test_no_registry_is_named() -> None:
    for name in ("Dockerfile", "compose.yaml", "compose.gpu.yaml", ".dockerignore"):
        text = (ROOT / name).read_text()
        assert not re.search(r"https?://(?!127\.0\.0\.1)", text), name


def test_the_context_is_what_is_copied_and_nothing_else() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*", "all is left out that is not named"
    named = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert named == {*copied("build"), *copied("")}
    assert {"**/__pycache__", "**/*.egg-info"} <= set(lines)


def test_what_changes_most_is_copied_last() -> None:
    order = copied("build")
    assert order.index("constraints.txt") < order.index("pyproject.toml") < order.index("shared") < len(order)
    torch, packages, own = [s.text for s in steps() if s.stage == "build" and s.instruction == "RUN"][1:]
    assert torch.endswith("${TORCH_PIP_ARGS} torch") and "needed.txt" in packages and own.endswith("--no-deps .")


def test_its_health_check_is_a_command_that_exists() -> None:
    words = exec_form(only("HEALTHCHECK"))
    environ = {**os.environ, "SYNCLINE_NATS_URL": "nats://127.0.0.1:1"}
    command = [sys.executable, "-m", "syncline_cli", *words[1:]]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert words[0] == "syncline" and done.returncode == 1 and "no server answers" in done.stdout


# -- what it does ------------------------------------------------------------------------------------------------------
class Build:
    """The image's directories, in one of ours."""

    def __init__(self, place: Path) -> None:
        self.root = place / "root"
        self.context = place / "context"
        self.venv = self.root / VENV.removeprefix("/")
        tools = place / "tools"  # what the base image has on its PATH
        tools.mkdir(parents=True)
        for name, words in (("python", '"$@"'), ("pip", '-m pip "$@"')):
            (tools / name).write_text(f"#!/bin/sh\nexec {sys.executable} {words}\n")
            (tools / name).chmod(0o755)
        self.path = f"{tools}:/usr/bin:/bin"

    def fill_context(self) -> None:
        """What .dockerignore lets through of the repository's own files."""
        lines = (ROOT / ".dockerignore").read_text().splitlines()
        out = [line.removeprefix("**/") for line in lines if line.startswith("**/")]

        def left_out(_: str, names: list[str]) -> set[str]:
            return {name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in out)}

        self.context.mkdir()
        for name in (line.removeprefix("!") for line in lines if line.startswith("!")):
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, self.context / name, ignore=left_out)
            else:
                shutil.copy(ROOT / name, self.context / name)

    def do(self, step: Step) -> None:
        at = self.root / SOURCE.removeprefix("/")
        if step.instruction == "COPY" and "from" not in step.options:
            target = (
                self.root / step.words[-1].removeprefix("/") if step.words[-1].startswith("/") else at / step.words[-1]
            )
            for source in step.words[:-1]:
                self._copy(self.context / source, target)
        elif step.instruction == "RUN" and step.stage == "build":
            self._run(step, at)

    def _copy(self, source: Path, target: Path) -> None:
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)

    def _run(self, step: Step, at: Path) -> None:
        at.mkdir(parents=True, exist_ok=True)
        script = re.sub(r"^(?:--mount=\S+\s+)+", "", step.text).replace(VENV, str(self.venv))
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "SYNCLINE_"))}
        environ |= {"PATH": self.path, "TORCH_PIP_ARGS": ""}
        done = subprocess.run(["sh", "-c", script], cwd=at, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    made = Build(tmp_path_factory.mktemp("image"))
    made.fill_context()
    for step in steps():
        made.do(step)
    return made


def inside(build: Build, *words: str) -> subprocess.CompletedProcess[str]:
    """A command in the image: its PATH and variables, a directory from which nothing of the repository can be imported."""
    given = {k: v.replace(VENV, str(build.venv)).replace("$PATH", "/usr/bin:/bin") for k, v in environment().items()}
    given["SYNCLINE_STATE_DIR"] = str(build.root / "state")
    environ = {"HOME": str(build.root), "LANG": "C.UTF-8", **given}
    program = shutil.which(words[0], path=environ["PATH"])
    assert program is not None, words
    return subprocess.run(
        [program, *words[1:]], cwd=build.root, env=environ, capture_output=True, text=True, check=False
    )


def test_the_steps_give_a_command_that_works_from_what_was_copied_alone(build: Build) -> None:
    shutil.rmtree(build.root / SOURCE.removeprefix("/"))
    shutil.rmtree(build.context)
    shown = inside(build, *exec_form(only("ENTRYPOINT")), *exec_form(only("CMD")))
    assert shown.returncode == 0 and "syncline demo" in shown.stdout, shown.stderr
    where = inside(
        build, "python", "-c", "import syncline, syncline_agent; print(syncline.__file__, syncline_agent.__file__)"
    )
    assert all(path.startswith(str(build.venv)) for path in where.stdout.split())
    assert not (build.venv / "bin" / "pip").exists(), "nothing to install more with"
    assert (build.root / "runs" / "first-run.yaml").is_file()


def test_the_packages_are_those_that_are_tested(build: Build) -> None:
    code = "import json; from importlib import metadata as m; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    there = json.loads(inside(build, "python", "-c", code).stdout)
    wanted = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    same = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in wanted.items()}
    for name, version in there.items():
        known = same.get(re.sub(r"[-_.]+", "-", name).lower())
        assert name == "syncline" or version.partition("+")[0] == known, name
    assert "pytest" not in there and "ruff" not in there


def test_a_whole_run_works_in_it(build: Build) -> None:
    (build.root / "small.yaml").write_text(
        "task: syncline.tasks.digits:Digits\nlocal: {steps: 5}\nstop: {versions: 2}\n"
    )
    done = inside(build, "syncline", "run", "small.yaml", "--local", "1", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["versions"] == 2, done.stderr
