"""`syncline watch` with the watcher's key on a real fleet, and with 400 agents that only speak on a real terminal."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import nats
import psutil
import pytest
import pytest_asyncio

from syncline.bus.server.violations import ViolationLog
from syncline.wire import subjects
from syncline.wire.messages import Stop, encode
from system.chorus import Chorus
from system.command import SYNCLINE, Command
from system.harness import Fleet, task

pytestmark = [pytest.mark.timeout(180), pytest.mark.asyncio(loop_scope="module")]

SLOW = {"task": task("Slow"), "task_options": {"seconds": 0.3}, "local": {"steps": 10}, "agents": {"min": 4}}
AGENTS = 400


@pytest.fixture
def started() -> Iterator[list[Command]]:
    commands: list[Command] = []
    yield commands
    for command in commands:
        command.stop()


def watching(fleet: Fleet, place: Path, *args: str, key: str = subjects.COORDINATOR) -> Command:
    broker = fleet.local.broker
    return Command(place, ("watch", *args, "--connect", broker.url, "--key", str(broker.keyring.path(key))))


# -- a real fleet -------------------------------------------------------------------------------------------------------


async def test_a_watcher_sees_the_run_to_its_end_with_nothing_but_the_public_feeds(
    fleet: Fleet, tmp_path: Path, started: list[Command]
) -> None:
    broker = fleet.local.broker
    refused = ViolationLog(broker.log_path, dict(broker.keyring.names))
    list(refused.read())
    run = await fleet.start(**SLOW, stop={"versions": 12})
    await fleet.version(run, 1)
    watch = watching(fleet, tmp_path, run, key="watch")
    started.append(watch)
    assert await asyncio.to_thread(watch.ended) == 0, watch.err
    lines = watch.out.splitlines()
    assert any(re.search(rf"  run {run}: version \d+ of 12 .* 4 of 4 agents  ", line) for line in lines), watch.out
    assert sum(line.endswith(f"  run {run}: 12 versions") for line in lines) == 1
    assert sum(f"  run {run}: version 12 of 12 " in line for line in lines) == 1
    assert list(refused.read()) == [], "it asked for something that a watcher may not"


async def test_who_is_late_or_lost_is_said_as_it_happens(fleet: Fleet, tmp_path: Path, started: list[Command]) -> None:
    run = await fleet.start(**SLOW | {"agents": {"min": 4, "lost_after_s": 1.5}}, stop={"versions": 1000})
    await fleet.version(run, 1)
    watch = watching(fleet, tmp_path, run, key="watch")
    started.append(watch)
    await asyncio.to_thread(watch.says, f"run {run}: version")
    await fleet.local.kill("a2")
    await asyncio.to_thread(watch.says, "a2 lost: not heard of for")
    await asyncio.to_thread(watch.says, "3 of 4 agents")
    watch.process.send_signal(signal.SIGINT)
    assert await asyncio.to_thread(watch.ended, 5.0) == 130
    assert f"interrupted; run {run} continues" in watch.err
    late = watching(fleet, tmp_path, "--json", key="watch")
    started.append(late)
    await asyncio.to_thread(late.says, '"kind": "run"')
    said = [json.loads(line) for line in late.out.splitlines() if '"kind": "run"' in line]
    assert said[-1]["lost"] == ["a2"]
    await fleet.local.start_agent("a2")
    await fleet.event(run, "agent-joined", "a2", after=1)
    stop = Command(
        tmp_path, ("stop", run, *watch.args[-4:-2], "--key", str(fleet.local.broker.keyring.path("coordinator")))
    )
    started.append(stop)
    assert await asyncio.to_thread(stop.ended) == 0


async def test_every_message_comes_as_a_json_line_and_the_watchers_key_is_found_beside_the_coordinators(
    fleet: Fleet, tmp_path: Path, started: list[Command]
) -> None:
    run = await fleet.start(**SLOW, stop={"versions": 20})
    watch = watching(fleet, tmp_path, run, "--json")
    started.append(watch)
    assert await asyncio.to_thread(watch.ended) == 0, watch.err
    lines = [json.loads(line) for line in watch.out.splitlines()]
    assert {line["run"] for line in lines} == {run}
    assert {line["sender"] for line in lines if line["kind"] == "train"} == {"a1", "a2", "a3", "a4"}
    versions = [line["version"] for line in lines if line["kind"] == "round"]
    assert versions == sorted(versions) and versions[-1] == 20
    assert any(line["kind"] == "event" and line["event"] == "run-done" for line in lines)


async def test_a_run_that_fails_ends_the_watching_with_its_reason(
    fleet: Fleet, tmp_path: Path, started: list[Command]
) -> None:
    before = await fleet.start(**SLOW, stop={"versions": 1000})
    broken = await fleet.start(name="broken", task=task("Raising"), agents={"min": 4}, local={"steps": 1})
    watch = watching(fleet, tmp_path, "broken", key="watch")
    started.append(watch)
    await asyncio.to_thread(watch.says, "queued: broken")
    await fleet.local.ask_coordinator(fleet.bus, subjects.stop(), encode(Stop(run=before)))
    await fleet.ended(broken)
    assert await asyncio.to_thread(watch.ended, 20.0) == 1
    assert "error: run broken: " in watch.err and "a bug in the user's code" in watch.err
    assert "Traceback" not in watch.err


async def test_a_name_that_is_mistyped_is_answered_with_the_one_that_speaks(
    fleet: Fleet, tmp_path: Path, started: list[Command]
) -> None:
    run = await fleet.start(**SLOW, name="spoken", stop={"versions": 30})
    await fleet.version(run, 1)
    watch = watching(fleet, tmp_path, "spokn", key="watch")
    started.append(watch)
    await asyncio.to_thread(watch.says, "did you mean spoken?")
    assert await asyncio.to_thread(watch.ended, 30.0) == 2
    assert "error: RUN: no run spokn is running or queued" in watch.err
    await fleet.ended(run)


async def test_a_run_that_had_ended_before_is_told_to_whoever_may_ask(
    fleet: Fleet, tmp_path: Path, started: list[Command]
) -> None:
    run = (await fleet.run(**SLOW, stop={"versions": 1})).run
    told, silent, none = (
        watching(fleet, tmp_path, run),
        watching(fleet, tmp_path, run, key="watch"),
        watching(fleet, tmp_path, f"{run}0"),
    )
    started += [told, silent, none]
    assert await asyncio.to_thread(told.ended, 30.0) == 0, told.err
    assert f"run {run}: 1 versions; it ended at version 1\n" in told.out
    assert f"watching with the key {fleet.local.broker.keyring.path('watch')}" in told.err
    assert await asyncio.to_thread(silent.ended, 30.0) == 2
    assert f"no run {run} is running or queued" in silent.err and "coordinator's key" in silent.err
    assert await asyncio.to_thread(none.ended, 30.0) == 2
    assert f"there is no run '{run}0'. Did you mean" in none.err


async def test_wrong_input_is_refused(fleet: Fleet, tmp_path: Path, started: list[Command]) -> None:
    nowhere = Command(tmp_path, ("watch", "--connect", "nats://127.0.0.1:1"))
    no_name = Command(tmp_path, ("watch", "No Name"))
    nothing = Command(tmp_path, ("watch",))
    started += [nowhere, no_name, nothing]
    for command in started:
        assert await asyncio.to_thread(command.ended, 30.0) == 2
        assert "Traceback" not in command.err
    assert nowhere.err.startswith("error: --connect: no broker answers at nats://127.0.0.1:1")
    assert no_name.err.startswith("error: RUN: 'No Name' is not a run's name")
    assert "no local fleet is up on this machine" in nothing.err and "syncline demo" in nothing.err


async def test_a_local_fleet_is_found_by_itself(tmp_path: Path, started: list[Command]) -> None:
    (tmp_path / "long.yaml").write_text(
        "task: syncline.tasks.digits:Digits\nname: long\nlocal: {steps: 50}\nstop: {versions: 100000}\n"
    )
    run = Command(tmp_path, ("run", "long.yaml", "--local", "2"))
    started.append(run)
    await asyncio.to_thread(run.says, "watch from a second terminal: syncline watch\n")
    await asyncio.to_thread(run.says, "round ")

    def beside(*args: str) -> subprocess.CompletedProcess[str]:
        """In a second terminal."""
        place = {**os.environ, "TMPDIR": str(run.temporary)}
        return subprocess.run([*SYNCLINE, *args], capture_output=True, text=True, env=place, cwd=tmp_path, timeout=60)

    listed = await asyncio.to_thread(beside, "ls", "--json")
    assert [row["run"] for row in json.loads(listed.stdout)["runs"]] == ["long"]
    exported = await asyncio.to_thread(beside, "export", "long", "long.safetensors")
    assert exported.returncode == 0, exported.stderr
    explained = await asyncio.to_thread(beside, "why", "long")
    assert "closed by: 2 of 2" in explained.stdout
    stopped = await asyncio.to_thread(beside, "stop", "long", "--by", "ann")
    assert stopped.stdout.startswith("run long was stopped by ann at version ")
    assert await asyncio.to_thread(run.ended, 30.0) == 0
    assert "run long: stopped by ann" in run.out
    run.leaves_nothing(5.0)


# -- 400 agents, and a terminal -----------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chorus(bare_broker: str) -> AsyncIterator[tuple[Chorus, str]]:
    """400 agents that speak on a broker without accounts and without JetStream."""
    client = await nats.connect(bare_broker)
    singing = Chorus(client, AGENTS)
    voice = asyncio.create_task(singing.sing())
    yield singing, bare_broker
    voice.cancel()
    await asyncio.gather(voice, return_exceptions=True)
    await client.close()


class Terminal:
    """A command on a terminal of its own, of a size."""

    def __init__(self, args: tuple[str, ...], columns: int, lines: int) -> None:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = psutil.Popen(
            [*SYNCLINE, *args],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**environment, "TERM": "xterm-256color"},
        )
        os.close(theirs)
        os.set_blocking(ours, False)
        self.ours = ours
        self.written = b""

    async def until(self, text: str, within_s: float = 60.0) -> None:
        deadline = time.monotonic() + within_s
        while text not in self.plain:
            assert time.monotonic() < deadline, self.plain[-4000:]
            await self.read(0.1)

    async def read(self, seconds: float) -> None:
        """Takes what is written for so long, as a terminal does."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                self.written += os.read(self.ours, 1 << 16)
            await asyncio.sleep(0.02)

    @property
    def plain(self) -> str:
        """All that was written, without colours and cursor."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.written.decode(errors="replace"))

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.ours)


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (160, 45)])
async def test_400_agents_fit_a_terminal_without_flicker_and_within_bounds(
    chorus: tuple[Chorus, str], columns: int, lines: int
) -> None:
    terminal = Terminal(("watch", "--connect", chorus[1]), columns, lines)
    try:
        await terminal.until("400 agents")
        await terminal.until(" more: ")
        before, began, seen = terminal.process.cpu_times(), time.monotonic(), len(terminal.written)
        said = chorus[0].published
        await terminal.read(6.0)
        after, took_s = terminal.process.cpu_times(), time.monotonic() - began
        assert chorus[0].published - said > 2000, "the chorus was too slow to say anything about the watcher"
        pictures = terminal.written[seen:].decode().split("\x1b[H")[1:]
        assert 1 <= len(pictures) <= took_s * 10
        assert "\x1b[2J" not in terminal.written[seen:].decode(), "the screen is never blank between two pictures"
        rows = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", pictures[-2] if len(pictures) > 1 else pictures[-1]).splitlines()
        assert len(rows) == lines and max(map(len, rows)) <= columns
        assert after.user + after.system - before.user - before.system < 0.6 * took_s
        assert terminal.process.memory_info().rss < 200 << 20
        os.write(terminal.ours, b"q")
        await terminal.until(f"come back with: syncline watch chorus --connect {chorus[1]}", 5.0)
        assert await asyncio.to_thread(terminal.process.wait, 5.0) == 0
        assert b"\x1b[?1049l" in terminal.written and b"\x1b[?25h" in terminal.written, "the screen and cursor are back"
    finally:
        terminal.close()


async def test_ctrl_c_leaves_the_terminal_as_it_was(chorus: tuple[Chorus, str]) -> None:
    terminal = Terminal(("watch", "chorus", "--connect", chorus[1]), 80, 24)
    try:
        await terminal.until("400 agents")
        terminal.process.send_signal(signal.SIGINT)
        await terminal.until("interrupted; run chorus continues", 5.0)
        assert await asyncio.to_thread(terminal.process.wait, 5.0) == 130
        assert b"\x1b[?1049l" in terminal.written and b"\x1b[?25h" in terminal.written
        attributes: list[Any] = termios.tcgetattr(terminal.ours)
        assert attributes[3] & termios.ECHO and attributes[3] & termios.ICANON
    finally:
        terminal.close()


@pytest.mark.parametrize("how", ["--json", "--plain"])
async def test_a_reader_that_has_read_enough_ends_the_watching(chorus: tuple[Chorus, str], how: str) -> None:
    def one_line() -> tuple[str, int, str]:
        """The first line, and how the command ends when nobody reads on."""
        command = [*SYNCLINE, "watch", "--connect", chorus[1], how]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline()
            process.stdout.close()
            return line, process.wait(15.0), process.stderr.read()

    line, code, err = await asyncio.to_thread(one_line)
    assert "chorus" in line or "edge-" in line, line
    assert (code, err) == (0, "")
