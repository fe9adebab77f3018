"""A cluster in one process: the real coordinator and the real agents on the memory bus, in virtual time.

A crash ends a `SimProcess` between two bus operations. The `Environment` supplies the children, the network and the observer;
the cluster itself checks no invariant but the end of the run.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
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
from syncline_sim.child_factories import ChildFactory
from syncline_sim.fault_injection import FaultInjector, subject_of
from syncline_sim.faults import AtOperation, Delay, Faults, Unanswered
from syncline_sim.inline_children import InlineChild, InlineTraining
from syncline_sim.loop import SimTask, Stuck, VirtualLoop
from syncline_sim.network import Network
from syncline_sim.observer import Observer
from syncline_sim.process import ProcessCrashed, SimProcess, current_process
from syncline_sim.rng import Rng
from syncline_sim.scenario import Outcome, Scenario

STORY_LINES = 12  # of one agent, after a violated invariant
COORDINATOR = subjects.COORDINATOR
RESTART_S = 1.0  # a supervisor's pause before it restarts a service that exited because another one failed
RESUBMIT_S = 0.5  # pause between two requests of a submitter
NOTHING_USABLE = "every update of version"  # beginning of the reason when all updates of a version were dropped
AFTERWARDS_S = 0.2  # time for the coordinator's purges after the end of the run


@dataclass(frozen=True, slots=True)
class Environment:
    """The exchangeable parts of a cluster."""

    children: ChildFactory
    network: Network
    observer: Observer


class Cluster:
    """A broker, a coordinator and agents that run one job under a schedule of faults.

    Args:
        scenario: the agents and the run.
        faults: the schedule.
        seed: of everything that services and torn power failures draw.
        loop: a new loop; the cluster sets its callbacks.
        environment: the children, the network and the observer.
    """

    def __init__(
        self, scenario: Scenario, faults: Faults, seed: int, loop: VirtualLoop, environment: Environment
    ) -> None:
        self.scenario, self.faults, self.seed, self.loop = scenario, faults, seed, loop
        self.children = environment.children
        self.network = environment.network
        self.observer = environment.observer
        self.timeline: list[str] = []
        self.refused: ConfigError | None = None  # the coordinator's refusal of the spec
        self.on_accepted: Callable[[list[str]], None] = lambda warnings: None  # called with the coordinator's warnings
        self.processes: dict[str, SimProcess] = {}  # by connection
        self._operations: dict[str, int] = {}  # service → number of its bus operations
        self._trace = hashlib.blake2b(digest_size=16)
        self._faults_at = {(f.service, f.at_op): f for f in faults.items if isinstance(f, AtOperation)}
        self._faults_when_done: dict[int, AtOperation] = {}
        self._newest_coordinator: Coordinator | None = None
        self._ended = asyncio.Event()
        self._head_seq = self._submissions = 0
        self._beats: dict[str, float] = {}  # connection → when its last answered heartbeat arrived at the earliest
        self._injector = FaultInjector(self)
        worst_s = max((f.seconds for f in faults.items if isinstance(f, Delay)), default=0.0)
        self._answer_s = 4 * (
            scenario.longest_delay_s + worst_s
        )  # bound of the time from a heartbeat's arrival to its answer
        loop.on_task = self._on_task
        loop.set_exception_handler(self._on_loop_error)

    # -- the run -------------------------------------------------------------------------------------------------------
    def run(self) -> Outcome:
        """Run from submit to end, in a context of its own."""
        return copy_context().run(self._run_until_ended)

    def _run_until_ended(self) -> Outcome:
        try:
            self.loop.run_until_complete(self._run())
        except Stuck as error:
            self._problem(str(error))
        finally:
            self._tidy_up()
        head, by_version = self.observer.head, sorted(self.observer.merged.items(), key=lambda m: (m[1], m[0]))
        versions = range(1, head.version + 1) if head is not None else range(0)
        merged = tuple(tuple(agent for (agent, _), v in by_version if v == version) for version in versions)
        return Outcome(
            head, tuple(self.observer.problems), tuple(self.timeline), dict(self._operations),
            self._trace.hexdigest(), self.loop.time(), merged,
        )  # fmt: skip

    async def _run(self) -> None:
        self._context = copy_context()
        self.broker = self._make_broker()
        self.start(COORDINATOR)
        for i, agent in enumerate(self.scenario.agents):
            self.at(self.scenario.starts_s[i % len(self.scenario.starts_s)], partial(self.start, agent))
        for fault in self.faults.items:
            self._injector.schedule(fault)
        self._begin(SimProcess("cli", 0), self._submit())
        await self._ended.wait()
        if not self.observer.problems:
            await asyncio.sleep(AFTERWARDS_S)
            self._check_the_end()

    def _make_broker(self) -> MemoryBroker:
        cluster = self

        class Watched(Stream):
            """A stream that reports stored and purged messages to the observer."""

            def store(self, subject: str, data: bytes, time_s: float, expected: int | None = None) -> int:
                seq = super().store(subject, data, time_s, expected)
                cluster._stored(self.name, Stored(subject, data, seq, time_s))
                return seq

            def purge(self, pattern: str) -> None:
                before = list(self.by_subject)
                super().purge(pattern)
                cluster._purged(self.name, [s for s in before if s not in self.by_subject])

        class Broker(MemoryBroker):
            stream_type = Watched

        broker = Broker(self.network, max_payload=self.scenario.max_payload)
        broker.before_op(self._on_operation)
        return broker

    async def _submit(self) -> None:
        """Submit the run as `syncline run` does: ask until it is accepted or refused."""
        bus = self._connect(f"cli/{self._submissions}", "cli")
        question = encode(submission(self.scenario.spec))
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
            if answer.setting not in ("", "spec"):  # the spec is wrong, so submitting again is useless
                self.refused = ConfigError(answer.setting, answer.problem, answer.hint)
                self._ended.set()
                return
            await asyncio.sleep(RESUBMIT_S)

    # -- services ------------------------------------------------------------------------------------------------------
    def start(self, service: str) -> None:
        """Start a new process of a service, unless the run has ended.

        A coordinator is started only when the previous one is dead or replaced; until then the start is tried again.
        """
        if self._ended.is_set():
            return
        if service == COORDINATOR and any(
            process.service == service and not (process.dead or process.replaced) for process in self.processes.values()
        ):
            self.at(RESTART_S, partial(self.start, service))
            return
        number = sum(process.service == service for process in self.processes.values()) + 1
        process = SimProcess(service, number)
        self.processes[process.connection] = process
        self.say(f"{service} starts" + (f" (life {number})" if number > 1 else ""))
        self._begin(process, self._coordinator(process) if service == COORDINATOR else self._agent(process))

    def crash(self, process: SimProcess, disk: bool) -> None:
        """End a process at once; without `disk`, its state directory is deleted as well."""
        self.end(process)
        if not disk:
            self.children.erase_disk(process.service)

    def rolled_back(self, store: Store, then: Observer) -> None:
        """Give the broker an older store. If the run is not in it, the run is submitted again.

        Args:
            store: the older store.
            then: the observer's copy from the time of the store.
        """
        self.broker.roll_back(store)
        self.observer.on_rolled_back(then, self.broker.store)
        bucket = self.broker.store.streams.get(f"KV_{subjects.RUNS_BUCKET}")
        keys = (subjects.head_key(self.scenario.spec.name), subjects.spec_key(self.scenario.spec.name))
        head, spec = (bucket.last(f"$KV.{subjects.RUNS_BUCKET}.{key}") if bucket is not None else None for key in keys)
        self._head_seq = head.seq if head is not None else 0
        if spec is None:
            self._submissions += 1
            self._begin(SimProcess("cli", self._submissions), self._submit())

    @property
    def ended(self) -> bool:
        """Whether the run has ended, or an invariant was violated."""
        return self._ended.is_set()

    def current(self, service: str) -> SimProcess | None:
        """Return the newest process of a service, or None if it is dead."""
        processes = [process for process in self.processes.values() if process.service == service]
        return processes[-1] if processes and not processes[-1].dead else None

    async def _coordinator(self, process: SimProcess) -> None:
        async def child(memory: SharedMemory) -> InlineChild:
            return self.children.evaluator(memory)

        bus = self._connect(process.connection, COORDINATOR)
        self._newest_coordinator = Coordinator(bus, child, CoordinatorSettings())
        await self._newest_coordinator.serve()

    async def _agent(self, process: SimProcess) -> None:
        async def child(memory: SharedMemory) -> InlineChild:
            return self.children.trainer(process.service, memory)

        process.training = InlineTraining(child)
        settings = AgentSettings(process.service, self.children.state_dir(process.service), ("*",))
        await Agent(self._connect(process.connection, process.service), settings, process.training).serve()

    def _connect(self, connection: str, service: str) -> MemoryBus:
        core = service in (COORDINATOR, "cli")
        return self.broker.connect(connection, "CORE" if core else "FLEET", service)

    def _begin(self, process: SimProcess, work: Any) -> None:
        context = self._context.copy()
        context.run(current_process.set, process)
        context.run(chance.source.set, Rng(f"{self.seed} {process.connection}"))
        context.run(chance.wall_clock.set, self.broker.now)
        task = self.loop.create_task(work, context=context)
        task.add_done_callback(partial(self._on_exit, process), context=self._context)

    def end(self, process: SimProcess) -> None:
        process.dead = True
        self.broker.cut(process.connection)
        for task in process.tasks:
            if not task.done():
                task.cancel()
        if process.training is not None:
            process.training.die()

    def _on_exit(self, process: SimProcess, task: asyncio.Task[Any]) -> None:
        error = None if task.cancelled() else task.exception()
        if process.dead or process.service == "cli":
            return
        self.end(process)
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        self.say(f"{process.connection} exits: {type(error).__name__}: {error}")
        alone = not any(other.service == process.service and not other.dead for other in self.processes.values())
        if isinstance(error, BusError | ChildDied | Deposed) or (isinstance(error, Superseded) and alone):
            self.at(RESTART_S, partial(self.start, process.service))
        elif not isinstance(error, Superseded):
            self._problem(f"{process.connection} died of its own bug: {type(error).__name__}: {error}")

    def at(self, seconds: float, call: Callable[[], None]) -> None:
        self.loop.call_later(seconds, call, context=self._context)

    # -- observation ---------------------------------------------------------------------------------------------------
    def _on_operation(self, now: Operation) -> None:
        process = self.processes.get(now.client)
        if process is not None and now.phase == "after":
            self._on_answer(now, process)
        if process is None or now.phase == "after":
            return
        if now.phase == "done":
            self._on_done(now, process)
            fault = self._faults_when_done.pop(now.number, None)
            if fault is not None and not process.dead:
                self._injector.strike(fault, process, now)
            return
        if process.dead:
            raise ProcessCrashed
        count = self._operations[process.service] = self._operations.get(process.service, 0) + 1
        self._trace.update(f"{self.loop.time()!r} {now.client} {now.name} {subject_of(now)}\n".encode())
        if now.name == "request":  # the answer told the agent to go on; else its next request is no heartbeat
            answered_s = self._beats.pop(process.connection, None)
            if answered_s is not None and ".heartbeat" in str(now.arguments[0]):
                self.observer.on_heartbeat_answered(process.service, answered_s)
        if now.name == "request" and ".heartbeat" in str(now.arguments[0]):
            beat = decode(Heartbeat, now.arguments[1] if isinstance(now.arguments[1], bytes) else b"")
            self.observer.on_heartbeat(beat)
        if now.name == "publish" and isinstance(now.arguments[1], bytes) and not process.replaced:
            self.observer.on_published(str(now.arguments[0]), now.arguments[1])
            if self.observer.problems:
                self._problem()
        fault = self._faults_at.get((process.service, count))
        if fault is None:
            return
        if isinstance(fault, Unanswered) or fault.when == "done":
            self._faults_when_done[now.number] = fault
            return
        self._injector.strike(fault, process, now)
        raise ProcessCrashed

    def _on_answer(self, now: Operation, process: SimProcess) -> None:
        """Note the answer to a heartbeat, if no second coordinator can have sent it."""
        if now.error is not None or now.name != "request" or ".heartbeat" not in str(now.arguments[0]):
            return
        if not any(other.replaced and not other.dead for other in self.processes.values()):
            self._beats[process.connection] = self.broker.now() - self._answer_s

    def _on_done(self, now: Operation, process: SimProcess) -> None:
        """Report a new head and its writer, if the broker accepted the operation."""
        bucket, key = subjects.RUNS_BUCKET, subjects.head_key(self.scenario.spec.name)
        if now.name == "kv_update" and now.arguments[:2] == (bucket, key):
            stream = self.broker.store.streams.get(f"KV_{bucket}")
            held = stream.last(f"$KV.{bucket}.{key}") if stream is not None else None
            if held is not None and held.data == now.arguments[2] and held.seq > self._head_seq:
                self._head_seq = held.seq
                self.observer.on_head_written(process.connection, decode(Head, held.data))

    def _stored(self, stream: str, message: Stored) -> None:
        line = self.observer.on_stored(stream, message)
        if line:
            self.say(line)
        if self.observer.head is not None and self.observer.head.phase in ENDED:
            self._ended.set()
        if self.observer.problems:
            self._problem()

    def _purged(self, stream: str, removed: list[str]) -> None:
        self.observer.on_purged(stream, removed)
        if self.observer.problems:
            self._problem()

    def _problem(self, text: str = "") -> None:
        if text:
            self.observer.problems.append(text)
        problem = self.observer.problems[-1]
        self.say(f"WRONG: {problem}")
        if len(self.observer.problems) == 1:
            self._say_story(problem)
        self._ended.set()

    def _say_story(self, problem: str) -> None:
        """Add the coordinator's recent decisions about the agents that a problem names, or about all of them."""
        named = [agent for agent in self.scenario.agents if re.search(rf"\b{re.escape(agent)}\b", problem)]
        for agent in named or self.scenario.agents:
            lines = (
                self._newest_coordinator.story(self.scenario.spec.name, agent)
                if self._newest_coordinator is not None
                else None
            )
            for line in (lines or [])[-STORY_LINES:]:
                self.say(f"story of {agent}: {line}")

    def say(self, text: str) -> None:
        self.timeline.append(f"{self.loop.time():10.4f}  {text}")

    def _on_task(self, task: SimTask[Any]) -> None:
        process = current_process.get()
        if process is not None:
            process.add_task(task)
            if process.dead:
                task.cancel()

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, Exception) and not isinstance(error, BusError):
            self._problem(f"{context.get('message')}: {type(error).__name__}: {error}")

    # -- the end -------------------------------------------------------------------------------------------------------
    def _check_the_end(self) -> None:
        head, spec = self.observer.head, self.scenario.spec
        if head is not None and head.phase == "failed" and self.observer.incomplete:
            return  # the broker lost a blob of head: the run cannot go on
        if head is None:
            self._problem(f"the run was refused: {self.refused}")
        elif head.reason.startswith(NOTHING_USABLE) and spec.task_options.get("diverges"):
            self.say(f"the run failed, and had to: {head.reason}")
        elif head.phase != "done":
            self._problem(f"the run ended as {head.phase}: {head.reason}")
        elif spec.stop.target is None and head.version != spec.stop.versions:
            self._problem(f"the run was done at version {head.version} of {spec.stop.versions}")

    def _tidy_up(self) -> None:
        """End all processes and wait for their tasks, so that no task reaches into the next simulation."""
        for process in self.processes.values():
            if not process.dead:
                self.end(process)
        left = asyncio.all_tasks(self.loop)
        for task in left:
            task.cancel()
        try:
            if left:
                self.loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        except Stuck as error:
            self._problem(f"on the way out: {error}")
        for process in self.processes.values():
            if process.training is not None:
                process.training.discard()
