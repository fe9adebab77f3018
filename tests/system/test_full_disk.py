"""A real nats-server whose disk or account is full during a run: that is told once, and the run goes on by itself later."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from syncline.bus.nats.bus import NatsBus
from syncline.bus.nats.lane import Connection
from syncline.errors import BusError
from syncline.wire import subjects
from syncline.wire.messages import Head, Stop, Stopped, decode, encode
from system.command import Command, until
from system.server import Server, free_port
from system.small_disk import SmallDisk

pytestmark = pytest.mark.timeout(180)

SPEC = "name: r\ntask: syncline.tasks.noop:Noop\nagents: {min: 1}\nlocal: {seconds: 0.1}\nstop: {versions: 10000}\n"
PATIENCE_S = 60.0


class Stage:
    """A broker with one account, and a coordinator, an agent and a run that use it."""

    def __init__(self, place: Path, started: ExitStack) -> None:
        self.place, self._started, self._port = place, started, free_port()
        self.url = f"nats://127.0.0.1:{self._port}"

    def configure(self, store: Path, max_file: str = "-1") -> Path:
        """Write the broker's configuration. `max_file`: what the account may store."""
        config = self.place / "broker.conf"
        config.write_text(
            f'listen: "127.0.0.1:{self._port}"\n'
            f'jetstream {{ store_dir: "{store}", max_file_store: 10G }}\n'
            f"accounts {{ A {{ users: [{{ user: u, password: p }}], jetstream: {{ max_file: {max_file} }} }} }}\n"
            "no_auth_user: u\n"
        )
        return config

    def serve(self, config: Path, log: str, disk: SmallDisk | None = None) -> Server:
        enter = () if disk is None else disk.enter
        return self._started.enter_context(Server(config, self.place / log, enter))

    def start(self, *args: str) -> Command:
        command = Command(self.place, (*args, "--connect", self.url))
        self._started.callback(command.stop)
        return command

    def fleet(self) -> tuple[Command, Command, Command]:
        """A coordinator, an agent and a run."""
        coordinator = self.start("coordinator")
        coordinator.says("the coordinator is up")
        agent = self.start("agent", "--name", "a1", "--state-dir", "a1", "--device", "cpu")
        (self.place / "spec.yaml").write_text(SPEC)
        return coordinator, agent, self.start("run", "spec.yaml")


def events(service: Command, name: str) -> list[str]:
    """The lines of a service's log that tell such an event."""
    return [line for line in service.err.splitlines() if f": {name}: " in line]


async def version(bus: NatsBus, run: Command, least: int) -> int:
    """Wait until the run has committed so many versions, and return how many it has."""
    deadline = asyncio.get_running_loop().time() + PATIENCE_S
    while True:
        assert run.process.poll() is None, run.out + run.err
        assert asyncio.get_running_loop().time() < deadline, f"not at version {least}: {run.out}{run.err}"
        with suppress(BusError):  # not submitted yet, or the broker is started again just now
            entry = await bus.kv_get(subjects.RUNS_BUCKET, subjects.head_key("r"))
            if entry is not None and (head := decode(Head, entry.value)).version >= least:
                return head.version
        await asyncio.sleep(0.05)


async def stopped(bus: NatsBus, run: Command) -> None:
    decode(Stopped, await bus.request(subjects.stop(), encode(Stop(run="r")), 20.0))
    assert run.ended() == 0, run.err


async def test_a_full_disk_is_told_once_and_the_run_goes_on_when_space_is_given_back_and_the_broker_started_again(
    tmp_path: Path,
) -> None:
    with SmallDisk(tmp_path / "disk", "8m") as disk, ExitStack() as started:
        stage = Stage(tmp_path, started)
        config = stage.configure(disk.at / "store")
        server = stage.serve(config, "first.log", disk)
        coordinator, _, run = stage.fleet()
        bus = await NatsBus.connect(Connection(stage.url, "test"))
        try:
            await version(bus, run, 2)
            disk.fill()
            coordinator.says(": broker-full: ", PATIENCE_S)
            (told,) = events(coordinator, "broker-full")
            for part in ("run r waits", "no space left on device", "start nats-server again"):
                assert part in told
            failed = "failed to store a msg"
            until(lambda: server.text.count(failed) >= 2, PATIENCE_S, lambda: server.text)  # the agent tries again
            disk.give_back()
            reached = await version(bus, run, 2)
            server.stop()
            stage.serve(config, "second.log", disk)
            await version(bus, run, reached + 3)
            coordinator.says(": broker-has-room: ", PATIENCE_S)
            assert events(coordinator, "broker-full") == [told]
            await stopped(bus, run)
        finally:
            await bus.close()


async def test_a_full_account_is_told_once_and_the_run_goes_on_when_it_may_store_more(
    tmp_path: Path,
) -> None:
    with ExitStack() as started:
        stage = Stage(tmp_path, started)
        server = stage.serve(stage.configure(tmp_path / "store"), "broker.log")
        coordinator, agent, run = stage.fleet()
        bus = await NatsBus.connect(Connection(stage.url, "test"))
        try:
            await version(bus, run, 2)
            stage.configure(tmp_path / "store", "1K")
            server.reload()
            coordinator.says(": broker-full: ", PATIENCE_S)
            refused = "resource limits exceeded for account"
            until(lambda: server.text.count(refused) >= 4, PATIENCE_S, lambda: server.text)
            (told,) = events(coordinator, "broker-full")
            assert "run r waits" in told and "Raise max_file of the account" in told
            stage.configure(tmp_path / "store")
            server.reload()
            await version(bus, run, await version(bus, run, 2) + 3)
            coordinator.says(": broker-has-room: ", PATIENCE_S)
            assert events(coordinator, "broker-full") == [told]
            (said,) = events(agent, "stream-full")
            assert refused in said and "Raise max_file of the account" in said
            await stopped(bus, run)
        finally:
            await bus.close()


def test_a_coordinator_does_not_start_on_a_full_disk_and_doctor_names_it_too(tmp_path: Path) -> None:
    with SmallDisk(tmp_path / "disk", "8m") as disk, ExitStack() as started:
        stage = Stage(tmp_path, started)
        stage.serve(stage.configure(disk.at / "store"), "broker.log", disk)
        disk.fill()
        hint = "Free some of the disk that holds the broker's store"
        coordinator, doctor = stage.start("coordinator"), stage.start("doctor", "--only", "space")
        assert coordinator.ended() == 2
        assert coordinator.err.startswith("error: --connect: nats://127.0.0.1"), coordinator.err
        assert hint in coordinator.err
        assert doctor.ended() == 1 and "the broker stores nothing" in doctor.out and hint in doctor.out, doctor.out
