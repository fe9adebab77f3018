"""The command line without a fleet: names, defaults, help, and how fast it starts."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import syncline
from syncline.errors import ConfigError, RunFailed
from syncline.spec.run_spec import stem_of
from syncline_cli import main as cli
from syncline_cli.commands.agent import name_of_host
from syncline_cli.commands.run import read_spec
from syncline_cli.local_fleet.demo_settings import DemoSettings
from syncline_cli.local_fleet.supervise import how_it_ended
from syncline_cli.process import Interrupted, as_typed, run_interruptible, since_start_s

TASK = "task: syncline.tasks.digits:Digits\n"
HELP_LINES = 36


def spec(place: Path, text: str = "") -> Path:
    path = place / "My spec.yaml"
    path.write_text(TASK + text)
    return path


# -- main ---------------------------------------------------------------------------------------------------------------


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"syncline {syncline.__version__}\n"


BELOW = [["keys", name] for name in ("make", "add", "revoke", "list")] + [["bench", "round"]]


@pytest.mark.parametrize("command", [[], *BELOW, *([name] for name in cli.COMMANDS)])
def test_help_fits_one_screen(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([*command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= HELP_LINES
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize("command", [*BELOW, *([name] for name in cli.COMMANDS if name != "bench")])
def test_help_has_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([*command, "--help"])
    assert f"Example: syncline {' '.join(command)}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "hint"), [(["dmeo"], "demo"), (["demo", "--agnets", "3"], "--agents"), (["run"], "SPEC")]
)
def test_what_click_refuses_is_wrong_input(argv: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("--agents", "0 is too few", "Use 1"), 2, "error: --agents: 0 is too few. Use 1\n"),
        (RunFailed("run r: no"), 1, "error: run r: no\n"),
        (Interrupted("; run r goes on"), 130, "interrupted; run r goes on\n"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    error: Exception, code: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", broken)
    assert cli.main(["demo"]) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["keys", "make", ""], "DIR: '' is not a directory. Name one; '.' is the current one"),
        (["agent", "--task-dir", "/not/there"], "--task-dir: '/not/there' is not a directory. Make it"),
        (["coordinator", "--task-dir", "/not/there"], "--task-dir: '/not/there' is not a directory. Make it"),
        (["run", "s.yaml", "--local", "2", "--connect", "nats://hub:4222"], "--connect nats://hub:4222 names another"),
        (["run", "s.yaml", "--local", "2", "--key", "k.nk"], "--key k.nk names another. Remove --local or --key"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_happens(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_command_imports_torch_or_anything_slow_before_it_must() -> None:
    code = (
        "import sys\n"
        "from syncline_cli.main import main, COMMANDS\n"
        "import importlib\n"
        "light = [importlib.import_module(m) for n, m in COMMANDS.items() if n != 'bench']\n"
        "print([m for m in ('torch', 'rich', 'nats', 'numpy', 'sklearn') if m in sys.modules])\n"
        "import syncline_cli.ui.demo_run, syncline_cli.ui.run_follow, syncline_cli.local_fleet.supervise\n"
        "print([m for m in ('torch', 'sklearn') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n[]\n"


# -- settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("agents", 0),
        ("agents", 65),
        ("rounds", 0),
        ("alpha", 2.0),
        ("alpha", -0.1),
        ("alpha", float("nan")),
        ("port", -1),
    ],
)
def test_a_flag_out_of_range_is_named(setting: str, value: float) -> None:
    with pytest.raises(ConfigError) as caught:
        DemoSettings(**{setting: value})  # type: ignore[arg-type]
    assert caught.value.setting == f"--{setting}"
    assert caught.value.hint


def test_alone_means_the_same_steps_on_the_same_parts_and_alpha_0() -> None:
    settings = DemoSettings(agents=3, rounds=7, alpha=0.5, seed=11)
    together, alone = settings.spec("t"), settings.spec_alone("a", 3)
    assert together.mix.alpha == 0.5
    assert alone.mix.alpha == 0
    assert alone.local.steps_for(0) == together.stop.versions * together.local.steps_for(0) == 7 * 20
    assert (alone.partition, alone.seed, alone.task) == (together.partition, together.seed, together.task)
    assert alone.local.optimizer == together.local.optimizer
    assert (alone.stop.versions, alone.evaluate.agents, alone.evaluate.center) == (1, True, False)


def test_a_run_without_a_name_gets_the_files_and_something_of_its_own(tmp_path: Path) -> None:
    path = spec(tmp_path)
    names = {read_spec(path).name for _ in range(3)}
    assert len(names) == 3
    assert all(name.startswith("my-spec-") for name in names)
    assert read_spec(spec(tmp_path, "name: mine\n")).name == "mine"
    assert read_spec(spec(tmp_path, "name: mine\n"), name="other").name == "other"
    assert stem_of(Path("___.yaml")) == "run"


@pytest.mark.parametrize(
    ("text", "least"),
    [
        ("", 4),
        ("agents: {min: 2}\n", 2),
        ("agents: {max: 3}\n", 3),
        ("sync: {quorum: 3}\n", 4),
        ("agents: {lost_after_s: 9}\n", 4),
    ],
)
def test_local_waits_for_all_its_agents_where_the_spec_says_nothing(tmp_path: Path, text: str, least: int) -> None:
    assert read_spec(spec(tmp_path, text), local=4).agents.min == least


def test_local_refuses_a_spec_that_needs_more_agents(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"agents\.min: .*--local 5"):
        read_spec(spec(tmp_path, "agents: {min: 5}\n"), local=4)


@pytest.mark.parametrize(
    ("host", "name"),
    [("pi-7.lan", "pi-7"), ("My_Box", "my-box"), ("", "agent"), ("---", "agent"), ("x" * 80, "x" * 63), ("Ünï", "n")],
)
def test_any_host_name_makes_an_agents_name(host: str, name: str) -> None:
    assert name_of_host(host) == name


# -- this process -------------------------------------------------------------------------------------------------------


def test_the_age_of_a_process_counts_from_its_creation() -> None:
    began = time.monotonic()
    code = "import time; time.sleep(0.3); from syncline_cli.process import since_start_s; print(since_start_s())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.3 <= float(done.stdout) <= time.monotonic() - began + 0.02  # the kernel counts in hundredths
    assert since_start_s() > 0


def test_a_command_is_shown_as_it_can_be_typed_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / ".venv" / "bin" / "syncline"
    monkeypatch.setattr(sys, "executable", str(script.with_name("python")))
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(tmp_path)
    assert as_typed() == "syncline", "there is no better"
    script.parent.mkdir(parents=True)
    script.touch(mode=0o755)
    assert as_typed() == ".venv/bin/syncline"
    monkeypatch.setenv("PATH", str(script.parent))
    assert as_typed() == "syncline"


def test_a_signal_cancels_the_work_lets_it_clean_up_and_is_reported() -> None:
    steps: list[str] = []

    async def work() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            steps.append("cleaned up")
        return 0

    with pytest.raises(Interrupted):
        run_interruptible(work, on_signal=lambda: steps.append("told"))
    assert steps == ["told", "cleaned up"]


def test_how_a_process_ended_in_words() -> None:
    assert how_it_ended(3) == "ended with code 3"
    assert how_it_ended(-9) == "was killed by SIGKILL"
    assert how_it_ended(-64) in ("was killed by signal 64", "was killed by SIGRTMAX")
