"""A whole fleet in one process: the real coordinator and the real agents on the bus in memory, in virtual time, by a seed.

A service is a *life*, and a crash ends it between two bus operations. Who computes, how messages travel and who looks on is
the world's `Stage`; it knows no invariant itself.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any

from syncline import chance
from syncline.bus.base import Stored
from syncline.bus.memory.bus import MemoryBroker, MemoryBus
from syncline.bus.memory.faults import Operation
from syncline.bus.memory.store import Store, Stream
from syncline.errors import BusError, ConfigError, PeerError
from syncline.runtime.child import ChildDied
from syncline.shm import SharedMemory
from syncline.spec.submission import submission
from syncline.wire import subjects
from syncline.wire.messages import ENDED, Head, Heartbeat, Submitted, decode, encode
from syncline_agent.heartbeat import Superseded
from syncline_agent.service import Agent, AgentSettings
from syncline_coordinator.head import Deposed
from syncline_coordinator.service import Coordinator, CoordinatorSettings
from syncline_sim.books import Books
from syncline_sim.children import Children
from syncline_sim.dice import Dice
from syncline_sim.faults import AtOperation, Delay, Faults, Unanswered, Weather
from syncline_sim.inline import InlineChild, InlineTraining
from syncline_sim.life import Crashed, Life, whose_task
from syncline_sim.loop import SimTask, Stuck, VirtualLoop
from syncline_sim.scene import Outcome, Scene
from syncline_sim.trouble import Trouble, subject_of

COORDINATOR = subjects.COORDINATOR
START_AGAIN_S = 1.0  # what a supervisor waits when a service exits because somebody else failed
ASK_AGAIN_S = 0.5
NOTHING_USABLE = "every update of version"  # … was dropped
AFTERWARDS_S = 0.2  # so that a coordinator can tidy up behind the run


@dataclass(frozen=True, slots=True)
class Stage:
    """What a world stands on: who computes, how messages travel, and who looks on."""

    children: Children
    weather: Weather
    books: Books


class World:
    """Everything there is in one simulation."""

    def __init__(self, scene: Scene, faults: Faults, seed: int, loop: VirtualLoop, stage: Stage) -> None:
        self.scene, self.faults, self.seed, self.loop = scene, faults, seed, loop
        self.children, self.weather, self.books = stage.children, stage.weather, stage.books
        self.timeline: list[str] = []
        self.refused: ConfigError | None = None  # what the coordinator says of the spec
        self.on_accepted: Callable[[list[str]], None] = lambda doubts: None  # told what it doubts of an accepted one
        self.lives: dict[str, Life] = {}  # by connection
        self._operations: dict[str, int] = {}
        self._trace = hashlib.blake2b(digest_size=16)
        self._struck = {(f.service, f.at_op): f for f in faults.items if isinstance(f, AtOperation)}
        self._struck_when_done: dict[int, AtOperation] = {}
        self._ended = asyncio.Event()
        self._head_seq = self._submissions = 0
        self._beats: dict[str, float] = {}  # connection → when its last heartbeat, which was answered, was heard
        self._trouble = Trouble(self)
        worst_s = max((f.seconds for f in faults.items if isinstance(f, Delay)), default=0.0)
        self._answer_s = 4 * (scene.longest_delay_s + worst_s)  # from hearing a heartbeat to its answer, at most
        loop.on_task = self._on_task
        loop.set_exception_handler(self._on_loop_error)

    # -- the play ------------------------------------------------------------------------------------------------------
    def play(self) -> Outcome:
        """In a context of its own."""
        return copy_context().run(self._until_the_end)

    def _until_the_end(self) -> Outcome:
        try:
            self.loop.run_until_complete(self._play())
        except Stuck as error:
            self._problem(str(error))
        finally:
            self._tidy_up()
        head, by_version = self.books.head, sorted(self.books.merged.items(), key=lambda m: (m[1], m[0]))
        versions = range(1, head.version + 1) if head is not None else range(0)
        merged = tuple(tuple(agent for (agent, _), v in by_version if v == version) for version in versions)
        return Outcome(
            head, tuple(self.books.problems), tuple(self.timeline), dict(self._operations),
            self._trace.hexdigest(), self.loop.time(), merged,
        )  # fmt: skip

    async def _play(self) -> None:
        self._context = copy_context()
        self.broker = self._make_broker()
        self.start(COORDINATOR)
        for i, agent in enumerate(self.scene.agents):
            self.at(self.scene.starts_s[i % len(self.scene.starts_s)], partial(self.start, agent))
        for fault in self.faults.items:
            self._trouble.schedule(fault)
        self._begin(Life("cli", 0), self._submit())
        await self._ended.wait()
        if not self.books.problems:
            await asyncio.sleep(AFTERWARDS_S)
            self._check_the_end()

    def _make_broker(self) -> MemoryBroker:
        world = self

        class Watched(Stream):
            """A stream that tells the invariants of what it takes and what it gives away."""

            def store(self, subject: str, data: bytes, time_s: float, expected: int | None = None) -> int:
                seq = super().store(subject, data, time_s, expected)
                world._stored(self.name, Stored(subject, data, seq, time_s))
                return seq

            def purge(self, pattern: str) -> None:
                before = list(self.by_subject)
                super().purge(pattern)
                world._purged(self.name, [s for s in before if s not in self.by_subject])

        class Broker(MemoryBroker):
            stream_type = Watched

        broker = Broker(self.weather, max_payload=self.scene.max_payload)
        broker.before_op(self._on_operation)
        return broker

    async def _submit(self) -> None:
        """As `syncline run` does it: asks until the run is accepted."""
        bus = self._connect(f"cli/{self._submissions}", "cli")
        question = encode(submission(self.scene.spec))
        while True:
            try:
                answer = decode(Submitted, await bus.request(subjects.submit(), question, 5.0))
            except (BusError, PeerError):
                answer = Submitted(problem="nobody answers")
            if answer.run:
                self.on_accepted(answer.warnings)
            if answer.run or "already" in answer.problem:
                return
            if answer.doing:
                continue
            if answer.setting not in ("", "spec"):  # the user's input is wrong, and asking again hints nothing
                self.refused = ConfigError(answer.setting, answer.problem, answer.hint)
                self._ended.set()
                return
            await asyncio.sleep(ASK_AGAIN_S)

    # -- services ------------------------------------------------------------------------------------------------------
    def start(self, service: str) -> None:
        """A new life of the service, if the run is not over. A coordinator that finds another goes, and is tried again."""
        if self._ended.is_set():
            return
        if service == COORDINATOR and any(
            life.service == service and not (life.dead or life.replaced) for life in self.lives.values()
        ):
            self.at(START_AGAIN_S, partial(self.start, service))
            return
        number = sum(life.service == service for life in self.lives.values()) + 1
        life = Life(service, number)
        self.lives[life.connection] = life
        self.say(f"{service} starts" + (f" (life {number})" if number > 1 else ""))
        self._begin(life, self._coordinator(life) if service == COORDINATOR else self._agent(life))

    def crash(self, life: Life, disk: bool) -> None:
        """Ends a life at once."""
        self.end(life)
        if not disk:
            self.children.forget(life.service)

    def rolled_back(self, store: Store, then: Books) -> None:
        """The broker comes back with an older store. Whose run is gone submits it again."""
        self.broker.roll_back(store)
        self.books.rolled_back(then, self.broker.store)
        bucket = self.broker.store.streams.get(f"KV_{subjects.RUNS_BUCKET}")
        keys = (subjects.head_key(self.scene.spec.name), subjects.spec_key(self.scene.spec.name))
        head, spec = (bucket.last(f"$KV.{subjects.RUNS_BUCKET}.{key}") if bucket is not None else None for key in keys)
        self._head_seq = head.seq if head is not None else 0
        if spec is None:
            self._submissions += 1
            self._begin(Life("cli", self._submissions), self._submit())

    @property
    def ended(self) -> bool:
        """The run has, or something is wrong."""
        return self._ended.is_set()

    def current(self, service: str) -> Life | None:
        """Its newest life, if it is alive."""
        lives = [life for life in self.lives.values() if life.service == service]
        return lives[-1] if lives and not lives[-1].dead else None

    async def _coordinator(self, life: Life) -> None:
        async def child(memory: SharedMemory) -> InlineChild:
            return self.children.evaluator(memory)

        bus = self._connect(life.connection, COORDINATOR)
        await Coordinator(bus, child, CoordinatorSettings()).serve()

    async def _agent(self, life: Life) -> None:
        async def child(memory: SharedMemory) -> InlineChild:
            return self.children.trainer(life.service, memory)

        life.training = InlineTraining(child)
        settings = AgentSettings(life.service, self.children.state_dir(life.service), ("*",))
        await Agent(self._connect(life.connection, life.service), settings, life.training).serve()

    def _connect(self, connection: str, who: str) -> MemoryBus:
        core = who in (COORDINATOR, "cli")
        return self.broker.connect(connection, "CORE" if core else "FLEET", who)

    def _begin(self, life: Life, work: Any) -> None:
        context = self._context.copy()
        context.run(whose_task.set, life)
        context.run(chance.source.set, Dice(f"{self.seed} {life.connection}"))
        context.run(chance.wall_clock.set, self.broker.now)
        task = self.loop.create_task(work, context=context)
        task.add_done_callback(partial(self._on_exit, life), context=self._context)

    def end(self, life: Life) -> None:
        life.dead = True
        self.broker.cut(life.connection)
        for task in life.tasks:
            if not task.done():
                task.cancel()
        if life.training is not None:
            life.training.die()

    def _on_exit(self, life: Life, task: asyncio.Task[Any]) -> None:
        error = None if task.cancelled() else task.exception()
        if life.dead or life.service == "cli":
            return
        self.end(life)
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        self.say(f"{life.connection} exits: {type(error).__name__}: {error}")
        alone = not any(other.service == life.service and not other.dead for other in self.lives.values())
        if isinstance(error, BusError | ChildDied | Deposed) or (isinstance(error, Superseded) and alone):
            self.at(START_AGAIN_S, partial(self.start, life.service))
        elif not isinstance(error, Superseded):
            self._problem(f"{life.connection} died of its own bug: {type(error).__name__}: {error}")

    def at(self, seconds: float, call: Callable[[], None]) -> None:
        self.loop.call_later(seconds, call, context=self._context)

    # -- what is seen --------------------------------------------------------------------------------------------------
    def _on_operation(self, now: Operation) -> None:
        life = self.lives.get(now.who)
        if life is not None and now.phase == "after":
            self._on_answer(now, life)
        if life is None or now.phase == "after":
            return
        if now.phase == "done":
            self._on_done(now, life)
            fault = self._struck_when_done.pop(now.number, None)
            if fault is not None and not life.dead:
                self._trouble.strike(fault, life, now)
            return
        if life.dead:
            raise Crashed
        count = self._operations[life.service] = self._operations.get(life.service, 0) + 1
        self._trace.update(f"{self.loop.time()!r} {now.who} {now.name} {subject_of(now)}\n".encode())
        if now.name == "request":  # an agent that was not known, or has made way for another, sends no heartbeat next
            answered_s = self._beats.pop(life.connection, None)
            if answered_s is not None and ".heartbeat" in str(now.arguments[0]):
                self.books.answered(life.service, answered_s)
        if now.name == "request" and ".heartbeat" in str(now.arguments[0]):
            beat = decode(Heartbeat, now.arguments[1] if isinstance(now.arguments[1], bytes) else b"")
            self.books.heard(beat)
        if now.name == "publish" and isinstance(now.arguments[1], bytes) and not life.replaced:
            self.books.told(str(now.arguments[0]), now.arguments[1])
            if self.books.problems:
                self._problem()
        fault = self._struck.get((life.service, count))
        if fault is None:
            return
        if isinstance(fault, Unanswered) or fault.when == "done":
            self._struck_when_done[now.number] = fault
            return
        self._trouble.strike(fault, life, now)
        raise Crashed

    def _on_answer(self, now: Operation, life: Life) -> None:
        """A heartbeat was answered, where only one coordinator can have done so."""
        if now.error is not None or now.name != "request" or ".heartbeat" not in str(now.arguments[0]):
            return
        if not any(other.replaced and not other.dead for other in self.lives.values()):
            self._beats[life.connection] = self.broker.now() - self._answer_s

    def _on_done(self, now: Operation, life: Life) -> None:
        """The broker has answered: who wrote head, if it took it?"""
        bucket, key = subjects.RUNS_BUCKET, subjects.head_key(self.scene.spec.name)
        if now.name == "kv_update" and now.arguments[:2] == (bucket, key):
            there = self.broker.store.streams.get(f"KV_{bucket}")
            held = there.last(f"$KV.{bucket}.{key}") if there is not None else None
            if held is not None and held.data == now.arguments[2] and held.seq > self._head_seq:
                self._head_seq = held.seq
                self.books.wrote(life.connection, decode(Head, held.data))

    def _stored(self, stream: str, message: Stored) -> None:
        line = self.books.stored(stream, message)
        if line:
            self.say(line)
        if self.books.head is not None and self.books.head.phase in ENDED:
            self._ended.set()
        if self.books.problems:
            self._problem()

    def _purged(self, stream: str, removed: list[str]) -> None:
        self.books.purged(stream, removed)
        if self.books.problems:
            self._problem()

    def _problem(self, text: str = "") -> None:
        if text:
            self.books.problems.append(text)
        self.say(f"WRONG: {self.books.problems[-1]}")
        self._ended.set()

    def say(self, text: str) -> None:
        self.timeline.append(f"{self.loop.time():10.4f}  {text}")

    def _on_task(self, task: SimTask[Any]) -> None:
        life = whose_task.get()
        if life is not None:
            life.begins(task)
            if life.dead:
                task.cancel()

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, Exception) and not isinstance(error, BusError):
            self._problem(f"{context.get('message')}: {type(error).__name__}: {error}")

    # -- the end -------------------------------------------------------------------------------------------------------
    def _check_the_end(self) -> None:
        head, spec = self.books.head, self.scene.spec
        if head is not None and head.phase == "failed" and self.books.incomplete:
            return  # it cannot go on, and says so
        if head is None:
            self._problem(f"the run was refused: {self.refused}")
        elif head.reason.startswith(NOTHING_USABLE) and spec.task_options.get("diverges"):
            self.say(f"the run failed, and had to: {head.reason}")
        elif head.phase != "done":
            self._problem(f"the run ended as {head.phase}: {head.reason}")
        elif spec.stop.target is None and head.version != spec.stop.versions:
            self._problem(f"the run was done at version {head.version} of {spec.stop.versions}")

    def _tidy_up(self) -> None:
        """Every life ends; their tasks are waited for, so that the next simulation finds nothing of this one."""
        for life in self.lives.values():
            if not life.dead:
                self.end(life)
        left = asyncio.all_tasks(self.loop)
        for task in left:
            task.cancel()
        try:
            if left:
                self.loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        except Stuck as error:
            self._problem(f"on the way out: {error}")
        for life in self.lives.values():
            if life.training is not None:
                life.training.discard()
