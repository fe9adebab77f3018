"""An operator's set of keys: made whole or not at all, never overwritten, and a revoked agent stays out."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

import pytest

from syncline.bus.server import operator
from syncline.bus.server.accounts import BrokerSettings, Identity, Keyring, write_whole
from syncline.bus.server.operator import OperatorSet, in_order
from syncline.errors import ConfigError
from syncline_cli import main as cli


def settings(place: Path) -> BrokerSettings:
    return BrokerSettings(store_dir=place / "jetstream", monitor="127.0.0.1:8222")


@pytest.fixture
def made(tmp_path: Path) -> OperatorSet:
    return OperatorSet.make(tmp_path / "ops", ["a1", "a2", "a10"], settings(tmp_path))


def content(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): p.read_text() for p in sorted(directory.rglob("*")) if p.is_file()}


def accounts(made: OperatorSet) -> str:
    return (made.directory / "broker" / "accounts.conf").read_text()


def public(made: OperatorSet, name: str) -> str:
    return made.keyring.identity(name).public_key


# -- making one --------------------------------------------------------------------------------------------------------
def test_a_set_has_a_directory_for_every_kind_of_machine(made: OperatorSet) -> None:
    assert set(content(made.directory)) == {
        *("broker/nats-server.conf", "broker/accounts.conf", "core/coordinator.nk", "watch/watch.nk"),
        *("agents/a1.nk", "agents/a2.nk", "agents/a10.nk"),
    }


def test_keys_are_the_owners_alone_and_the_configuration_holds_none(made: OperatorSet) -> None:
    for key in made.directory.rglob("*.nk"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    for file in (made.directory / "broker").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o644
        assert not re.search(r"\bSU[A-Z2-7]{50,}", file.read_text())


def test_every_identity_is_in_the_accounts_and_the_settings_include_them(made: OperatorSet) -> None:
    for identity in made.keyring.identities():
        assert identity.public_key in accounts(made)
    text = made.config.read_text()
    assert text.endswith('include "accounts.conf"\n') and 'http: "127.0.0.1:8222"' in text
    assert "accounts {" not in text


def test_a_set_that_is_there_is_not_touched(made: OperatorSet, tmp_path: Path) -> None:
    before = content(made.directory)
    with pytest.raises(ConfigError, match=r"holds a set of keys already.*keys add.*--keep"):
        OperatorSet.make(made.directory, ["a1", "a3"], settings(tmp_path))
    assert content(made.directory) == before


def test_keep_adds_what_is_missing_and_changes_nothing_else(made: OperatorSet, tmp_path: Path) -> None:
    made.config.write_text(made.config.read_text() + "# mine\n")
    before = content(made.directory)
    OperatorSet.make(made.directory, ["a1", "a3"], BrokerSettings(store_dir=tmp_path, port=9), keep=True)
    after = content(made.directory)
    assert set(after) - set(before) == {"agents/a3.nk"}
    assert {k for k in before if after[k] != before[k]} == {"broker/accounts.conf"}
    assert public(made, "a3") in accounts(made)


def test_a_wrong_name_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'A1' is not a name"):
        OperatorSet.make(tmp_path / "ops", ["a1", "A1"], settings(tmp_path))
    assert not (tmp_path / "ops").exists()


@pytest.mark.parametrize("stop_at", range(1, 6))
def test_an_interrupted_make_goes_on_with_the_keys_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    """Stopped at any one of its writes, the next attempt makes a whole set, and no key that was there is another."""
    calls, write, place = 0, write_whole, tmp_path / "ops"

    def fails(path: Path, text: str, mode: int = 0o600) -> None:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise OSError("power")
        write(path, text, mode)

    with monkeypatch.context() as patched:
        patched.setattr(operator, "write_whole", fails)
        patched.setattr("syncline.bus.server.accounts.write_whole", fails)
        with pytest.raises(OSError, match="power"):
            OperatorSet.make(place, ["a1"], settings(tmp_path))
    before = content(place)
    made = OperatorSet.make(place, ["a1"], settings(tmp_path))
    assert before.items() <= content(place).items()
    assert len(content(place)) == 5 and public(made, "a1") in accounts(made)


def test_no_set_is_no_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no set of keys.*syncline keys make"):
        OperatorSet(tmp_path)


def test_two_at_once_are_one_after_the_other(made: OperatorSet) -> None:
    with operator._locked(made.directory), pytest.raises(ConfigError, match="another `syncline keys` command"):
        made.add(["a3"])


# -- coming and going --------------------------------------------------------------------------------------------------
def test_an_added_agent_has_a_key_and_an_account(made: OperatorSet) -> None:
    (identity,) = made.add(["edge-7"])
    assert identity == made.keyring.identity("edge-7")
    assert '"FLEET-edge-7" {\n    limits' in accounts(made) and identity.public_key in accounts(made)


def test_a_key_is_never_replaced_by_adding(made: OperatorSet) -> None:
    before = content(made.directory)
    with pytest.raises(ConfigError, match="'a1' has a key already"):
        made.add(["new", "a1"])
    assert content(made.directory) == before


def test_a_revoked_agent_is_gone_from_the_accounts_and_its_key_with_it(made: OperatorSet) -> None:
    key = public(made, "a2")
    made.revoke(["a2"])
    assert key not in accounts(made) and "FLEET-a2" not in accounts(made)
    assert not made.keyring.path("a2").exists()
    assert [(line.name, line.revoked) for line in OperatorSet(made.directory).listed()][-2:] == [
        ("a10", False),
        ("a2", True),
    ]


def test_nothing_brings_a_revoked_agent_back_but_adding_it(made: OperatorSet, tmp_path: Path) -> None:
    key = public(made, "a2")
    made.revoke(["a2"])
    again = OperatorSet.make(made.directory, ["a1", "a2", "a3"], settings(tmp_path), keep=True)
    again.add(["a4"])
    assert "FLEET-a2" not in accounts(made) and "FLEET-a3" in accounts(made)
    (identity,) = again.add(["a2"])
    assert identity.public_key != key and identity.public_key in accounts(made)
    assert not [line for line in again.listed() if line.revoked]


def test_a_revocation_that_is_interrupted_stands_and_can_be_finished(
    made: OperatorSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = public(made, "a2")

    def fails(*_: object) -> None:
        raise OSError("power")

    with monkeypatch.context() as patched:
        patched.setattr(operator, "_write_accounts", fails)
        with pytest.raises(OSError, match="power"):
            made.revoke(["a2"])
    assert made.keyring.path("a2").exists() and key in accounts(made)
    OperatorSet(made.directory).add(["a3"])
    assert key not in accounts(made), "whatever writes the accounts next leaves the agent out"
    made.revoke(["a2"])
    assert not made.keyring.path("a2").exists()


@pytest.mark.parametrize(
    ("name", "hint"),
    [("a22", "Did you mean 'a2'"), ("zebra", "keys list"), ("coordinator", "--keep"), ("watch", "--keep")],
)
def test_who_is_no_agent_cannot_be_revoked_and_then_nobody_is(made: OperatorSet, name: str, hint: str) -> None:
    before = content(made.directory)
    with pytest.raises(ConfigError, match=hint):
        made.revoke(["a1", name])
    assert content(made.directory) == before


def test_a_lost_coordinators_key_is_replaced(made: OperatorSet, tmp_path: Path) -> None:
    old = public(made, "coordinator")
    made.keyring.path("coordinator").unlink()
    again = OperatorSet.make(made.directory, [], settings(tmp_path), keep=True)
    assert public(again, "coordinator") != old and old not in accounts(again)


def test_names_are_in_the_order_of_people() -> None:
    assert in_order(["a10", "a2", "b", "7up", "a1b"]) == ["7up", "a1b", "a2", "a10", "b"]


def test_a_keyring_finds_out_how_it_is_laid_out(made: OperatorSet, tmp_path: Path) -> None:
    flat = Keyring(tmp_path / "flat").create(["a1"])
    assert Keyring(flat.directory).names == flat.names
    assert Keyring(made.directory).names[public(made, "a10")] == "a10"
    assert Identity.of("a1", flat.path("a1").read_text().strip()).name == "a1"


# -- the command -------------------------------------------------------------------------------------------------------
def keys(*args: str) -> int:
    return cli.main(["keys", *args])


def test_the_command_says_what_to_do_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ops = str(tmp_path / "ops")
    assert keys("make", ops, "--agents", "2") == 0
    said = capsys.readouterr().out
    assert f"nats-server -c {ops}/broker/nats-server.conf" in said and "nats-server --signal reload; sleep 1;" in said
    assert keys("add", ops, "edge-7") == 0
    said = capsys.readouterr().out
    assert "--name edge-7 --key edge-7.nk" in said and "--signal reload" in said
    assert keys("revoke", ops, "a1") == 0
    assert "the key is still valid" in capsys.readouterr().out
    assert keys("list", ops) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["coordinator", "watch", "a2", "edge-7", "a1"]
    assert lines[-1].endswith("revoked") and lines[3].endswith("FLEET-edge-7")


@pytest.mark.parametrize(
    "args", [("make", "--agents", "1", "--keep"), ("add", "a9"), ("revoke", "a1"), ("list",)], ids=lambda a: a[0]
)
def test_programs_read_json_and_never_a_seed(
    made: OperatorSet, args: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert keys(args[0], str(made.directory), *args[1:], "--json") == 0
    text = capsys.readouterr().out
    found = json.loads(text)
    assert set(found) == {"directory", "config", "keys"}
    assert {"name", "account", "public_key", "revoked"} == set(found["keys"][0])
    assert not re.search(r"\bSU[A-Z2-7]{50,}", text)


def test_settings_of_the_broker_reach_its_configuration(tmp_path: Path) -> None:
    options = (
        "--listen",
        "[::1]:4333",
        "--monitor",
        "",
        "--store",
        "/srv/nats",
        "--max-store",
        "5gib",
        "--sync",
        "10s",
    )
    assert keys("make", str(tmp_path / "ops"), *options) == 0
    text = (tmp_path / "ops" / "broker" / "nats-server.conf").read_text()
    assert 'listen: "[::1]:4333"' in text and "http" not in text
    assert 'store_dir: "/srv/nats"' in text and f"max_file_store: {5 << 30}" in text and 'sync_interval: "10s"' in text


@pytest.mark.parametrize(
    ("option", "value"),
    [("--listen", "4222"), ("--listen", "a:70000"), ("--monitor", "x"), ("--max-store", "0"), ("--sync", "soon")],
)
def test_a_setting_that_is_none_is_named(
    tmp_path: Path, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keys("make", str(tmp_path / "ops"), option, value) == 2
    assert capsys.readouterr().err.startswith(f"error: {option}: {value!r} is not a")
    assert not (tmp_path / "ops").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert keys("make", str(tmp_path / "file" / "ops")) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: DIR: ") and "Not a directory" in said and os.linesep in said
