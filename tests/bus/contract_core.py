"""The contract: core messages and accounts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from functools import partial

from bus.contract_kit import (
    HEAD,
    MODEL,
    OFFERS,
    PATIENCE_S,
    QUIET_S,
    B,
    Backend,
    Heard,
    HeardSlowly,
    S,
    a_run,
    outcome,
    outcomes,
    settled,
    until,
)
from syncline.bus.base import WAITING_BYTES, Delivery
from syncline.bus.server.violations import Violation
from syncline.errors import AlreadyPut, Denied, NoResponders, Unavailable, Unreachable


class Core:
    """At-most-once messages, requests, and how they meet streams."""

    async def test_a_message_reaches_whoever_listens_in_order(self, backend: Backend) -> None:
        speaker, listener = await backend.connect("coordinator"), await backend.connect("coordinator")
        patterns = ["q.>", "q.*", "q.a", "*.a", ">", "q.*.b", "r.>"]
        heard = {pattern: Heard() for pattern in patterns}
        for pattern in patterns[::-1]:
            if pattern != ">":
                await listener.subscribe(pattern, heard[pattern])
        twice, own = Heard(), Heard()
        await listener.subscribe("q.a", twice)
        await speaker.subscribe("q.a", own)
        await settled(listener, speaker)
        for i in range(200):
            await speaker.publish("q.a", b"%d" % i)
        await speaker.publish("q.a.b", b"")
        await speaker.publish("q", b"")
        await speaker.publish("r.last", b"")
        await until(lambda: len(heard["r.>"]) == 1, "the last one is heard")
        await until(lambda: len(own) == 200, "what one says oneself, too")
        numbers = [b"%d" % i for i in range(200)]
        assert heard["q.a"].data == heard["q.*"].data == heard["*.a"].data == twice.data == own.data == numbers
        assert heard["q.>"].data == [*numbers, b""] and heard["q.*.b"] == [Delivery("q.a.b", b"")]

    async def test_who_unsubscribes_hears_no_more_not_even_what_waits(self, backend: Backend) -> None:
        bus, heard = await backend.connect("coordinator"), HeardSlowly()
        subscription = await bus.subscribe("q", heard)
        for i in range(3):
            await bus.publish("q", b"%d" % i)
        await until(lambda: bool(heard), "the first is heard")
        await settled(bus)
        await subscription.unsubscribe()
        await subscription.unsubscribe()
        heard.gate.set()
        await bus.publish("q", b"late")
        assert await outcome(bus.request("q", b"", 1.0)) is NoResponders
        await asyncio.sleep(QUIET_S)
        assert heard.data == [b"0"]

    async def test_when_too_many_wait_the_newest_are_dropped(self, backend: Backend) -> None:
        bus, heard = await backend.connect("coordinator"), HeardSlowly()
        await bus.subscribe("q", heard, limit=5)
        await bus.publish("q", b"0")
        await until(lambda: bool(heard), "the first is heard")
        for i in range(1, 20):
            await bus.publish("q", b"%d" % i)
        await settled(bus)
        heard.gate.set()
        await until(lambda: len(heard) == 6, "what waited is heard")
        await bus.publish("q", b"next")
        await until(lambda: len(heard) > 6, "it goes on")
        assert heard.data == [b"0", b"1", b"2", b"3", b"4", b"5", b"next"]

    async def test_when_too_much_waits_the_newest_are_dropped(self, backend: Backend) -> None:
        bus, heard, large = await backend.connect("coordinator"), HeardSlowly(), bytes(1 << 20)
        most = WAITING_BYTES >> 20
        await bus.subscribe("q", heard)
        await bus.publish("q", b"first")
        await until(lambda: bool(heard), "the first is heard")
        for _ in range(most + 3):
            await bus.publish("q", large)
            await settled(bus)
        await bus.publish("q", b"small")
        heard.gate.set()
        await until(lambda: heard[-1].data == b"small", "what waited is heard")
        assert len(heard) == 1 + (most - 1) + 1

    async def test_a_handler_takes_one_message_after_the_other_and_outlives_its_errors(self, backend: Backend) -> None:
        bus, heard = await backend.connect("coordinator"), Heard()
        busy, most = 0, 0

        async def clumsy(delivery: Delivery) -> None:
            nonlocal busy, most
            busy, most = busy + 1, max(most, busy + 1)
            try:
                await asyncio.sleep(0)
                if delivery.data == b"raise":
                    raise ValueError("a bug")
                if delivery.data == b"cancel":  # as when it awaits a task that somebody else has cancelled
                    raise asyncio.CancelledError
                await heard(delivery)
            finally:
                busy -= 1

        await bus.subscribe("q", clumsy)
        for data in (b"1", b"raise", b"2", b"cancel", b"3"):
            await bus.publish("q", data)
        await until(lambda: len(heard) == 3, "all that can be heard")
        assert heard.data == [b"1", b"2", b"3"] and most == 1

    async def test_the_first_answer_to_a_request_counts(self, backend: Backend) -> None:
        bus, other = await backend.connect("coordinator"), await backend.connect("coordinator")

        async def echo(delivery: Delivery) -> None:
            assert delivery.reply
            await other.publish(delivery.reply, delivery.data)
            await other.publish(delivery.reply, b"second")

        await other.subscribe("q", echo)
        await settled(other)
        assert [await bus.request("q", data, 5.0) for data in (b"a", b"", b"b")] == [b"a", b"", b"b"]
        answers = await asyncio.gather(*(bus.request("q", b"%d" % i, 5.0) for i in range(20)))
        assert answers == [b"%d" % i for i in range(20)]

    async def test_nobody_listening_is_known_at_once_and_silence_in_time(self, backend: Backend) -> None:
        bus, other, back = await backend.connect("coordinator"), await backend.connect("coordinator"), []
        bus.when_reconnected(lambda: back.append(1))
        async with asyncio.timeout(5):
            assert await outcome(bus.request("q", b"", 60.0)) is NoResponders
        await other.subscribe("q", Heard())
        await settled(other)
        for _ in range(5):
            assert await outcome(bus.request("q", b"", 0.05)) is Unreachable
        await other.close()  # a peer's silence says nothing about the connection
        await settled(bus)
        await asyncio.sleep(2 * QUIET_S)
        assert await outcome(bus.request("q", b"", 60.0)) is NoResponders
        assert not back

    async def test_what_is_published_on_a_streams_subject_is_stored_and_what_is_put_is_heard(
        self, backend: Backend
    ) -> None:
        bus, heard = await backend.connect("coordinator"), Heard()
        await bus.ensure_stream(S)
        await bus.subscribe("s.*", heard)
        await bus.publish("s.a", b"published")

        async def stored() -> bool:
            return await bus.get("S", "s.a") is not None

        await until(stored, "it is stored")
        assert await bus.put("s.b", b"put") == 2
        acknowledged = json.loads(await bus.request("s.c", b"asked", 5.0))
        assert (acknowledged["stream"], acknowledged["seq"]) == ("S", 3)
        await until(lambda: len(heard) == 3, "all is heard")
        assert heard.data == [b"published", b"put", b"asked"]
        assert [bool(delivery.reply) for delivery in heard] == [False, True, True]

    async def test_a_put_that_no_stream_takes_is_no_put_whoever_answers(self, backend: Backend) -> None:
        bus = await backend.connect("coordinator")

        async def pong(delivery: Delivery) -> None:
            await bus.publish(delivery.reply, b"pong")

        await bus.subscribe("q", pong)
        assert await outcome(bus.put("q", b"")) is Unavailable

    async def test_what_is_no_subject_is_refused_and_harms_nothing(self, backend: Backend) -> None:
        bus, back = await backend.connect("coordinator"), []
        bus.when_reconnected(lambda: back.append(1))
        for bad in ("", "a b", "a\r\nb", "\ta", "a\x7fb", "a.\ud800", "a" * 4096):
            calls = (bus.publish(bad, b""), bus.put(bad, b""), bus.request(bad, b"", 1.0), bus.subscribe(bad, Heard()))
            assert await outcomes(*calls) == [Unavailable] * 4
        for bad in ("a..b", ".a", "a.", "a.>.b", "*a", "a.b>"):
            assert await outcomes(bus.subscribe(bad, Heard()), bus.put(bad, b"")) == [Unavailable, NoResponders]
        await settled(bus)
        assert not back


class Accounts:
    """Who may do what, and what whoever may not is told."""

    async def test_an_agent_can_do_its_work(self, backend: Backend) -> None:
        core = await a_run(backend)
        agent, heard, notes = await backend.connect("a1"), Heard(), Heard()

        async def welcome(delivery: Delivery) -> None:
            await heard(delivery)
            await core.publish(delivery.reply, b"welcome")

        await core.subscribe("syncline.v1.*.agent.*.heartbeat", welcome)
        await agent.subscribe("syncline.v1.*.notify", notes)
        await settled(core, agent)
        assert await agent.request("syncline.v1.r.agent.a1.heartbeat", b"alive", 5.0) == b"welcome"
        assert heard[0].subject == "syncline.v1.r.agent.a1.heartbeat" and not heard[0].reply.startswith("_INBOX")
        head, model = await agent.kv_get(*HEAD), await agent.get(MODEL, "syncline.v1.r.model.b.0", bulk=True)
        assert head is not None and head.value == b"HEAD" and model is not None and model.data == b"MODEL"
        assert await agent.kv_get("syncline-runs", "none") is None
        assert await agent.get(MODEL, "syncline.v1.r.model.b.9") is None
        assert await agent.put("syncline.v1.r.agent.a1.offer", b"offer") == 1
        assert await agent.put("syncline.v1.r.agent.a1.update.b.0", b"chunk", bulk=True) == 1
        assert await outcome(agent.put("syncline.v1.r.agent.a1.update.b.0", b"chunk", bulk=True)) is AlreadyPut
        assert await outcome(agent.put("syncline.v1.other.agent.a1.offer", b"")) is NoResponders
        assert await outcome(agent.request("syncline.v1.r.agent.a1.other", b"", 5.0)) is NoResponders
        assert await outcome(agent.get("SYNCLINE_MODEL_x", "syncline.v1.x.model.b.0")) is NoResponders
        await core.publish("syncline.v1.r.notify", b"committed")
        await until(lambda: bool(notes), "the notify is heard")
        assert notes == [Delivery("syncline.v1.r.notify", b"committed")] and backend.violations() == []

    async def test_what_is_not_an_agents_own_is_denied_and_reported(self, backend: Backend) -> None:
        await self.is_denied(backend, "a1")

    async def test_all_is_denied_to_a_watcher(self, backend: Backend) -> None:
        await self.is_denied(backend, "watch")

    async def is_denied(self, backend: Backend, who: str) -> None:
        core, heard = await a_run(backend), Heard()
        bus = await backend.connect(who)
        for subject in ("syncline.v1.r.agent.a2.>", "syncline.v1.r.notify", "syncline.v1.r.metrics.>"):
            await core.subscribe(subject, heard)
        await settled(core)
        foreign = "syncline.v1.r.agent.a2.offer"
        tried: dict[str, Callable[[], Awaitable[object]]] = {
            "$KV.syncline-runs.r.head": partial(bus.kv_update, *HEAD, b"evil", 1),
            "$KV.syncline-runs.r.new": partial(bus.kv_create, "syncline-runs", "r.new", b"evil"),
            "$JS.API.STREAM.PURGE.KV_syncline-runs": partial(bus.purge, "KV_syncline-runs", "$KV.syncline-runs.r.head"),
            "$JS.API.STREAM.INFO.KV_syncline-runs": partial(bus.kv_keys, "syncline-runs"),
            "$JS.API.STREAM.CREATE.KV_b": partial(bus.ensure_bucket, B),
            "$JS.API.STREAM.CREATE.S": partial(bus.ensure_stream, S),
            f"$JS.API.STREAM.DELETE.{MODEL}": partial(bus.delete_stream, MODEL),
            f"$JS.API.STREAM.INFO.{MODEL}": partial(bus.state, MODEL),
            f"$JS.API.STREAM.PURGE.{MODEL}": partial(bus.purge, MODEL, ">"),
            f"$JS.API.DIRECT.GET.{MODEL}": partial(bus.read, MODEL, 1, 9),
            f"$JS.API.DIRECT.GET.{MODEL}.syncline.v1.r.outer.b.0": partial(bus.get, MODEL, "syncline.v1.r.outer.b.0"),
            f"$JS.API.DIRECT.GET.{OFFERS}.{foreign}": partial(bus.get, OFFERS, foreign, bulk=True),
            "$JS.API.DIRECT.GET.KV_b.$KV.b.k": partial(bus.kv_get, "b", "k"),
            foreign: partial(bus.put, foreign, b"evil"),
            "syncline.v1.r.model.b.1": partial(bus.put, "syncline.v1.r.model.b.1", b"evil", bulk=True),
            "syncline.v1.r.agent.a2.heartbeat": partial(bus.request, "syncline.v1.r.agent.a2.heartbeat", b"evil", 5.0),
        }
        async with asyncio.timeout(PATIENCE_S):
            assert {subject: await outcome(call()) for subject, call in tried.items()} == dict.fromkeys(tried, Denied)
        silent = ["syncline.v1.r.notify", "syncline.v1.r.metrics.a2.loss", "_INBOX.a2.1.1", foreign]
        for subject in silent:
            await bus.publish(subject, b"evil")  # nobody is told at once
        expected = {Violation(who, "publish", subject) for subject in (*tried, *silent)}
        await until(lambda: expected <= set(backend.violations()), "every attempt is reported")
        await settled(core)
        assert heard == [] and [m.data for m in await core.read(MODEL, 1, 9)] == [b"MODEL"]
        assert (await core.state(OFFERS)).messages == 0 and await core.kv_keys("syncline-runs") == ["r.head"]

    async def test_listening_to_what_is_not_ones_own_hears_nothing_and_is_reported(self, backend: Backend) -> None:
        core, heard = await a_run(backend), Heard()
        forbidden = {
            "a1": ["syncline.v1.>", "_INBOX.a2.>", "_INBOX.>", "syncline.v1.r.agent.a1.>", "syncline.v1.r.metrics.>"],
            "watch": ["syncline.v1.>", "syncline.v1.r.notify", "syncline.v1.r.agent.>", "_INBOX.watch.>"],
        }
        for who, patterns in forbidden.items():
            bus = await backend.connect(who)
            for pattern in patterns:
                await bus.subscribe(pattern, heard)  # the broker says no, but only later, and to its log
        expected = {Violation(who, "subscribe", p) for who, patterns in forbidden.items() for p in patterns}
        await until(lambda: expected <= set(backend.violations()), "every attempt is reported")
        said = [
            "syncline.v1.r.notify",
            "syncline.v1.r.agent.a1.x",
            "_INBOX.a2.x",
            "_INBOX.watch.x",
            "syncline.v1.r.model.b.1",
        ]
        for subject in said:
            await core.publish(subject, b"")
        await settled(core)
        await asyncio.sleep(QUIET_S)
        assert heard == []

    async def test_agents_hear_the_coordinator_and_not_each_other(self, backend: Backend) -> None:
        core, a1, a2 = await a_run(backend), await backend.connect("a1"), await backend.connect("a2")
        heard, core_heard = Heard(), Heard()
        for pattern in ("_INBOX.a2.x", "syncline.v1.*.notify"):
            await a2.subscribe(pattern, heard)
        await core.subscribe("syncline.v1.*.metrics.>", core_heard)
        await settled(core, a2)
        await a1.publish("_INBOX.a2.x", b"evil")
        await core.publish("_INBOX.a2.x", b"out of its account")
        await a1.publish("syncline.v1.r.metrics.a1.loss", b"for watchers only")
        await settled(a1)
        await core.publish("syncline.v1.r.notify", b"last")
        await until(lambda: bool(heard), "the notify is heard")
        await settled(core)
        assert heard.data == [b"last"] and core_heard == []

    async def test_what_is_told_across_accounts_still_says_where_an_answer_was_wanted(self, backend: Backend) -> None:
        core, agent, heard = await a_run(backend), await backend.connect("a1"), Heard()
        await agent.subscribe("syncline.v1.*.notify", heard)
        await settled(agent)
        asking = asyncio.create_task(outcome(core.request("syncline.v1.r.notify", b"", 2 * QUIET_S)))
        await until(lambda: bool(heard), "the notify is heard")
        assert heard[0].reply.startswith("_INBOX.coordinator.")
        await agent.publish(heard[0].reply, b"evil")  # and is none of the agent's
        assert await asking is Unreachable

    async def test_watchers_hear_metrics_and_events_from_everywhere(self, backend: Backend) -> None:
        core, agent, watcher = await a_run(backend), await backend.connect("a1"), await backend.connect("watch")
        everything, some = Heard(), Heard()
        for pattern in ("syncline.v1.*.metrics.>", "syncline.v1.*.events.*"):
            await watcher.subscribe(pattern, everything)
        await watcher.subscribe("syncline.v1.r.metrics.a1.>", some)

        async def listens() -> bool:  # it can ask nothing, so that we know it by what it hears
            await agent.publish("syncline.v1.r.metrics.a1.first", b"")
            return bool(some)

        await until(listens, "the watcher listens")
        say = {"coordinator": core, "a1": agent}
        subjects = [f"syncline.v1.r.{what}" for who in say for what in (f"metrics.{who}.loss.train", f"events.{who}")]
        for subject in subjects:
            await say["a1" if "a1" in subject else "coordinator"].publish(subject, b"")
        wanted = set(subjects)
        await until(lambda: wanted <= {d.subject for d in everything}, "all of it is heard")
        assert {d.subject for d in some} == {"syncline.v1.r.metrics.a1.first", "syncline.v1.r.metrics.a1.loss.train"}

    async def test_a_key_under_another_name_is_denied_and_not_just_silent(self, backend: Backend) -> None:
        await a_run(backend)
        bus = await backend.connect("a1", name="a2")
        async with asyncio.timeout(3):
            for _ in range(2):
                assert await outcome(bus.kv_get(*HEAD)) is Denied
