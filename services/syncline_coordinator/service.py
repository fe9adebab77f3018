"""The coordinator service: knows the fleet, takes runs, and drives one after the other, the oldest first.

It holds nothing that it could not read again: specs and heads are in the key-value bucket, everything else of a run hangs on
its head. Heavy work happens elsewhere: reducing in a thread, models and evaluation in a child process.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from syncline.bus.base import Bus, Delivery
from syncline.bus.blobs import BlobGone
from syncline.bus.records import record_of
from syncline.errors import BusError, ConfigError, Conflict, PeerError, StoreDown, StreamFull, Unavailable
from syncline.model.manifest import Manifest
from syncline.observe.telemetry import QUEUED_NAMED, FleetStatus, Telemetry, tell_often
from syncline.policy.membership import Membership
from syncline.runtime.child import Asked, ChildDied, ChildFailed, Start
from syncline.shm import SharedMemory
from syncline.spec.guardrails import doubts_of_model
from syncline.spec.run_spec import RunSpec
from syncline.spec.submission import submitted_spec
from syncline.wire import subjects
from syncline.wire.allow_list import is_allowed
from syncline.wire.chunks import LEAST_PAYLOAD_BYTES
from syncline.wire.messages import (
    ENDED,
    Head,
    Heartbeat,
    Hello,
    Stop,
    Stopped,
    Submit,
    Submitted,
    Welcome,
    decode,
    encode,
)
from syncline_coordinator.evaluation import Evaluation
from syncline_coordinator.head import Deposed, HeadKeeper, RolledBack
from syncline_coordinator.merge.center import Center
from syncline_coordinator.merge.reducer import Reducer, chunk_bytes_for
from syncline_coordinator.offers import OfferReader
from syncline_coordinator.recovery import WORDS, Losses, taken_over
from syncline_coordinator.reporting import Room, tell_refusals
from syncline_coordinator.reservation import (
    RUNS,
    Reservation,
    check_space,
    insist_on_models,
    most_agents,
    release,
    reserve,
    restore,
)
from syncline_coordinator.run import Parts, Run
from syncline_coordinator.run_queue import (
    WaitingRuns,
    commit_initial,
    end_undriven,
    exists,
    first_head,
    give_up,
    gone,
    payload_too_small,
    superseded,
    why,
)
from syncline_coordinator.submissions import Submissions

log = logging.getLogger(__name__)

STOOD_STILL_S = 0.5  # a timer that comes later by this: the process was stopped, or its machine asleep
JUST_AFTER_S = 0.001  # an agent is lost after its time, not at it
IDLE_LOST_AFTER_S = 15.0  # agents without a run say hello every few seconds
QUEUE_AGAIN_S = 5.0
QUEUED_RUNS = 64


@dataclass(frozen=True, slots=True)
class CoordinatorSettings:
    broker_log: Path | None = None  # tell permission violations that the broker logs
    key_names: dict[str, str] = field(default_factory=dict)  # public key → name, for those
    executor: Executor | None = None  # reduces; None: inline, as a simulation wants it
    evaluation_s: float | None = None  # that an evaluation may take


class Coordinator:
    """`serve` until cancelled."""

    def __init__(self, bus: Bus, start_child: Start, settings: CoordinatorSettings) -> None:
        self._bus, self._start_child, self._settings = bus, start_child, settings
        self._fleet = Membership(IDLE_LOST_AFTER_S)
        self._hellos: dict[str, Hello] = {}
        self._active: Run | None = None
        self._active_changed = asyncio.Event()
        self._opening = ""  # the run that is being opened: not active yet, and no longer just in the queue
        self._stop_asked: dict[str, Stop] = {}  # what was asked of it meanwhile
        self._queue: list[str] = []  # as last read, the oldest first
        self._waiting = WaitingRuns(bus)
        self._held_bytes = 0  # on the bus, by the run that is open
        self._queue_changed = asyncio.Event()
        self._losses = Losses()
        self._fleet_events = Telemetry(bus, subjects.FLEET, subjects.COORDINATOR)
        self._room = Room(self._fleet_events)
        self._reducers = settings.executor
        self._loading: dict[str, Asked] = {}  # by run: the child that loads its task and makes its model
        self._submissions = Submissions(self._accept, self._doing, self._answer)

    async def serve(self) -> None:
        """Until cancelled. Raises Deposed where another coordinator has taken over: one serves all runs."""
        self._bus.when_reconnected(self._on_reconnect)
        await self._bus.ensure_bucket(RUNS)
        agents = f"{subjects.PREFIX}.*.agent.*"
        await self._bus.subscribe(f"{agents}.hello", self._on_hello)
        await self._bus.subscribe(f"{agents}.heartbeat", self._on_heartbeat)
        await self._bus.subscribe(subjects.submit(), self._submissions.on_submit)
        await self._bus.subscribe(subjects.stop(), self._on_stop)
        await self._fleet_events.event("coordinator-started", "the coordinator is up")
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._watch_silence())
                tasks.create_task(
                    tell_refusals(self._settings.broker_log, self._settings.key_names, self._fleet_events)
                )
                tasks.create_task(self._take_runs())
                tasks.create_task(tell_often(self._fleet_events, self._status))
        except* Deposed as group:
            raise group.exceptions[0] from None
        finally:
            await self._submissions.close()

    def _on_reconnect(self) -> None:
        self._losses.connection_was_gone()
        if self._active is not None:
            self._active.lookout.look()

    def _status(self) -> FleetStatus:
        run = self._active.parts.spec.name if self._active is not None else self._opening
        queued = [name for name in self._queue if name != run]
        doing = self._doing(self._opening)
        return FleetStatus(agents=len(self._fleet.lives), run=run, doing=doing, queued=queued[:QUEUED_NAMED])

    def _doing(self, run: str) -> str:
        """What the child of a run that is checked or opened is at; '' where there is none, or it has not said so."""
        child = self._loading.get(run)
        return child.doing if child is not None else ""

    # -- the fleet -----------------------------------------------------------------------------------------------------
    async def _on_hello(self, delivery: Delivery) -> None:
        try:
            agent = subjects.checked_name("agent", subjects.agent_of(delivery.subject))
            hello = decode(Hello, delivery.data, limit=32 * 1024)
        except (PeerError, ConfigError) as error:
            await self._bad(delivery, error)
            return
        replaced = self._fleet.claim(agent, hello.session, _now())
        if not self._fleet.holds(agent, hello.session):
            await self._answer(delivery, superseded(agent))
            return
        if replaced and self._active is not None:
            await self._active.lost(agent, "its name was claimed by a newer process")
        if agent not in self._hellos or replaced:
            text = f"{agent} is here: {hello.device or 'no device named'}"
            await self._fleet_events.event("agent-here", text, agent=agent)
        self._hellos[agent] = hello
        await self._answer(delivery, self._welcome(agent))

    def _welcome(self, agent: str) -> Welcome:
        run = self._active
        if run is None:
            return Welcome()
        task = run.parts.spec.task
        if not is_allowed(task, self._hellos[agent].tasks):
            hint = f"If you trust it, start the agent with `--allow-task '{task}'`"
            return Welcome(reason=f"task {task} is not allowed on this agent. {hint}")
        why_not = run.why_no_room(agent)
        return Welcome(reason=why_not) if why_not else Welcome(run=run.parts.spec.name)

    async def _on_heartbeat(self, delivery: Delivery) -> None:
        try:
            agent, name = subjects.agent_of(delivery.subject), subjects.run_of(delivery.subject)
            beat = decode(Heartbeat, delivery.data, limit=8 * 1024)
        except PeerError as error:
            await self._bad(delivery, error)
            return
        if not self._fleet.heard(agent, beat.session, beat.progress, beat.state == "training", _now()):
            known = beat.session in self._fleet.superseded
            await self._answer(delivery, superseded(agent) if known else Welcome(unknown=True))
            return
        run, why_not = self._active, ""
        if run is not None and run.parts.spec.name == name:
            run.lookout.heard(agent, beat)
        if run is not None and run.parts.spec.name == name and beat.state != "starting":
            if beat.state == "failed":
                await run.lost(agent, beat.reason or "it cannot train", failed=True)
            elif beat.state == "leaving":
                await run.lost(agent, beat.reason or "it left")
            elif not self._fleet.is_slow(agent):
                why_not = await run.joined(agent)
        await self._answer(delivery, Welcome(run="" if why_not else name, reason=why_not))

    async def _watch_silence(self) -> None:
        """Find agents that are lost or slow, when the first of them can be.

        The time can come sooner while this sleeps: where the median period falls, or another run begins.
        """
        while True:
            run = self._active
            self._active_changed.clear()
            self._fleet.lost_after_s = run.parts.spec.agents.lost_after_s if run else IDLE_LOST_AFTER_S
            period_s = run.policy.median_round_s() if run else 0.0
            for agent, reason in self._fleet.expired(_now()):
                self._hellos.pop(agent, None)
                if run is not None:
                    await run.lost(agent, reason)
            for agent, reason in self._fleet.slowed(_now(), period_s):
                if run is not None:
                    await run.slowed(agent, reason)
            latest_s = _now() + self._fleet.lost_after_s
            until_s = min(latest_s, self._fleet.next_expiry_s(period_s) or latest_s) + JUST_AFTER_S
            try:
                async with asyncio.timeout(max(0.0, until_s - _now())):
                    await self._active_changed.wait()
            except TimeoutError:
                pass
            if _now() - until_s > STOOD_STILL_S:
                log.warning("this process stood still until just now; agents get time to be heard again")
                self._fleet.stood_still(_now())
                if self._active is not None:  # another coordinator may be in charge of it by now
                    self._active.lookout.look()

    async def _bad(self, delivery: Delivery, error: Exception) -> None:
        tokens = delivery.subject.split(".")
        who = tokens[4] if len(tokens) > 4 else "somebody"
        await self._fleet_events.event("bad-message", f"{who}: {error}", level="warning", agent=who)

    async def _answer(self, delivery: Delivery, record: Welcome | Submitted | Stopped) -> None:
        if delivery.reply:
            try:
                await self._bus.publish(delivery.reply, encode(record))
            except BusError as error:
                log.debug("%s: %s", delivery.reply, error)

    # -- runs ----------------------------------------------------------------------------------------------------------
    async def _on_stop(self, delivery: Delivery) -> None:
        try:
            stop = decode(Stop, delivery.data)
            await self._answer(delivery, await self._stop(stop))
        except PeerError as error:
            await self._bad(delivery, error)
        except (BusError, Deposed) as error:  # no answer: who asked asks again
            log.warning("stop: %s", error)

    async def _stop(self, stop: Stop) -> Stopped:
        run = self._active
        if run is not None and run.parts.spec.name == stop.run:
            await run.stop(why(stop))
        elif self._opening == stop.run:
            self._stop_asked[stop.run] = stop
        else:
            self._queue = [name for name in self._queue if name != stop.run]
            return await end_undriven(self._bus, stop)
        return Stopped(run=stop.run, outcome="stopping", reason=why(stop))

    async def _accept(self, spec: RunSpec, record: Submit) -> list[str]:
        """Checks all that can be checked before a run starts, and queues it; returns what is doubtful. Raises ConfigError."""
        if self._bus.max_payload < LEAST_PAYLOAD_BYTES:
            raise payload_too_small(self._bus.max_payload)
        if (there := await HeadKeeper.read(self._bus, spec.name)) is not None and not await there.is_orphan():
            raise exists(there.head)
        manifest = await self._manifest_of(spec)
        if self._active is None and not self._opening and not self._queue:
            await reserve(self._bus, spec, manifest)  # it is opened next
            self._held_bytes = Reservation.of(spec, manifest, most_agents(spec)).total
        else:
            await check_space(self._bus, spec, manifest, self._held_bytes)
        try:
            await self._bus.kv_create(subjects.RUNS_BUCKET, subjects.spec_key(spec.name), encode(record))
        except Conflict:
            raise exists(Head(run=spec.name, term=1, version=0, phase="waiting")) from None
        await first_head(self._bus, spec.name)
        self._waiting.accepted(spec.name)
        self._queue.append(spec.name)
        await self._fleet_events.event("run-accepted", f"run {spec.name} is queued")
        self._queue_changed.set()
        return [*spec.warnings, *doubts_of_model((t.name for t in manifest.tensors), manifest.local)]

    async def _manifest_of(self, spec: RunSpec) -> Manifest:
        memory = SharedMemory()
        try:
            child, manifest = await self._model_of(spec, memory)
            await child.close()
        finally:
            memory.close()
        return manifest

    async def _model_of(
        self, spec: RunSpec, memory: SharedMemory, manifest: bytes = b"", *, check: bool = True
    ) -> tuple[Asked, Manifest]:
        """A child process with the task's model. Raises ConfigError for a task that cannot be used.

        `check`: try the optimiser's settings, which loads modules of some 80 MB into the child. They are tried at submit.
        """
        child = await self._start_child(memory)
        chunk = chunk_bytes_for(spec, most_agents(spec), self._bus.max_payload)
        self._loading[spec.name] = child
        try:
            answer = await child.ask(
                "describe", spec=spec.model_dump(mode="json"), chunk_bytes=chunk, manifest=manifest, check=check
            )
            return child, decode(Manifest, answer["manifest"], limit=64 << 20)
        except ChildFailed as error:
            await child.close()
            raise error.config or ConfigError("task", error.problem, "Mend the task's code") from None
        except BaseException:
            await child.close()
            raise
        finally:
            self._loading.pop(spec.name, None)

    async def _take_runs(self) -> None:
        while True:
            self._queue_changed.clear()
            try:
                self._queue = await self._waiting.look()
                if self._queue:
                    await self._drive(self._queue[0])
                    continue
            except (StreamFull, StoreDown) as error:
                await self._room.refused(self._queue[0] if self._queue else "?", error)
            except ChildDied as error:
                log.warning(
                    "run %s cannot be opened now, and is tried again: %s", self._queue[0] if self._queue else "?", error
                )
            except BusError as error:  # out of reach for long: head says where to go on
                run = f"run {self._queue[0]}: " if self._queue else ""
                log.warning("%sthe bus is out of reach: %s", run, error)
            try:
                async with asyncio.timeout(QUEUE_AGAIN_S):
                    await self._queue_changed.wait()
            except TimeoutError:
                pass

    async def _drive(self, name: str) -> None:
        """One run from its start, or from where head stands, to its end."""
        keeper = await HeadKeeper.read(self._bus, name)
        if keeper is None:
            return
        telemetry = Telemetry(self._bus, name, subjects.COORDINATOR)
        memory = SharedMemory()
        run: Run | None = None
        self._opening = name
        try:
            run = await self._open(keeper, memory, telemetry)
            slow = run.slow()
            for agent in sorted(run.present()):
                self._fleet.expect(agent, _now(), agent in slow)
            self._active, self._opening = run, ""
            self._active_changed.set()
            if (stop := self._stop_asked.get(name)) is not None:
                await run.stop(why(stop))
            await run.keeper.notify()
            await run.pump()
        except RolledBack as error:
            text = f"run {name}: {error}. It goes on from what is there; what was not merged by then is made again"
            await telemetry.event("broker-rolled-back", text, level="error")
            if liar := self._losses.noticed(name, error):
                text = (
                    f"{liar} has told of losses {WORDS} times, and alone: it is not believed until the broker was away"
                )
                await telemetry.event("not-believed", text, level="warning", agent=liar)
        except BlobGone as error:
            await give_up(keeper, gone(name, error), telemetry)
        except StoreDown:  # the run goes on when the broker stores again
            raise
        except (ConfigError, Unavailable, PeerError) as error:
            await give_up(keeper, str(error), telemetry)
            if run is not None and keeper.head.phase in ENDED:  # else the streams may be somebody else's
                await release(self._bus, name, ended=True)
        except ChildDied as error:
            if error.from_outside:  # by the kernel, when memory runs out: tried again
                raise
            await give_up(keeper, f"the process that makes the model died: {error}", telemetry)
        except Deposed as error:
            log.warning("run %s: %s", name, error)
            if await keeper.is_taken():  # both would take the run from each other without end
                raise
        else:
            await release(self._bus, name, ended=True)
        finally:
            self._active, self._opening = None, ""
            if keeper.head.phase in ENDED:  # else it is opened again, and holds its streams meanwhile
                self._held_bytes = 0
            self._active_changed.set()
            self._stop_asked.clear()
            if run is not None and run.parts.evaluation is not None:
                await run.parts.evaluation.close()
            memory.close()

    async def _open(self, keeper: HeadKeeper, memory: SharedMemory, telemetry: Telemetry) -> Run:
        name = keeper.head.run
        entry = await self._bus.kv_get(subjects.RUNS_BUCKET, subjects.spec_key(name))
        if entry is None or keeper.head.phase in ENDED:
            raise Deposed("it was ended before it was opened")
        try:
            return await self._opened(keeper, entry.value, memory, telemetry)
        except BlobGone:  # lost; or only purged, as another coordinator has moved on
            if await keeper.is_newest():
                if keeper.head.version == 0:  # that can be made anew
                    raise RolledBack("the first version is gone", keeper.head.term) from None
                raise
            raise Deposed("it has moved on while it was opened") from None

    async def _opened(self, keeper: HeadKeeper, submitted: bytes, memory: SharedMemory, telemetry: Telemetry) -> Run:
        spec = submitted_spec(decode(Submit, submitted))
        lost_term = self._losses.term(keeper.head.run)
        anew = keeper.head.model is None or (lost_term is not None and keeper.head.version == 0)
        if not anew:
            await insist_on_models(self._bus, spec.name)
        layout = None if anew else keeper.head.manifest
        known = b"" if layout is None else await record_of(self._bus, keeper.head.run, layout)
        child, manifest = await self._model_of(spec, memory, known, check=False)
        try:
            await (reserve if anew else restore)(self._bus, spec, manifest)
            self._held_bytes = Reservation.of(spec, manifest, most_agents(spec)).total
            center = Center(manifest, memory, spec.states)
            reducer = Reducer(self._bus, spec, manifest, center, self._reducers)
            if anew or keeper.head.model is None:
                await child.ask("initial")
                await commit_initial(self._bus, keeper, reducer, manifest, lost_term)
            else:
                await reducer.get_center(keeper.head.model, keeper.head.version)
                head = await taken_over(self._bus, keeper.head, lost_term)
                await keeper.check()  # a broker that was set back gives revisions again
                await keeper.write(head)
            self._losses.mended(spec.name)
            offers = OfferReader(self._bus, spec.name, manifest, self._public_key)
            parts = Parts(
                self._bus, spec, manifest, center, reducer, telemetry, offers, None, most_agents(spec), self._room
            )
            believes = partial(self._losses.believes, spec.name)
            run = Run(parts, keeper, believes=believes, rolled_back=lost_term is not None)
            if spec.evaluate.center:
                start = partial(self._fresh_evaluator, spec, memory, encode(manifest))
                parts.evaluation = Evaluation(child, start, telemetry, run.evaluated, self._settings.evaluation_s)
            else:
                await child.close()
            await run.resume()
        except BaseException:
            await child.close()
            raise
        return run

    async def _fresh_evaluator(self, spec: RunSpec, memory: SharedMemory, manifest: bytes) -> Asked:
        return (await self._model_of(spec, memory, manifest))[0]

    def _public_key(self, agent: str) -> str:
        hello = self._hellos.get(agent)
        return hello.public_key if hello is not None else ""


def _now() -> float:
    return asyncio.get_running_loop().time()
