"""The coordinator service: queues submitted runs, and drives them one after the other, the oldest first.

The service keeps no state that must survive: everything can be read again from the bus. The desk answers agents, and a host
drives a run. Arithmetic runs in threads, and models live in child processes.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path

from syncline.bus.base import Bus, Delivery
from syncline.errors import BusError, PeerError, StoreDown, StreamFull
from syncline.observe.telemetry import QUEUED_NAMED, FleetStatus, Telemetry, tell_often
from syncline.policy.words import story_lines
from syncline.runtime.child import ChildDied, Start
from syncline.spec.guardrails import model_warnings
from syncline.spec.run_spec import RunSpec
from syncline.wire import subjects
from syncline.wire.chunks import LEAST_PAYLOAD_BYTES
from syncline.wire.messages import Stop, Stopped, Story, StoryTold, Submit, decode
from syncline_coordinator.desk import Desk, answer
from syncline_coordinator.head import Deposed, HeadKeeper
from syncline_coordinator.model_loader import ModelLoader
from syncline_coordinator.recovery import LossReports
from syncline_coordinator.reporting import StorageAlarm, report_refusals
from syncline_coordinator.reservation import RUNS, Reservation, check_space, most_agents, reserve
from syncline_coordinator.run_host import RunHost, Shared
from syncline_coordinator.run_queue import RunQueue, end_undriven, exists, payload_too_small, stop_reason
from syncline_coordinator.submissions import Submissions

log = logging.getLogger(__name__)

QUEUE_AGAIN_S = 5.0


@dataclass(frozen=True, slots=True)
class CoordinatorSettings:
    """Settings that the process gives to the service."""

    broker_log: Path | None = None  # its permission violations are published as events
    key_names: dict[str, str] = field(default_factory=dict)  # public key → name of the agent in that log
    executor: Executor | None = None  # runs the reducer's arithmetic; None: the event loop does, as in a simulation
    evaluation_s: float | None = None  # the longest time of an evaluation; None: no limit


class Coordinator:
    """Composes desk, queue and host, and answers the requests of users."""

    def __init__(self, bus: Bus, start_child: Start, settings: CoordinatorSettings) -> None:
        self._bus = bus
        self._settings = settings
        self._events = Telemetry(bus, subjects.FLEET, subjects.COORDINATOR)
        self._loss_reports = LossReports()
        self._storage_alarm = StorageAlarm(self._events)
        self._loader = ModelLoader(bus, start_child)
        self._desk = Desk(bus, self._events)
        self._queue = RunQueue(bus)
        self._host: RunHost | None = None  # of the run that is being opened or driven
        self._held_bytes = 0  # reserved on the bus for the hosted run, or for the next one
        self._shared = Shared(
            bus=bus,
            loader=self._loader,
            loss_reports=self._loss_reports,
            storage_alarm=self._storage_alarm,
            executor=settings.executor,
            evaluation_s=settings.evaluation_s,
            public_key=self._desk.public_key,
            hold=self._hold,
        )
        self._submissions = Submissions(self._accept, self._loader.doing, lambda to, record: answer(bus, to, record))

    async def serve(self) -> None:
        """Serve until cancelled.

        Raises:
            Deposed: another coordinator has taken over. One coordinator serves all runs.
        """
        self._bus.when_reconnected(self._on_reconnect)
        await self._bus.ensure_bucket(RUNS)
        await self._desk.open()
        await self._bus.subscribe(subjects.submit(), self._submissions.on_submit)
        await self._bus.subscribe(subjects.stop(), self._on_stop)
        await self._bus.subscribe(subjects.story(), self._on_story)
        await self._events.event("coordinator-started", "the coordinator is up")
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._desk.watch_silence())
                tasks.create_task(report_refusals(self._settings.broker_log, self._settings.key_names, self._events))
                tasks.create_task(self._take_runs())
                tasks.create_task(self._storage_alarm.watch(self._bus, self._driven))
                tasks.create_task(tell_often(self._events, self._status))
        except* Deposed as group:
            raise group.exceptions[0] from None
        finally:
            await self._submissions.close()

    def _driven(self) -> tuple[str, int]:
        """Return the name of the run that is driven, or "", and its version."""
        run = None if self._host is None else self._host.run
        return ("", 0) if run is None else (run.parts.spec.name, run.keeper.head.version)

    def _on_reconnect(self) -> None:
        self._loss_reports.reset_trust()
        if self._host is not None and self._host.run is not None:
            self._host.run.loss_detector.check_now()

    def _status(self) -> FleetStatus:
        run = self._host.name if self._host is not None else ""
        doing = self._loader.doing(run) if self._host is not None and self._host.run is None else ""
        queued = [name for name in self._queue.names if name != run]
        return FleetStatus(agents=len(self._desk), run=run, doing=doing, queued=queued[:QUEUED_NAMED])

    def _hold(self, reserved_bytes: int) -> None:
        self._held_bytes = reserved_bytes

    # -- requests ------------------------------------------------------------------------------------------------------
    async def _on_stop(self, delivery: Delivery) -> None:
        try:
            stop = decode(Stop, delivery.data)
            await answer(self._bus, delivery, await self._stop(stop))
        except PeerError as error:
            await self._desk.report_bad(delivery, error)
        except (BusError, Deposed) as error:  # no answer: the requester asks again
            log.warning("stop: %s", error)

    async def _stop(self, stop: Stop) -> Stopped:
        """End a run, hosted or not. Raises BusError and Deposed; the request is repeated then."""
        if self._host is None or self._host.name != stop.run:
            self._queue.remove(stop.run)
            return await end_undriven(self._bus, stop)
        await self._host.stop(stop)
        return Stopped(run=stop.run, outcome="stopping", reason=stop_reason(stop))

    async def _on_story(self, delivery: Delivery) -> None:
        try:
            story = decode(Story, delivery.data)
        except PeerError as error:
            await self._desk.report_bad(delivery, error)
            return
        lines = self.story(story.run, story.agent)
        await answer(self._bus, delivery, StoryTold(run=story.run, known=lines is not None, lines=lines or []))

    def story(self, run: str, agent: str) -> list[str] | None:
        """Return the recent decisions about an agent in words, or None unless this coordinator drives the run."""
        host = self._host
        if host is None or host.run is None or host.name != run:
            return None
        return story_lines(host.run.policy.story(agent))

    async def _accept(self, spec: RunSpec, record: Submit) -> list[str]:
        """Check a submitted run as far as possible before its start, and queue it.

        Returns:
            Warnings for the submitter.

        Raises:
            ConfigError: the run is refused.
            BusError: the bus is out of reach.
            ChildDied: the process that makes the model died.
        """
        if self._bus.max_payload < LEAST_PAYLOAD_BYTES:
            raise payload_too_small(self._bus.max_payload)
        if (there := await HeadKeeper.read(self._bus, spec.name)) is not None and not await there.is_orphan():
            raise exists(there.head)
        manifest = await self._loader.manifest_of(spec)
        if self._host is None and not self._queue.names:
            await reserve(self._bus, spec, manifest)  # this run is opened next
            self._hold(Reservation.of(spec, manifest, most_agents(spec)).total)
        else:
            await check_space(self._bus, spec, manifest, self._held_bytes)
        await self._queue.put(spec.name, record)
        await self._events.event("run-accepted", f"run {spec.name} is queued")
        self._queue.changed.set()
        return [*spec.warnings, *model_warnings((t.name for t in manifest.tensors), manifest.local)]

    # -- runs ----------------------------------------------------------------------------------------------------------
    async def _take_runs(self) -> None:
        """Drive the runs of the queue, until cancelled. A run that cannot go on now is tried again."""
        while True:
            self._queue.changed.clear()
            try:
                if names := await self._queue.read():
                    await self._drive(names[0])
                    continue
            except (StreamFull, StoreDown) as error:
                await self._storage_alarm.raise_alarm(self._queue.first, error)
            except ChildDied as error:
                log.warning("run %s cannot be opened now, and is tried again: %s", self._queue.first, error)
            except BusError as error:
                log.warning("run %s: the bus is out of reach: %s", self._queue.first, error)
            try:
                async with asyncio.timeout(QUEUE_AGAIN_S):
                    await self._queue.changed.wait()
            except TimeoutError:
                pass

    async def _drive(self, name: str) -> None:
        """Host a run until it ends or must be opened again."""
        keeper = await HeadKeeper.read(self._bus, name)
        if keeper is None:
            return
        self._host = host = RunHost(self._shared, keeper, self._desk.host_opened)
        try:
            await host.drive()
        finally:
            self._host = None
            self._desk.host_closed()
            await host.close()
