"""What a coordinator concludes from what the bus holds and from what agents say; and how it goes on afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

import pytest

from syncline import chance
from syncline.bus.base import StreamConfig
from syncline.bus.memory.bus import MemoryBroker, MemoryBus
from syncline.policy.ledger import Ledger
from syncline.wire import subjects
from syncline.wire.messages import BlobRef, Head, Heartbeat, Offer, encode
from syncline_coordinator.head import Deposed, HeadKeeper, RolledBack
from syncline_coordinator.offers import StreamPosition
from syncline_coordinator.recovery import LOST_OFFER_S, LossDetector, head_under_new_term
from syncline_coordinator.reservation import RUNS
from syncline_sim.rng import Rng
from unit.stored_run import lose_head

SESSION = "5" * 32
KEY = subjects.head_key("r")
HEAD = Head(run="r", term=3, version=5, epoch=77, phase="training", offers_seq=0)


def blob(i: int) -> BlobRef:
    return BlobRef(id=f"{i:032x}", size=4, chunks=1)


class Stage:
    """A broker with a run's streams, and a detector that stands at term 3, version 5."""

    def __init__(self, broker: MemoryBroker, bus: MemoryBus, keeper: HeadKeeper, ledger: Ledger) -> None:
        self.broker, self.bus, self.keeper, self.ledger = broker, bus, keeper, ledger
        self.position = StreamPosition(keeper.head.offers_seq)
        self.detector = LossDetector(bus, keeper, ledger, self.position)

    @classmethod
    async def set(cls, head: Head = HEAD) -> Stage:
        broker = MemoryBroker()
        bus = broker.connect("coordinator")
        await bus.ensure_bucket(RUNS)
        await bus.ensure_stream(StreamConfig(subjects.offers_stream("r"), (subjects.offer("r", "*"),), 1 << 20))
        await bus.ensure_stream(StreamConfig(subjects.model_stream("r"), ("syncline.v1.r.model.>",), 1 << 20))
        keeper = await HeadKeeper.create(bus, head)
        return cls(broker, bus, keeper, Ledger())

    def beat(self, agent: str = "a1", **said: Any) -> None:
        fields = {"seen_term": 3, "seen_version": 5, "seen_epoch": 77, **said}
        self.detector.on_heartbeat(agent, Heartbeat(session=SESSION, clock=9, progress=0, **fields))

    async def offer(self, agent: str, clock: int) -> int:
        offer = Offer(
            session=SESSION, clock=clock, base=5, term=3, epoch=77, samples=1, steps=1, blob=blob(1), digest=bytes(32)
        )
        return await self.bus.put(subjects.offer("r", agent), encode(offer))

    async def concludes(self, within_s: float = 60.0) -> str:
        """Why the coordinator must stop, or '' where it need not."""
        try:
            async with asyncio.timeout(within_s):
                await self.detector.watch()
        except TimeoutError:
            pass
        except RolledBack as error:
            return f"term {error.term}: {error}"
        except Deposed as error:
            return f"deposed: {error}"
        return ""


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    token = chance.source.set(Rng("lookout"))
    yield
    chance.source.reset(token)


Simulated = Callable[[Coroutine[Any, Any, Any]], tuple[Any, float]]
Trouble = Callable[[Stage], Awaitable[None]]


async def nothing(stage: Stage) -> None:
    stage.position.read_up_to = await stage.offer("a1", 6)
    stage.ledger.found("a1", 6)
    stage.beat(handed=6)
    stage.beat("a2", seen_term=2, seen_version=5)
    stage.beat("a3", seen_term=1, seen_version=9, seen_epoch=1, handed=9)  # of before a roll-back that is known
    stage.detector.check_now()


async def an_offer_that_is_read_a_little_later(stage: Stage) -> None:
    stage.beat(handed=6)
    asyncio.get_running_loop().call_later(LOST_OFFER_S / 2, stage.ledger.found, "a1", 6)


async def an_older_head(stage: Stage) -> None:
    then = stage.broker.snapshot()
    await stage.keeper.write(HEAD.model_copy(update={"version": 6}))
    stage.broker.roll_back(then)


async def no_head_at_all(stage: Stage) -> None:
    await lose_head(stage.bus, "r")


async def an_older_head_than_an_agent_has_seen(stage: Stage) -> None:
    stage.beat(seen_term=4, seen_version=2)


async def a_version_that_an_agent_saw_under_an_older_term(stage: Stage) -> None:
    stage.beat(seen_term=2, seen_version=6)


async def fewer_offers_than_were_read(stage: Stage) -> None:
    stage.position.read_up_to = 4


async def an_offer_that_was_acknowledged_to_its_agent(stage: Stage) -> None:
    stage.beat(handed=6)


async def a_model_that_head_names(stage: Stage) -> None:
    await stage.keeper.write(HEAD.model_copy(update={"model": blob(9)}))


async def another_coordinator(stage: Stage) -> None:
    entry = await stage.bus.kv_get(subjects.RUNS_BUCKET, KEY)
    assert entry is not None
    newer = encode(HEAD.model_copy(update={"term": 4}))
    await stage.bus.kv_update(subjects.RUNS_BUCKET, KEY, newer, entry.revision)
    stage.beat(seen_term=4)


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (nothing, ""),
        (an_offer_that_is_read_a_little_later, ""),
        (an_older_head, "term 3: the broker has lost writes that it had acknowledged: r.head holds term 3, version 5"),
        (no_head_at_all, "term 3: the broker has lost writes that it had acknowledged: r.head is gone"),
        (
            an_older_head_than_an_agent_has_seen,
            "term 4: the broker has lost writes that it had acknowledged: a1 has seen term 4, version 2, round 0",
        ),
        (
            a_version_that_an_agent_saw_under_an_older_term,
            "term 3: the broker has lost writes that it had acknowledged: a1 has seen version 6 of term 2",
        ),
        (
            fewer_offers_than_were_read,
            "term 3: the broker has lost writes that it had acknowledged: SYNCLINE_OFFERS_r ends at message 0, "
            "and message 4 was read",
        ),
        (
            an_offer_that_was_acknowledged_to_its_agent,
            "term 3: the broker has lost writes that it had acknowledged: a1's offer of clock 6 is not in SYNCLINE_OFFERS_r",
        ),
        (
            a_model_that_head_names,
            "term 3: the broker has lost writes that it had acknowledged: head names a model that is not on the bus",
        ),
        (another_coordinator, "deposed: r.head holds term 4: another coordinator is in charge of this run"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_is_lost_is_noticed_and_nothing_else(trouble: Trouble, words: str, simulated: Simulated) -> None:
    async def play() -> str:
        stage = await Stage.set()
        await trouble(stage)
        return await stage.concludes()

    said, after_s = simulated(play())
    assert said == words and (not words or after_s < 2 * LOST_OFFER_S)


@pytest.mark.parametrize("rolled_back", [False, True])
def test_an_update_that_is_gone_is_believed_lost_once_for_each_time_the_connection_was(
    rolled_back: bool, simulated: Simulated
) -> None:
    """A lying agent may say so for ever; a coordinator that has just gone back for it does not go back for it again."""

    async def play() -> list[bool]:
        stage = await Stage.set()
        detector = LossDetector(stage.bus, stage.keeper, stage.ledger, stage.position, rolled_back=rolled_back)
        believed = [detector.report_missing_update("a1", "gone"), detector.report_missing_update("a1", "gone")]
        stage.broker.restart()
        return [*believed, detector.report_missing_update("a2", "gone"), detector.report_missing_update("a2", "gone")]

    assert simulated(play())[0] == [not rolled_back, False, True, False]


def test_a_reconnect_is_reason_to_look_at_once(simulated: Simulated) -> None:
    async def play() -> str:
        stage = await Stage.set()
        asyncio.get_running_loop().call_later(30.0, stage.detector.check_now)
        asyncio.get_running_loop().call_later(29.9, setattr, stage.position, "read_up_to", 4)
        return await stage.concludes()

    said, after_s = simulated(play())
    assert "was read" in said and after_s < 30.1


def test_a_compare_and_set_that_fails_tells_a_roll_back_from_another_coordinator(simulated: Simulated) -> None:
    async def play() -> None:
        for trouble, error in (
            (an_older_head, RolledBack),
            (another_coordinator, Deposed),
            (no_head_at_all, RolledBack),
        ):
            stage = await Stage.set()
            await trouble(stage)
            with pytest.raises(Deposed) as raised:
                await stage.keeper.write(HEAD.model_copy(update={"version": 7}))
            assert raised.type is error

    simulated(play())


def test_whoever_takes_over_after_a_roll_back_begins_a_new_line_under_a_higher_term(simulated: Simulated) -> None:
    merging = HEAD.model_copy(update={"phase": "merging", "plan": b"x", "offers_seq": 2, "round": 8})

    async def play() -> None:
        stage = await Stage.set()
        for clock in (6, 7):
            await stage.offer("a1", clock)
        same = await head_under_new_term(stage.bus, merging, None)
        assert same == merging.model_copy(update={"term": 4})
        other = await head_under_new_term(stage.bus, merging, 9)
        assert (other.term, other.phase, other.plan, other.round, other.offers_seq) == (10, "training", None, 9, 2)
        assert other.version == 5 and other.epoch not in (0, 77)
        short = await head_under_new_term(stage.bus, merging.model_copy(update={"offers_seq": 3}), None)
        assert short.term == 4 and short.epoch not in (0, 77) and short.offers_seq == 2

    simulated(play())
