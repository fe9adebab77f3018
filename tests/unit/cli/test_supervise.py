"""Broker and coordinator of a local fleet are kept up: started again when one has gone, or had no room; not without end."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from syncline.bus.connect import connection_problem
from syncline.errors import ConfigError, RunFailed, StreamFull, Unavailable
from syncline.runtime.service import FAILED, WRONG_INPUT
from syncline_cli.local_fleet.fleet import FleetSettings, check_room
from syncline_cli.local_fleet.supervise import BROKER_STARTS, COORDINATOR_STARTS, ENOUGH_BYTES, FleetSupervisor

FULL = (
    "[16001] 2026/11/27 21:58:13.147456 [ERR] JetStream failed to store a msg on stream 'CORE > SYNCLINE_MODEL_r': "
    "write /tmp/b/jetstream/CORE/streams/SYNCLINE_MODEL_r/msgs/1.blk: no space left on device\n"
)
LIE = (
    '[16001] 2026/11/27 21:58:13.147456 [ERR] 127.0.0.1:1 - cid:7 - "[ERR] JetStream x: no space left on device" - no\n'
)


@dataclass
class Broker:
    directory: Path
    exit_code: int | None = None
    restarts: int = 0
    broken: bool = False
    said: list[tuple[str, str]] = field(default_factory=list)

    @property
    def log_path(self) -> Path:
        return self.directory / "broker.log"

    async def restart(self) -> None:
        if self.broken:
            raise Unavailable("nats-server ended with code 1")
        self.restarts += 1
        self.exit_code = None

    def services(self) -> FleetSupervisor:
        self.log_path.touch()
        fleet = cast("Any", SimpleNamespace(broker=self))
        return FleetSupervisor(fleet, lambda level, text: self.said.append((level, text)))


async def test_a_broker_that_has_gone_is_started_again_three_times(tmp_path: Path) -> None:
    broker = Broker(tmp_path)
    services = broker.services()
    await services._keep_broker()
    assert broker.restarts == 0, "it was up"
    for _ in range(BROKER_STARTS):
        broker.exit_code = -9
        await services._keep_broker()
    assert broker.said[0] == ("warning", "the broker's process was killed by SIGKILL; restarting it")
    broker.exit_code = 1
    with pytest.raises(RunFailed, match="ended with code 1, after 3 restarts"):
        await services._keep_broker()
    assert broker.restarts == BROKER_STARTS


async def test_a_broker_that_does_not_come_up_again_ends_the_run(tmp_path: Path) -> None:
    broker = Broker(tmp_path, exit_code=-9, broken=True)
    with pytest.raises(RunFailed, match="killed by SIGKILL, and cannot be restarted: nats-server ended with code 1"):
        await broker.services()._keep_broker()


async def test_a_full_disk_is_said_once_and_the_broker_started_again_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = ENOUGH_BYTES - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    broker = Broker(tmp_path)
    services = broker.services()
    broker.log_path.write_text(LIE)
    await services._keep_broker()
    assert broker.said == [], "what a client calls itself is nothing that the server says"
    for _ in range(3):
        with broker.log_path.open("a") as log:
            log.write(FULL)
        await services._keep_broker()
    ((level, text),) = broker.said
    assert level == "error" and text == f"the disk is full and the run has stopped: free 64 MiB for {tmp_path}"
    free = ENOUGH_BYTES
    await services._keep_broker()
    await services._keep_broker()
    assert broker.restarts == 1 and broker.said[1][1] == "the broker's process ran out of disk space; restarting it"


# -- the coordinator ------------------------------------------------------------------------------------------------------


class Fleet:
    """A coordinator's process that ends when a test says so, and no agents."""

    def __init__(self, directory: Path) -> None:
        self.broker = Broker(directory)
        self.broker.log_path.touch()
        self.settings = SimpleNamespace(agents=(), directory=None)
        self.workers: dict[str, Any] = {}
        self.starts = 0
        (directory / "logs").mkdir()
        (directory / "logs" / "coordinator.log").write_text("error: the reason\n")

    async def start_coordinator(self) -> None:
        self.starts += 1
        self.workers["coordinator"] = SimpleNamespace(exited=asyncio.get_running_loop().create_future())

    def ends(self, code: int) -> None:
        self.workers["coordinator"].exited.set_result(code)

    async def services(self, **settings: Any) -> FleetSupervisor:
        await self.start_coordinator()
        return FleetSupervisor(
            cast("Any", self), lambda level, text: self.broker.said.append((level, text)), **settings
        )


async def test_a_coordinator_that_has_gone_is_started_again_three_times(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    services = await fleet.services()
    await services._keep_coordinator()
    assert fleet.starts == 1, "it was up"
    for _ in range(COORDINATOR_STARTS):
        fleet.ends(-9)
        await services._keep_coordinator()
    assert fleet.starts == 1 + COORDINATOR_STARTS
    said = ("warning", "the coordinator's process was killed by SIGKILL; restarting it")
    assert fleet.broker.said == [said] * COORDINATOR_STARTS
    fleet.ends(FAILED)
    with pytest.raises(RunFailed, match=r"ended with code 1\n  coordinator\.log: error: the reason"):
        await services._keep_coordinator()
    assert fleet.starts == 1 + COORDINATOR_STARTS


async def test_a_coordinator_that_does_not_like_its_input_is_not_started_again(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    services = await fleet.services()
    fleet.ends(WRONG_INPUT)
    with pytest.raises(RunFailed, match=r"ended with code 2\n  coordinator\.log: error: the reason"):
        await services._keep_coordinator()
    assert fleet.starts == 1


async def test_a_coordinator_that_ends_before_it_has_answered_is_noticed_at_once(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    services = await fleet.services()

    async def answer() -> str:
        return "submitted"

    assert await services.while_up(answer()) == "submitted"
    fleet.ends(WRONG_INPUT)
    with pytest.raises(RunFailed, match=r"coordinator\.log: error: the reason"):
        await services.while_up(asyncio.Event().wait())


# -- a disk that is too small ---------------------------------------------------------------------------------------------


def test_a_disk_without_room_for_a_run_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 203 << 20
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    check_room(FleetSettings(("a1",)))
    free = 6 << 20
    check_room(FleetSettings(("a1",), max_file_store_bytes=1 << 30))
    with pytest.raises(ConfigError) as caught:
        check_room(FleetSettings(("a1",)))
    problem = f"{tmp_path} has 6 MiB free, a fleet on this machine needs 165 MiB at least"
    assert str(caught.value) == f"TMPDIR: {problem}. Free some, or set TMPDIR to a directory on a larger disk"
    with pytest.raises(ConfigError, match=r"--directory: .* name one on a larger disk"):
        check_room(FleetSettings(("a1",), directory=tmp_path / "not" / "yet"))


def test_a_broker_without_room_is_not_one_that_has_to_be_started() -> None:
    error = connection_problem(
        StreamFull("STREAM.CREATE.KV_x: insufficient storage resources available"), "nats://hub:4222"
    )
    assert "Give its JetStream more room" in str(error) and "Start the broker" not in str(error)
