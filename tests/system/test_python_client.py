"""The Python client on a real fleet: the program in docs/python.md runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import syncline
from syncline.errors import ConfigError, Denied, Unreachable

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.system


def test_the_program_in_the_documentation_trains_and_prints(tmp_path: Path) -> None:
    program = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)[0]
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    followed, commits = lines[:-6], lines[-6:-1]
    assert re.fullmatch(r"5 0\.\d+", followed[-1]), done.stdout
    assert commits == [f"{version} ['a1', 'a2']" for version in range(1, 6)]
    assert re.fullmatch(r"\[.*\] [0-9a-f]{32}", lines[-1])


async def test_what_cannot_be_reached_or_used_is_an_error() -> None:
    with pytest.raises(Unreachable):
        async with syncline.connect("nats://127.0.0.1:1", patience_s=0.1):
            pass
    with pytest.raises(ConfigError, match="key file: /not/there"):
        async with syncline.connect(key="/not/there"):
            pass
    with pytest.raises(ConfigError, match="agents: 0 is out of range"):
        async with syncline.local_fleet(agents=0):
            pass


async def test_a_broker_with_accounts_refuses_a_client_without_a_key() -> None:
    async with syncline.local_fleet(agents=1) as client:
        assert await client.runs() == []
        with pytest.raises(Denied):
            async with syncline.connect(client.url):
                pass
