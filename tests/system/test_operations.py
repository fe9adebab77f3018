"""docs/operations.md is run: every command with a prompt, in order, as one person at one shell in an empty directory."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from system.dockerfile import ROOT
from system.server import free_port

pytestmark = pytest.mark.timeout(400)

DOCUMENT = ROOT / "docs" / "operations.md"


def commands() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert all(line.startswith("$ ") for line in lines)
    return [line.removeprefix("$ ") for line in lines]


def script() -> str:
    """Stops at the first command that fails, says which, and ends what it started in the background. On free ports."""
    text = "\n".join(["set -eu", "trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT", *commands()])
    ports = {"4222": free_port(), "8222": free_port()}
    made = text.replace("keys make ops ", f"keys make ops --monitor 127.0.0.1:{ports['8222']} ")
    return made.replace(":4222", f":{ports['4222']}")


def test_every_command_of_the_page_works_in_its_order(tmp_path: Path) -> None:
    mark = secrets.token_hex(8)
    environ = {k: v for k, v in os.environ.items() if not k.startswith("SYNCLINE_")}
    path = os.pathsep.join([sysconfig.get_path("scripts"), str(Path(sys.executable).parent), environ.get("PATH", "")])
    environ |= {"PATH": path, "HOME": str(tmp_path / "home"), "SYNCLINE_TEST_MARK": mark}
    (tmp_path / "home").mkdir()
    place = tmp_path / "place"
    place.mkdir()
    done = subprocess.run(
        ["bash", "-x", "-c", script()], cwd=place, env=environ, capture_output=True, text=True, timeout=350, check=False
    )
    logs = "\n".join(f"{p.name}: {p.read_text()[-1500:]}" for p in place.glob("*.log"))
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}\n{logs}"
    assert "10 versions" in done.stdout and "Traceback" not in done.stdout + done.stderr
    assert (place / "first.safetensors").stat().st_size > 1000
    assert (place / "backup.tgz").stat().st_size > 1000
    assert not (place / "ops/agents/edge-7.nk").exists()
    assert not _left(mark), "what the page starts ends with its shell"


def _left(mark: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"SYNCLINE_TEST_MARK={mark}".encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().decode(errors="replace"))
        except OSError:
            pass
    return found


def test_its_units_start_commands_that_exist_with_variables_that_exist() -> None:
    text = DOCUMENT.read_text()
    shown = "".join(
        subprocess.run(
            [sys.executable, "-m", "syncline_cli", name, "--help"], capture_output=True, text=True, check=True
        ).stdout
        for name in ("agent", "coordinator", "doctor", "keys")
    )
    variables = set(re.findall(r"^Environment=(SYNCLINE_\w+)=", text, re.MULTILINE))
    assert variables and all(variable in shown for variable in variables)
    assert "ExecStart=/opt/syncline/bin/syncline agent\n" in text
