"""Whoever is killed, stopped or sends rubbish: the run goes on, and the events name it and the reason."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import nats
import pytest

from syncline.wire import subjects
from syncline.wire.messages import Head
from system.command import Command
from system.harness import Fleet, eventually, task

pytestmark = pytest.mark.asyncio(loop_scope="module")

SLOW = {"task": task("Slow"), "task_options": {"seconds": 0.3}, "local": {"steps": 10}}
QUICK_LOSS = {"min": 4, "lost_after_s": 1.5}


async def goes_on(fleet: Fleet, run: str, versions: int = 3) -> Head:
    """The run makes that many more versions."""
    head = await fleet.head(run)
    assert head is not None
    return await fleet.version(run, head.version + versions)


async def test_an_agent_killed_in_the_middle_of_a_round_is_named_and_rejoins(fleet: Fleet) -> None:
    run = await fleet.start(**SLOW, agents=QUICK_LOSS, stop={"versions": 12})
    await fleet.version(run, 1)
    await fleet.local.kill("a2")
    assert "not heard of" in (await fleet.event(run, "agent-lost", "a2"))["text"]
    await goes_on(fleet, run, 2)
    await fleet.local.start_agent("a2")
    await fleet.event(run, "agent-joined", "a2", after=1)
    head = await fleet.ended(run)
    assert head.phase == "done", head.reason
    merged = [{e.agent for e in record.plan.merged} for record in await fleet.log(run)]
    assert any("a2" not in agents for agents in merged), "the run never went on without it"
    assert "a2" in merged[-1], "it never came back"
    assert (await fleet.roster(head)).agents == ["a1", "a2", "a3", "a4"], "it came back under another number"


async def test_a_training_child_killed_alone_is_started_again_and_no_update_is_lost(fleet: Fleet) -> None:
    run = await fleet.start(**SLOW, agents=QUICK_LOSS, stop={"versions": 6})
    await fleet.version(run, 1)
    os.kill(fleet.trainer_pid("a3"), signal.SIGKILL)
    assert "SIGKILL" in (await fleet.event(run, "trainer-died", "a3"))["text"]
    head = await fleet.ended(run)
    assert head.phase == "done", head.reason
    assert [len(r.plan.merged) for r in await fleet.log(run)] == [4] * 6


async def test_an_agent_stopped_for_a_while_is_lost_and_rejoins(fleet: Fleet) -> None:
    run = await fleet.start(**SLOW, agents=QUICK_LOSS, stop={"versions": 14})
    await fleet.version(run, 1)
    os.kill(fleet.local.workers["a1"].pid, signal.SIGSTOP)
    try:
        assert "not heard of" in (await fleet.event(run, "agent-lost", "a1"))["text"]
        await goes_on(fleet, run, 2)
    finally:
        os.kill(fleet.local.workers["a1"].pid, signal.SIGCONT)
    await fleet.event(run, "agent-joined", "a1", after=1)
    head = await fleet.ended(run)
    assert head.phase == "done", head.reason
    assert "a1" in {e.agent for e in (await fleet.log(run))[-1].plan.merged}


async def test_a_training_child_that_hangs_makes_its_agent_slow_and_not_lost_while_it_answers_heartbeats(
    fleet: Fleet,
) -> None:
    run = await fleet.start(**SLOW, agents=QUICK_LOSS, stop={"versions": 10})
    await fleet.version(run, 1)
    pid = fleet.trainer_pid("a4")
    os.kill(pid, signal.SIGSTOP)
    try:
        assert "no progress" in (await fleet.event(run, "agent-slow", "a4"))["text"]
        await goes_on(fleet, run, 2)
    finally:
        os.kill(pid, signal.SIGCONT)
    await fleet.event(run, "agent-present", "a4")
    assert (await fleet.ended(run)).phase == "done"
    assert not fleet.events(run, "agent-lost")


async def test_an_agent_asked_to_stop_says_goodbye_and_nobody_waits_for_it(fleet: Fleet) -> None:
    run = await fleet.start(**SLOW, agents={"min": 4, "lost_after_s": 60.0}, stop={"versions": 6})
    await fleet.version(run, 1)
    fleet.local.signal("a2", signal.SIGTERM)
    assert "it left" in (await fleet.event(run, "agent-lost", "a2"))["text"]
    assert await fleet.local.workers["a2"].exited == 0
    assert (await fleet.ended(run)).phase == "done"
    await fleet.local.start_agent("a2")


async def test_a_late_agent_joins_a_running_run_and_the_data_is_split_anew(fleet: Fleet) -> None:
    fleet.local.signal("a4", signal.SIGTERM)
    await fleet.local.workers["a4"].exited
    run = await fleet.start(
        task="syncline.tasks.quadratic:LinearRegression",
        agents={"min": 3},
        local={"steps": 1, "batch_size": "all", "optimizer": {"kind": "sgd", "lr": 0.01}},
        stop={"versions": 200},
    )
    await fleet.version(run, 1)
    await fleet.local.start_agent("a4")
    await fleet.event(run, "agent-joined", "a4")
    head = await fleet.ended(run)
    assert head.phase == "done", head.reason
    roster, records = await fleet.roster(head), await fleet.log(run)
    assert roster.agents == ["a1", "a2", "a3", "a4"] and roster.parts == 4
    assert len(records[0].plan.merged) == 3 and len(records[-1].plan.merged) == 4
    for record in (records[0], records[-1]):
        assert sum(e.samples for e in record.plan.merged) == 64, "the parts are not disjoint and complete"


async def test_a_diverging_agent_is_named_and_the_others_go_on(fleet: Fleet) -> None:
    run = await fleet.start(task=task("DivergingOne"), agents={"min": 4}, local={"steps": 1}, stop={"versions": 3})
    event = await fleet.event(run, "update-dropped", "a2")
    assert "NaN" in event["text"]
    head = await fleet.ended(run)
    assert head.phase == "done", head.reason
    assert {e.agent for r in await fleet.log(run) for e in r.plan.merged} == {"a1", "a3", "a4"}


async def test_a_run_in_which_every_update_diverges_fails_and_says_why(fleet: Fleet) -> None:
    head = await fleet.ended(await fleet.start(task=task("Diverging"), agents={"min": 4}, local={"steps": 1}))
    assert head.phase == "failed" and "NaN" in head.reason


async def test_a_bug_in_the_task_fails_the_run_with_its_message(fleet: Fleet) -> None:
    head = await fleet.ended(await fleet.start(task=task("Raising"), agents={"min": 4}, local={"steps": 1}))
    assert head.phase == "failed"
    assert "a bug in the user's code" in head.reason and "tasks.py" in head.reason


async def test_a_second_process_of_the_same_name_takes_over_and_the_first_exits(fleet: Fleet) -> None:
    first = fleet.local.workers["a1"]
    run = await fleet.start(**SLOW, agents=QUICK_LOSS, stop={"versions": 8})
    await fleet.version(run, 1)
    await fleet.local.start_agent("a1")
    assert await first.exited == 1
    assert "claimed" in (await fleet.event(run, "agent-lost", "a1"))["text"]
    assert (await fleet.ended(run)).phase == "done"


async def test_an_agent_that_does_not_allow_the_task_takes_no_part_and_is_named_with_the_mend(fleet: Fleet) -> None:
    await fleet.local.start_agent("a1", allow_task=("syncline.tasks.*",))
    run = await fleet.start(**SLOW, agents={"min": 3, "lost_after_s": 1.5}, stop={"versions": 3})
    text = (await fleet.event("fleet", "agent-not-taken", "a1"))["text"]
    assert "is not allowed on this agent" in text and f"--allow-task '{SLOW['task']}'" in text
    head = await fleet.ended(run)
    assert head.phase == "done", head.reason
    assert {e.agent for r in await fleet.log(run) for e in r.plan.merged} == {"a2", "a3", "a4"}
    await fleet.local.start_agent("a1")


async def test_a_second_coordinator_says_so_and_leaves_the_run_alone(fleet: Fleet, tmp_path: Path) -> None:
    run = await fleet.start(**SLOW, stop={"versions": 8})
    await fleet.version(run, 1)
    broker = fleet.local.broker
    key = str(broker.keyring.path("coordinator"))
    second = Command(tmp_path, ("coordinator", "--connect", broker.url, "--key", key))
    try:
        assert await asyncio.to_thread(second.ended) == 2
        assert (
            f"error: --connect: a coordinator is up on {broker.url} already. One coordinator serves all runs"
            in second.err
        )
    finally:
        second.stop()
    head = await fleet.ended(run)
    assert (head.phase, head.term) == ("done", 1), head


async def test_a_coordinator_killed_in_the_middle_goes_on_where_head_stands(fleet: Fleet) -> None:
    run = await fleet.start(**SLOW, agents=QUICK_LOSS, stop={"versions": 6})
    await fleet.version(run, 2)
    await fleet.local.kill("coordinator")
    await fleet.local.start_coordinator()
    head = await fleet.ended(run)
    assert head.phase == "done" and head.term == 2, head
    records = await fleet.log(run)
    judged = [(e.agent, e.clock) for r in records for e in r.plan.merged]
    assert len(set(judged)) == len(judged), "an update was merged twice"
    assert [r.version for r in records] == [1, 2, 3, 4, 5, 6]
    assert [len(r.plan.merged) for r in records] == [4] * 6, "it did not wait for those it had not heard of yet"


async def test_a_coordinator_that_was_replaced_while_it_hung_goes_when_it_wakes(fleet: Fleet) -> None:
    run = await fleet.start(**SLOW, agents=QUICK_LOSS, stop={"versions": 10})
    await fleet.version(run, 2)
    hung = fleet.local.workers["coordinator"]
    os.kill(hung.pid, signal.SIGSTOP)
    try:
        await fleet.local.start_coordinator()
        await goes_on(fleet, run, 2)
    finally:
        os.kill(hung.pid, signal.SIGCONT)
    async with asyncio.timeout(30.0):
        assert await hung.exited == 1
    log = (fleet.local.broker.directory / "logs" / "coordinator.log").read_text()
    assert "another coordinator is in charge of this run; exiting" in log
    head = await fleet.ended(run)
    assert (head.phase, head.term) == ("done", 2), head
    assert [len(r.plan.merged) for r in await fleet.log(run)] == [4] * 10


async def test_rubbish_on_an_agents_subjects_is_counted_reported_and_harmless(fleet: Fleet) -> None:
    run = await fleet.start(**SLOW, agents=QUICK_LOSS, stop={"versions": 5})
    await fleet.version(run, 1)
    thief = await fleet.local.connect("a1")
    try:
        for subject in (subjects.heartbeat(run, "a1"), subjects.hello("a1")):
            await thief.publish(subject, b"\xc1 rubbish")
        await thief.put(subjects.offer(run, "a1"), b"\x93 not an offer")
        assert "msgpack" in (await fleet.event(run, "offer-refused", "a1"))["text"]
        await fleet.event("fleet", "bad-message", "a1", after=1)
    finally:
        await thief.close()
    head = await fleet.ended(run)
    assert head.phase == "done", head.reason
    assert [len(r.plan.merged) for r in await fleet.log(run)] == [4] * 5


async def test_a_stolen_key_reaches_nothing_and_the_attempts_are_said_in_the_events(fleet: Fleet) -> None:
    run = await fleet.start(**SLOW, agents=QUICK_LOSS, stop={"versions": 8})
    await fleet.version(run, 1)
    seed = fleet.local.broker.keyring.identity("a1").seed
    thief = await nats.connect(fleet.local.broker.url, nkeys_seed_str=seed, inbox_prefix=b"_INBOX.a1", error_cb=_ignore)
    aims = [
        subjects.offer(run, "a2"),
        f"$KV.{subjects.RUNS_BUCKET}.{subjects.head_key(run)}",
        f"$JS.API.STREAM.PURGE.{subjects.model_stream(run)}",
        subjects.notify(run),
        subjects.log_record(run, 1, 1),
        subjects.metrics(run, "a2", "train"),
    ]
    try:
        for aim in aims:
            await thief.publish(aim, b"evil")
            await thief.publish(subjects.heartbeat(run, "a1"), b"evil", reply=aim)
            await thief.publish(f"$JS.API.DIRECT.GET.KV_{subjects.RUNS_BUCKET}.$KV.x", b"", reply=aim)
        for aim in aims:

            async def told(aim: str = aim) -> bool:
                return any(aim in e["text"] and e["agent"] == "a1" for e in fleet.events("fleet", "refused"))

            await eventually(told, f"an event about {aim}")
    finally:
        await thief.close()
    head = await fleet.ended(run)
    assert head.phase == "done", head.reason
    assert [len(r.plan.merged) for r in await fleet.log(run)] == [4] * 8


async def _ignore(_: Exception) -> None:
    pass
