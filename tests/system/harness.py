"""A running fleet for the system tests, and what a test asks of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor

from syncline.bus.base import Bus, Delivery
from syncline.bus.blobs import get_blob, get_record
from syncline.bus.commits import record_in
from syncline.model.manifest import Manifest
from syncline.transform.torch_dtypes import TORCH_DTYPES
from syncline.wire import subjects
from syncline.wire.messages import ENDED, Committed, Head, LogLine, Roster, Stop, Submit, Submitted, decode, encode
from syncline_cli.local_fleet.fleet import FleetSettings, LocalFleet

TASKS = Path(__file__).with_name("tasks.py")
PATIENCE_S = 60.0


@dataclass
class Said:
    """Everything published while a test ran."""

    events: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)  # who, what, metric


T = TypeVar("T")


class Fleet:
    """A LocalFleet with connections as coordinator and as watcher."""

    def __init__(self, local: LocalFleet, bus: Bus, watch: Bus) -> None:
        self.local, self.bus, self.watch = local, bus, watch
        self.said = Said()
        self._runs = 0
        self._started: list[str] = []

    @classmethod
    async def open(cls, local: LocalFleet) -> Fleet:
        fleet = cls(local, await local.connect(subjects.COORDINATOR), await local.connect("watch"))
        await fleet.watch.subscribe("syncline.v1.*.events.*", fleet._on_event)
        await fleet.watch.subscribe("syncline.v1.*.metrics.>", fleet._on_metric)
        return fleet

    async def close(self) -> None:
        await self.bus.close()
        await self.watch.close()

    async def _on_event(self, delivery: Delivery) -> None:
        self.said.events.append({**json.loads(delivery.data), "run": subjects.run_of(delivery.subject)})

    async def _on_metric(self, delivery: Delivery) -> None:
        _, _, _, _, who, what = delivery.subject.split(".")
        self.said.metrics.append((who, what, {**json.loads(delivery.data), "run": subjects.run_of(delivery.subject)}))

    # -- runs ----------------------------------------------------------------------------------------------------------
    async def submit(self, **spec: Any) -> Submitted:
        self._runs += 1
        whole = {"name": f"run-{self._runs}", **spec}
        question = encode(Submit(spec=whole))
        while True:
            answer = decode(Submitted, await self.local.ask_coordinator(self.bus, subjects.submit(), question))
            if not answer.doing:
                return answer

    async def start(self, **spec: Any) -> str:
        answer = await self.submit(**spec)
        assert answer.run, f"{answer.setting}: {answer.problem} {answer.hint}"
        self._started.append(answer.run)
        return answer.run

    async def stop_all(self) -> None:
        """Ends what was started here and still goes on or waits."""
        for run in self._started:
            head = await self.head(run)
            if head is None or head.phase not in ENDED:
                await self.local.ask_coordinator(self.bus, subjects.stop(), encode(Stop(run=run)))
        self._started.clear()

    async def head(self, run: str) -> Head | None:
        entry = await self.bus.kv_get(subjects.RUNS_BUCKET, subjects.head_key(run))
        return None if entry is None else decode(Head, entry.value)

    async def ended(self, run: str) -> Head:
        async def look() -> Head | None:
            head = await self.head(run)
            return head if head is not None and head.phase in ENDED else None

        try:
            return await eventually(look, f"the end of {run}")
        except AssertionError as error:
            logs = {f.name: f.read_text()[-800:] for f in (self.local.broker.directory / "logs").iterdir()}
            raise AssertionError(f"{error}; {await self.head(run)}; {self.said.events[-8:]}; {logs}") from None

    async def run(self, **spec: Any) -> Head:
        """Submit, wait for the end, and insist on success."""
        head = await self.ended(await self.start(**spec))
        assert head.phase == "done", head.reason
        return head

    async def center(self, head: Head) -> Tensor:
        """The flat center of a head, as it lies on the bus."""
        return (await self.sections(head))[0]

    async def sections(self, head: Head) -> list[Tensor]:
        """The center, and where the run has one the sum of control variates."""
        assert head.model is not None and head.manifest is not None
        stream, prefix = subjects.model_stream(head.run), partial(subjects.model_prefix, head.run)
        data = await get_record(self.bus, stream, prefix, head.manifest, 64 << 20)
        layout = decode(Manifest, data)
        flat = bytearray(layout.blob_bytes)
        how: dict[str, Any] = {"sections": layout.sections}
        await get_blob(self.bus, stream, prefix, head.model, memoryview(flat), layout.chunk_bytes, **how)
        return list(torch.frombuffer(flat, dtype=TORCH_DTYPES[layout.dtype]).view(layout.sections, -1))

    async def roster(self, head: Head) -> Roster:
        assert head.roster is not None
        stream, prefix = subjects.model_stream(head.run), partial(subjects.model_prefix, head.run)
        data = await get_record(self.bus, stream, prefix, head.roster, 64 << 20)
        return decode(Roster, data)

    async def log(self, run: str) -> list[Committed]:
        """What was committed, in its order: a coordinator that is killed between its record and head has committed nothing, and
        its successor puts another record of that version, under a higher term."""
        committed: dict[int, Committed] = {}
        lines = (await self.bus.state(subjects.log_stream(run), subjects.log_record(run, "*", "*"))).subjects
        for line in sorted(lines, key=lambda subject: [int(token) for token in subject.split(".")[4:]]):
            stored = await self.bus.get(subjects.log_stream(run), line)
            assert stored is not None
            record = await record_in(self.bus, run, decode(LogLine, stored.data))
            before = committed.get(record.version)
            assert before is None or before.term < record.term, f"version {record.version} was committed twice"
            committed[record.version] = record
        return [*committed.values()]

    # -- what was said -------------------------------------------------------------------------------------------------
    def events(self, run: str, kind: str) -> list[dict[str, Any]]:
        return [e for e in self.said.events if e["run"] == run and e["event"] == kind]

    async def event(self, run: str, kind: str, agent: str = "", after: int = 0) -> dict[str, Any]:
        """Waits for an event, the one after the first `after` of its kind."""

        async def look() -> dict[str, Any] | None:
            found = [e for e in self.events(run, kind) if agent in ("", e["agent"])]
            return found[after] if len(found) > after else None

        return await eventually(look, f"event {kind} of {agent or 'anybody'} in {run}; said: {self.said.events[-5:]}")

    async def version(self, run: str, at_least: int) -> Head:
        async def look() -> Head | None:
            head = await self.head(run)
            return head if head is not None and head.version >= at_least else None

        return await eventually(look, f"version {at_least} of {run}")

    def weights(self, run: str) -> dict[int, dict[str, Tensor]]:
        """Of a `Scattered` run: by clock, each agent's W_i at the end of that period."""
        found: dict[int, dict[str, Tensor]] = {}
        for who, what, metric in self.said.metrics:
            if metric["run"] == run and what == "eval" and who != subjects.COORDINATOR:
                w = torch.tensor(
                    [metric["metrics"][f"w{i}"] for i in range(len(metric["metrics"]))], dtype=torch.float64
                )
                found.setdefault(metric["clock"], {})[who] = w
        return found

    # -- processes -----------------------------------------------------------------------------------------------------
    def trainer_pid(self, agent: str) -> int:
        """The training child of an agent: agent → its nursery → the child."""
        (nursery,) = psutil.Process(self.local.workers[agent].pid).children()
        return int(nursery.children()[-1].pid)


async def eventually(look: Callable[[], Awaitable[T | None]], what: str, patience_s: float = PATIENCE_S) -> T:
    """What `look` finds, within the patience."""
    deadline = asyncio.get_running_loop().time() + patience_s
    while asyncio.get_running_loop().time() < deadline:
        found = await look()
        if found is not None and found is not False:
            return found
        await asyncio.sleep(0.02)
    raise AssertionError(f"in vain for {patience_s:g} s: {what}")


def settings(agents: int, **changes: Any) -> FleetSettings:
    names = tuple(f"a{i}" for i in range(1, agents + 1))
    allow = ("syncline.tasks.*", f"{TASKS}:*", f"{TASKS.parents[1]}/structures/*")
    return FleetSettings(names, allow_task=allow, task_dir=TASKS.parent, device="cpu", **changes)


def task(name: str) -> str:
    return f"{TASKS}:{name}"
