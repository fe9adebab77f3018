"""`syncline doctor` with real brokers, whole and broken: it names the trouble, disturbs nobody, and always comes back."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from syncline.bus.server.accounts import BrokerSettings, Keyring, server_config
from syncline.bus.server.operator import OperatorSet
from syncline.wire import subjects
from system.command import Command
from system.harness import Fleet
from system.server import Server, free_port

pytestmark = pytest.mark.timeout(120)
in_module_loop = pytest.mark.asyncio(loop_scope="module")

BROKER = ("broker", "key", "rights", "jetstream", "payload", "space", "clock", "coordinator")
Findings = dict[str, dict[str, Any]]


def doctor(place: Path, *args: str, checks: tuple[str, ...] = BROKER, within_s: float = 60.0) -> Findings:
    """What it finds, by check."""
    only = [word for check in checks for word in ("--only", check)]
    command = Command(place, ("doctor", *args, *only, "--json"))
    try:
        code = command.ended(within_s)
        found = json.loads(command.out.splitlines()[-1])
        assert code == (0 if found["ok"] else 1), command.err
        assert command.err == "", "what it has to say is in its findings"
        return {check["check"]: check for check in found["checks"]}
    finally:
        command.stop()


def verdicts(found: Findings) -> dict[str, str]:
    return {name: check["verdict"] for name, check in found.items()}


# -- a fleet that is well ----------------------------------------------------------------------------------------------
@in_module_loop
@pytest.mark.parametrize("who", ["coordinator", "a1", "watch"])
async def test_a_fleet_that_is_well_is_found_well_with_every_kind_of_key(
    fleet: Fleet, tmp_path: Path, who: str
) -> None:
    broker = fleet.local.broker
    where = ("--connect", broker.url, "--key", str(broker.keyring.path(who)))
    found = await asyncio.to_thread(doctor, tmp_path, *where)
    skips = {"coordinator": set(), "a1": {"space", "clock"}, "watch": {"space", "clock", "coordinator"}}[who]
    assert verdicts(found) == {check: "skipped" if check in skips else "ok" for check in BROKER}, found


@in_module_loop
async def test_it_leaves_no_stream_and_takes_no_agents_session(fleet: Fleet, tmp_path: Path) -> None:
    broker = fleet.local.broker
    run = await fleet.start(task="syncline.tasks.noop:Noop", agents={"min": 4}, stop={"versions": 100_000})
    before = await fleet.version(run, 3)
    for who in ("coordinator", "a1"):
        await asyncio.to_thread(doctor, tmp_path, "--connect", broker.url, "--key", str(broker.keyring.path(who)))
    await fleet.version(run, before.version + 20)
    assert not fleet.events(run, "agent-lost")
    streams = json.loads((await fleet.bus.request("$JS.API.STREAM.NAMES", b"", 5.0)).decode())["streams"]
    assert not [name for name in streams if "DOCTOR" in name]
    assert all(not worker.exited.done() for worker in fleet.local.workers.values())


@in_module_loop
async def test_a_key_under_another_name_and_one_that_is_not_known(fleet: Fleet, tmp_path: Path) -> None:
    broker = fleet.local.broker
    found = await asyncio.to_thread(
        doctor, tmp_path, "--connect", broker.url, "--key", str(broker.keyring.path("a1")), "--name", "a2"
    )
    assert found["rights"]["verdict"] == "broken" and "belongs to another name" in found["rights"]["text"]
    stranger = Keyring(tmp_path / "keys").create(["a1"]).path("a1")
    found = await asyncio.to_thread(doctor, tmp_path, "--connect", broker.url, "--key", str(stranger))
    assert found["key"]["verdict"] == "broken" and "does not know this key" in found["key"]["text"]
    assert {found[check]["verdict"] for check in BROKER[2:]} == {"skipped"}
    found = await asyncio.to_thread(doctor, tmp_path, "--connect", broker.url)
    assert found["key"]["verdict"] == "broken" and "--key" in found["key"]["hint"]


@in_module_loop
async def test_a_directory_of_keys_is_looked_at_as_one_of_its_agents(fleet: Fleet, tmp_path: Path) -> None:
    broker = fleet.local.broker
    pool = tmp_path / "pool"
    pool.mkdir()
    for name in ("a2", "a3"):
        _copy(broker.keyring.path(name), pool)
    found = await asyncio.to_thread(doctor, tmp_path, "--connect", broker.url, "--key", str(pool), "--name", "auto")
    assert "is a2" in found["key"]["text"] and found["coordinator"]["verdict"] == "ok"


def _copy(key: Path, directory: Path) -> None:
    copied = directory / key.name
    copied.touch(mode=0o600)
    copied.write_text(key.read_text())


# -- brokers that are not ----------------------------------------------------------------------------------------------
def bare(place: Path, text: str) -> tuple[str, Server]:
    """A broker with this configuration."""
    port = free_port()
    config = place / "bare.conf"
    config.write_text(f'listen: "127.0.0.1:{port}"\n{text}')
    return f"nats://127.0.0.1:{port}", Server(config, place / "bare.log")


def test_a_broker_without_jetstream_and_accounts(tmp_path: Path) -> None:
    url, server = bare(tmp_path, "")
    with server:
        found = doctor(tmp_path, "--connect", url)
    assert found["key"]["verdict"] == "warning" and "keys make" in found["key"]["hint"]
    assert found["jetstream"]["verdict"] == "broken" and "-js" in found["jetstream"]["hint"]


def test_an_agents_key_on_a_broker_that_knows_it_but_has_no_accounts(tmp_path: Path) -> None:
    identity = Keyring(tmp_path / "keys").create(["a1"]).identity("a1")
    store = f'jetstream {{ store_dir: "{tmp_path / "js"}" }}\n'
    url, server = bare(tmp_path, f"{store}authorization {{ users: [{{nkey: {identity.public_key}}}] }}\n")
    with server:
        found = doctor(tmp_path, "--connect", url, "--key", str(tmp_path / "keys" / "a1.nk"))
    assert found["rights"]["verdict"] == "broken" and "may do everything" in found["rights"]["text"]


def test_small_limits_are_named(tmp_path: Path) -> None:
    keyring = Keyring(tmp_path / "keys").create(["a1"])
    settings = BrokerSettings(tmp_path / "js", 1, max_payload_bytes=64 << 10, max_file_store_bytes=100 << 20)
    text = server_config(settings, keyring.identities()).replace('listen: "127.0.0.1:1"\n', "")
    url, server = bare(tmp_path, text)
    with server:
        found = doctor(tmp_path, "--connect", url, "--key", str(keyring.path("coordinator")))
    assert found["payload"]["verdict"] == "warning" and "max_payload" in found["payload"]["hint"]
    assert found["space"]["verdict"] == "warning" and "max_file_store" in found["space"]["hint"]
    assert found["clock"]["verdict"] == "ok", "a small store has room for one message"
    assert found["coordinator"]["verdict"] == "broken" and "syncline coordinator" in found["coordinator"]["hint"]


def test_a_broker_whose_messages_are_too_small_for_any_run_is_broken(tmp_path: Path) -> None:
    url, server = bare(tmp_path, f'max_payload: 8192\njetstream {{ store_dir: "{tmp_path / "js"}" }}\n')
    with server:
        found = doctor(tmp_path, "--connect", url, "--only", "payload")
    assert found["payload"]["verdict"] == "broken" and "16 KiB" in found["payload"]["text"]


def test_the_brokers_own_pages_tell_more_and_to_every_key(tmp_path: Path) -> None:
    port, pages = free_port(), f"127.0.0.1:{free_port()}"
    settings = BrokerSettings(tmp_path / "js", port, monitor=pages, max_file_store_bytes=20 << 30)
    keys = OperatorSet.make(tmp_path / "ops", ["a1"], settings)
    with Server(keys.config, tmp_path / "log"):
        where = ("--connect", f"nats://127.0.0.1:{port}", "--key", str(keys.keyring.path("a1")))
        found = doctor(tmp_path, *where, "--monitor", f"http://{pages}")
    assert found["space"]["text"].startswith("20.0 of 20.0 GiB (max_file_store) are free")
    assert found["clock"]["verdict"] == "ok"


@contextmanager
def listener(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """Something that listens and is no broker."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            try:
                while True:
                    serve(server.accept()[0])
            except OSError:
                pass

        threading.Thread(target=accept, daemon=True).start()
        yield f"nats://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def test_what_listens_and_says_nothing_does_not_hang_it(tmp_path: Path) -> None:
    silent: list[socket.socket] = []
    began = time.monotonic()
    with listener(silent.append) as url:
        found = doctor(tmp_path, "--connect", url, within_s=30.0)
    assert found["broker"]["verdict"] == "broken" and "no answer within" in found["broker"]["text"]
    assert {check["verdict"] for name, check in found.items() if name != "broker"} == {"skipped"}
    assert time.monotonic() - began < 30
    for connection in silent:
        connection.close()


def test_another_kind_of_server_is_not_taken_for_a_broker(tmp_path: Path) -> None:
    def ssh(connection: socket.socket) -> None:
        connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
        connection.close()

    with listener(ssh) as url:
        found = doctor(tmp_path, "--connect", url, checks=("broker",))
    assert "is not a NATS server" in found["broker"]["text"]


def test_a_broker_that_is_stopped_in_the_middle_does_not_hang_it(tmp_path: Path) -> None:
    settings = BrokerSettings(tmp_path / "js", free_port())
    keys = OperatorSet.make(tmp_path / "ops", [], settings)
    with Server(keys.config, tmp_path / "log") as server:
        server.process.send_signal(signal.SIGSTOP)
        try:
            where = ("--connect", f"nats://127.0.0.1:{settings.port}", "--key", str(keys.keyring.path("coordinator")))
            found = doctor(tmp_path, *where, within_s=45.0)
        finally:
            server.process.send_signal(signal.SIGCONT)
    assert found["broker"]["verdict"] == "broken"


def test_a_host_that_does_not_exist(tmp_path: Path) -> None:
    found = doctor(tmp_path, "--connect", "nats://no-such-host.invalid:4222", checks=("broker",))
    assert found["broker"]["verdict"] == "broken" and found["broker"]["hint"]


def test_people_get_lines_and_the_code_of_a_failure(tmp_path: Path) -> None:
    command = Command(tmp_path, ("doctor", "--connect", "nats://127.0.0.1:1", "--device", "cpu"))
    assert command.ended(60.0) == 1
    lines = command.out.splitlines()
    assert [line.split()[1] for line in lines if not line.startswith(" ")] == ["python", "torch", "disk", *BROKER]
    assert "→ Start the broker" in command.out
    assert subjects.COORDINATOR in lines[-1]
    command.leaves_nothing(5.0)
