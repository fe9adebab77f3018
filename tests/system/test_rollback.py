"""A power failure at the broker's, as it is in life: nats-server comes back with a store that it had some versions ago."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from syncline.runtime.nursery import Nursery
from syncline_cli.local_fleet.fleet import LocalFleet
from system.harness import Fleet, settings

pytestmark = pytest.mark.timeout(240)

SPEC = {
    "task": "syncline.tasks.digits:Digits",
    "agents": {"min": 4, "lost_after_s": 60},
    "local": {"steps": 10},
    "evaluate": {"center": False},
    "stop": {"versions": 60},
}


def image_of(store: Path, broker_pid: int, to: Path) -> None:
    """What would be on the disk if the power failed now."""
    os.kill(broker_pid, signal.SIGSTOP)
    try:
        shutil.copytree(store, to)
    finally:
        os.kill(broker_pid, signal.SIGCONT)


async def test_the_run_goes_on_from_what_is_there_under_a_higher_term_to_the_very_same_model(
    nursery: Nursery, tmp_path: Path
) -> None:
    async with LocalFleet(settings(4), nursery) as local:
        fleet = await Fleet.open(local)
        calm = await fleet.run(**SPEC)

        run = await fleet.start(**SPEC)
        before = await fleet.version(run, 5)
        broker, store = local.broker, local.broker.directory / "jetstream"
        image_of(store, broker.pid, tmp_path / "image")
        lost = await fleet.version(run, before.version + 10)
        await broker.kill()
        shutil.rmtree(store)
        shutil.copytree(tmp_path / "image", store)
        await broker.restart()

        head = await fleet.ended(run)
        assert head.phase == "done" and head.version == 60 and head.digest == calm.digest
        assert lost.term == 1 < head.term and head.epoch != lost.epoch
        told = await fleet.event(run, "run-set-back")
        assert f"goes on from version {before.version}" in told["text"]
        said = (broker.directory / "logs" / "coordinator.log").read_text()
        assert f"broker-rolled-back: run {run}: the broker has lost writes that it had acknowledged" in said
        records = [record for record in await fleet.log(run) if record.version > before.version]
        assert {record.term for record in records if record.version > before.version + 3} == {head.term}
        await fleet.close()
