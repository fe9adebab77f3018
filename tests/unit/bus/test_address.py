"""Addresses of a broker: what is accepted, what is refused with which words, and that no password is shown."""

from __future__ import annotations

import pytest

from syncline.bus.address import Address, address_of, masked
from syncline.bus.connect import connect
from syncline.errors import ConfigError
from syncline_cli import main as cli
from syncline_cli.connect import BrokerChoice, command_with_options

SECRET = "s3cr3t"
NOWHERE = "127.0.0.1:1"


@pytest.mark.parametrize(
    ("text", "urls"),
    [
        ("hub", ["nats://hub:4222"]),
        ("hub:4333", ["nats://hub:4333"]),
        ("nats://hub", ["nats://hub:4222"]),
        ("NATS://Hub:4333/", ["nats://Hub:4333"]),
        ("tls://hub:4333", ["tls://hub:4333"]),
        ("a:4222,b:4223", ["nats://a:4222", "nats://b:4223"]),
        (" nats://a , nats://b:1 ", ["nats://a:4222", "nats://b:1"]),
        ("nats://a,b", ["nats://a:4222", "nats://b:4222"]),
        ("tls://a,tls://b", ["tls://a:4222", "tls://b:4222"]),
        ("nats://[::1]:4222", ["nats://[::1]:4222"]),
        ("[fe80::1%eth0]", ["nats://[fe80::1%eth0]:4222"]),
        ("127.0.0.1", ["nats://127.0.0.1:4222"]),
        ("my_host.example.", ["nats://my_host.example.:4222"]),
        ("bücher.example", ["nats://xn--bcher-kva.example:4222"]),
    ],
)
def test_an_address_names_one_server_or_several(text: str, urls: list[str]) -> None:
    assert [server.url for server in address_of(text).servers] == urls


@pytest.mark.parametrize(
    ("text", "login"),
    [
        ("nats://alice:s3cr3t@hub", ("alice", SECRET, "")),
        ("alice:s3cr3t@hub:1", ("alice", SECRET, "")),
        ("nats://s3cr3t@hub", ("", "", SECRET)),
        ("nats://alice:a%40b%2Cc@hub", ("alice", "a@b,c", "")),
        ("nats://alice:a@b@hub", ("alice", "a@b", "")),
        ("nats://alice:s3cr3t@a,nats://alice:s3cr3t@b", ("alice", SECRET, "")),
        ("nats://alice:s3cr3t@a,b", ("alice", SECRET, "")),
        ("nats://hub", ("", "", "")),
    ],
)
def test_an_address_may_say_how_to_log_in(text: str, login: tuple[str, str, str]) -> None:
    address = address_of(text)
    assert (address.user, address.password, address.token) == login
    assert not any("@" in server.url for server in address.servers)
    assert SECRET not in repr(address) and isinstance(address, Address)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nats://host:42x2", "'nats://host:42x2' is not an address: port '42x2' is not a number from 1 to 65535"),
        ("nats://", "'nats://' is not an address: the host is missing"),
        ("a:1,,b", "'' in 'a:1,,b' is not an address: the host is missing"),
        ("a:1,b:2,", "'' in 'a:1,b:2,' is not an address: the host is missing"),
        ("a:1,b:0", "'b:0' in 'a:1,b:0' is not an address: port '0' is not a number from 1 to 65535"),
        ("hub:70000", "port '70000' is not a number"),
        ("hub:-1", "port '-1' is not a number"),
        ("hub:", "port '' is not a number"),
        ("hub:４２２２", "is not a number from 1 to 65535"),  # digits of full width
        ("a:1 b:2", "it contains a space"),
        ("http://hub", "the scheme must be nats:// or tls://"),
        ("ws://hub", "the scheme must be nats:// or tls://"),
        ("nats:/hub", "an address has no path"),
        ("nats://hub/path", "an address has no path"),
        ("::1", "write an IPv6 address in brackets, as [::1]:4222"),
        ("nats://::1:4222", "write an IPv6 address in brackets, as [::1]:4222"),
        ("[::1", "the ] of the IPv6 address is missing"),
        ("[hub]:1", "At least 3 parts expected in 'hub'"),
        ("4222", "'4222' is a port without a host"),
        (":4222", "the host is missing"),
        ("a;b", "'a;b' is not a host name"),
        ("h..", "is not an address"),
        ("x" * 300, "is not an address"),
        ("tls://a,b", "has servers with tls:// and servers without"),
        ("nats://u:x@a,nats://v:x@b", "'nats://***@a,nats://***@b' has different users or tokens"),
        (",".join(["a"] * 101), "names 101 servers"),
    ],
)
def test_what_is_no_address_is_refused_with_setting_value_and_hint(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        address_of(text, "SYNCLINE_NATS_URL")
    assert said in error.value.problem and error.value.setting == "SYNCLINE_NATS_URL" and error.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "nats://alice:s3cr3t@host:42x2",
        "nats://s3cr3t@",
        "nats://alice:pre,s3cr3t@host",
        "nats://alice:s3cr3t,post@host",
        "nats://alice:s3cr3t post@host",
        "nats://alice:pre s3cr3t@host",
        "nats://alice:s3cr3t://x@host",
        "alice:s3cr3t@host:0",
        "http://alice:s3cr3t@host",
        "a:1,nats://alice:s3cr3t@host:x",
    ],
)
def test_an_error_about_an_address_hides_its_password(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        address_of(text)
    assert SECRET not in str(error.value) and "alice" not in str(error.value) and "pre" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("nats://hub:4222", "nats://hub:4222"),
        ("nats://alice:s3cr3t@hub:4222", "nats://***@hub:4222"),
        ("tls://s3cr3t@a,tls://s3cr3t@b", "tls://***@a,tls://***@b"),
        ("alice:s3cr3t@hub", "***@hub"),
        ("a:1, alice:s3cr3t@hub", "a:1, ***@hub"),
        ("nats://alice:a@b/c@hub", "nats://***@hub"),
        ("no broker answers at nats://alice:s3cr3t@hub: refused", "no broker answers at nats://***@hub: refused"),
    ],
)
def test_an_address_is_shown_without_its_login(text: str, shown: str) -> None:
    assert masked(text) == shown and masked(shown) == shown


def test_a_place_and_a_hint_show_no_password() -> None:
    url = f"nats://alice:{SECRET}@hub:4222"
    assert SECRET not in repr(BrokerChoice(url, "")) and BrokerChoice(url, "").shown == "nats://***@hub:4222"
    assert command_with_options("syncline ls", url, "") == "syncline ls --connect 'nats://***@hub:4222'"


COMMANDS = [
    ["ls"],
    ["why", "x"],
    ["stop", "x"],
    ["watch", "x"],
    ["export", "x", "x.safetensors"],
    ["doctor", "--only", "broker", "--only", "coordinator"],
    ["run", "spec.yaml"],
    ["agent", "--patience", "0"],
    ["coordinator", "--patience", "0"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize("by", ["option", "variable"])
def test_every_command_names_the_option_or_the_variable(
    command: list[str], by: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = f"a:4222,nats://alice:{SECRET}@b:42x2"
    if by == "variable":
        monkeypatch.setenv("SYNCLINE_NATS_URL", bad)
    setting = "--connect" if by == "option" else "SYNCLINE_NATS_URL"
    assert cli.main([*command, *(["--connect", bad] if by == "option" else [])]) == 2
    said = "".join(capsys.readouterr())
    assert said.startswith(f"error: {setting}: 'a:4222,nats://***@b:42x2' is not an address: port '42x2'"), said


@pytest.mark.parametrize("command", COMMANDS[:6], ids=lambda command: command[0])
def test_a_command_that_reaches_no_server_shows_no_password(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BrokerChoice, "connect", lambda at, name, seed: connect(at.url, name, seed, patience_s=0.0))
    assert cli.main([*command, "--connect", f"nats://alice:{SECRET}@{NOWHERE},{NOWHERE}"]) in (1, 2)
    said = "".join(capsys.readouterr())
    assert NOWHERE in said and SECRET not in said and "alice" not in said, said
