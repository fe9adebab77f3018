"""Equal containers become different agents: each claims a free key for its lifetime, and the same key after a restart."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from syncline.bus.server.accounts import Keyring
from syncline.errors import ConfigError
from syncline_agent.identity import ClaimedName, claim

Claim = Callable[..., ClaimedName]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return Keyring(tmp_path / "set", by_kind=True).create([f"a{i}" for i in range(1, 12)]).path("a1").parent


@pytest.fixture
def claimed(keys: Path, tmp_path: Path) -> Iterator[Claim]:
    """Claim a name for a host; all locks are released at the end."""
    made: list[ClaimedName] = []

    def auto(host: str, **changes: Path) -> ClaimedName:
        made.append(claim("auto", str(changes.get("keys", keys)), changes.get("state", tmp_path / "state"), host))
        return made[-1]

    yield auto
    for one in made:
        give_back(one)


def give_back(one: ClaimedName) -> None:
    """Release the lock, as the kernel does when the process ends."""
    try:
        os.close(one.lock_fd)
    except OSError:
        pass  # a test gave it back


def test_every_container_is_another_agent_in_the_order_of_people(claimed: Claim, keys: Path) -> None:
    got = [claimed(f"host{i}") for i in range(11)]
    assert [one.name for one in got] == [f"a{i}" for i in range(1, 12)]
    assert got[9].key == str(keys / "a10.nk")


def test_when_all_keys_are_in_use_it_says_so(claimed: Claim) -> None:
    for i in range(11):
        claimed(f"host{i}")
    with pytest.raises(ConfigError, match=r"all 11 keys in .* are in use on this machine.*keys add"):
        claimed("one-too-many")


def test_who_starts_again_gets_its_own_name_back(claimed: Claim) -> None:
    first, second, third = (claimed(f"host{i}") for i in range(3))
    give_back(first)
    give_back(third)
    assert claimed("host2").name == third.name == "a3", "its own, though a1 is free as well"
    assert claimed("host0").name == "a1"
    assert second.name == "a2"


def test_a_name_that_another_took_meanwhile_is_no_reason_to_fail(claimed: Claim) -> None:
    first = claimed("host0")
    give_back(first)
    assert claimed("new").name == "a1"
    assert claimed("host0").name == "a2"
    assert claimed("host0").name == "a3", "two agents on one host"


def test_recreated_containers_use_the_same_names_as_before(claimed: Claim) -> None:
    before = [claimed(f"old{i}") for i in range(3)]
    for one in before:
        give_back(one)
    assert {claimed(f"new{i}").name for i in range(3)} == {"a1", "a2", "a3"}


def test_a_key_that_is_gone_is_not_claimed(claimed: Claim, keys: Path) -> None:
    (keys / "a1.nk").unlink()
    assert claimed("host0").name == "a2"


def test_a_claim_needs_no_right_to_write_the_keys(claimed: Claim, keys: Path) -> None:
    for path in keys.iterdir():
        path.chmod(0o400)
    keys.chmod(0o500)
    assert claimed("host0").name == "a1"
    keys.chmod(0o700)


def test_the_kernel_lets_go_of_a_claim_when_its_process_is_killed(keys: Path, tmp_path: Path, claimed: Claim) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom syncline_agent.identity import claim\n"
        "print(claim('auto', sys.argv[1], Path(sys.argv[2]), 'other').name, flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(keys), str(tmp_path / "state")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "a1\n"
        assert claimed("host0").name == "a2"
        other.kill()
        other.wait()
    assert claimed("host1").name == "a1"


def test_a_claim_is_not_inherited_by_what_the_service_starts(claimed: Claim) -> None:
    assert not os.get_inheritable(claimed("host0").lock_fd)


# -- names that are given ----------------------------------------------------------------------------------------------
def test_a_name_that_is_given_is_taken_as_it_is(tmp_path: Path, keys: Path) -> None:
    assert claim("edge-7", "some.nk", tmp_path) == ClaimedName("edge-7", "some.nk")
    assert claim("edge-7", "", tmp_path) == ClaimedName("edge-7", "")
    assert claim("a3", str(keys), tmp_path) == ClaimedName("a3", str(keys / "a3.nk"))
    with pytest.raises(ConfigError, match="--name: 'A 1' is not a name"):
        claim("A 1", "", tmp_path)


@pytest.mark.parametrize(
    ("key", "problem"),
    [("", "none is named"), ("missing", "missing is no directory"), ("empty", "empty holds no keys")],
)
def test_auto_without_a_directory_of_keys_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, problem: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"--key: {problem}"):
        claim("auto", key, tmp_path / "state")


def test_a_state_directory_that_cannot_be_written_is_named(claimed: Claim, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--state-dir: .*Not a directory"):
        claimed("host0", state=tmp_path / "file" / "state")
    with pytest.raises(ConfigError, match=r"--state-dir: .*Not a directory"):
        claim("a1", "", tmp_path / "file" / "state")
