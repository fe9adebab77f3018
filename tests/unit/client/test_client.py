"""The contract of the Python client, on a bus in memory: submit, follow, list, stop, history and export."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from syncline.bus.base import Delivery
from syncline.bus.memory.bus import MemoryBroker
from syncline.client.client import Client
from syncline.client.follow import HeadFollower, Progress
from syncline.errors import ConfigError, NoResponders, RunFailed
from syncline.observe.telemetry import CenterEval, Event, Published, Round, Train
from syncline.spec.run_spec import RunSpec, parse
from syncline.wire import subjects
from syncline.wire.messages import Head, Notify, Stop, Stopped, Submit, Submitted, decode, encode
from syncline.wire.subjects import COORDINATOR
from unit.stored_run import RUN, StoredRun, bucket, center, submitted

ROUND = Round(
    version=3, closed_by="2 of 2", merged=2, late=[], seconds=1, collect_s=1, merge_s=0, bytes_up=7, bytes_down=5
)
TRAIN = Train(state="training", version=3, clock=3, step=5, steps=20, part=0, rows=4, bytes_up=1, bytes_down=2)


class Services:
    """A coordinator that accepts every run but `refused`, and ends a run that is stopped; with one agent."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.bus = broker.connect(COORDINATOR)
        self.run = StoredRun(self.bus)

    async def start(self) -> None:
        await self.bus.subscribe(subjects.submit(), self._on_submit)
        await self.bus.subscribe(subjects.stop(), self._on_stop)

    async def _on_submit(self, question: Delivery) -> None:
        name = decode(Submit, question.data).spec["name"]
        refused = Submitted(run="", setting="name", problem=f"{name} is taken", hint="Use another")
        answer = refused if name == "refused" else Submitted(run=name, warnings=["doubtful"])
        await self.bus.publish(question.reply, encode(answer))

    async def _on_stop(self, question: Delivery) -> None:
        asked = decode(Stop, question.data)
        await self.bus.publish(question.reply, encode(Stopped(run=asked.run, outcome="stopping")))
        await self.end("done", f"stopped by {asked.by}")

    async def publish(self, sender: str, said: Published) -> None:
        event = isinstance(said, Event)
        subject = subjects.events(RUN, sender) if event else subjects.metrics(RUN, sender, said.kind)
        await self.bus.publish(subject, said.model_dump_json().encode())

    async def end(self, phase: str, reason: str) -> None:
        entry = await self.bus.kv_get(subjects.RUNS_BUCKET, subjects.head_key(RUN))
        assert entry is not None
        head = decode(Head, entry.value)
        last = Head.model_validate({**head.model_dump(), "phase": phase, "reason": reason})
        await self.run.write(last)
        await self.bus.publish(subjects.notify(RUN), encode(Notify(head=encode(last))))


@pytest.fixture
async def services() -> Services:
    made = Services(MemoryBroker())
    await made.start()
    return made


@pytest.fixture
def client(services: Services) -> Client:
    return Client(services.bus, url="memory")


def spec_of(name: str) -> RunSpec:
    return parse(RunSpec, {"name": name, "task": "syncline.tasks.noop:Noop"})


# -- submit --------------------------------------------------------------------------------------------------------------
async def test_a_submitted_run_returns_its_warnings(client: Client) -> None:
    assert await client.submit(spec_of("r")) == ["doubtful"]


async def test_a_refused_run_names_the_setting(client: Client) -> None:
    with pytest.raises(ConfigError) as caught:
        await client.submit(spec_of("refused"))
    assert (caught.value.setting, caught.value.hint) == ("name", "Use another")


async def test_without_a_coordinator_nothing_is_submitted_or_stopped() -> None:
    bus = MemoryBroker().connect(COORDINATOR)
    await submitted(bus)
    client = Client(bus)
    with pytest.raises(NoResponders):
        await client.submit(spec_of("r"), patience_s=0.0)
    with pytest.raises(NoResponders):
        await client.stop(RUN)


# -- follow --------------------------------------------------------------------------------------------------------------
async def test_a_run_is_followed_with_its_metrics_and_events_to_its_end(services: Services, client: Client) -> None:
    await services.run.make(3)
    seen: list[Progress] = []
    events: list[Event] = []

    async def speak() -> None:
        await services.publish("a1", TRAIN)
        await services.publish(COORDINATOR, ROUND)
        await services.publish(COORDINATOR, CenterEval(version=3, metrics={"accuracy": 0.9}, seconds=0.1))
        await services.publish("a1", Event(event="advice", level="warning", text="a1 is hot", agent="a1"))
        await services.end("done", "3 versions")

    speaking = None
    async for progress in client.follow(RUN):
        seen.append(progress)
        events += progress.events
        speaking = speaking or asyncio.create_task(speak())
    assert speaking is not None
    await speaking
    last = seen[-1]
    assert last.head is not None and (last.head.phase, last.head.reason) == ("done", "3 versions")
    assert (last.version, last.metrics, last.state.bytes_up) == (3, {"accuracy": 0.9}, 7)
    assert list(last.state.agents) == ["a1"]
    assert [event.text for event in events] == ["a1 is hot"]


async def test_a_failed_run_is_an_error_after_its_last_progress(services: Services, client: Client) -> None:
    await services.run.make(1)
    await services.end("failed", "too few agents")
    seen = []
    with pytest.raises(RunFailed, match="too few agents"):
        async for progress in client.follow(RUN):
            seen.append(progress.head)
    assert seen[-1] is not None and seen[-1].phase == "failed"
    with pytest.raises(RunFailed, match="too few agents"):
        await client.wait(RUN)


async def test_leaving_early_ends_the_subscriptions(services: Services, client: Client) -> None:
    await services.run.make(1)
    before = len(asyncio.all_tasks())
    async with aclosing(client.follow(RUN)) as following:  # type: ignore[type-var]
        async for _ in following:
            break
    for _ in range(10):
        await asyncio.sleep(0)  # cancelled tasks get their turn
    assert len(asyncio.all_tasks()) == before


async def test_an_older_head_does_not_replace_a_newer_one(services: Services) -> None:
    await services.run.make(1)
    follower = HeadFollower(services.bus, RUN)
    newer = Head(run=RUN, term=2, version=5, phase="training")
    follower._see(newer)
    follower._see(Head(run=RUN, term=1, version=9, phase="training"))
    assert follower.head == newer


@pytest.mark.parametrize("call", ["follow", "wait", "stop", "history", "model"])
async def test_a_run_that_does_not_exist_is_a_config_error(services: Services, client: Client, call: str) -> None:
    await bucket(services.bus)
    with pytest.raises(ConfigError, match="there is no run 'gone'"):
        result: Any = getattr(client, call)("gone")
        if hasattr(result, "__aiter__"):
            _ = [item async for item in result]
        else:
            await result


# -- list, stop, history, export -----------------------------------------------------------------------------------------
async def test_runs_are_listed(services: Services, client: Client) -> None:
    await bucket(services.bus)
    assert await client.runs() == []
    await services.run.make(2)
    assert [(run.run, run.version) for run in await client.runs()] == [(RUN, 2)]


async def test_a_stopped_run_has_ended_with_the_requesters_name(services: Services, client: Client) -> None:
    await services.run.make(2)
    result = await client.stop(RUN, by="ann")
    assert (result.outcome, result.head.phase, result.head.reason) == ("stopping", "done", "stopped by ann")


async def test_the_history_is_every_commit_in_order(services: Services, client: Client) -> None:
    await services.run.make(3)
    assert [commit.version async for commit in client.history(RUN)] == [1, 2, 3]
    assert [commit.version async for commit in client.history(RUN, 2, 2)] == [2]


async def test_an_exported_center_is_a_file_and_arrays(services: Services, client: Client, tmp_path: Path) -> None:
    await services.run.make(2)
    file = tmp_path / "m.safetensors"
    model = await client.export(RUN, file)
    assert file.exists() and model.about["version"] == 2
    np.testing.assert_array_equal(model.tensors["fc.bias"], center(2)[4:])
