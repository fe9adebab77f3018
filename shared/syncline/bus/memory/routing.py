"""The server's half of the bus in memory: who may say and hear what, who is told, and what the streams take. Package-private.

It routes as nats-server 2.15 does with our accounts: what a tenant may not say or hear is refused and noted, questions of
agents are mapped into CORE and answered once, metrics and events reach the watchers, and a message on a stream's subject goes
its own way into the stream. Knows nothing of the bus port, nor of what a test does to a broker.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from syncline.bus.memory.faults import BROKER, Hooks, Network
from syncline.bus.memory.lane import Ear, Lane, Message, Pipe, Who
from syncline.bus.memory.store import FEEDS, NOTIFY, Store, Stream, Tenant, matches
from syncline.bus.server.violations import Violation
from syncline.errors import BusError, NoResponders

EPOCH_S = 1.7e9  # what the event loop's time is added to
OPEN_REPLIES = 4096  # questions of FLEET that may wait for CORE's answer; beyond, the oldest stay without


class Router:
    """What a server does by itself. `clock`: seconds since the epoch; None for the event loop's time and a constant."""

    def __init__(self, network: Network, store: Store, clock: Callable[[], float] | None, max_payload: int) -> None:
        self.network, self.store, self.max_payload = network, store, max_payload
        self.violations: list[Violation] = []
        self.hooks = Hooks()
        self._clock = clock
        self._storing: dict[str, Pipe] = {}  # the way of messages into each stream
        self._core = Tenant("CORE", "")
        self._tenants: dict[str, Tenant] = {"CORE": self._core}
        self._lanes: dict[Lane, None] = {}
        self._replies: dict[str, tuple[Tenant, str]] = {}  # a reply subject in CORE → where the agent who asked listens
        self._lane_numbers, self._reply_numbers = itertools.count(1), itertools.count(1)

    def now(self) -> float:
        return self._clock() if self._clock else EPOCH_S + asyncio.get_running_loop().time()

    # -- connections -----------------------------------------------------------------------------------------------
    def _lane(self, who: Who, inbox: str) -> Lane:
        lane = Lane(self, who, f"_INBOX.{inbox or who.identity}.{next(self._lane_numbers)}")
        self._lanes[lane] = None
        return lane

    def listen(self, ear: Ear) -> None:
        tenant = self._tenant(ear.lane.who)
        if tenant.may_hear(ear.pattern):
            tenant.ears.add(ear)
        else:
            self.violations.append(Violation(ear.lane.who.identity, "subscribe", ear.pattern))
            ear.lane.refuse("subscribe", ear.pattern)

    def unlisten(self, ear: Ear) -> None:
        self._tenant(ear.lane.who).ears.remove(ear)

    def forget(self, lane: Lane) -> None:
        self._tenant(lane.who).ears.remove_all(lane)
        if lane.closed:
            self._lanes.pop(lane, None)

    def arrive(self, lane: Lane, message: Message) -> None:
        """One message of a client's is here."""
        tenant = self._tenant(lane.who)
        if not tenant.may_say(message.subject):
            self.violations.append(Violation(lane.who.identity, "publish", message.subject))
            lane.refuse("publish", message.subject)
        elif message.ask is None:
            self._take(tenant, message)
        else:
            self._answer(tenant, message, message.ask)

    def _tenant(self, who: Who) -> Tenant:
        name = f"FLEET-{who.identity}" if who.account == "FLEET" else who.account
        if name not in self._tenants:
            self._tenants[name] = Tenant(who.account, who.identity)
        return self._tenants[name]

    # -- routing ---------------------------------------------------------------------------------------------------
    def _answer(self, tenant: Tenant, message: Message, ask: Callable[[], object]) -> None:
        try:
            result = ask()
        except BusError as error:
            result = error
        self.hooks.tell(message.operation, "done")
        self._take(tenant, Message(message.reply, result=result))

    def _take(self, tenant: Tenant, message: Message) -> None:
        """Everyone who listens is told, in other accounts too, and the stream that takes the subject gets it."""
        if tenant is self._core and message.subject in self._replies:
            tenant, reply = self._replies.pop(message.subject)
            message = replace(message, subject=reply)
        heard = self._deliver(tenant, message)
        for other in self._audience(tenant, message.subject):
            heard += self._deliver(other, message)
        if tenant.asks_core(message.subject):
            tenant, message = self._core, message.answered_to(self._mapped(tenant, message.reply))
            heard += self._deliver(tenant, message)
        stream = self.store.taking(message.subject) if tenant is self._core else None
        if stream is not None:
            delay_s = self.network.delay(BROKER, stream.name, "store", message.size_bytes)
            if delay_s is not None:
                self._storing.setdefault(stream.name, Pipe()).send(delay_s, partial(self._keep, stream, message))
            return
        self.hooks.tell(message.operation, "done")
        if not heard and message.reply:
            self._take(tenant, Message(message.reply, result=NoResponders(f"{message.subject}: nobody listens")))

    def _audience(self, said_in: Tenant, subject: str) -> list[Tenant]:
        """The other accounts that hear it."""
        if said_in is self._core and matches(NOTIFY, subject):
            return [tenant for tenant in self._tenants.values() if tenant.account == "FLEET"]
        if said_in.account != "WATCH" and any(matches(feed, subject) for feed in FEEDS):
            return [tenant for tenant in self._tenants.values() if tenant.account == "WATCH"]
        return []

    def _deliver(self, tenant: Tenant, message: Message) -> int:
        ears = tenant.ears.of(message.subject)
        for ear in ears:
            ear.lane.deliver(ear, message)
        return len(ears)

    def _mapped(self, asks: Tenant, reply: str) -> str:
        """In CORE a question of an agent's is answered to a subject of its own, once."""
        if not reply:
            return ""
        if len(self._replies) >= OPEN_REPLIES:
            del self._replies[next(iter(self._replies))]
        mapped = f"_R_.{next(self._reply_numbers)}"
        self._replies[mapped] = asks, reply
        return mapped

    def _keep(self, stream: Stream, message: Message) -> None:
        now = self.now()
        stream.expire(now)
        result: int | BusError
        try:
            result = stream.store(message.subject, message.data, now, message.expected)
            said: dict[str, object] = {"stream": stream.name, "seq": result}
        except BusError as error:
            result, said = error, {"stream": stream.name, "error": {"description": str(error)}}
        self.hooks.tell(message.operation, "done")
        if message.reply:
            self._take(self._core, Message(message.reply, json.dumps(said).encode(), result=result))

    # -- streams ---------------------------------------------------------------------------------------------------
    def stream(self, name: str, missing: type[BusError]) -> Stream:
        """As it is now. Direct gets of a stream that is not there meet nobody; JetStream itself says that it is not."""
        found = self.store.streams.get(name)
        if found is None:
            raise missing(f"{name}: stream not found")
        found.expire(self.now())
        return found

    def delete(self, name: str) -> None:
        self.store.streams.pop(name, None)
        if name in self._storing:
            self._storing.pop(name).cut()
