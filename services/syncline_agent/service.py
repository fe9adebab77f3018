"""The agent service: says hello, takes part in the run that the coordinator names, then in the next. Imports no torch."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import syncline
from syncline.bus.base import Bus, Delivery
from syncline.chance import jitter, new_id
from syncline.errors import BusError, PeerError
from syncline.observe.telemetry import Telemetry
from syncline.wire import subjects
from syncline.wire.messages import ENDED, Head, Hello, Notify, Welcome, decode, encode
from syncline.wire.signing import Signer
from syncline_agent.heartbeat import Superseded
from syncline_agent.identity import AgentIdentity
from syncline_agent.session import Session
from syncline_agent.training_child import Training

log = logging.getLogger(__name__)

HELLO_S = 3.0
HELLO_ANSWER_S = 5.0


@dataclass(frozen=True, slots=True)
class AgentSettings:
    name: str
    state_dir: Path
    allowed_tasks: tuple[str, ...]
    signer: Signer | None = None


class Agent:
    """Serves until it is cancelled, or until another process claims its name."""

    def __init__(self, bus: Bus, settings: AgentSettings, training: Training) -> None:
        self._bus = bus
        self._settings = settings
        self._training = training
        self._identity = AgentIdentity(settings.name, new_id(), settings.state_dir, settings.signer)
        self._session: Session | None = None
        self._wake = asyncio.Event()  # a run may have a place for this agent
        self._woken_by = ""  # the run whose notify was answered with a hello: further ones, many a second, are not
        self._device = ""
        self._waits_because = ""

    async def serve(self) -> None:
        """Take part in runs. Raises Superseded when another process claims the name."""
        subscription = await self._bus.subscribe(subjects.notify("*"), self._on_notify)
        self._bus.when_reconnected(self._on_reconnect)
        self._device = (await self._training.describe()).name
        log.info("agent %s on %s", self._identity.agent, self._device)
        left = ""  # the run just left: a coordinator that sends the agent back at once has a stale view
        try:
            while True:
                run = await self._hello()
                if run and run != left:
                    await self._take_part(run)
                    left = run
                else:
                    await self._wait()
                    left = ""
        finally:
            await self._training.close()
            try:
                await subscription.unsubscribe()
            except BusError:
                pass

    async def leave(self) -> None:
        """Say goodbye to the run before the process ends, so that no round waits for this agent."""
        if self._session is not None:
            await self._session.leave()

    async def _take_part(self, run: str) -> None:
        log.info("taking part in run %s", run)
        self._waits_because = self._woken_by = ""
        self._session = Session(self._bus, run, self._identity, self._training, self._hello)
        try:
            await self._session.follow()
        except BusError as error:  # for long: the next session begins with what head says
            log.warning("the bus is out of reach: %s", error)
            await self._wait()
        finally:
            if not _being_cancelled():
                self._session = None

    async def _hello(self) -> str:
        """Say hello to the coordinator. Returns the run to take part in, or ''. Raises Superseded."""
        self._wake.clear()
        signer = self._settings.signer
        hello = Hello(
            session=self._identity.session,
            public_key=signer.public_key if signer is not None else "",
            tasks=list(self._settings.allowed_tasks),
            device=self._device[:200],
            version=syncline.__version__,
        )
        try:
            answer = await self._bus.request(subjects.hello(self._identity.agent), encode(hello), HELLO_ANSWER_S)
            welcome = decode(Welcome, answer)
        except (BusError, PeerError) as error:
            await self._waits(f"no coordinator answers yet: {error}")
            return ""
        if welcome.superseded:
            raise Superseded(welcome.reason)
        if not welcome.run:
            await self._waits(welcome.reason or "no run is waiting", refused=bool(welcome.reason))
        return welcome.run

    async def _waits(self, why: str, *, refused: bool = False) -> None:
        """Log a new reason for waiting; a refusal of this agent is also an event of the fleet."""
        if why == self._waits_because:
            return
        self._waits_because = why
        log.info("waiting for a run: %s", why)
        if refused:
            text = f"{self._identity.agent} takes no part: {why}"
            fleet = Telemetry(self._bus, subjects.FLEET, self._identity.agent)
            await fleet.event("agent-not-taken", text, level="warning", agent=self._identity.agent)

    async def _wait(self) -> None:
        """Wait for the first notify of a run, at most a few seconds."""
        try:
            async with asyncio.timeout(jitter(HELLO_S)):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _on_notify(self, delivery: Delivery) -> None:
        session = self._session
        if session is not None:
            await session.on_notify(delivery)
            return
        try:
            head = decode(Head, decode(Notify, delivery.data).head)
        except PeerError:
            return
        if head.phase not in ENDED and head.run != self._woken_by:
            self._woken_by = head.run
            self._wake.set()

    def _on_reconnect(self) -> None:
        if self._session is not None:
            self._session.look_again()
        self._wake.set()


def _being_cancelled() -> bool:
    task: asyncio.Task[Any] | None = asyncio.current_task()
    return task is not None and task.cancelling() > 0
