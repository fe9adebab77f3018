"""A local fleet's broker is kept up: started again when it has gone, or has had no room on its disk; not without end."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from syncline.errors import RunFailed, Unavailable
from syncline_cli.supervise import BROKER_STARTS, ENOUGH_BYTES, Services

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

    def services(self) -> Services:
        self.log_path.touch()
        fleet = cast("Any", SimpleNamespace(broker=self))
        return Services(fleet, lambda level, text: self.said.append((level, text)))


async def test_a_broker_that_has_gone_is_started_again_three_times(tmp_path: Path) -> None:
    broker = Broker(tmp_path)
    services = broker.services()
    await services._keep_broker()
    assert broker.restarts == 0, "it was up"
    for _ in range(BROKER_STARTS):
        broker.exit_code = -9
        await services._keep_broker()
    assert broker.said[0] == ("warning", "the broker's process was killed by SIGKILL; it is started again")
    broker.exit_code = 1
    with pytest.raises(RunFailed, match="ended with code 1, after 3 new starts"):
        await services._keep_broker()
    assert broker.restarts == BROKER_STARTS


async def test_a_broker_that_does_not_come_up_again_ends_the_run(tmp_path: Path) -> None:
    broker = Broker(tmp_path, exit_code=-9, broken=True)
    with pytest.raises(RunFailed, match="killed by SIGKILL, and does not start again: nats-server ended with code 1"):
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
    assert level == "error" and text == f"the disk is full and the run stands still: free 64 MiB for {tmp_path}"
    free = ENOUGH_BYTES
    await services._keep_broker()
    await services._keep_broker()
    assert (
        broker.restarts == 1 and broker.said[1][1] == "the broker's process ran out of disk space; it is started again"
    )
