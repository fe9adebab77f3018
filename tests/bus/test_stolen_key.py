"""What a thief can do who has the key of agent a1, and any client he likes: what a1 can, and nothing else.

"Without effect" is meant literally: a fingerprint of all that CORE stores, and of all that CORE and agent a2 hear, is the
same after the attempt. The thief's client is bare nats-py, so that no rule of ours stands between him and the broker.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error
from nats.js.api import DiscardPolicy, KeyValueConfig, StreamConfig
from nats.js.client import JetStreamContext

from syncline.bus.nats.bus import NatsBus
from syncline.bus.nats.lane import Connection
from syncline.bus.server.accounts import Identity
from syncline.bus.server.embedded import EmbeddedBroker
from syncline.bus.server.violations import Violation, ViolationLog

Connect = Callable[..., Awaitable[Client]]
Flush = Callable[..., Awaitable[None]]
Eventually = Callable[..., Awaitable[None]]
Heard = list[tuple[str, bytes]]  # subject and payload

STREAMS = {
    "SYNCLINE_UPDATES_r": "syncline.v1.r.agent.*.update.*.*",
    "SYNCLINE_OFFERS_r": "syncline.v1.r.agent.*.offer",
    "SYNCLINE_MODEL_r": "syncline.v1.r.model.*.*",
    "SYNCLINE_LOG_r": "syncline.v1.r.log.*.*",
}
HEAD = "$KV.syncline-runs.r.head"
GET_HEAD = f"$JS.API.DIRECT.GET.KV_syncline-runs.{HEAD}"
GET_MODEL = "$JS.API.DIRECT.GET.SYNCLINE_MODEL_r.syncline.v1.r.model.b.0"
HEARTBEAT = "syncline.v1.r.agent.a1.heartbeat"
SETTLE_S = 0.15  # how long to listen for what should not come

NOT_HIS_TO_SAY = (
    HEAD,
    "$KV.syncline-runs.r.spec",
    "$JS.API.INFO",
    "$JS.API.STREAM.NAMES",
    "$JS.API.STREAM.CREATE.EVIL",
    "$JS.API.STREAM.INFO.SYNCLINE_MODEL_r",
    "$JS.API.STREAM.UPDATE.SYNCLINE_MODEL_r",
    "$JS.API.STREAM.PURGE.SYNCLINE_MODEL_r",
    "$JS.API.STREAM.DELETE.SYNCLINE_MODEL_r",
    "$JS.API.STREAM.MSG.GET.SYNCLINE_UPDATES_r",
    "$JS.API.STREAM.MSG.DELETE.SYNCLINE_MODEL_r",
    "$JS.API.CONSUMER.CREATE.SYNCLINE_UPDATES_r",
    "$JS.API.DIRECT.GET.SYNCLINE_UPDATES_r",
    "$JS.API.DIRECT.GET.SYNCLINE_UPDATES_r.syncline.v1.r.agent.a2.update.b.0",
    "$JS.API.DIRECT.GET.SYNCLINE_LOG_r.syncline.v1.r.log.1.1",
    "$JS.API.DIRECT.GET.KV_syncline-leases.$KV.syncline-leases.r.lease",
    "$SYS.REQ.USER.INFO",
    "$SYS.REQ.SERVER.PING",
    "syncline.v1.r.model.b.0",
    "syncline.v1.r.model.b.1",
    "syncline.v1.r.outer.b.0",
    "syncline.v1.r.log.1.1",
    "syncline.v1.r.notify",
    "syncline.v1.fleet.submit",
    "syncline.v1.fleet.stop",
    "syncline.v1.r.agent.a2.offer",
    "syncline.v1.r.agent.a2.update.b.0",
    "syncline.v1.r.agent.a2.heartbeat",
    "syncline.v1.fleet.agent.a2.hello",
    "syncline.v1.r.agent.*.offer",
    "syncline.v1.r.metrics.a2.loss",
    "syncline.v1.r.metrics.coordinator.rounds",
    "syncline.v1.r.events.a2",
    "syncline.v1.r.events.coordinator",
    "syncline.v1.r.events.broker",
    "_INBOX.a1.x",
    "_INBOX.a2.x",
    "_INBOX.coordinator.x",
)
NOT_HIS_TO_HEAR = (
    ">",
    "*",
    "*.>",
    "_INBOX.>",
    "_INBOX.*",
    "_INBOX.*.>",
    "_INBOX.a2.>",
    "_INBOX.coordinator.>",
    "_R_.>",
    "$JS.>",
    "$KV.>",
    "$SYS.>",
    "syncline.>",
    "syncline.v1.r.agent.>",
    "syncline.v1.r.agent.a2.>",
    "syncline.v1.r.agent.a1.>",
    "syncline.v1.r.log.>",
    "syncline.v1.r.model.>",
    "syncline.v1.*.metrics.>",
    "syncline.v1.r.events.a2",
)
WILDCARDS = (">", "_INBOX.>", "_INBOX.*.*", "_INBOX.a2.>", "_R_", "syncline.v1.r.>")
REPLIES = (*(subject for subject in NOT_HIS_TO_SAY if subject != "_INBOX.a1.x"), *WILDCARDS)


@dataclass
class World:
    """A run `r` in CORE, agent a2 at work, and a thief with the key of a1."""

    broker: EmbeddedBroker
    violations: ViolationLog
    coordinator: Client
    jetstream: JetStreamContext
    a2: Client
    thief: Client
    flush: Flush
    eventually: Eventually
    heartbeats: list[bytes] = field(default_factory=list)
    core_heard: Heard = field(default_factory=list)  # in CORE, on subjects that are not the thief's
    a2_heard: Heard = field(default_factory=list)
    thief_heard: Heard = field(default_factory=list)

    async def prepare(self) -> None:
        for name, subject in STREAMS.items():
            once = name.startswith("SYNCLINE_UPDATES")
            await self.jetstream.add_stream(
                StreamConfig(
                    name=name,
                    subjects=[subject],
                    allow_direct=True,
                    max_bytes=1 << 24,
                    max_msgs_per_subject=1 if once else -1,
                    discard=DiscardPolicy.NEW if once else DiscardPolicy.OLD,
                    discard_new_per_subject=once,
                )
            )
        runs = await self.jetstream.create_key_value(KeyValueConfig(bucket="syncline-runs", direct=True))
        await runs.put("r.head", b"HEAD")
        await runs.put("r.spec", b"SPEC")
        for name in ("model.b.0", "log.1.1"):
            await self.jetstream.publish(f"syncline.v1.r.{name}", name.encode())
        await self.a2.jetstream().publish("syncline.v1.r.agent.a2.offer", b"OFFER")
        await self.coordinator.subscribe("syncline.v1.*.agent.*.heartbeat", cb=self._answer)
        await self._listen()

    async def _listen(self) -> None:
        heard = set(NOT_HIS_TO_SAY) - {"syncline.v1.r.agent.*.offer"} | {"syncline.v1.*.agent.a2.>", "$KV.>"}
        for subject in heard:
            await self.coordinator.subscribe(subject, cb=_into(self.core_heard))
        for subject in ("_INBOX.a2.>", "syncline.v1.*.notify"):
            await self.a2.subscribe(subject, cb=_into(self.a2_heard))
        await self.thief.subscribe("_INBOX.a1.>", cb=_into(self.thief_heard))
        await self.flush(self.coordinator, self.a2, self.thief)

    def core_heard_of(self, part: str) -> Heard:
        return [heard for heard in self.core_heard if part in heard[0]]

    async def _answer(self, message: Msg) -> None:
        self.heartbeats.append(message.data)
        if message.reply:
            await message.respond(b"pong")

    async def fingerprint(self) -> dict[str, object]:
        """All that CORE holds, but for what a1 may put."""
        held: dict[str, object] = {}
        for info in await self.jetstream.streams_info():
            subjects = (await self.jetstream.stream_info(info.config.name, subjects_filter=">")).state.subjects or {}
            held[info.config.name] = (info.config, {s: n for s, n in subjects.items() if ".agent.a1." not in s})
        for name, subject in (("KV_syncline-runs", HEAD), ("SYNCLINE_MODEL_r", "syncline.v1.r.model.b.0")):
            held[subject] = (await self.jetstream.get_last_msg(name, subject)).data
        return held

    async def all_done(self) -> None:
        """All that the thief sent before was dealt with: what he sends last has arrived."""
        last = os.urandom(8)
        await self.thief.publish(HEARTBEAT, last)
        await self.eventually(lambda: last in self.heartbeats, "the last heartbeat")
        await asyncio.sleep(SETTLE_S)


def _into(heard: Heard) -> Callable[[Msg], Awaitable[None]]:
    async def hear(message: Msg) -> None:
        heard.append((message.subject, message.data))

    return hear


@pytest.fixture
async def world(broker: EmbeddedBroker, connect: Connect, flush: Flush, eventually: Eventually) -> AsyncIterator[World]:
    coordinator, a2, thief = [await connect(broker, who) for who in ("coordinator", "a2", "a1")]
    made = World(broker, broker.violations(), coordinator, coordinator.jetstream(), a2, thief, flush, eventually)
    await made.prepare()
    yield made
    assert thief.is_connected  # a refusal costs him nothing, so all that he tried was really tried


# -- what the broker refuses -------------------------------------------------------------------------------------------
async def test_he_can_say_nothing_that_is_not_his(world: World) -> None:
    before = await world.fingerprint()
    world.core_heard.clear()  # of our own questions
    for subject in NOT_HIS_TO_SAY:
        for data in (b"", b"evil"):
            await world.thief.publish(subject, data, reply="_INBOX.a1.answer")
    await world.all_done()
    assert world.core_heard == world.a2_heard == []
    assert [heard for heard in world.thief_heard if heard[1] != b"pong"] == []
    assert world.violations.read() == [Violation("a1", "publish", s) for s in NOT_HIS_TO_SAY for _ in "12"]
    assert await world.fingerprint() == before


async def test_he_can_hear_nothing_that_is_not_his(world: World) -> None:
    overheard: Heard = []
    for subject in NOT_HIS_TO_HEAR:
        await world.thief.subscribe(subject, cb=_into(overheard))
        await world.thief.subscribe(subject, queue="thieves", cb=_into(overheard))
    await world.all_done()
    await world.a2.jetstream().publish("syncline.v1.r.agent.a2.update.b.0", b"secret")
    assert (await world.a2.request(GET_HEAD, b"", timeout=5)).data == b"HEAD"
    for subject in ("syncline.v1.r.metrics.a2.loss", "syncline.v1.r.events.a2"):
        await world.a2.publish(subject, b"secret")
    await world.jetstream.publish("syncline.v1.r.log.2.1", b"secret")
    await world.all_done()
    assert overheard == []
    assert world.violations.read() == [Violation("a1", "subscribe", s) for s in NOT_HIS_TO_HEAR for _ in "12"]


async def test_the_broker_takes_no_inner_subject_as_a_reply(world: World) -> None:
    inner = ("_R_.abc", "$JS.ACK.SYNCLINE_MODEL_r.c.1.1.1.1.1")
    for subject in inner:
        await world.thief.publish(GET_HEAD, b"", reply=subject)
    await world.all_done()
    assert world.violations.read() == [Violation("a1", "reply", s) for s in inner]


async def test_a_question_that_names_another_message_is_not_answered(world: World) -> None:
    """A direct get goes by its subject. With a payload that names another message it must not become that other get."""
    await world.a2.jetstream().publish("syncline.v1.r.agent.a2.update.b.0", b"secret")
    foreign = GET_MODEL.replace("MODEL", "UPDATES")
    asks = [{"seq": 1}, {"seq": 1, "batch": 9}, {"last_by_subj": "syncline.v1.r.agent.a2.update.b.0"}]
    for subject in (foreign, GET_MODEL, GET_HEAD):
        for ask in asks:
            answer = await world.thief.request(subject, json.dumps(ask).encode(), timeout=5)
            assert answer.data == b"" and (answer.headers or {})["Status"] in ("404", "408")


@pytest.mark.parametrize(
    "headers",
    [
        {"Nats-Rollup": "all"},
        {"Nats-Rollup": "sub"},
        {"Nats-TTL": "1s"},
        {"Nats-Schedule": "@at 2020-01-01T00:00:00Z", "Nats-Schedule-Target": "syncline.v1.r.agent.a2.offer"},
        {"Nats-Batch-Id": "1", "Nats-Batch-Sequence": "1", "Nats-Batch-Commit": "1"},
        {"Nats-Stream-Source": "SYNCLINE_MODEL_r 1"},
    ],
    ids=lambda headers: next(iter(headers)),
)
async def test_a_header_gives_no_orders_to_a_stream(world: World, headers: dict[str, str]) -> None:
    before = await world.fingerprint()
    for subject in ("syncline.v1.r.agent.a1.offer", "syncline.v1.r.agent.a1.update.b.0"):
        answer = await world.thief.request(subject, b"evil", timeout=5, headers=headers)
        assert "error" in json.loads(answer.data)
    assert await world.fingerprint() == before


@pytest.mark.parametrize("target", [HEAD, "syncline.v1.r.agent.a2.offer", "_INBOX.a2.x", "syncline.v1.r.notify"])
async def test_a_trace_goes_nowhere_that_he_could_not_say(world: World, target: str) -> None:
    before = await world.fingerprint()
    world.core_heard.clear()
    await world.thief.publish("syncline.v1.r.agent.a1.offer", b"x", headers={"Nats-Trace-Dest": target})
    await world.all_done()
    assert world.core_heard == world.a2_heard == []
    assert world.violations.read() == [Violation("a1", "publish", target)]
    assert await world.fingerprint() == before


@pytest.mark.parametrize(
    "headers",
    [
        {"Status": "204"},
        {"Status": "404"},
        {"Status": "503"},
        {"Nats-Subject": "syncline.v1.r.agent.a2.offer", "Nats-Sequence": "999", "Nats-Time-Stamp": "now"},
    ],
    ids=lambda headers: "-".join(headers.values())[:12],
)
async def test_a_header_hides_no_message_and_gives_it_no_other_name(world: World, headers: dict[str, str]) -> None:
    """The broker marks its own answers with such headers, and gives out a stored message with those that it came with."""
    key = world.broker.keyring.identity("coordinator")
    bus = await NatsBus.connect(Connection(world.broker.url, "coordinator", key.seed))
    his = "syncline.v1.r.agent.a1.offer"
    await world.thief.request(his, b"", timeout=5, headers=headers)
    await world.a2.jetstream().publish("syncline.v1.r.agent.a2.offer", b"behind it")
    try:
        found = await bus.read("SYNCLINE_OFFERS_r", 1, 9)
        assert [(m.seq, m.subject.split(".")[4]) for m in found] == [(1, "a2"), (2, "a1"), (3, "a2")]
        assert await bus.get("SYNCLINE_OFFERS_r", his) == await bus.get("SYNCLINE_OFFERS_r", his, bulk=True) == found[1]
    finally:
        await bus.close()


# -- reply subjects, which the broker does not refuse ------------------------------------------------------------------
async def ask_everything(world: World, reply: str) -> int:
    """Each request that a1 may make, with and without a payload, answers to go to `reply`; returns how many."""
    requests = 0
    for data in (b"", b"evil", json.dumps({"filter": ">"}).encode()):
        put = f"syncline.v1.r.agent.a1.update.{reply.encode().hex()}.{requests}"
        for subject in (put, "syncline.v1.r.agent.a1.offer", GET_HEAD, GET_MODEL, HEARTBEAT):
            await world.thief.publish(subject, data, reply=reply)
            requests += 1
    return requests


async def test_naming_what_is_not_his_as_the_reply_subject_is_without_effect(world: World) -> None:
    before = await world.fingerprint()
    world.core_heard.clear()
    for reply in REPLIES:
        await ask_everything(world, reply)
    await world.all_done()
    assert world.core_heard == world.a2_heard == []
    assert world.violations.read() == []  # it is no violation, which is why it takes accounts
    assert await world.fingerprint() == before
    puts = (await world.jetstream.stream_info("SYNCLINE_UPDATES_r", subjects_filter=">")).state.subjects or {}
    assert len(puts) == 3 * len(REPLIES)  # his requests themselves were granted


async def test_the_answers_to_others_arrive_whatever_reply_subjects_he_names(world: World) -> None:
    """In one account with a2, each `_INBOX.>` makes the broker forget whom the answers under way are for."""
    stop = asyncio.Event()

    async def disturb() -> None:
        while not stop.is_set():
            for reply in WILDCARDS:
                await world.thief.publish(HEARTBEAT, b"", reply=reply)
            await asyncio.sleep(0)

    disturbing = asyncio.create_task(disturb())
    for k in range(100):
        assert (await world.a2.request(GET_HEAD, b"", timeout=5)).data == b"HEAD"
        await world.a2.jetstream().publish(f"syncline.v1.r.agent.a2.update.b.{k}", b"x", timeout=5)
    stop.set()
    await disturbing


async def test_what_he_tells_himself_stays_with_him(world: World) -> None:
    """A notify or an answer of his own making reaches his own inbox and subscriptions, and nobody else's."""
    for subject in ("syncline.v1.*.notify", "_INBOX.a1.>"):
        await world.thief.subscribe(subject, cb=_into(world.thief_heard))
    for reply in ("syncline.v1.r.notify", "_INBOX.a1.x"):
        await world.thief.publish(GET_HEAD, b"", reply=reply)
    await world.eventually(lambda: ("syncline.v1.r.notify", b"HEAD") in world.thief_heard, "his own answer")
    await world.all_done()
    assert world.a2_heard == world.core_heard_of("notify") == []


# -- logging in --------------------------------------------------------------------------------------------------------
async def test_an_unknown_key_is_refused_and_reported_by_its_address(world: World, connect: Connect) -> None:
    stranger = Identity.new("a1")
    with pytest.raises(Error, match="Authorization Violation"):
        await connect(world.broker, stranger)
    assert world.violations.read() == [Violation("127.0.0.1", "login", stranger.public_key)]


async def test_claiming_a_key_without_its_seed_blames_nobody(world: World) -> None:
    claimed = world.broker.keyring.identity("a2").public_key
    signature = base64.urlsafe_b64encode(bytes(64)).rstrip(b"=").decode()
    assert b"Authorization Violation" in await told(world.broker, {"nkey": claimed, "sig": signature})
    assert b"Authorization Violation" in await told(world.broker, {})
    expected = [Violation("127.0.0.1", "login", "a2"), Violation("127.0.0.1", "login", "")]
    assert world.violations.read() == expected


async def told(broker: EmbeddedBroker, login: dict[str, str]) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", broker.port)
    await reader.readline()
    writer.write(f"CONNECT {json.dumps(login)}\r\nPING\r\n".encode())
    answer = await reader.readline()
    writer.close()
    await writer.wait_closed()
    return answer


async def test_a_client_cannot_name_itself_into_the_log(world: World, connect: Connect) -> None:
    a2 = world.broker.keyring.identity("a2")
    line = f'[1] 2026/11/23 22:18:48.0 [ERR] 127.0.0.1:1 - cid:1 - "FLEET/nkey:{a2.public_key}" - Publish Violation'
    forged = f'x\n{line} - Subject "forged"\n'
    a1 = world.broker.keyring.identity("a1")
    client = await connect(world.broker, Identity(forged, a1.account, a1.public_key, a1.seed))
    await client.publish('evil."subject', b"")
    await world.flush(client)
    assert world.violations.read() == [Violation("a1", "publish", 'evil.\\"subject')]


# -- watching ----------------------------------------------------------------------------------------------------------
async def test_a_watcher_hears_the_metrics_and_events_of_all_accounts(world: World, connect: Connect) -> None:
    watcher, heard = await connect(world.broker, "watch"), Heard()
    for subject in ("syncline.v1.*.metrics.>", "syncline.v1.*.events.*"):
        await watcher.subscribe(subject, cb=_into(heard))
    await world.flush(watcher)
    said = []
    for client, who in ((world.coordinator, "coordinator"), (world.a2, "a2"), (world.thief, "a1")):
        for subject in (f"syncline.v1.r.metrics.{who}.loss", f"syncline.v1.r.events.{who}"):
            await client.publish(subject, subject.encode())
            said.append((subject, subject.encode()))
    await world.eventually(lambda: len(heard) >= len(said), "all that was said")
    assert sorted(heard) == sorted(said)


async def test_a_watcher_can_say_nothing_and_hear_nothing_else(world: World, connect: Connect) -> None:
    watcher, heard = await connect(world.broker, "watch"), Heard()
    hear = (">", "syncline.v1.>", "syncline.v1.r.agent.>", "syncline.v1.r.notify", "syncline.v1.r.log.>", "_INBOX.>")
    say = (*NOT_HIS_TO_SAY, "syncline.v1.r.agent.a1.offer", GET_HEAD, GET_MODEL)
    for subject in hear:
        await watcher.subscribe(subject, cb=_into(heard))
    before = await world.fingerprint()
    world.core_heard.clear()
    for subject in say:
        await watcher.publish(subject, b"evil")
    await world.flush(watcher)
    await world.all_done()
    assert world.core_heard == world.a2_heard == heard == []
    expected = [Violation("watch", "subscribe", s) for s in hear] + [Violation("watch", "publish", s) for s in say]
    assert world.violations.read() == expected
    assert await world.fingerprint() == before


async def test_answers_do_not_reach_the_watchers(world: World, connect: Connect) -> None:
    """Nobody can make the broker publish metrics or events in another's name."""
    watcher, heard = await connect(world.broker, "watch"), Heard()
    for subject in ("syncline.v1.*.metrics.>", "syncline.v1.*.events.*"):
        await watcher.subscribe(subject, cb=_into(heard))
    await world.flush(watcher)
    for reply in ("syncline.v1.r.metrics.a2.loss", "syncline.v1.r.events.coordinator"):
        await ask_everything(world, reply)
    await world.all_done()
    assert heard == []
