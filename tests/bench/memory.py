"""What the processes of a coordinator take: `python tests/bench/memory.py`. A local fleet with two agents.

Prints the peak memory of the coordinator's service and of its evaluator in models, as the kernel counts it: PSS, so that what
they share is counted once. `--params` sets the model's size, `--outer` the outer optimiser.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path

import psutil

from syncline.bus.base import Bus
from syncline.wire import subjects
from syncline.wire.messages import Head, Submit, Submitted, decode, encode
from syncline_cli.local_fleet.fleet import FleetSettings, LocalFleet

LOOK_S = 0.05


def pss_bytes(process: psutil.Process) -> int:
    """Bytes that the process takes, its share of what it shares; 0 where it has just gone."""
    try:
        text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))


class Peaks:
    """The most that each of the coordinator's processes took, and all of them together."""

    def __init__(self, coordinator: int) -> None:
        self._process, self.most = psutil.Process(coordinator), dict.fromkeys(("service", "evaluator", "together"), 0)

    def look(self) -> None:
        try:
            children = self._process.children(recursive=True)  # its nursery, and what that has forked
        except psutil.NoSuchProcess:  # one ended meanwhile
            return
        found = {"service": pss_bytes(self._process), "evaluator": sum(map(pss_bytes, children))}
        for name, size in (*found.items(), ("together", sum(found.values()))):
            self.most[name] = max(self.most[name], size)

    def take(self) -> dict[str, float]:
        """The peaks since the last call, in MiB."""
        most, self.most = self.most, dict.fromkeys(self.most, 0)
        return {name: round(size / 2**20) for name, size in most.items()}

    async def keep_looking(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)


async def measure(params: int, outer: str) -> dict[str, dict[str, float]]:
    """MiB before a run, from its submission to its first version, and afterwards."""
    nursery = LocalFleet.preload()
    async with LocalFleet(FleetSettings(("a1", "a2")), nursery) as local:
        await local.kill(
            subjects.COORDINATOR
        )  # another one takes its place, which shares nothing with the fleet's processes
        key = str(local.broker.keyring.path(subjects.COORDINATOR))
        command = ["-m", "syncline_cli", "coordinator", "--connect", local.broker.url, "--key", key]
        coordinator = await asyncio.create_subprocess_exec(sys.executable, *command)
        bus, peaks = await local.connect(subjects.COORDINATOR), Peaks(coordinator.pid)
        looking = asyncio.create_task(peaks.keep_looking())
        try:
            await local.ask_coordinator(bus, subjects.submit(), b"")  # no run at all: refused, once it is up
            found = {"idle": peaks.take()}
            await _submit(local, bus, params, outer)
            for name, version in (("to the first version", 1), ("afterwards", 4)):
                await _reaches(bus, version)
                found[name] = peaks.take()
            return found
        finally:
            looking.cancel()
            coordinator.terminate()
            await coordinator.wait()
            await bus.close()


async def _submit(local: LocalFleet, bus: Bus, params: int, outer: str) -> None:
    task = {"task": "syncline.tasks.noop:Noop", "task_options": {"params": params}, "local": {"steps": 1}}
    spec = {"name": "memory", **task, "agents": {"min": 2, "max": 2}, "outer": {"kind": outer}, "stop": {"versions": 4}}
    while True:
        said = await local.ask_coordinator(bus, subjects.submit(), encode(Submit(spec=spec)), 600)
        answer = decode(Submitted, said)
        if not answer.doing:
            assert answer.run, f"{answer.problem} {answer.hint}"
            return


async def _reaches(bus: Bus, version: int) -> None:
    for _ in range(20_000):
        entry = await bus.kv_get(subjects.RUNS_BUCKET, subjects.head_key("memory"))
        head = None if entry is None else decode(Head, entry.value)
        assert head is None or head.phase != "failed", head.reason
        if head is not None and head.version >= version:
            return
        await asyncio.sleep(LOOK_S)
    raise AssertionError(f"no version {version}")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--params", type=int, default=100_000_000)
    arguments.add_argument("--outer", default="sgd")
    asked = arguments.parse_args()
    print(f"model: {asked.params * 4 / 2**20:.0f} MiB, outer: {asked.outer}; MiB")
    for when, sizes in asyncio.run(measure(asked.params, asked.outer)).items():
        print(f"{when:>20}: {json.dumps(sizes)}")


if __name__ == "__main__":
    main()
