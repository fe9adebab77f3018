"""The desk: answers the hellos and heartbeats of agents, and finds agents that are lost or slow.

Exactly one process may answer agents, since only the first answer to a request crosses the border of an account.
"""

from __future__ import annotations

import asyncio
import logging

from syncline.bus.base import Bus, Delivery
from syncline.errors import BusError, ConfigError, PeerError
from syncline.observe.telemetry import Telemetry
from syncline.policy.membership import Membership
from syncline.wire import subjects
from syncline.wire.allow_list import is_allowed
from syncline.wire.messages import Heartbeat, Hello, Record, Welcome, decode, encode
from syncline_coordinator.run import Run
from syncline_coordinator.run_host import RunHost

log = logging.getLogger(__name__)

STOOD_STILL_S = 0.5  # a timer later than this shows that the process was stopped, or its machine asleep
JUST_AFTER_S = 0.001  # an agent is lost after its time, not exactly then
IDLE_LOST_AFTER_S = 15.0  # of agents without a run, which repeat their hello every few seconds


class Desk:
    """Keeps the list of agents, and assigns them to the run that is open."""

    def __init__(self, bus: Bus, events: Telemetry) -> None:
        self._bus = bus
        self._events = events
        self._fleet = Membership(IDLE_LOST_AFTER_S)
        self._hellos: dict[str, Hello] = {}
        self._host: RunHost | None = None  # the host of the open run
        self._host_changed = asyncio.Event()

    async def open(self) -> None:
        """Subscribe to hellos and heartbeats. Raises BusError."""
        agents = f"{subjects.PREFIX}.*.agent.*"
        await self._bus.subscribe(f"{agents}.hello", self._on_hello)
        await self._bus.subscribe(f"{agents}.heartbeat", self._on_heartbeat)

    def __len__(self) -> int:
        """Return the number of agents that send hellos or heartbeats."""
        return len(self._fleet.lives)

    def public_key(self, agent: str) -> str:
        """Return the public key in the agent's hello; '' for an agent without a hello or without a key."""
        hello = self._hellos.get(agent)
        return hello.public_key if hello is not None else ""

    def host_opened(self, host: RunHost) -> None:
        """Assign agents to this host's run, and expect heartbeats of the agents that take part already."""
        assert host.run is not None
        slow = host.run.slow()
        for agent in sorted(host.run.present()):
            self._fleet.expect(agent, _now(), agent in slow)
        self._host = host
        self._host_changed.set()

    def host_closed(self) -> None:
        """Assign agents to no run."""
        self._host = None
        self._host_changed.set()

    # -- answers -------------------------------------------------------------------------------------------------------
    async def _on_hello(self, delivery: Delivery) -> None:
        """Add an agent, or a newer process of a known agent, to the fleet, and answer with its assignment."""
        try:
            agent = subjects.checked_name("agent", subjects.agent_of(delivery.subject))
            hello = decode(Hello, delivery.data)
        except (PeerError, ConfigError) as error:
            await self.report_bad(delivery, error)
            return
        replaced = self._fleet.claim(agent, hello.session, _now())
        if not self._fleet.holds(agent, hello.session):
            await answer(self._bus, delivery, _superseded(agent))
            return
        if replaced and (run := self._run) is not None:
            await run.lost(agent, "its name was claimed by a newer process")
        if agent not in self._hellos or replaced:
            text = f"{agent} is here: {hello.device or 'no device named'}"
            await self._events.event("agent-here", text, agent=agent)
        self._hellos[agent] = hello
        await answer(self._bus, delivery, self._welcome(agent))

    @property
    def _run(self) -> Run | None:
        return self._host.run if self._host is not None else None

    def _welcome(self, agent: str) -> Welcome:
        """Return the agent's assignment: the open run, or the reason why the agent cannot take part."""
        run = self._run
        if run is None:
            return Welcome()
        task = run.parts.spec.task
        if not is_allowed(task, self._hellos[agent].tasks):
            hint = f"If you trust it, start the agent with `--allow-task '{task}'`"
            return Welcome(reason=f"task {task} is not allowed on this agent. {hint}")
        why_not = run.why_no_room(agent)
        return Welcome(reason=why_not) if why_not else Welcome(run=run.parts.spec.name)

    async def _on_heartbeat(self, delivery: Delivery) -> None:
        """Note the agent's state and progress, pass them to its run, and answer whether the agent takes part."""
        try:
            agent = subjects.agent_of(delivery.subject)
            name = subjects.run_of(delivery.subject)
            beat = decode(Heartbeat, delivery.data)
        except PeerError as error:
            await self.report_bad(delivery, error)
            return
        if not self._fleet.heard(agent, beat.session, beat.progress, beat.state == "training", _now()):
            known = beat.session in self._fleet.superseded
            await answer(self._bus, delivery, _superseded(agent) if known else Welcome(unknown=True))
            return
        run = self._run
        why_not = ""
        if run is not None and run.parts.spec.name == name:
            run.loss_detector.on_heartbeat(agent, beat)
            if beat.state == "failed":
                await run.lost(agent, beat.reason or "it cannot train", failed=True)
            elif beat.state == "leaving":
                await run.lost(agent, beat.reason or "it left")
            elif beat.state != "starting" and not self._fleet.is_slow(agent):
                why_not = await run.joined(agent)
        await answer(self._bus, delivery, Welcome(run="" if why_not else name, reason=why_not))

    async def report_bad(self, delivery: Delivery, error: Exception) -> None:
        """Publish an event about a message that cannot be read."""
        tokens = delivery.subject.split(".")
        who = tokens[4] if len(tokens) > 4 else "somebody"
        await self._events.event("bad-message", f"{who}: {error}", level="warning", agent=who)

    # -- silence -------------------------------------------------------------------------------------------------------
    async def watch_silence(self) -> None:
        """Find lost and slow agents, until cancelled. Sleeps until the first agent may be lost or slow.

        The sleep also ends when a run is opened or closed: its limits are different.
        """
        while True:
            run = self._run
            self._host_changed.clear()
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
                    await self._host_changed.wait()
            except TimeoutError:
                pass
            if _now() - until_s > STOOD_STILL_S:
                log.warning("this process was stopped for some time; the silence of agents is measured from now on")
                self._fleet.stood_still(_now())
                if (run := self._run) is not None:  # another coordinator may drive the run by now
                    run.loss_detector.check_now()


async def answer(bus: Bus, delivery: Delivery, record: Record) -> None:
    """Send the answer to a request. An answer that cannot be sent is dropped: the requester repeats its request."""
    if delivery.reply:
        try:
            await bus.publish(delivery.reply, encode(record))
        except BusError as error:
            log.debug("%s: %s", delivery.reply, error)


def _superseded(agent: str) -> Welcome:
    return Welcome(superseded=True, reason=f"another process has claimed the name {agent}")


def _now() -> float:
    return asyncio.get_running_loop().time()
