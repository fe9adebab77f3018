"""Where a command finds its bus: what is named, else what is up on this machine."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from syncline.bus.tls import Tls
from syncline.client.keys import watch_key
from syncline.errors import ConfigError, Denied, Unreachable
from syncline.wire.allow_list import is_allowed
from syncline_cli.commands.run import allowed_tasks
from syncline_cli.connect import (
    BrokerChoice,
    check_task_dir,
    choose_broker,
    command_with_options,
    connection_error,
    local_fleets,
)
from syncline_cli.options import DEFAULT_URL

A, B = "nats://127.0.0.1:5001", "nats://127.0.0.1:5002"


@pytest.fixture
def tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("SYNCLINE_NATS_URL", "SYNCLINE_KEY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def fleet(tmp: Path, name: str, url: str) -> Path:
    directory = tmp / f"syncline-broker-{name}"
    directory.mkdir(mode=0o700)
    (directory / "broker.url").write_text(f"{url}\n")
    return directory


def test_without_a_fleet_it_is_the_usual_address(tmp: Path) -> None:
    assert choose_broker("", "") == BrokerChoice(DEFAULT_URL, "", named=False)
    assert choose_broker("", "mine.nk") == BrokerChoice(DEFAULT_URL, "mine.nk")
    assert choose_broker(A, "mine.nk") == BrokerChoice(A, "mine.nk")


def test_a_fleet_that_is_up_is_found_with_its_key(tmp: Path) -> None:
    keys = fleet(tmp, "1", A) / "keys"
    assert choose_broker("", "") == BrokerChoice(A, str(keys / "coordinator.nk"), found=True)
    assert choose_broker("", "", "watch") == BrokerChoice(A, str(keys / "watch.nk"), found=True)
    assert choose_broker(A, "") == BrokerChoice(A, str(keys / "coordinator.nk"))
    assert choose_broker(B, "") == BrokerChoice(B, "")


def test_of_several_fleets_one_must_be_named(tmp: Path) -> None:
    fleet(tmp, "1", A)
    fleet(tmp, "2", B)
    with pytest.raises(ConfigError) as caught:
        choose_broker("", "")
    assert str(caught.value) == f"--connect: several local fleets are up: {A}, {B}. Name one of them"
    assert choose_broker(B, "").key.endswith("syncline-broker-2/keys/coordinator.nk")


def test_what_is_not_up_yet_or_may_be_somebody_elses_is_not_looked_at(tmp: Path) -> None:
    fleet(tmp, "open", A).chmod(0o755)
    (tmp / "syncline-broker-early").mkdir(mode=0o700)
    (fleet(tmp, "half", A) / "broker.url").write_text("nats://127.0")
    (tmp / "syncline-broker-file").write_text("")
    (tmp / "syncline-broker-link").symlink_to(fleet(tmp, "half-linked", B), target_is_directory=True)
    (tmp / "syncline-broker-half-linked").chmod(0o755)
    assert local_fleets() == []


def test_the_watchers_key_is_taken_where_it_lies_beside(tmp: Path) -> None:
    (tmp / "coordinator.nk").touch()
    assert watch_key(str(tmp / "coordinator.nk")) == str(tmp / "coordinator.nk")
    (tmp / "watch.nk").touch()
    assert watch_key(str(tmp / "coordinator.nk")) == str(tmp / "watch.nk")
    assert watch_key("") == ""


def test_the_watchers_key_is_taken_out_of_an_operators_set(tmp: Path) -> None:
    for directory in ("core", "watch"):
        (tmp / "ops" / directory).mkdir(parents=True)
    (tmp / "ops" / "watch" / "watch.nk").touch()
    assert watch_key(str(tmp / "ops/core/coordinator.nk")) == str(tmp / "ops/watch/watch.nk")


def test_what_to_type_to_come_back(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command_with_options("syncline watch r", DEFAULT_URL, "") == "syncline watch r"
    assert command_with_options("syncline watch r", A, "k.nk") == f"syncline watch r --connect {A} --key k.nk"
    monkeypatch.setenv("SYNCLINE_NATS_URL", A)
    monkeypatch.setenv("SYNCLINE_KEY", "k.nk")
    assert command_with_options("syncline watch r", A, "k.nk") == "syncline watch r"


def test_nothing_to_connect_to_is_said_with_the_mend(tmp: Path) -> None:
    gone = Unreachable("no broker answers at x")
    assert "syncline demo" in str(connection_error(gone, BrokerChoice(DEFAULT_URL, "", named=False)))
    assert "Start the broker" in str(connection_error(gone, BrokerChoice(A, "")))
    assert connection_error(Denied("no"), BrokerChoice(DEFAULT_URL, "", named=False)).setting == "--key"


def test_a_task_file_is_submitted_only_to_a_local_fleet_that_looks_for_it_there(tmp: Path) -> None:
    (fleet(tmp, "1", A) / "task.dir").write_text(str(tmp / "tasks"))
    check_task_dir(choose_broker("", ""), "mine.py:Mine", tmp / "tasks" / "spec.yaml")
    check_task_dir(choose_broker(B, ""), "mine.py:Mine", tmp / "other" / "spec.yaml")
    for task in ("package.module:Mine", "/tasks/mine.py:Mine"):
        check_task_dir(choose_broker("", ""), task, tmp / "other" / "spec.yaml")
    with pytest.raises(ConfigError, match=r"task: 'mine.py:Mine' lies in .*/other, and the local fleet .* in .*/tasks"):
        check_task_dir(choose_broker("", ""), "mine.py:Mine", tmp / "other" / "spec.yaml")


@pytest.mark.parametrize(
    ("first", "stay", "further", "allowed"),
    [
        ("mine.py:Mine", False, "other.py:Other", False),
        ("mine.py:Mine", True, "other.py:Other", True),
        ("mine.py:Mine", True, "below/other.py:Other", True),
        ("mine.py:Mine", True, "../other.py:Other", False),
        ("mine.py:Mine", True, "/elsewhere/other.py:Other", False),
        ("mine.py:Mine", True, "package.module:Other", False),
        ("package.module:Mine", True, "package.module:Other", True),
        ("package.module:Mine", True, "syncline.tasks.digits:Digits", True),
    ],
)
def test_a_fleet_that_stays_allows_what_further_runs_of_its_directory_need(
    first: str, stay: bool, further: str, allowed: bool
) -> None:
    patterns = allowed_tasks(first, stay=stay)
    assert is_allowed(first, patterns)
    assert is_allowed(further, patterns) == allowed


def test_a_command_to_come_back_with_names_certificates_too(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tls = Tls("ca.crt", "own.crt", "own.key")
    monkeypatch.setenv("SYNCLINE_TLS_KEY", "own.key")
    assert command_with_options("syncline ls", DEFAULT_URL, "", tls) == "syncline ls --tls-ca ca.crt --tls-cert own.crt"
