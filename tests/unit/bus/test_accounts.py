"""Keys and the nats-server configuration made from them; what a server does with it is tested in tests/bus."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import nkeys
import pytest

from syncline.bus.server.accounts import (
    BrokerSettings,
    Identity,
    Keyring,
    accounts_config,
    public_key_of,
    read_seed,
    server_config,
    write_whole,
)
from syncline.errors import ConfigError


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    return Keyring(tmp_path / "keys").create(["a2", "a1"])


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def line_with(text: str, part: str) -> str:
    (line,) = [line for line in text.splitlines() if part in line]
    return line


# -- the keyring -------------------------------------------------------------------------------------------------------
def test_a_keyring_holds_a_coordinator_a_watcher_and_the_agents(keyring: Keyring) -> None:
    assert keyring.agents == ["a1", "a2"]
    accounts = [(i.name, i.account) for i in keyring.identities()]
    assert accounts == [("coordinator", "CORE"), ("watch", "WATCH"), ("a1", "FLEET"), ("a2", "FLEET")]
    assert len({i.public_key for i in keyring.identities()}) == 4


def test_only_the_owner_may_read_the_keys(keyring: Keyring) -> None:
    assert mode(keyring.directory) == 0o700
    assert {mode(path) for path in keyring.directory.iterdir()} == {0o600}


def test_creating_again_keeps_the_keys_and_adds_what_is_missing(keyring: Keyring) -> None:
    before = keyring.identities()
    again = Keyring(keyring.directory).create(["a1", "a3"])
    assert again.agents == ["a1", "a2", "a3"]
    assert [i for i in again.identities() if i.name != "a3"] == before


def test_a_name_that_is_none_makes_no_key(keyring: Keyring) -> None:
    before = sorted(keyring.directory.iterdir())
    for name in ("A1", "a.1", "", "*", "../x", "a" * 64, "coordinator", "watch"):
        with pytest.raises(ConfigError):
            keyring.add_agent(name)
        with pytest.raises(ConfigError):
            keyring.create(["a9", name])
    assert sorted(keyring.directory.iterdir()) == before


def test_a_stray_key_file_is_named(keyring: Keyring) -> None:
    keyring.path("a1").rename(keyring.path("My Laptop"))
    with pytest.raises(ConfigError, match="My Laptop"):
        _ = keyring.agents


def test_a_key_leads_to_its_name(keyring: Keyring) -> None:
    assert keyring.agent_of_key(keyring.identity("a1").public_key) == "a1"
    assert keyring.agent_of_key(Identity.new("a1").public_key) is None


def test_the_view_of_names_grows_with_the_keyring(keyring: Keyring) -> None:
    names = keyring.names
    added = keyring.add_agent("a3")
    assert names[added.public_key] == "a3"


def test_an_identity_signs_and_never_prints_its_seed(keyring: Keyring) -> None:
    identity = keyring.identity("a1")
    signature = identity.sign(b"offer")
    assert nkeys.from_seed(bytearray(identity.seed.encode())).verify(b"offer", signature)
    assert identity.seed not in repr(identity)
    assert identity.seed.startswith("SU") and identity.public_key.startswith("U")


# -- key files ---------------------------------------------------------------------------------------------------------
def test_a_missing_key_file_is_named(keyring: Keyring) -> None:
    with pytest.raises(ConfigError, match=r"a7\.nk: No such file"):
        keyring.identity("a7")


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o620])
def test_a_key_that_others_may_read_is_refused_with_the_mend(keyring: Keyring, bits: int) -> None:
    path = keyring.path("a1")
    path.chmod(bits)
    with pytest.raises(ConfigError, match=f"mode 0{bits:o}.*chmod 600 {path}"):
        read_seed(path)


def mistyped(seed: str) -> str:
    return seed[:20] + ("A" if seed[20] != "A" else "B") + seed[21:]


def broken_seeds() -> dict[str, bytes]:
    seed = Identity.new("a1").seed
    return {
        "empty": b"",
        "text": b"hello\n",
        "binary": os.urandom(200),
        "huge": b"SU" + b"A" * 100_000,
        "truncated": seed[:-4].encode(),
        "mistyped": mistyped(seed).encode(),
        "two seeds": f"{seed}\n{seed}\n".encode(),
        "lower case": seed.lower().encode(),
        "a public key": public_key_of(seed).encode(),
        "an account's seed": nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_ACCOUNT),
    }


@pytest.mark.parametrize("kind", broken_seeds())
def test_what_is_no_seed_is_refused_and_not_quoted(tmp_path: Path, kind: str) -> None:
    path, content = tmp_path / "a1.nk", broken_seeds()[kind]
    path.touch(mode=0o600)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"a1\.nk contains no nkey user seed") as raised:
        read_seed(path)
    assert not content or content.decode(errors="replace").strip()[:12] not in str(raised.value)


def test_a_seed_may_have_space_around_it(tmp_path: Path) -> None:
    seed = Identity.new("a1").seed
    write_whole(tmp_path / "key", f"\n  {seed} \r\n")
    assert read_seed(tmp_path / "key") == seed


def test_a_private_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "key"
    write_whole(path, "old")

    def fails(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, "new")
    assert path.read_text() == "old" and mode(path) == 0o600
    assert list(tmp_path.iterdir()) == [path]


# -- the configuration -------------------------------------------------------------------------------------------------
def test_the_configuration_holds_public_keys_alone(keyring: Keyring, tmp_path: Path) -> None:
    text = server_config(BrokerSettings(store_dir=tmp_path), keyring.identities())
    for identity in keyring.identities():
        assert text.count(identity.public_key) == 1
        assert identity.seed not in text


def test_an_agent_has_an_account_that_reaches_exactly_its_own(keyring: Keyring) -> None:
    a1 = keyring.identity("a1")
    expected = f"""\
  "FLEET-a1" {{
    limits: {{max_connections: 256}}
    users: [
      {{nkey: {a1.public_key}, permissions: {{publish: {{allow: ["syncline.v1.*.agent.a1.>", \
"$JS.API.DIRECT.GET.*.syncline.v1.*.model.>", "$JS.API.DIRECT.GET.KV_syncline-runs.$KV.syncline-runs.>", \
"syncline.v1.*.metrics.a1.>", "syncline.v1.*.events.a1"]}}, \
subscribe: {{allow: ["_INBOX.a1.>", "syncline.v1.*.notify"]}}}}}}
    ]
    imports: [
      {{service: {{account: "CORE", subject: "syncline.v1.*.agent.a1.>"}}}}
      {{service: {{account: "CORE", subject: "$JS.API.DIRECT.GET.*.syncline.v1.*.model.>"}}}}
      {{service: {{account: "CORE", subject: "$JS.API.DIRECT.GET.KV_syncline-runs.$KV.syncline-runs.>"}}}}
      {{stream: {{account: "CORE", subject: "syncline.v1.*.notify"}}}}
    ]
    exports: [
      {{stream: "syncline.v1.*.metrics.a1.>"}}
      {{stream: "syncline.v1.*.events.a1"}}
    ]
  }}
"""
    assert expected in accounts_config(keyring.identities())


def test_a_watcher_may_say_nothing(keyring: Keyring) -> None:
    line = line_with(accounts_config(keyring.identities()), keyring.identity("watch").public_key)
    assert 'publish: {deny: ">"}' in line
    assert 'subscribe: {allow: ["syncline.v1.*.metrics.>", "syncline.v1.*.events.*"]}' in line


def test_the_server_is_told_what_was_set_and_nothing_else(tmp_path: Path) -> None:
    bare = server_config(BrokerSettings(store_dir=tmp_path), [])
    assert 'listen: "127.0.0.1:4222"' in bare and "max_payload: 1114112" in bare
    for setting in ("sync_interval", "max_file_store", "log_file", "pid_file"):
        assert setting not in bare
    full = server_config(
        BrokerSettings(
            store_dir=tmp_path,
            max_file_store_bytes=1 << 30,
            sync_interval="always",
            log_path=tmp_path / "log",
            pid_path=tmp_path / "pid",
        ),
        [],
    )
    assert 'sync_interval: "always"' in full and "max_file_store: 1073741824" in full
    assert f'log_file: "{tmp_path}/log"' in full and f'pid_file: "{tmp_path}/pid"' in full


def test_a_path_is_quoted() -> None:
    assert r'store_dir: "/a \"b\" \\ $c é"' in server_config(BrokerSettings(store_dir=Path('/a "b" \\ $c é')), [])
