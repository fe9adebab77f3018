"""`ls`, `why`, `stop` and `export` as a user runs them on a fleet that is there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_model

from syncline.data.partition import Part
from syncline.tasks.base import evaluate
from syncline.tasks.digits import Digits
from syncline.wire import subjects
from system.command import Command
from system.harness import Fleet, task

pytestmark = [pytest.mark.timeout(180), pytest.mark.asyncio(loop_scope="module")]

SLOW = {"task": task("Slow"), "task_options": {"seconds": 0.3}, "local": {"steps": 10}, "agents": {"min": 4}}
DIGITS = {"task": "syncline.tasks.digits:Digits", "local": {"steps": 20}, "agents": {"min": 4}}
Syncline = Callable[..., Any]


class Shell:
    """Runs commands on the fleet, as the coordinator unless another key is named."""

    def __init__(self, fleet: Fleet, place: Path) -> None:
        self.fleet, self.place = fleet, place
        self.commands: list[Command] = []

    def start(self, *args: str, key: str = subjects.COORDINATOR) -> Command:
        broker = self.fleet.local.broker
        where = ("--connect", broker.url, "--key", str(broker.keyring.path(key)))
        self.commands.append(Command(self.place, (*args, *where)))
        return self.commands[-1]

    async def done(self, *args: str, code: int = 0, key: str = subjects.COORDINATOR) -> Command:
        command = self.start(*args, key=key)
        assert await asyncio.to_thread(command.ended) == code, command.out + command.err
        assert "Traceback" not in command.err
        return command

    async def told(self, *args: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((await self.done(*args, "--json")).out)
        return found

    async def refused(self, *args: str, key: str = subjects.COORDINATOR) -> str:
        command = await self.done(*args, code=2, key=key)
        assert "error" not in command.out
        return command.err


@pytest_asyncio.fixture(loop_scope="module")
async def shell(fleet: Fleet, tmp_path: Path) -> AsyncIterator[Shell]:
    """A shell that takes what it started with it, also the runs: a test that fails must not hold up the next."""
    shell = Shell(fleet, tmp_path)
    yield shell
    for command in shell.commands:
        command.stop()
    await fleet.stop_all()


async def test_a_running_run_is_listed_explained_stopped_and_listed_again(fleet: Fleet, shell: Shell) -> None:
    run = await fleet.start(**SLOW, stop={"versions": 1000})
    await fleet.version(run, 2)
    (row,) = [row for row in (await shell.told("ls"))["runs"] if row["run"] == run]
    assert row["phase"] in ("training", "merging") and row["version"] >= 2
    assert (row["versions"], row["agents"], row["roster"]) == (1000, 4, 4)

    said = await shell.told("why", run, "2")
    record = (await fleet.log(run))[1]
    assert said["version"] == 2 and said["digest"] == record.digest
    assert said["closed_by"] == "4 of 4"
    assert all(0.3 <= entry.pop("seconds") < 60 for entry in said["merged"])
    assert said["merged"] == [{"agent": f"a{i}", "clock": 2, "lag": 0, "weight": 0.25} for i in (1, 2, 3, 4)]
    assert (said["dropped"], said["late"]) == ([], [])
    assert said["bytes"] == record.bytes_up + record.bytes_down > 0
    assert set(said["phases_s"]) == {"collect", "merge"} and all(s > 0 for s in said["phases_s"].values())
    assert "  closed by: 4 of 4\n" in (await shell.done("why", run)).out

    story = await shell.told("why", run, "--agent", "a2")
    assert any("a2 joined" in line for line in story["story"])
    assert any("merge" in line and "a2 clock" in line for line in story["story"])
    assert "a2 offered clock" in (await shell.done("why", run, "--agent", "a2")).out
    assert "made no recent decision about 'a9'" in await shell.refused("why", run, "--agent", "a9")
    assert "Leave VERSION out" in await shell.refused("why", run, "2", "--agent", "a2")

    stopped = await shell.told("stop", run, "--by", "ann")
    head = await fleet.head(run)
    assert head is not None
    assert (head.phase, head.reason, head.version) == ("done", "stopped by ann", stopped["version"])
    assert stopped["outcome"] == "stopping"
    assert len(await fleet.log(run)) >= head.version > 2
    assert "stopped by ann" in (await shell.done("ls")).out
    assert "has ended" in await shell.refused("why", run, "--agent", "a2")
    again = await shell.done("stop", run)
    assert f"had ended before, at version {head.version}: stopped by ann" in again.out


async def test_an_agent_that_is_late_is_named_with_the_reason(fleet: Fleet, shell: Shell) -> None:
    run = await fleet.start(**SLOW, sync={"quorum": 3, "grace_s": 0.0}, stop={"versions": 4})
    await fleet.ended(run)
    records = await fleet.log(run)
    late = next(record for record in records if record.plan.late)
    said = await shell.told("why", run, str(late.version))
    assert said["late"] == list(late.plan.late)
    assert said["closed_by"].startswith("quorum 3 of 4 + ")
    dropped = [drop for record in records for drop in record.dropped]
    if dropped:
        of = next(record.version for record in records if record.dropped)
        assert "is closed" in (await shell.told("why", run, str(of)))["dropped"][0]["reason"]


async def test_a_queued_run_that_is_stopped_never_begins(fleet: Fleet, shell: Shell) -> None:
    active = await fleet.start(**SLOW, stop={"versions": 1000})
    queued = await fleet.start(**SLOW, stop={"versions": 1})
    await fleet.version(active, 1)
    rows = {row["run"]: row["phase"] for row in (await shell.told("ls"))["runs"]}
    assert rows[queued] == "queued"
    assert "has no model yet" in await shell.refused("export", queued, "m.safetensors")
    assert "has committed no version yet" in await shell.refused("why", queued)
    said = await shell.done("stop", queued, "--by", "ann")
    assert said.out == f"run {queued} was stopped by ann before its first version\n"
    await shell.done("stop", active)
    await fleet.run(**SLOW, stop={"versions": 1})  # the queue goes on behind it
    head = await fleet.head(queued)
    assert head is not None
    assert (head.phase, head.version, head.model) == ("done", 0, None)
    assert await fleet.event(queued, "run-done")


async def test_a_run_that_waits_for_agents_is_stopped_at_once(fleet: Fleet, shell: Shell) -> None:
    run = await fleet.start(**{**SLOW, "agents": {"min": 9}})
    said = await shell.told("stop", run)
    assert (said["outcome"], said["version"]) == ("stopping", 0)
    assert (await fleet.ended(run)).phase == "done"


async def test_a_fleet_without_a_coordinator_is_told_with_how_to_start_one(fleet: Fleet, shell: Shell) -> None:
    run = await fleet.start(**{**SLOW, "agents": {"min": 9}})
    await fleet.local.kill(subjects.COORDINATOR)
    try:
        broker = fleet.local.broker
        start = f"syncline coordinator --connect {broker.url} --key {broker.keyring.path(subjects.COORDINATOR)}"
        listed = await shell.told("ls")
        assert listed["coordinator"] is False
        shown = (await shell.done("ls")).out
        assert run in shown and ("waiting?" in shown or "queued?" in shown) and start in shown
        assert f"Start one with `{start}`" in await shell.refused("stop", run)
        for key in (subjects.COORDINATOR, "a1"):
            assert start in (await shell.done("doctor", "--only", "coordinator", key=key, code=1)).out
    finally:
        await fleet.local.start_coordinator()
    assert (await shell.told("stop", run))["outcome"] in ("stopping", "stopped")
    assert (await shell.told("ls"))["coordinator"] is None


async def test_a_stopped_run_that_is_being_opened_ends_too(fleet: Fleet, shell: Shell) -> None:
    first = await fleet.start(**SLOW, stop={"versions": 1000})
    second = await fleet.start(**SLOW, stop={"versions": 1000})
    await fleet.version(first, 1)
    await shell.done("stop", first)
    await shell.done("stop", second)
    assert (await fleet.ended(second)).reason.startswith("stopped by ")


async def test_plain_pytorch_gets_the_same_accuracy_from_the_exported_model(
    fleet: Fleet, shell: Shell, tmp_path: Path
) -> None:
    run = await fleet.start(**DIGITS, stop={"versions": 12})
    await fleet.version(run, 1)
    while_it_goes_on = await shell.told("export", run, "early.safetensors")
    assert while_it_goes_on["version"] >= 1
    head = await fleet.ended(run)
    exported = await shell.told("export", run, "digits.safetensors")
    assert (exported["version"], exported["digest"]) == (12, head.digest)
    model, digits = Digits().model(), Digits()
    assert load_model(model, tmp_path / "digits.safetensors") == (set(), [])
    (measured,) = [
        metric["metrics"]["accuracy"]
        for who, what, metric in fleet.said.metrics
        if (metric["run"], who, what, metric.get("version")) == (run, subjects.COORDINATOR, "eval", 12)
    ]
    with torch.no_grad():
        mine = evaluate(digits, model, digits.dataset(Part.test()), 64, "cpu")["accuracy"]
    assert mine == pytest.approx(measured, abs=1e-6)
    assert (await shell.told("export", run, "older.safetensors", "--version", "11"))["version"] == 11
    assert "version 3" in await shell.refused("export", run, "gone.safetensors", "--version", "3")


async def test_wrong_names_and_versions_are_said_with_what_is_near(fleet: Fleet, shell: Shell) -> None:
    run = await fleet.start(**SLOW, stop={"versions": 1}, name="mistyped")
    await fleet.ended(run)
    for command in (("why", "mistpyed"), ("stop", "mistpyed"), ("export", "mistpyed", "m.safetensors")):
        said = await shell.refused(*command)
        assert said == "error: RUN: there is no run 'mistpyed'. Did you mean `mistyped`?\n"
    assert "Use a version from 1 to 1" in await shell.refused("why", run, "7")
    assert (await shell.refused("export", run, "m.pt")).startswith("error: FILE: m.pt does not end with")


@pytest.mark.parametrize("key", ["watch", "a1"])
async def test_only_the_coordinators_key_reads_and_steers(fleet: Fleet, shell: Shell, key: str) -> None:
    run = await fleet.start(**SLOW, stop={"versions": 1})
    await fleet.ended(run)
    for command in (("ls",), ("why", run), ("stop", run), ("export", run, "m.safetensors")):
        said = await shell.refused(*command, key=key)
        assert said.startswith("error: --key: ") and "Use the coordinator's key" in said


async def test_a_run_that_is_submitted_twice_says_so_and_what_to_do(fleet: Fleet, shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text(f"task: {task('Slow')}\nname: twice\nagents: {{min: 4}}\n")
    detached = await shell.done("run", "twice.yaml", "--detach")
    assert detached.out == "twice\n"
    await fleet.version("twice", 1)
    said = await shell.refused("run", "twice.yaml")
    assert said.startswith("error: name: there is a run 'twice' already: ")
    assert "`syncline watch twice`" in said and "`syncline stop twice`" in said and "--name" in said
    await shell.done("stop", "twice")
    said = await shell.refused("run", "twice.yaml")
    assert "and it has ended: stopped by " in said and "`syncline why twice`" in said
